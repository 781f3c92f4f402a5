"""Commands that only look at files import neither torch nor ESPnet's models; modules are counted, not seconds."""

import json
import subprocess
import sys

import pytest
import yaml

from espnet_kd.bin import asr_kd_page
from espnet_kd.distill.page import list_pages

SCRIPT = """
import importlib, json, sys
for module, argv in json.loads(sys.argv[1]):
    importlib.import_module(module).main(argv)
print("found", json.dumps(sorted(sys.modules)))
"""
OBJECTIVE = """
import torch
from espnet_kd.distill.objectives import Objective

class Mine(Objective):
    def __init__(self, height: float = 1.0):
        super().__init__()
        self.height = torch.tensor(height)
"""


def run(*commands, cwd=None):
    """The output of some commands in a fresh process, and the modules that it has imported."""
    argv = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stderr
    printed, _, modules = done.stdout.rpartition("found ")
    return printed, set(json.loads(modules))


def unwanted(modules):
    """Modules that must not be imported; of ESPnet, only the table of classes may be, because it needs nothing else."""
    small = {"espnet", "espnet2", "espnet2.train", "espnet2.train.class_choices"}
    small |= {"espnet2.utils", "espnet2.utils.types", "espnet2.utils.nested_dict_action"}
    packages = ("torch", "numpy", "scipy", "espnet", "espnet2", "librosa", "matplotlib", "triton", "kaldiio")
    return sorted(m for m in modules - small if m.partition(".")[0] in packages)


def test_every_page_is_checked_without_torch(capsys):
    """The printed results are the same as with torch."""
    pages = list_pages()
    printed, modules = run(*(("espnet_kd.bin.asr_kd_page", [page]) for page in pages))
    assert unwanted(modules) == []
    assert len(modules) < 700
    for page in pages:
        asr_kd_page.main([page])
    assert printed == capsys.readouterr().out


def test_page_with_mistakes_is_refused_without_torch(tmp_path):
    content = {"stages": [{"objectives": [{"objective": "kl", "frames": {"rule": "symmetric", "n": -1}}]}]}
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "espnet_kd.bin.asr_kd_page", str(tmp_path / "page.yaml")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and "page.yaml: stages[0].objectives[0] (kl): frames: " in done.stderr
    assert " torch\n" not in done.stderr and " yaml\n" in done.stderr


def test_objective_from_outside_that_needs_torch(tmp_path):
    (tmp_path / "outside.py").write_text(OBJECTIVE)
    page = {"stages": [{"objectives": [{"objective": "outside.Mine", "height": 2.0}, {"objective": "factorized_kl"}]}]}
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(page))
    printed, modules = run(("espnet_kd.bin.asr_kd_page", ["page.yaml", "--import_objectives"]), cwd=tmp_path)
    assert "teacher=required" in printed and "torch" in modules


@pytest.mark.parametrize("what", ["score", "watch"])
def test_scores_and_watching(what, tmp_path):
    """Only numpy is allowed, which draws the bootstrap samples."""
    if what == "score":
        (tmp_path / "text").write_text("a one two\nb three\n")
        argv = ["--hyp", "text", "--ref", "text", "--output_dir", "out", "--resamples", "1000"]
        _, modules = run(("espnet_kd.bin.asr_kd_score", argv), cwd=tmp_path)
    else:
        (tmp_path / "exp" / "student").mkdir(parents=True)
        (tmp_path / "exp" / "student" / "config.yaml").write_text("max_epoch: 3\n")
        _, modules = run(("espnet_kd.bin.asr_kd_report", ["--watch", "--once", "exp"]), cwd=tmp_path)
    assert [m for m in unwanted(modules) if m.partition(".")[0] != "numpy"] == []
