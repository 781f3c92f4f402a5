"""Odd method pages and checkpoints end in one of the ways that fuzzing.py allows."""

from __future__ import annotations

import copy
import functools
import operator

import pytest
import yaml
from fuzzing import NUMBERS, WORDS, damaged_bytes, damaged_trees, examples, limited, places, survives
from hypothesis import given
from hypothesis import strategies as st

from espnet_kd.bin import asr_kd_page
from espnet_kd.distill.page import METHODS_DIR
from espnet_kd.experiments.checkpoints import read_checkpoint

pytestmark = pytest.mark.usefixtures("elsewhere")

PAGES = sorted(METHODS_DIR.glob("*.yaml"))
#: YAML that parsers often fail on.
YAML = [
    "&a [*a]",
    "!!python/object/apply:os.getcwd []",
    "2001-99-99",
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!set {a}",
]
YAML += [
    "{[1]: 2}",
    "<<: 3",
    "\t",
    "%YAML 3.0\n",
    "\n--- a\n--- b\n",
    "[" * 3000,
    "{a: " * 3000,
    "\0",
    "1" * 5000,
    "*b",
    "@",
]
YAML += ["'", "!!binary 3", "190:20:30", "? ", ": ", "- ", "\n", "\x85", "\ufeff", "|2", "..."]


@pytest.mark.trains
@pytest.mark.faults("odd method pages (fuzz)")
def test_pages(tmp_path, record_property):
    path, counts = tmp_path / "page.yaml", [0, 0]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        counts[survives(lambda: asr_kd_page.main([str(path)]))] += 1

    pages = [yaml.safe_load(p.read_text()) for p in PAGES]

    @examples(250)
    @given(damaged_trees(pages))
    def trees(tree):
        check(yaml.safe_dump(tree, allow_unicode=True).encode())

    @examples(250)
    @given(st.sampled_from(PAGES).flatmap(lambda p: damaged_bytes(p.read_bytes(), [x.encode() for x in YAML])))
    def texts(content):
        check(content)

    odd, seen = [*NUMBERS, *WORDS, None, True, [], {}, [3], {"a": 3}], set()
    for page in pages:
        for *above, key in places(page):
            value = functools.reduce(operator.getitem, above, page)[key]
            if (*above[-1:], key, repr(value)) not in seen:  # pages have many entries in common
                seen.add((*above[-1:], key, repr(value)))
                for other in odd[len(seen) % 4 :: 4]:
                    tree = copy.deepcopy(page)
                    functools.reduce(operator.getitem, above, tree)[key] = other
                    check(yaml.safe_dump(tree, allow_unicode=True).encode())
    trees()
    texts()
    record_property("faults", sum(counts))
    assert min(counts) > 20, counts  # some of the damaged pages are still valid, many are not


@pytest.mark.faults("odd checkpoints (fuzz)")
def test_checkpoints(trained, tmp_path, record_property):
    """A checkpoint cut anywhere counts as damaged; one with changed bytes counts as damaged, is refused, or is read."""
    content, path = (trained / "checkpoint.pth").read_bytes(), tmp_path / "checkpoint.pth"
    cuts = range(0, len(content) - 1, len(content) // 300)
    for length in cuts:
        path.write_bytes(content[:length])
        with limited():
            assert read_checkpoint(path) is None, length

    @examples(150)
    @given(damaged_bytes(content[:3000], [b"\xff", b"cposix\nsystem\n", b"PK"]), st.integers(0, 3000))
    def damaged(start, rest):
        path.write_bytes(start + content[3000 + rest - 1500 :])
        survives(lambda: read_checkpoint(path))

    damaged()
    record_property("faults", len(cuts) + 150)
