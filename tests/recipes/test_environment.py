"""The Python environment that run_all.sh and tests/run.sh create or use."""

import os
import subprocess

import pytest
from recipe import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
*sys.prefix*) echo "{prefix}" ;;
"-m pip "*) echo "$*" >"{prefix}/pip"; echo "Collecting much"; exit "$(cat "{prefix}/code")" ;;
esac
"""


@pytest.mark.parametrize("code", [0, 1])
def test_what_pip_says_goes_into_a_log(tmp_path, code):
    (tmp_path / "setup.py").touch()
    (tmp_path / "code").write_text(str(code))
    python = tmp_path / "python"
    python.write_text(PYTHON.format(prefix=tmp_path))
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
    env.pop("ESPNET_KD_INSTALLED", None)
    script = f"set -euo pipefail; ROOT={tmp_path} EXTRAS='mini test'; . {ROOT}/egs2/TEMPLATE/setup_env.sh; echo ready"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    log = tmp_path / "espnet_kd_install.log"
    assert log.read_text() == "Collecting much\n" and str(log) in done.stderr
    assert f" -q -e {tmp_path}[mini,test]" in (tmp_path / "pip").read_text()
    if code:
        assert done.returncode == 1 and "error: pip cannot install" in done.stderr and "ready" not in done.stdout
        assert not list(tmp_path.glob(".espnet_kd.*"))
    else:
        assert done.stdout == "ready\n" and "installed" in done.stderr and "Collecting" not in done.stderr
        assert len(list(tmp_path.glob(".espnet_kd.*"))) == 2  # these marks prevent a second installation


@pytest.mark.parametrize("code", [0, 2])
def test_a_mistake_is_found_before_anything_is_installed(tmp_path, code):
    (tmp_path / "setup.py").touch()
    (tmp_path / "code").write_text("0")
    python = tmp_path / "python"
    python.write_text(PYTHON.format(prefix=tmp_path))
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
    env.pop("ESPNET_KD_INSTALLED", None)
    check = f"before_installing() {{ echo checked; return {code}; }}"
    script = f"set -euo pipefail; {check}; ROOT={tmp_path} EXTRAS=mini; . {ROOT}/egs2/TEMPLATE/setup_env.sh"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stdout == "checked\n"
    assert (tmp_path / "pip").exists() == (code == 0)


@pytest.mark.parametrize(
    "own, used, activate",
    [
        ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, "making {root}/.venv", ". {root}/.venv/bin/activate"),
        (
            {"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base", "ESPNET_KD_INTO_BASE": "1"},
            "using the active environment /conda", "conda activate /conda",
        ),
        (
            {"CONDA_PREFIX": "/conda/envs/asr", "CONDA_DEFAULT_ENV": "asr"},
            "using the active environment /conda/envs/asr", "conda activate /conda/envs/asr",
        ),
        ({}, "making {root}/.venv", ". {root}/.venv/bin/activate"),
        ({"VIRTUAL_ENV": "/venv"}, "using the active environment /venv", ". /venv/bin/activate"),
    ],
)  # fmt: skip
def test_which_environment_is_used(tmp_path, own, used, activate):
    """Conda's base is used only on request, and ``ACTIVATE`` is the command that a new shell needs."""
    (tmp_path / "setup.py").touch()
    (tmp_path / "code").write_text("0")
    venv = f"{tmp_path}/.venv"
    make = f"*venv*) mkdir -p {venv}/bin; echo VIRTUAL_ENV={venv} >{venv}/bin/activate ;;\nesac"
    python = PYTHON.replace("esac", make).replace("{prefix}", str(tmp_path))
    for name in ("python3.12", "python"):
        (tmp_path / name).write_text(python)
        (tmp_path / name).chmod(0o755)
    without = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "ESPNET_KD_INSTALLED")
    env = {k: v for k, v in os.environ.items() if k not in without} | own
    env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    script = f"set -euo pipefail; ROOT={tmp_path} EXTRAS=mini; . {ROOT}/egs2/TEMPLATE/setup_env.sh; echo $ACTIVATE"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and used.format(root=tmp_path) in done.stderr, done.stderr
    assert done.stdout == activate.format(root=tmp_path) + "\n"
    base = own.get("CONDA_DEFAULT_ENV") == "base" and "ESPNET_KD_INTO_BASE" not in own
    assert ("ESPNET_KD_INTO_BASE=1" in done.stderr) == base


@pytest.mark.parametrize("conda, used", [("base", True), ("asr", False), (None, True)])
def test_a_recipe_uses_the_projects_environment_beside_condas_base(tmp_path, conda, used):
    recipe = tmp_path / "egs2/mini/asr_kd1"
    recipe.mkdir(parents=True)
    (recipe / "path.sh").write_text((ROOT / "egs2/TEMPLATE/asr_kd1/path.sh").read_text())
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("echo activated\n")
    env = {"PATH": os.environ["PATH"], **({"CONDA_PREFIX": "/c", "CONDA_DEFAULT_ENV": conda} if conda else {})}
    done = subprocess.run(["bash", "-c", ". ./path.sh"], cwd=recipe, env=env, capture_output=True, text=True)
    assert done.stdout == ("activated\n" if used else "")
