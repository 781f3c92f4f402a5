"""Shared by the tests: tiny ESPnet models, a tiny corpus, and what it takes to train on it in this process."""

import os
import sys
from pathlib import Path

# Two OpenMP threads on a busy machine are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Helpers that several directories use: tiny_asr.py (one random experiment), tiny_kd.py (a corpus and a training run),
# tiny_espnet.py (data as ESPnet leaves it).
for helpers in ("data", "decode", "distill"):
    sys.path.insert(0, str(Path(__file__).parent / helpers))

import pytest  # noqa: E402
import tiny_kd  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Nine training and three validation utterances as data dirs with shape files, a token list, statistics."""
    return tiny_kd.Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """A finished experiment: random, wider than the student, both blank and non-blank frames."""
    return tiny_kd.save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def teacher(teacher_dir):
    """The teacher of ``teacher_dir``, loaded."""
    from espnet_kd.targets.online import OnlineTeacher

    return OnlineTeacher(teacher_dir)


@pytest.fixture
def write_page(tmp_path):
    """Write a method page, given as a Python mapping; return its path."""

    def write(content, name="page.yaml"):
        return tiny_kd.write_yaml(tmp_path / name, content)

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus, teacher_dir):
    """A student after all three KD stages of the main method, an epoch each."""
    from espnet_kd.bin import asr_kd_train

    out = tmp_path_factory.mktemp("trained") / "student"
    asr_kd_train.main(corpus.options(out, "--teacher", str(teacher_dir), "--kd_config", "progressive_fkl"))
    return out


@pytest.fixture
def fkl():
    """The page of the main method."""
    from espnet_kd.distill.page import load_page

    return load_page("progressive_fkl")


def pytest_terminal_summary(terminalreporter):
    """What tests have to say when they pass (``record_property("summary", …)``), also from xdist's workers."""
    reports = [r for r in terminalreporter.getreports("passed") if r.when == "call"]
    lines = sorted(text for r in reports for key, text in r.user_properties if key == "summary")
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
