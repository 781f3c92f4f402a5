"""Stages 1 to 4 on data dirs with one fault each give the right count, or one message that names the fault."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import numpy as np
import pytest
import soundfile
import yaml
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from espnet_kd.bin import asr_kd_data, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import Utterance, read_map, write_data_dir

FS, NUMBER = 16000, 4
CONFIG = {
    "encoder": "transformer", "model_conf": {"ctc_weight": 1.0}, "use_matplotlib": False, "use_tensorboard": False,
    "encoder_conf": {"num_blocks": 1, "output_size": 8, "attention_heads": 1, "linear_units": 8},
    "frontend_conf": {"n_fft": 512, "hop_length": 160}, "num_workers": 0, "batch_type": "unsorted", "batch_size": 2,
}  # fmt: skip


class Place(NamedTuple):
    """The place of a fault: a data dir, and one of its utterances."""

    data_dir: Path
    utt_id: str

    @property
    def audio(self) -> Path:
        return self.data_dir / f"{self.utt_id}.wav"

    def line(self, file: str, change: Callable[[str], str]) -> None:
        path = self.data_dir / file
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [change(x) if x.split()[0] == self.utt_id else x for x in lines]
        path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))

    def text(self, text: str) -> None:
        self.line("text", lambda x: f"{self.utt_id} {text}\n")

    def rename(self, new: str) -> None:
        for file in ("wav.scp", "text", "utt2spk", "spk2utt"):
            path = self.data_dir / file
            path.write_text(path.read_text().replace(self.utt_id, new, 1))

    def file(self, file: str, change: Callable[[bytes], bytes]) -> None:
        path = self.data_dir / file
        path.write_bytes(change(path.read_bytes()))

    def wave(self, samples: np.ndarray, rate: int = FS, subtype: str = "PCM_16", form: str = "WAV") -> None:
        soundfile.write(self.audio, samples, rate, subtype=subtype, format=form)


TEXTS = ["AB BA ABA", "BAB ABBA", "ABA AB BABA", "BA ABBA AB"]
NOISE = 0.1 * np.random.default_rng(0).standard_normal(FS)


def odd(value: float) -> np.ndarray:
    x = NOISE.astype(np.float32)
    x[99] = value
    return x


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(400) + content[len(content) // 2 + 400 :]


def segments(p: Place, line: str) -> None:
    """Write segments with one utterance in each recording; the utterance of ``p`` gets ``line``."""
    names = list(read_map(p.data_dir / "wav.scp"))
    rows = [f"{u} {u} {line if u == p.utt_id else '0.0 0.9'}\n" for u in names]
    (p.data_dir / "segments").write_text("".join(rows))


def move(p: Place, name: str) -> None:
    """Rename the audio file, also in wav.scp."""
    p.audio.rename(p.data_dir / name)
    p.line("wav.scp", lambda x: f"{p.utt_id} {p.data_dir / name}\n")


def pipe(p: Place, command: str) -> None:
    p.line("wav.scp", lambda x: f"{p.utt_id} {command.format(p.audio)} |\n")


# For each fault: what makes it, and the number of utterances that are dropped (None: the data must be refused).
FAULTS: Dict[str, tuple] = {
    "none": (lambda p: None, 0),
    "U+3000 in a text": (lambda p: p.text("A\u3000B"), 0),
    "tab in a text": (lambda p: p.text("A\tB"), 0),
    "a text of U+00A0": (lambda p: p.text("\xa0"), None),
    "an empty text": (lambda p: p.text(""), None),
    "CR in a text": (lambda p: p.text("A\rB"), None),
    "CR LF": (lambda p: p.file("text", lambda x: x.replace(b"\n", b"\r\n")), 0),
    "NUL in a text": (lambda p: p.text("A\0B"), None),
    "U+FEFF in a text": (lambda p: p.text("A\ufeffB"), None),
    "byte order mark": (lambda p: p.file("text", lambda x: b"\xef\xbb\xbf" + x), 0),
    "UTF-16": (lambda p: p.file("text", lambda x: x.decode().encode("utf-16")), None),
    "Latin-1": (lambda p: p.line("text", lambda x: x[:-1] + "\udce4\n"), None),
    "<unk>": (lambda p: p.text("A <unk> B"), 0),
    "<blank>": (lambda p: p.text("A <blank> B"), None),
    "no text of one": (lambda p: p.line("text", lambda x: ""), None),
    "a text twice": (lambda p: p.line("text", lambda x: x + x), None),
    "a text without audio": (lambda p: p.line("text", lambda x: x + "zz A\n"), 0),
    "unsorted": (lambda p: p.file("text", lambda x: b"".join(sorted(x.splitlines(True), reverse=True))), 0),
    "no speaker": (lambda p: p.line("utt2spk", lambda x: ""), None),
    "two speakers": (lambda p: p.line("utt2spk", lambda x: x[:-1] + " t\n"), None),
    "speakers of others": (lambda p: p.file("spk2utt", lambda x: b"t " + x), 0),
    "no file text": (lambda p: (p.data_dir / "text").unlink(), None),
    "no file utt2spk": (lambda p: (p.data_dir / "utt2spk").unlink(), None),
    "no file spk2utt": (lambda p: (p.data_dir / "spk2utt").unlink(), 0),
    "no file wav.scp": (lambda p: (p.data_dir / "wav.scp").unlink(), None),
    "audio twice": (lambda p: p.line("wav.scp", lambda x: x + x), None),
    "audio without a file": (lambda p: p.line("wav.scp", lambda x: f"{p.utt_id}\n"), None),
    "audio that is a directory": (lambda p: (p.audio.unlink(), p.audio.mkdir()), None),
    "a blank in a path": (lambda p: move(p, "a b.wav"), 0),
    "an empty line in a text": (lambda p: p.line("text", lambda x: x + "\n"), 0),
    "an empty line in wav.scp": (lambda p: p.line("wav.scp", lambda x: x + "\n"), 0),
    "no end of the last line": (lambda p: p.file("text", bytes.rstrip), 0),
    "blanks behind a text": (lambda p: p.text("A B  "), 0),
    "an id with /": (lambda p: p.rename("s-/x"), None),
    "an id with U+3000": (lambda p: p.rename("s-\u3000x"), None),
    "a long id": (lambda p: p.rename("s-" + "x" * 300), None),
    "no audio": (lambda p: p.audio.unlink(), None),
    "audio of no bytes": (lambda p: p.audio.write_bytes(b""), None),
    "audio of no samples": (lambda p: p.wave(NOISE[:0]), None),
    "no audio file": (lambda p: p.audio.write_bytes(b"hello" * 99), None),
    "cut audio": (lambda p: p.audio.write_bytes(p.audio.read_bytes()[:-9000]), None),
    "damaged FLAC": (lambda p: (p.wave(NOISE, form="FLAC"), p.audio.write_bytes(damaged(p.audio.read_bytes()))), None),
    "NaN": (lambda p: p.wave(odd(np.nan), subtype="FLOAT"), None),
    "infinite": (lambda p: p.wave(odd(np.inf), subtype="DOUBLE"), None),
    "16-bit scale": (lambda p: p.wave(odd(3e4), subtype="FLOAT"), None),
    "beyond full scale": (lambda p: p.wave(odd(1.2), subtype="FLOAT"), 0),
    "8000 Hz": (lambda p: p.wave(NOISE, 8000), 0),
    "two channels": (lambda p: p.wave(np.stack([NOISE, -0.5 * NOISE], 1)), 0),
    "too short to keep": (lambda p: p.wave(NOISE[:700]), 1),
    "too short for the encoder": (lambda p: p.wave(NOISE[:850]), None),
    "too short for its text": (lambda p: p.text("A B " * 30 + "A"), 0),
    "silence": (lambda p: p.wave(0 * NOISE), 0),
    "a pipe": (lambda p: pipe(p, "cat {}"), 0),
    "a pipe that fails": (lambda p: pipe(p, "no_such_program {}"), None),
    "a pipe that is cut": (lambda p: pipe(p, "head -c 20000 {}"), None),
    "an ark that is none": (lambda p: p.line("wav.scp", lambda x: x[:-1] + ":7\n"), None),
    "a segment": (lambda p: segments(p, "0.1 0.8"), 0),
    "a segment that ends late": (lambda p: segments(p, "0.1 1.3"), 0),
    "a segment behind the end": (lambda p: segments(p, "2.0 3.0"), None),
    "a segment that ends far behind": (lambda p: segments(p, "0.1 9.0"), None),
    "a segment backwards": (lambda p: segments(p, "0.8 0.1"), None),
    "a segment of NaN": (lambda p: segments(p, "nan 0.5"), None),
    "a segment of another channel": (lambda p: segments(p, "0.1 0.8 3"), None),
}  # fmt: skip


def make(root: Path) -> None:
    """An ESPnet recipe with two sets of good data."""
    for name in ("train", "valid"):
        data_dir = root / "data" / name
        data_dir.mkdir(parents=True)
        utts = []
        for i in range(NUMBER):
            path = data_dir / f"s-{i}.wav"
            soundfile.write(path, NOISE, FS)
            utts.append(Utterance(f"s-{i}", "s", str(path), TEXTS[i]))
        write_data_dir(data_dir, utts)


def run_stages(root: Path, token_type: str) -> Dict[str, int]:
    """Run stages 1 to 4 as run.sh does; return the number of utterances in the statistics of each set."""
    raw, tokens, stats = root / "dump/raw", str(root / "tokens/tokens.txt"), root / "stats"
    asr_kd_data.main(["espnet", "--espnet_data", str(root), "--sets", "train", "valid", "--out", str(root / "taken")])
    options: List[str] = ["--token_list", tokens, "--token_type", token_type]
    for name in ("train", "valid"):
        asr_kd_data.main(["format", "--src", str(root / "taken" / name), "--dst", str(raw / name), "--text", "optional",
                          "--drop_out_of_range", "--min_seconds", "0.05"])  # fmt: skip
    asr_kd_data.main(["tokens", "--text", str(raw / "train/text"), "--out", str(root / "tokens"), "--token_type",
                      token_type, "--nbpe", "7"])  # fmt: skip
    check = ["validate", "--no_text", "--headers_only", "--min_seconds", "0.05", *options]
    asr_kd_data.main([*check, str(raw / "train")])
    asr_kd_data.main([*check, "--allow_unknown", str(raw / "valid")])
    collect = ["--collect_stats", "true", "--config", str(root / "student.yaml"), "--output_dir", str(stats), *options]
    if token_type == "bpe":
        collect += ["--bpemodel", str(root / "tokens/bpe.model")]
    elif (root / "tokens/nlsyms.txt").exists():
        collect += ["--non_linguistic_symbols", str(root / "tokens/nlsyms.txt")]
    for name in ("train", "valid"):
        data = f"--{name}_data_path_and_name_and_type"
        collect += [data, f"{raw / name}/wav.scp,speech,sound"]
        if (raw / name / "text").exists():
            collect += [data, f"{raw / name}/text,text,text"]
        collect += [f"--{name}_shape_file", f"{raw / name}/wav.scp"]
    asr_kd_train.main(collect)
    asr_kd_data.main(["statistics", f"{stats}/train/feats_stats.npz", f"{stats}/valid/feats_stats.npz"])
    asr_kd_data.main(["lengths", "--model", f"student=--config {root}/student.yaml", "--stats", str(stats),
                      "--data_dirs", str(raw / "train"), str(raw / "valid"), *options])  # fmt: skip
    return {name: len(read_map(stats / name / "speech_shape")) for name in ("train", "valid")}


@pytest.mark.faults("single faults, stages 1 to 4")
@pytest.mark.parametrize("token_type", ["char", "bpe"])
def test_stages_1_to_4(tmp_path: Path, token_type: str, record_property, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path / "whole")
    seen = set()

    def stages(fault: str, name: str, i: int) -> None:
        root = tmp_path / "recipe"  # always here, because wav.scp has absolute paths
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", root)
        for scp in root.glob("data/*/wav.scp"):
            scp.write_text(scp.read_text().replace("/whole/", "/recipe/"))
        (root / "student.yaml").write_text(yaml.safe_dump(CONFIG))
        do, dropped = FAULTS[fault]
        place = Place(root / "data" / name, f"s-{i}")
        do(place)
        if (fault, name) == ("<unk>", "valid"):  # <unk> is a token only if the training text has it
            dropped = None
        if (fault, name) == ("no file text", "valid"):  # a set may have no transcripts; the tokens come from train
            dropped = 0
        seen.add(fault)
        caplog.clear()
        said: Optional[str] = None
        with caplog.at_level(logging.INFO):
            try:
                counts = run_stages(root, token_type)
            except UserError as e:
                said = str(e)
        if dropped is None:
            assert said is not None, f"{fault} passed"
            assert place.utt_id in said or "s-" in said or str(root) in said, said
            assert len(said.splitlines()) <= 1 + 2 * NUMBER, said
        else:
            assert said is None, f"{fault}: {said}"
            for each in ("train", "valid"):
                left = NUMBER - (dropped if each == name else 0)
                assert counts[each] == left and f"dump/raw/{each}: {left} utterances" in caplog.text
        if fault == "too short for its text":
            assert f"{name}: 1 of {NUMBER} utterances (25.0 %) have fewer frames" in caplog.text

    @examples(20)
    @given(st.sampled_from(sorted(FAULTS)), st.sampled_from(["train", "valid"]), st.integers(0, NUMBER - 1))
    def more(fault: str, name: str, i: int) -> None:
        stages(fault, name, i)

    for n, fault in enumerate(FAULTS):
        stages(fault, ("train", "valid")[n % 2], n % NUMBER)
    more()
    record_property("faults", len(seen))
