"""docs/api.md agrees with the docstrings, and the tree in the README with the project's files."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs/make_api.py"


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_up_to_date(make_api):
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.make_page(), "run: python docs/make_api.py"


def test_every_public_name_is_on_the_page_with_its_docstring(make_api):
    page = make_api.PAGE.read_text(encoding="utf-8")
    shown = 0
    for name, members in make_api.MODULES:
        module = importlib.import_module(name)
        for member in members or make_api.public_names(module):
            first = make_api.inline(getattr(module, member).__doc__.splitlines()[0])
            assert f"\n### {member}\n" in page and first in page, f"{name}.{member}"
            shown += 1
    assert shown > 20


def test_docstrings_as_markdown(make_api):
    doc = 'One line, :func:`kl`.\n\nArgs:\n    x: (B,), as ``y``\n        and more.\n\nSource: a paper.'
    assert make_api.to_markdown(doc).splitlines() == [
        "One line, `kl`.", "", "**Args:**", "", "- `x`: (B,), as `y`", "    and more.", "", "**Source:** a paper.",
    ]  # fmt: skip


def tree() -> list:
    """Paths of the README's tree; a path after a comma lies in the directory of the first path of its line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Where things are\n+```text\n(.*?)```", text, re.DOTALL)[1]
    paths = []
    for line in block.splitlines():
        first, *others = re.match(r"([^\s,]+(?:, [^\s,]+)*)", line)[1].split(", ")
        parent = first.rstrip("/").rpartition("/")[0]
        paths += [first, *(f"{parent}/{other}" for other in others)]
    return paths


@pytest.mark.parametrize("path", tree())
def test_the_readmes_tree_exists(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_the_readmes_tree_names_every_package_and_recipe():
    there = [p.parent for p in ROOT.glob("espnet_kd/*/__init__.py")] + [p for p in ROOT.glob("egs2/*") if p.is_dir()]
    missing = {f"{p.relative_to(ROOT)}/" for p in there} - set(tree())
    assert not missing


def test_the_readme_is_narrow():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120] == []
