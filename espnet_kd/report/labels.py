"""Labels of experiments in tables and pictures."""

from __future__ import annotations

from typing import Any, Callable, Dict, Sequence, Set

Row = Dict[str, Any]  # keys: espnet_kd.report.results.KEYS


def describe_kind(row: Row) -> str:
    """The kind of experiment of a row, equal for all seeds: ``teacher``, ``plain`` or method and KD stages."""
    if row["role"] in ("teacher", "plain"):
        return row["role"]
    stages = show_stages(row["kd_stages"])
    name = row["method"] or row["experiment"]
    return name if stages == "–" else f"{name}, KD stages {stages}"


def label_rows(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Return a function like `describe_kind` whose labels have only what distinguishes these rows.

    KD stages are left out of methods with a single one; the size is added where one kind has several.
    """
    stages: Dict[Any, Set[str]] = {}
    for row in rows:
        stages.setdefault(row["method"], set()).add(show_stages(row["kd_stages"]))

    def kind(row: Row) -> str:
        single = row["role"] == "student" and row["method"] and stages.get(row["method"]) == {"1"}
        return row["method"] if single else describe_kind(row)

    sizes: Dict[str, Set[int]] = {}
    for row in rows:
        sizes.setdefault(kind(row), set()).update([] if row["params"] is None else [row["params"]])

    def label(row: Row) -> str:
        tell = row["params"] is not None and len(sizes.get(kind(row), ())) > 1
        return f"{kind(row)}, {row['params']:,} parameters" if tell else kind(row)

    return label


def show_stages(stages: Any) -> str:
    """KD stages as a label: ``1+2+3``."""
    if stages in (None, "", []):
        return "–"
    return "+".join(map(str, stages)) if isinstance(stages, list) else str(stages)
