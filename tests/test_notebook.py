"""docs/distil.ipynb: its cells run on a tiny corpus, and its saved outputs are small and name no particular machine."""

import json
import logging
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/distil.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture
def own_log():
    """Restore the root logger, because the notebook sets up the log of its process."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.mark.trains
def test_its_cells_run(tmp_path, corpus, teacher_dir, monkeypatch, capsys, own_log):
    (parameters,) = [cell for cell in CODE if "parameters" in cell["metadata"].get("tags", [])]
    assert parameters is CODE[0]
    given: dict = {}
    exec("".join(parameters["source"]), given)
    known = set(given)
    given.update(
        recipe=str(tmp_path), prepare=["true"], teacher=str(teacher_dir), dump=str(corpus.dir), test="valid",
        tokens=str(corpus.dir / "tokens.txt"), token_type="char", student=str(corpus.config()),
        options={"use_tensorboard": False},
    )  # fmt: skip
    assert set(given) == known, "the notebook has no such parameter"
    monkeypatch.chdir(tmp_path)  # so that the directory is restored after the test
    for cell in CODE[1:]:
        exec("".join(cell["source"]), given)
    printed = capsys.readouterr().out
    assert re.search(r"teacher: WER \d+\.\d\d % on 3 utterances\nstudent: WER ", printed)
    assert (tmp_path / "exp/notebook/student/export/model.pth").is_file()


def test_its_outputs_are_saved_small_and_of_no_particular_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 30_000
    counts = [cell["execution_count"] for cell in CODE]
    assert counts == list(range(1, len(CODE) + 1)), "run all cells from the first on, and save"
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds == {"stream"}, "neither errors nor pictures nor audio"
    assert not re.search(r"/(home|root|tmp|work|Users|usr|opt|mnt)/", text)
    assert "student: WER" in text


def test_the_first_cells_can_be_run_again(tmp_path, monkeypatch, capsys):
    """As after an error in data and teacher: the paths are relative to the recipe, where the notebook is by then."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "egs2/mini").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs")
    given: dict = {}
    for _ in range(2):
        exec("".join(CODE[0]["source"]), given)
        given.update(recipe="../egs2/mini", prepare=["true"])
        exec("".join(CODE[1]["source"]), given)
        assert Path.cwd() == tmp_path / "egs2/mini"
    assert capsys.readouterr().out.split() == ["ready", "ready"]
