"""docs/trust.md: every sentence names its test, and that test exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/trust.md").read_text(encoding="utf-8")
SENTENCES = re.findall(r"^- (.*?)(?=^- |^#|^<!--|\Z)(?:<!-- (\S+) -->)?", PAGE, re.MULTILINE | re.DOTALL)


def test_there_is_nothing_but_such_sentences():
    below = PAGE.split("\n## ", 1)[1]
    left = re.sub(r"^- .*?^<!-- \S+ -->$", "", below, flags=re.MULTILINE | re.DOTALL)
    assert [line for line in left.splitlines() if line.strip() and not line.startswith("#")] == [
        "A teacher: a directory, a .pth file, an export"
    ]
    assert len(SENTENCES) > 15


@pytest.mark.parametrize("sentence, test", SENTENCES, ids=[t.rpartition("::")[2] for _, t in SENTENCES])
def test_its_test_exists(sentence, test):
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)], (sentence, test)
