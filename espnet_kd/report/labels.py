"""Labels of experiments in tables and pictures."""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

Row = Dict[str, Any]  # keys: espnet_kd.report.results.KEYS
GREEDY = "greedy"  #: the `search` of rows that were decoded greedily


def describe_kind(row: Row) -> str:
    """The kind of experiment of a row, equal for all seeds: ``teacher``, ``plain`` or method and KD stages."""
    if row["role"] in ("teacher", "plain"):
        return row["role"]
    stages = show_stages(row["kd_stages"])
    name = row["method"] or row["experiment"]
    return name if stages == "–" else f"{name}, KD stages {stages}"


def label_rows(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Return a function like `describe_kind` whose labels have only what distinguishes these rows.

    KD stages are left out of methods with a single one; the size is added where one kind has several, and the search
    where some rows were decoded with another one than greedy.
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

    searches = {row["search"] for row in rows} - {None}

    def label(row: Row) -> str:
        tell = row["params"] is not None and len(sizes.get(kind(row), ())) > 1
        name = f"{kind(row)}, {row['params']:,} parameters" if tell else kind(row)
        other = len(searches) > 1 and row["search"] not in (None, GREEDY)
        return f"{name}, {row['search']}" if other else name

    return label


def divide_by_tag(rows: Sequence[Row]) -> List[Tuple[str, List[Row]]]:
    """Divide rows of one label and test set into those that differ in nothing but the seed.

    run.sh names students by their tag, and by the seed if it is not 0. Rows with other names are of one kind if their
    seeds differ.

    Returns:
        (addition to the label, rows) of each part; the addition is empty if there is one part only
    """
    names = [_name_without_seed(row) for row in rows]
    if None in names:
        apart = _repeats_seed(rows) or any(row["seed"] is None for row in rows)
        names = [row["experiment"] if apart else "" for row in rows]
    parts: Dict[Any, List[Row]] = {}
    for name, row in zip(names, rows):
        parts.setdefault(name, []).append(row)
    for name, part in list(parts.items()):
        if _repeats_seed(part):
            del parts[name]
            parts.update({id(row): [row] for row in part})  # one experiment may have several decodings of a test set
    if len(parts) == 1:
        return [("", list(rows))]
    experiments = [row["experiment"] for row in rows]

    def own_name(row: Row) -> str:
        name = row["experiment"]
        return name if experiments.count(name) == 1 else f"{name}/{row['decoding']}"

    return [(f" ({name if len(part) > 1 else own_name(part[0])})", part) for name, part in parts.items()]


def _name_without_seed(row: Row) -> Optional[str]:
    """What the names of all seeds of a kind have in common; None if the name is not one of run.sh."""
    name, seed = row["experiment"], row["seed"]
    common = re.sub(f"_s(eed)?{seed}$", "", name)
    if common == name:
        common = re.sub(rf"(?<!\d){seed}$", "#", name)  # a tag of the user's own, such as run1, run2
    # The seed of a given teacher is not known: it is another model, not another seed.
    return common if common != name or seed in (0, None) or name.startswith("student_") else None


def _repeats_seed(rows: Sequence[Row]) -> bool:
    return len({row["seed"] for row in rows}) < len(rows)


def show_stages(stages: Any) -> str:
    """KD stages as a label: ``1+2+3``."""
    if stages in (None, "", []):
        return "–"
    return "+".join(map(str, stages)) if isinstance(stages, list) else str(stages)
