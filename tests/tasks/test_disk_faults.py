"""On a disk that is full or not writable, every command ends with one message, and works when it is repeated."""

import resource

import pytest
import tiny_asr

from espnet_kd.bin import (
    asr_kd_cache,
    asr_kd_data,
    asr_kd_export,
    asr_kd_inference,
    asr_kd_nbest,
    asr_kd_report,
    asr_kd_score,
    asr_kd_train,
)
from espnet_kd.cli import run

KD = ["--kd_config", "kl", "--max_epoch", "3", "--use_tensorboard", "false"]


@pytest.fixture
def commands(corpus, teacher_dir, trained, tmp_path):
    """Each command with all its arguments except the output directory."""
    teacher, text = str(teacher_dir), str(corpus.dir / "valid/text")
    tiny_asr.data_dir(tmp_path / "data", {f"u{i}": tiny_asr.audio(0.8, i) for i in range(3)})
    for name in ("utt2spk", "text"):
        (tmp_path / "data" / name).write_text("".join(f"u{i} abc\n" for i in range(3)))
    data = str(tmp_path / "data")
    return {
        "train": lambda out: asr_kd_train.main(corpus.options(out, "--teacher", teacher, *KD)),
        "plain training": lambda out: asr_kd_train.main(corpus.options(out, "--max_epoch", "1")),
        "cache": lambda out: asr_kd_cache.main(
            ["--teacher", teacher, "--kd_config", "kl", "--data_dir", data, "--output", str(out)]
        ),
        "nbest": lambda out: asr_kd_nbest.main(["--teacher", teacher, "--data_dir", data, "--output", str(out)]),
        "inference": lambda out: asr_kd_inference.main(
            ["--expdir", teacher, "--data_dir", data, "--output_dir", str(out)]
        ),
        "score": lambda out: asr_kd_score.main(["--hyp", text, "--ref", text, "--output_dir", str(out)]),
        "export": lambda out: asr_kd_export.main(["--expdir", str(trained), "--output_dir", str(out)]),
        "report": lambda out: asr_kd_report.main([str(trained.parent), "--no_frames", "--output_dir", str(out)]),
        "format": lambda out: asr_kd_data.main(["format", "--src", data, "--dst", str(out), "--fs", "8000"]),
        "tokens": lambda out: asr_kd_data.main(["tokens", "--text", text, "--out", str(out)]),
    }


NAMES = ["train", "plain training", "cache", "nbest", "inference", "score", "export", "report", "format", "tokens"]


def refused(capsys, command, out) -> None:
    """Assert that the command ends with an error line, exit code 1 and no traceback."""
    with pytest.raises(SystemExit) as e:
        run(lambda _: command(out))
    error = capsys.readouterr().err.splitlines()
    assert e.value.code == 1 and error[-1].startswith("error: ") and not any("Traceback" in x for x in error), error


@pytest.mark.faults("a place that cannot be written")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["/sys/espnet_kd", "below a file"])
def test_a_place_that_cannot_be_written(commands, name, place, tmp_path, capsys):
    (tmp_path / "file").touch()
    refused(capsys, commands[name], tmp_path / "file/out" if place == "below a file" else place)  # even root cannot


@pytest.mark.faults("a full disk")
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(commands, name, tmp_path, capsys):
    """A limit on the size of files makes writes fail. Without the limit, the same command then works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 20_000 if name in ("train", "plain training") else 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused(capsys, commands[name], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    commands[name](tmp_path / "out")
