"""The embedded recipe end to end: the main job's stages, a kill in the middle, stages that ask for earlier ones."""

import json
import os
import signal
import subprocess
import time

import pytest
from recipe import TINY, Recipe

SIZES = "--train 24 --valid 6 --test 8"
TEACHER = f"{TINY} --max_epoch 2"
STUDENT = f"{TINY} --max_epoch 6"
SMALL = ["--local_data_opts", SIZES, "--teacher_args", TEACHER, "--train_args", STUDENT]


@pytest.fixture(scope="module")
def finished(egs2):
    """The main job in little: run_all.sh with tiny models."""
    recipe = Recipe(egs2, "mini")
    done = subprocess.run(
        [str(egs2.parent / "run_all.sh"), *SMALL],
        env=recipe.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return recipe


def rows(recipe: Recipe) -> dict:
    return {row["role"]: row for row in json.loads((recipe.dir / "exp/results.json").read_text())}


def test_results_table(finished):
    table = rows(finished)
    assert set(table) == {"teacher", "plain", "student"}
    student = table["student"]
    assert student["method"] == "progressive_fkl" and student["kd_stages"] == [1, 2, 3]
    assert student["epochs"] == table["plain"]["epochs"] == 6
    assert student["params"] == table["plain"]["params"] > 0
    for row in table.values():
        assert row["testset"] == "test" and row["wer_low"] <= row["wer"] <= row["wer_high"]
        assert row["rtf"] > 0 and row["train_seconds"] > 0
    exp = finished.dir / "exp"
    assert "progressive_fkl" in (exp / "RESULTS.md").read_text()
    assert (exp / "curves.png").stat().st_size > 10_000


def test_every_kd_stage_has_its_epochs_and_statistics(finished):
    exp = finished.dir / "exp/student_progressive_fkl"
    epochs = [json.loads((exp / d / "kd_stage.json").read_text())["epochs"] for d in ("kd_stage1", "kd_stage2", ".")]
    assert epochs == [1, 1, 4]
    for k, names in {
        1: ["loss_blank_kl"],
        2: ["loss_factorized_representation"],
        3: ["loss_factorized_kl", "loss_ctc"],
    }.items():
        text = (exp / f"train.kd_stage{k}.log").read_text()
        for name in [*names, "nonblank_share", "agreement", "loss_kd"]:
            assert f"{name}=" in text


def test_finished_stages_are_harmless(finished):
    before = (finished.dir / "exp/student_progressive_fkl/student.pth").stat().st_mtime_ns
    done = finished.run(*SMALL, "--stage", "1", "--stop_stage", "10")
    assert (finished.dir / "exp/student_progressive_fkl/student.pth").stat().st_mtime_ns == before
    assert "is finished in" in (finished.dir / "exp/student_progressive_fkl/train.kd_stage3.log").read_text()
    assert "is trained" in done.stdout


def test_a_model_of_other_settings_is_refused(finished):
    other = ["--train_args", f"{TINY} --max_epoch 7"]
    done = finished.run(*SMALL, "--stage", "6", "--stop_stage", "6", *other, check=False)
    assert done.returncode == 1 and "holds a model of other options" in done.stdout


def test_a_stage_names_the_one_that_makes_its_input(egs2, finished):
    fresh = Recipe(egs2, "mini")
    for stage, text in ((2, "stage 1 makes it"), (6, "stage 4 makes it")):
        done = fresh.run(
            "--stage", str(stage), "--train_set", "absent", "--dumpdir", "none", "--expdir", "none", check=False
        )
        assert done.returncode == 1 and text in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize("arguments", [["--stge", "3"], ["--stage"], ["--stage", "two"], ["stray"]])
def test_wrong_options_are_refused(egs2, arguments):
    done = Recipe(egs2, "mini").run(*arguments, check=False)
    assert done.returncode == 2 and "error:" in done.stdout


def test_kill_in_stage_9_and_half_a_checkpoint(finished):
    """kill -9 in KD stage 2 and a checkpoint cut in half: the same command goes on from the epoch before."""
    options = [*SMALL[:5], f"{TINY} --max_epoch 30", "--tag", "killed"]
    finished.run(*options, "--stage", "8", "--stop_stage", "8")
    run = subprocess.Popen(
        finished.command(*options, "--stage", "9", "--stop_stage", "9"),
        cwd=finished.dir,
        env=finished.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    directory = finished.dir / "exp/student_progressive_fkl_killed/kd_stage2"
    deadline = time.time() + 300
    while not (directory / "checkpoint.prev.pth").exists():  # from the second epoch on
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    checkpoint = directory / "checkpoint.pth"
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)

    finished.run(*options, "--stage", "9", "--stop_stage", "13")
    text = (finished.dir / "exp/student_progressive_fkl_killed/train.kd_stage2.log").read_text()
    assert "checkpoint.pth is damaged" in text and "going back to" in text
    record = json.loads((directory / "kd_stage.json").read_text())
    assert record["finished"] and record["epochs"] == 3
    assert len(json.loads((finished.dir / "exp/results.json").read_text())) == 4


@pytest.mark.skipif(not int(os.environ.get("ESPNET_KD_TEST_LONG", "0")), reason="full length: tests/run.sh --long")
def test_full_length(egs2):
    recipe = Recipe(egs2, "mini")
    recipe.run("--expdir", "exp_long", timeout=3600)
    table = json.loads((recipe.dir / "exp_long/results.json").read_text())
    wer = {row["role"]: row["wer"] for row in table}
    assert wer["teacher"] < wer["plain"]
