"""An imitation of the files that ESPnet's asr.sh leaves in a recipe directory, with audio of every kind."""

from __future__ import annotations

from pathlib import Path

import kaldiio
import numpy as np
import soundfile
import tiny_asr

KINDS = ("flac", "wav.ark", "flac.ark", "kaldi_ark", "segments", "pipe")


def samples(i: int, seconds: float) -> np.ndarray:
    """The audio of utterance i, as 16-bit integers (N,), some of them so large that a wrong scale would change them."""
    return np.round(tiny_asr.audio(seconds, i) * 2.5 * 32768).clip(-32768, 32767).astype(np.int16)


def add_set(recipe: Path, name: str, kind: str, seconds: list) -> dict:
    """Add a data dir of one kind of audio to an ESPnet recipe directory; return {utterance: samples}.

    Paths start from ``recipe``, as asr.sh writes them. Pipes and segments are in ``data``, the others in ``dump/raw``.
    """
    waves = {f"{name}-{i}": samples(i, s) for i, s in enumerate(seconds)}
    data_dir = recipe / ("data" if kind in ("segments", "pipe") else "dump/raw") / name
    audio = data_dir / "data/format.1"
    audio.mkdir(parents=True)
    relative = audio.relative_to(recipe)
    write(data_dir, "utt2spk", {u: f"{name}-spk" for u in waves})
    write(data_dir, "spk2utt", {f"{name}-spk": " ".join(waves)})
    write(data_dir, "text", {u: "abc def"[: 3 + 4 * (i % 2)] for i, u in enumerate(waves)})
    if kind not in ("segments", "pipe"):
        write(data_dir, "utt2num_samples", {u: str(len(x)) for u, x in waves.items()})
        (data_dir / "feats_type").write_text("raw\n")
        (data_dir / "audio_format").write_text(f"{kind}\n")
    if kind == "flac":
        write(data_dir, "wav.scp", {u: f"{relative}/{u}.flac" for u in waves})
        for utt_id, x in waves.items():
            soundfile.write(audio / f"{utt_id}.flac", x, 16000)
    elif kind.endswith("ark"):
        # Arks are written as by asr.sh's format_wav_scp.py; "kaldi_ark" is Kaldi's plain form without an extra header.
        how = {"write_function": "soundfile", "write_kwargs": {"format": kind.split(".")[0], "subtype": None}}
        with open(audio / "data_wav.ark", "wb") as ark, open(data_dir / "wav.scp", "w") as scp:
            for utt_id, x in waves.items():
                at = ark.tell() + len(f"{utt_id} ")
                kaldiio.save_ark(ark, {utt_id: (16000, x)}, append=True, **({} if kind == "kaldi_ark" else how))
                scp.write(f"{utt_id} {relative}/data_wav.ark:{at}\n")
    elif kind == "pipe":
        write(data_dir, "wav.scp", {u: f"cat {relative}/{u}.raw |" for u in waves})
        for utt_id, x in waves.items():
            soundfile.write(audio / f"{utt_id}.raw", x, 16000, format="WAV")
    elif kind == "segments":
        write(data_dir, "wav.scp", {f"{name}-rec": f"cat {relative}/rec.wav |"})
        soundfile.write(audio / "rec.wav", np.concatenate(list(waves.values())), 16000)
        ends = np.cumsum([len(x) for x in waves.values()]) / 16000
        starts = [0.0, *ends[:-1]]
        write(data_dir, "segments", {u: f"{name}-rec {s:.4f} {e:.4f}" for u, s, e in zip(waves, starts, ends)})
    return waves


def write(data_dir: Path, name: str, lines: dict) -> None:
    """Write a Kaldi-style file."""
    (data_dir / name).write_text("".join(f"{k} {v}\n" for k, v in lines.items()), encoding="utf-8")
