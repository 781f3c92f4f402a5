"""Utterances that are too short for a model, or for their texts in it, are counted and named before training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.lengths import FrameCounter, Need, check_lengths, frames_needed

FS = 16000
CONV = {"conv2d": (4, 7), "conv2d6": (6, 11), "conv2d8": (8, 15)}


def encode(samples: int, shift: int = 640, least: int = 2000) -> int:
    if samples < least:
        raise RuntimeError("Kernel size can't be greater than actual input size")
    return (samples - least) // shift + 1


def test_frames_that_ctc_needs() -> None:
    assert [frames_needed(list(text)) for text in ("", "A", "AB", "AA", "ABBA", "AAA")] == [1, 1, 2, 3, 5, 5]


def test_too_short_for_the_encoder() -> None:
    needs = [Need("a", 3000, 1), Need("b", 1999, 1), Need("c", 10, 5)]
    message = r"data: 2 of 3 utterances are too short for the student: b \(0.125 s\), c \(0.001 s\); it needs 0.125 s"
    with pytest.raises(UserError, match=message + ".*--min_seconds 0.126"):
        check_lengths("data", iter(needs), FrameCounter(encode, FS), "the student", FS)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("frames", [1, 2, 7, 100])
def test_exactly_as_many_frames_as_needed(frames: int, extra: int, caplog: pytest.LogCaptureFixture) -> None:
    samples = 2000 + (frames - 1) * 640
    needs = [Need("a", samples, frames + extra), Need("b", 100 * FS, 5)]
    with caplog.at_level(logging.INFO):
        assert check_lengths("data", iter(needs), FrameCounter(encode, FS), "the student", FS) == (2, extra)
    assert ("1 of 2 utterances (50.0 %) have fewer frames in the student than CTC needs" in caplog.text) == bool(extra)
    assert (f"a ({frames} frames, {frames + 1} needed)" in caplog.text) == bool(extra)


def write(root: Path, seconds: float, text: str, layer: str) -> list:
    for part in ("train", "valid"):
        (root / "stats" / part).mkdir(parents=True, exist_ok=True)
        (root / part).mkdir(exist_ok=True)
        (root / "stats" / part / "speech_shape").write_text(f"u1 {2 * FS}\nu2 {int(seconds * FS)}\n")
        (root / part / "text").write_text(f"u1 AB\nu2 {text}\n" if part == "train" else "u1 AB\nu2 A\n")
    (root / "tokens.txt").write_text("<blank>\n<unk>\nA\nB\n<sos/eos>\n")
    (root / "student.yaml").write_text(
        f"encoder: transformer\nencoder_conf: {{num_blocks: 1, output_size: 8, attention_heads: 1, linear_units: 8, "
        f"input_layer: {layer}}}\nmodel_conf: {{ctc_weight: 1.0}}\n"
    )
    return ["lengths", "--stats", str(root / "stats"), "--data_dirs", str(root / "train"), str(root / "valid"),
            "--token_list", str(root / "tokens.txt"), "--model", f"student=--config {root}/student.yaml"]  # fmt: skip


@pytest.mark.parametrize("model", ["x.yaml", "--config x.yaml", "student=x.yaml", "student=", "a/b=--config x.yaml"])
def test_a_model_without_a_name_or_options_is_refused(tmp_path: Path, model: str) -> None:
    """ESPnet would make its default model, whose lengths are those of no model that is trained."""
    options = write(tmp_path, 0.5, "AB", "conv2d")
    with pytest.raises(UserError, match=f"--model '{model}'"):
        asr_kd_data.main([*options[:-1], model])


@pytest.mark.parametrize("layer", CONV)
def test_espnets_own_subsampling(tmp_path: Path, layer: str, caplog: pytest.LogCaptureFixture) -> None:
    """ESPnet would find these faults in the middle of an epoch; the command finds them before training."""
    factor, least = CONV[layer]
    hop = 128 / FS
    with pytest.raises(UserError, match=r"train: 1 of 2 utterances are too short for the student: u2 \(0."):
        asr_kd_data.main(write(tmp_path, (least - 2) * hop, "A", layer))
    caplog.clear()
    asr_kd_data.main(write(tmp_path, 0.5, "AB" * 40, layer))
    report = tmp_path / "stats/train/too_short.student"
    utt_id, frames, needed = report.read_text().split()
    assert utt_id == "u2" and int(needed) == 80 and abs(int(frames) - 0.5 / hop / factor) < 3
    assert f"u2 ({frames} frames, 80 needed); all in {report}" in caplog.text and "valid: 1 of" not in caplog.text
    asr_kd_data.main(write(tmp_path, 0.5, "AB", layer))
    assert not report.exists()
