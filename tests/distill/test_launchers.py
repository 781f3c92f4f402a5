"""KD training in two processes on CPU (gloo), started as on several machines by ESPnet's slurm launcher or torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

#: Replacements for Kaldi's slurm.pl and slurm's srun: each requested machine is a local process.
SLURM_PL = """#!/usr/bin/env bash
set -eu
while [[ "$1" == --* ]]; do
    [ "$1" != --num_nodes ] || export nodes=$2
    shift 2
done
log=$1
shift
exec "$@" >"${log}" 2>&1
"""
SRUN = """#!/usr/bin/env bash
set -eu
shift # --export=ALL
export SLURM_NTASKS=${nodes} SLURM_STEP_NUM_NODES=${nodes} SLURM_STEP_NODELIST=localhost SLURM_LOCALID=0
for ((i = 0; i < nodes; i++)); do
    SLURM_PROCID=${i} SLURM_NODEID=${i} "$@" &
    pids[i]=$!
done
for pid in "${pids[@]}"; do wait "${pid}"; done
"""


@pytest.fixture
def env(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, content in (("slurm.pl", SLURM_PL), ("srun", SRUN)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def check(out: Path, log: str) -> None:
    """Check that all KD stages were trained, and that only one of the processes logged the epochs."""
    record = json.loads((out / "kd_stage.json").read_text())
    assert record["finished"] and record["finished_kd_stage"] == 3
    for sub in ("kd_stage1", "kd_stage2", ""):
        assert (out / sub / "student.pth").is_file()
        assert yaml.safe_load((out / sub / "config.yaml").read_text())["distributed"]
    assert [log.count(f" {epoch}epoch results") for epoch in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert json.loads((out / "experiment.json").read_text())["kd_stages"] == [1, 2, 3]
    assert all(torch.isfinite(x).all() for x in torch.load(out / "student.pth", weights_only=True).values())


def command(corpus, out: Path, teacher_dir: Path, page: Path) -> list:
    options = corpus.options(out, "--teacher", str(teacher_dir), "--kd_config", str(page))
    return ["espnet_kd.bin.asr_kd_train", *options, "--use_tensorboard", "false"]


@pytest.mark.trains
def test_two_machines_of_slurm(tmp_path, corpus, teacher_dir, restarting, env):
    out, log = tmp_path / "student", tmp_path / "train.log"
    launch = [sys.executable, "-m", "espnet2.bin.launch", "--cmd", "slurm.pl --name student", "--log", str(log)]
    launch += ["--ngpu", "0", "--num_nodes", "2", "--init_file_prefix", f"{tmp_path}/.dist_init_"]
    launch += ["--multiprocessing_distributed", "true", "--", sys.executable, "-m"]
    done = subprocess.run(
        [*launch, *command(corpus, out, teacher_dir, restarting)], env=env, capture_output=True, text=True, timeout=900
    )
    said = log.read_text() if log.is_file() else ""
    assert done.returncode == 0, done.stderr[-2000:] + said[-6000:]
    check(out, said)


@pytest.mark.trains
def test_torchrun(tmp_path, corpus, teacher_dir, restarting, env):
    out = tmp_path / "student"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    own = ["--ngpu", "0", "--dist_backend", "gloo", "--multiprocessing_distributed", "false"]
    done = subprocess.run(
        [*torchrun, *command(corpus, out, teacher_dir, restarting), *own],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    check(out, done.stderr)
