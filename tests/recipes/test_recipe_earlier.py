"""This version resumes, finishes, decodes and reports an experiment directory of an earlier version.

``earlier/mini.tar.xz`` holds ``exp`` and ``conf`` of the embedded recipe, written by version 0.1.0 of 2026-11-26: a
finished and decoded teacher and plain student, and a student stopped after KD stage 2. The models are tiny.
"""

import json
import os
import tarfile
from pathlib import Path

import pytest
from recipe import TINY, Recipe

ARCHIVE = Path(__file__).parent / "earlier/mini.tar.xz"
OPTIONS = ["--local_data_opts", "--train 24 --valid 6 --test 8", "--teacher_args", f"{TINY} --max_epoch 2"]
OPTIONS += ["--train_args", f"{TINY} --max_epoch 4", "--method", "conf/progressive_fkl.yaml"]


@pytest.fixture(scope="module")
def earlier(egs2):
    recipe = Recipe(egs2, "mini")
    recipe.run("--stage", "1", "--stop_stage", "3", *OPTIONS[:2])
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(recipe.dir, filter="data")
    os.utime(recipe.dir / "exp/stats_train_word/.done")  # statistics must be newer than the data, made just now
    return recipe


def test_an_experiment_of_an_earlier_version_goes_on(earlier):
    exp = earlier.dir / "exp"
    decoded = (exp / "teacher/decode_test/decode.json").read_bytes()
    done = earlier.run("--stage", "4", "--stop_stage", "13", *OPTIONS)
    for kept in ("statistics are there", "the teacher is trained", "the plain is trained"):
        assert kept in done.stdout, done.stdout
    log = (exp / "student_progressive_fkl/train.kd_stage3.log").read_text()
    assert "from epoch 2" in log and " 1epoch results" not in log
    record = json.loads((exp / "student_progressive_fkl/kd_stage.json").read_text())
    assert record["finished"] and record["finished_kd_stage"] == 3
    assert (exp / "teacher/decode_test/decode.json").read_bytes() == decoded
    roles = {row["role"] for row in json.loads((exp / "results.json").read_text())}
    assert roles == {"teacher", "plain", "student"}


def test_other_data_are_refused_there(earlier):
    wav_scp = earlier.dir / "dump/raw/train/wav.scp"
    content = wav_scp.read_text()
    (earlier.dir / "exp/teacher/checkpoint.pth").touch()
    wav_scp.write_text(content.replace("data/wav", "./data/wav"))
    done = earlier.run("--stage", "5", "--stop_stage", "5", *OPTIONS, check=False)
    wav_scp.write_text(content)
    assert done.returncode == 1 and "error: exp/teacher holds a model of other" in done.stdout
    assert "dump/raw/train/wav.scp" in done.stdout
