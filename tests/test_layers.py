"""Imports point one way: no module imports from a higher layer (a "room"), none imports a command, no cycles."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import espnet_kd

ROOT = Path(espnet_kd.__file__).parent
#: Rooms from the lowest to the highest. A module imports only from its own room and from rooms listed before it.
ROOMS = (
    *("cli", "strict", "safe_yaml", "files", "pieces", "lazy", "offline", "environment"),
    *("backend", "topk", "late", "frames", "losses"),
    *("foreign", "experiments", "data", "inference", "targets", "decode", "distill", "tasks"),
    *("report", "deploy", "bench", "ez", "transcribe", "runs", "bin", "__main__"),
)


def modules() -> list[Path]:
    return [p for p in sorted(ROOT.rglob("*.py")) if "conf" not in p.relative_to(ROOT).parts]


def name_of(path: Path) -> str:
    return ".".join(("espnet_kd", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported(source: str) -> Iterator[str]:
    """Every module of the package that a source imports, also within its functions."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else str(node.module) for name in inner]
        yield from (name for name in names if name.startswith("espnet_kd.") and is_module(name))


def is_module(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


GRAPH = {name_of(p): set(imported(p.read_text(encoding="utf-8"))) for p in modules()}


def wrong(graph: dict[str, set[str]]) -> list[str]:
    """The imports that point upwards, or to a command."""
    place = ROOMS.index
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if place(room(other)) > place(room(name)) or (room(other) == "bin" and other != "espnet_kd.bin")
    ]


def test_every_module_has_a_room():
    assert {room(name) for name in GRAPH} - {""} == set(ROOMS)


def test_imports_point_down():
    assert wrong({name: others for name, others in GRAPH.items() if room(name)}) == []
    assert GRAPH["espnet_kd"] == set()


@pytest.mark.parametrize(
    "graph",
    [
        {"espnet_kd.losses.common": {"espnet_kd.distill.page"}},
        {"espnet_kd.report.page": {"espnet_kd.bin.asr_kd_page"}},
        {"espnet_kd.bin.asr_kd_nbest": {"espnet_kd.bin.asr_kd_inference"}},
    ],
)
def test_an_import_that_points_up_is_found(graph):
    assert len(wrong(graph)) == 1


def test_no_cycles_between_modules():
    # Imports within functions count as well. A package and its modules import each other, so only modules are nodes.
    packages = {name_of(p) for p in modules() if p.name == "__init__.py"}
    graph = {name: {o for o in others if o not in packages} for name, others in GRAPH.items() if name not in packages}
    list(graphlib.TopologicalSorter(graph).static_order())
