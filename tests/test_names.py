"""One name for each thing: no two modules define a class, a type or a function of the same name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import espnet_kd

ROOT = Path(espnet_kd.__file__).parent
MODULES = [p for p in sorted(ROOT.rglob("*.py")) if "conf" not in p.relative_to(ROOT).parts]
#: Functions that several modules have by design: an interface, or two ways to compute the same.
SAME = {"main", "get_parser", "measure", "kl", "factorized_kl"}


def public_names(source: str) -> Iterator[str]:
    """Yield the classes, functions and type aliases of a module; type variables and constants may be repeated."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.value, (ast.Subscript, ast.BinOp)):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name) and re.fullmatch("[A-Z]+[a-z].*", t.id))


def repeated(sources: dict[str, str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for module, source in sources.items():
        for name in dict.fromkeys(public_names(source)):  # overloads are one function
            if not name.startswith("_") and name not in SAME:
                found[name].append(module)
    return {name: modules for name, modules in found.items() if len(modules) > 1}


def test_no_name_is_defined_twice():
    assert repeated({str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in MODULES}) == {}


@pytest.mark.parametrize("source", ["class Entry: ...", "def entry(): ...", "Entry = Union[str, int]"])
def test_a_repeated_name_is_found(source):
    assert list(repeated({"a": source, "b": source}).values()) == [["a", "b"]]
