"""Shared by the tests with odd input: a check of the outcome, and damage to trees, lines and bytes.

Each input must end soon, in success, a UserError or wrong options, and change no file but the output. The examples are
the same in every run; hypothesis prints the smallest one that fails.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import os
import signal
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from espnet_kd.cli import UserError

SECONDS = 30  # limit for one example


def examples(number: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=checks
    )  # fmt: skip


class TooLong(BaseException):
    """A BaseException, so that no ``except Exception`` in the program catches it by mistake."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TooLong after ``SECONDS``, so that a hang fails the test."""

    def stop(*_: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survives(do: Callable[[], Any]) -> bool:
    """Whether ``do`` succeeds; False after a UserError or wrong options. Any other error fails the test."""
    with limited():
        try:
            do()
        except UserError as e:
            assert str(e).strip()
            return False
        except SystemExit as e:
            assert e.code == 2
            return False
    return True


def contents(directory: Path) -> Dict[str, Any]:
    """Every file, link and directory below ``directory``, with its bytes, its target or its mode."""

    def what(path: Path) -> Any:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else path.stat().st_mode

    return {str(p.relative_to(directory)): what(p) for p in directory.rglob("*")}


# ---- trees, as YAML and JSON hold them ----

NUMBERS = [0, -1, 1, 0.5, 2, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 2**63]
WORDS = [
    "",
    "kl",
    "encoder",
    "encoder.99",
    "encoder.-1",
    "none",
    "nan",
    "1e-3",
    "é\u3000\u2028",
    "os.path",
    "..",
    "a\n",
]
VALUES = st.sampled_from([*NUMBERS, *WORDS, None, True]) | st.text(max_size=5)
TREES = st.recursive(
    VALUES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=4
)


def places(tree: Any, path: Tuple = ()) -> Iterator[Tuple]:
    """Yield the path of every entry below the root."""
    for key in tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0):
        yield (*path, key)
        yield from places(tree[key], (*path, key))


@st.composite
def damaged_trees(draw: Callable, trees: List[Any]) -> Any:
    """One of ``trees`` with up to three entries dropped, added, renamed, moved or replaced."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        parent = functools.reduce(operator.getitem, above, tree)
        kind = draw(st.sampled_from(["replace", "replace", "drop", "add", "rename", "copy"]))
        if kind == "replace":
            parent[key] = draw(TREES)
        elif kind == "drop":
            del parent[key]
        elif kind == "copy":  # a value from elsewhere in the tree
            parent[key] = copy.deepcopy(functools.reduce(operator.getitem, draw(st.sampled_from(found)), tree))
        elif isinstance(parent, list):
            parent.insert(key, draw(st.sampled_from(parent)) if kind == "add" else draw(TREES))
        else:
            name = draw(st.sampled_from([str(key)[:-1], f"{key}s", 3, None, "weight", "ctc", "é"]))
            parent[name] = parent.pop(key) if kind == "rename" else draw(TREES)
    return tree


@st.composite
def damaged_bytes(draw: Callable, content: bytes, odd: List[bytes]) -> bytes:
    """``content`` with one to three changes: a part cut out, overwritten, or inserted."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.one_of(st.just(start), st.integers(start, len(content)), st.just(len(content))))
        content = content[:start] + draw(st.sampled_from(odd) | st.binary(max_size=4)) + content[end:]
    return content


@st.composite
def damaged_lines(draw: Callable, lines: List[bytes], odd: List[bytes]) -> bytes:
    """``lines`` with one to three changes: lines dropped, doubled, moved or added, or a field changed."""
    lines = list(lines)
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(lines) - 1)) if lines else 0
        kind = draw(st.sampled_from(["field", "field", "field", "drop", "double", "move", "add", "all"]))
        if kind == "add" or not lines:
            lines.insert(i, draw(st.sampled_from(odd)) + b"\n")
        elif kind == "field":
            fields = lines[i].rstrip(b"\n").split(b" ")
            fields[draw(st.integers(0, len(fields) - 1))] = draw(st.sampled_from(odd) | st.binary(max_size=3))
            lines[i] = b" ".join(fields) + b"\n"
        elif kind == "drop":
            del lines[i]
        elif kind == "double":
            lines.insert(i, lines[i])
        elif kind == "move":
            lines.append(lines.pop(i))
        else:
            change = draw(
                st.sampled_from([(b"\n", b"\r\n"), (b" ", b"\t"), (b" ", b"  "), (b"s-", b"s"), (b"\n", b"")])
            )
            lines = [line.replace(*change) for line in lines]
    return b"".join(lines)


def damage_file(draw: Callable, path: Path, odd: List[bytes], lines: bool) -> None:
    """Damage one file: change its lines or bytes, cut, empty or delete it, or put a directory in its place."""
    content = path.read_bytes()
    kind = draw(st.sampled_from(["lines"] * 8 * lines + ["bytes"] * 2 + ["gone", "empty", "directory", "cut"]))
    path.unlink()
    if kind == "lines":
        path.write_bytes(draw(damaged_lines(content.splitlines(keepends=True), odd)))
    elif kind == "bytes":
        path.write_bytes(draw(damaged_bytes(content, odd)))
    elif kind == "cut":
        path.write_bytes(content[: draw(st.integers(0, len(content)))])
    elif kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
