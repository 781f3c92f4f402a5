"""Fixtures that many tests share: tiny ESPnet models, a tiny corpus, and students trained on it in this process."""

import logging
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

# Two OpenMP threads on a busy machine are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Directories of helper modules that several test directories import: tiny_asr.py (one random experiment), tiny_kd.py
# (a corpus and a training run), tiny_espnet.py (data in the layout that ESPnet writes).
for helpers in ("data", "decode", "distill", "foreign", "report"):
    sys.path.insert(0, str(Path(__file__).parent / helpers))

import pytest  # noqa: E402
import tiny_kd  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def log_state():
    """Check that no test, and no command called in one, changes what later tests of the same process log."""
    before = logging.getLogger().level, logging.root.manager.disable
    yield
    after = logging.getLogger().level, logging.root.manager.disable
    logging.getLogger().setLevel(before[0])
    logging.disable(before[1])
    assert after == before, "the level of the root logger, or logging.disable, was changed and not set back"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Nine training and three validation utterances as data dirs with shape files, a token list, statistics."""
    return tiny_kd.Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """A finished experiment: a random teacher, wider than the student, with both blank and non-blank frames."""
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
def thirds(tmp_path_factory):
    """The page of the main method with KD stages of equal length, so that each lasts one of three epochs."""
    from espnet_kd.distill.page import METHODS_DIR

    page = yaml.safe_load((METHODS_DIR / "progressive_fkl.yaml").read_text(encoding="utf-8"))
    for stage in page["stages"]:
        stage["share"] = 1 / 3
    return tiny_kd.write_yaml(tmp_path_factory.mktemp("thirds") / "progressive_fkl.yaml", page)


@pytest.fixture(scope="session")
def restarting(thirds):
    """The page of ``thirds`` with a fresh optimizer in the last KD stage."""
    page = yaml.safe_load(thirds.read_text(encoding="utf-8"))
    page["stages"][2]["restart"] = True
    return tiny_kd.write_yaml(thirds.with_name("restarting.yaml"), page)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus, teacher_dir, thirds):
    """A student after all three KD stages of the main method, each of one epoch."""
    from espnet_kd.bin import asr_kd_train

    out = tmp_path_factory.mktemp("trained") / "student"
    asr_kd_train.main(corpus.options(out, "--teacher", str(teacher_dir), "--kd_config", str(thirds)))
    return out


@pytest.fixture
def fkl():
    """The page of the main method."""
    from espnet_kd.distill.page import load_page

    return load_page("progressive_fkl")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run the test in an empty directory, which must stay empty, and without the log of hundreds of examples."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    assert not list((tmp_path / "cwd").iterdir())


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "faults(kind): makes a fault of this kind, or as many as record_property('faults', n) says"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        # A test trains if its module has the training command or a recipe, or if it uses a trained student.
        if {"asr_kd_train", "Recipe"} & vars(item.module).keys() or "trained" in item.fixturenames:
            item.add_marker("trains")
        if marker := item.get_closest_marker("faults"):
            item.user_properties.append(("kind", marker.args[0]))


def pytest_terminal_summary(terminalreporter):
    """Print figures of passing tests (``record_property("summary", …)``) and counts of faults, also under xdist."""
    reports = [r for r in terminalreporter.getreports("passed") if r.when == "call"]
    lines = sorted(text for r in reports for key, text in r.user_properties if key == "summary")
    kinds = {}
    for said in (dict(r.user_properties) for r in reports):
        if "kind" in said:
            kinds.setdefault(said["kind"], []).append(said.get("faults", 1))
    for title, table in (("figures", lines), ("faults that were made, and survived", fault_table(kinds))):
        if table:
            terminalreporter.section(title)
            for line in table:
                terminalreporter.write_line(line)


def fault_table(kinds):
    """A Markdown table of how many faults of each kind were made, in how many tests."""
    if not kinds:
        return []
    rows = [(kind, len(counts), sum(counts)) for kind, counts in sorted(kinds.items())]
    rows.append(("**all**", sum(tests for _, tests, _ in rows), sum(faults for *_, faults in rows)))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "espnet", "hypothesis"))
    head = [f"{date.today()}, Python {platform.python_version()}, {versions}", ""]
    return [*head, "| fault | tests | faults |", "|---|---|---|", *(f"| {k} | {t} | {n} |" for k, t, n in rows)]
