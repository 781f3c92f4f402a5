"""After Ctrl-C or kill, one line tells the user how to continue, and no process is left."""

import os
import signal
import subprocess
import time

import pytest
from recipe import Recipe, sleepers

SECONDS = "98765"


@pytest.fixture
def recipe(egs2):
    """A recipe with fabricated data of stages 1 to 4, and a replacement for Python that sleeps, as does its child."""
    recipe = Recipe(egs2, "mini")
    files = {f"dump/raw/{s}/{f}": "u1 x\nu2 x\n" for s in ("train", "valid", "test") for f in ("wav.scp", "text")}
    files |= {"data/train/wav.scp": "u1 x\n", "data/token_list/word/tokens.txt": "x\n"}
    # asr_kd_record fails, so that no training counts as finished and the stage begins its work.
    fake = f'#!/usr/bin/env bash\ncase "$*" in *asr_kd_record*) exit 3 ;; esac\nsleep {SECONDS} &\nsleep {SECONDS}\n'
    for name, content in {**files, "fake_python": fake}.items():
        path = recipe.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (recipe.dir / "fake_python").chmod(0o755)
    return recipe


#: Stages with preparation, parallel jobs and a training, and the number of sleeping processes in each.
@pytest.mark.faults("Ctrl-C and kill")
@pytest.mark.parametrize("stage, asleep", [(2, 2), (4, 4), (6, 2)])
@pytest.mark.parametrize("how, code", [("Ctrl-C", 130), ("kill", 143)])
def test_nothing_is_left_behind(recipe, stage, asleep, how, code):
    if stage == 6:
        (recipe.dir / "exp/stats_train_word").mkdir(parents=True, exist_ok=True)
        (recipe.dir / "exp/stats_train_word/.done").touch()
    command = recipe.command("--stage", str(stage), "--stop_stage", str(stage), "--python", "./fake_python")
    run = subprocess.Popen(
        [*command, "--expdir", "exp" if stage == 6 else f"exp_{how}"], cwd=recipe.dir, env=recipe.env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        # Tests that run in the background ignore Ctrl-C, and bash cannot trap a signal that was ignored at its start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.time() + 60
        while len(sleepers(recipe.dir, SECONDS)) < asleep:
            assert time.time() < deadline and run.poll() is None, run.communicate()
            time.sleep(0.1)
        if how == "kill":
            os.kill(run.pid, signal.SIGTERM)  # only the script, not its children
        else:
            os.killpg(run.pid, signal.SIGINT)  # the whole group, as from a terminal
        said, _ = run.communicate(timeout=20)
        # The script waits for its own children; their children have been killed, but may still be exiting.
        deadline = time.time() + 5
        while (left := sleepers(recipe.dir, SECONDS)) and time.time() < deadline:
            time.sleep(0.1)
    finally:
        for process in sleepers(recipe.dir, SECONDS):
            process.kill()
    assert run.returncode == code and not left
    assert said.splitlines()[-1] == "error: stopped; the same command continues where it stopped"
    assert "failed" not in said and "Traceback" not in said
