"""Transcripts of a Whisper for asr_kd_pseudo, one JSON object a line; needs pip install faster-whisper.

    python local/whisper_labels.py --model small.en --data_dir dump/raw/extra --out whisper.jsonl

--model is a directory in CTranslate2's form, or a name that faster-whisper fetches from the hub. The confidence is the
mean probability of the tokens; no_speech and compression, Whisper's own signs of hallucination, stand beside it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from espnet_kd import cli
from espnet_kd.data.audio import read_samples
from espnet_kd.data.datadir import read_map

RATE = 16000  # Hz, of the audio that Whisper takes


def transcribe(whisper: Any, path: str, language: str) -> Dict[str, Any]:
    """Text and confidences of one audio file."""
    audio, rate = read_samples(path, path)
    if rate != RATE:
        import soxr

        audio = soxr.resample(audio, rate, RATE)
    segments = list(whisper.transcribe(audio.astype("float32"), language=language, temperature=0)[0])
    tokens = sum(len(s.tokens) for s in segments)
    mean = sum(s.avg_logprob * len(s.tokens) for s in segments) / max(tokens, 1)
    return {
        "text": " ".join(s.text.strip() for s in segments),
        "confidence": math.exp(mean) if tokens else 0.0,
        "no_speech": max((s.no_speech_prob for s in segments), default=1.0),
        "compression": max((s.compression_ratio for s in segments), default=0.0),
    }


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Transcribe a formatted data dir."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, or name such as small.en")
    parser.add_argument("--data_dir", required=True, type=Path, help="formatted data dir (stage 2)")
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("--language", default="en")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args(argv)
    if (args.data_dir / "segments").exists():
        raise cli.UserError(f"{args.data_dir} has a segments file: give the formatted data dir (stage 2)")
    paths = read_map(args.data_dir / "wav.scp")
    try:
        from faster_whisper import WhisperModel
    except ImportError as e:
        parser.error(f"{e}; pip install faster-whisper")
    whisper = WhisperModel(args.model, device=args.device, compute_type="int8", cpu_threads=args.threads)
    with open(args.out, "w", encoding="utf-8") as f:
        for utt_id, path in paths.items():
            found = {"utt_id": utt_id, **transcribe(whisper, path, args.language)}
            f.write(json.dumps(found, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main)
