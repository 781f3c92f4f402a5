"""Learning curves: validation CTC loss and CER by epoch and by training time, as means over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from espnet_kd.report.curves import Curve
from espnet_kd.report.labels import divide_by_tag
from espnet_kd.report.plotting import add_legend, look, picture, scale_log
from espnet_kd.report.results import Gathered

#: {validation statistic: (title, factor to the unit in the title)}.
MEASURES = {"loss_ctc": ("CTC loss", 1.0), "cer_ctc": ("CER, %", 100.0)}
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass
class Learning:
    """All seeds of one kind of student, over the epochs that each of them has."""

    label: str
    role: str
    params: Optional[int]
    seeds: int
    epochs: np.ndarray  #: (E,) epoch numbers, which continue over KD stages
    seconds: np.ndarray  #: (E,) seconds of training until the end of each epoch, mean over seeds
    values: Dict[str, np.ndarray]  #: {one of `MEASURES`: (seeds, E)}; NaN where an epoch lacks it
    alone: bool  #: whether nothing else was trained at the same time as any of them

    def mean(self, name: str) -> np.ndarray:
        """(E,) mean over seeds of one of `MEASURES`."""
        return self.values[name].mean(axis=0)


def collect_learning(gathered: Gathered) -> List[Learning]:
    """One entry for each kind of plain or distilled student with statistics, in the table's order of labels."""
    rows = {row["experiment"]: row for row in gathered.rows}
    groups: Dict[str, List[Curve]] = {}
    for curve in gathered.curves:
        if curve.stages and rows[curve.experiment]["role"] in ("plain", "student"):
            groups.setdefault(curve.label, []).append(curve)
    found = []
    for label, curves in groups.items():
        by_name = {curve.experiment: curve for curve in curves}
        for tag, members in divide_by_tag([rows[name] for name in by_name]):
            found.append(_average(f"{label}{tag}", [by_name[row["experiment"]] for row in members], gathered))
    return [learning for learning in found if len(learning.epochs)]


def _average(label: str, curves: Sequence[Curve], gathered: Gathered) -> Learning:
    tables = [_flatten(curve) for curve in curves]
    epochs = sorted(set.intersection(*(set(table) for table in tables)))
    data = np.array([[table[epoch] for epoch in epochs] for table in tables]).reshape(len(tables), len(epochs), -1)
    rows = [next(r for r in gathered.rows if r["experiment"] == c.experiment) for c in curves]
    return Learning(
        label, rows[0]["role"], rows[0]["params"], len(curves), np.array(epochs),
        data[:, :, 0].mean(axis=0) if epochs else np.empty(0),
        {name: data[:, :, i + 1] for i, name in enumerate(MEASURES)} if epochs else {},
        all(map(gathered.ran_alone, rows)),
    )  # fmt: skip


def _flatten(curve: Curve) -> Dict[int, Tuple[float, ...]]:
    """{epoch: (seconds until its end, values of `MEASURES`)}, over all KD stages."""
    table: Dict[int, Tuple[float, ...]] = {}
    done, passed = 0, 0.0
    for history in curve.stages:
        for epoch in sorted(history):
            phases = history[epoch]
            passed += sum(stats.get("time", 0.0) for stats in phases.values())
            valid = phases.get("valid", {})
            table[done + epoch] = (passed, *(f * valid.get(name, math.nan) for name, (_, f) in MEASURES.items()))
        done += max(history)
    return table


def draw_learning(
    learned: Sequence[Learning], labels: Sequence[str], path: Path, teacher_cer: Optional[float] = None
) -> List[str]:
    """Draw all kinds: a panel for each of `MEASURES` by epoch and by training time; bands from lowest to highest seed.

    The place of a label in ``labels`` gives its colour. ``teacher_cer`` in percent is drawn as a line.

    Returns:
        The statistics drawn; [] where no kind has two epochs of any, and then no file is written.
    """
    shown = [name for name in MEASURES if any(np.isfinite(one.mean(name)).sum() > 1 for one in learned)]
    if not shown:
        return []
    from matplotlib.lines import Line2D

    alone = all(one.alone for one in learned)
    unit, scale = ("minutes", 60.0) if max(one.seconds[-1] for one in learned) < 2 * 3600 else ("hours", 3600.0)
    with picture(path, 2.5 * len(shown) + 0.3, len(shown), 2) as (figure, axes):
        for row, name in zip(axes, shown):
            drawn: List[float] = []
            for one in learned:
                style = look(_place(one.label, labels))
                drawn += _draw(row[0], one.epochs, one.values[name], *style)
                _draw(row[1], one.seconds / scale, one.values[name], *style, alpha=0.95 if alone else 0.35)
            for axis, what in zip(row, ("epoch", f"training time, {unit}")):
                if min(drawn) > 0 and max(drawn) > 20 * min(drawn):
                    scale_log(axis, "y")
                if name == "cer_ctc" and teacher_cer is not None:
                    axis.axhline(teacher_cer, color="0.4", linestyle=":", linewidth=1.2)
                axis.set_title(MEASURES[name][0])
                axis.set_xlabel(what)
                axis.grid(True)
            row[0].xaxis.get_major_locator().set_params(integer=True)
            if not alone:
                text = "cores were shared:\nnot to be compared"
                row[1].text(0.97, 0.95, text, transform=row[1].transAxes, ha="right", va="top", color="0.25")
        handles = []
        for one in learned:
            colour, marker = look(_place(one.label, labels))
            label = f"{one.label}, {one.seeds} seeds" if one.seeds > 1 else one.label
            handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=label))
        if teacher_cer is not None and "cer_ctc" in shown:
            handles.append(Line2D([], [], color="0.4", linestyle=":", label="teacher, best epoch"))
        add_legend(figure, handles)
    return shown


def _place(label: str, labels: Sequence[str]) -> int:
    return labels.index(label) if label in labels else len(labels)


def _draw(axis, x: np.ndarray, values: np.ndarray, colour: str, marker: str, alpha: float = 0.95) -> List[float]:
    """Draw one kind in one panel; return the finite values of its mean."""
    mean = values.mean(axis=0)
    every = max(1, len(x) // 8)
    axis.plot(x, mean, color=colour, alpha=alpha, lw=1.4, marker=marker, ms=4, markevery=every)
    if len(values) > 1:
        axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=alpha / 6, lw=0)
    return [v for v in mean if math.isfinite(v)]


def rank_by_epoch(learned: Sequence[Learning]) -> Tuple[List[str], List[List[str]]]:
    """Head and body of the table of validation CERs at `SHARES` of the epochs; the last line names the best kind.

    Only kinds of the same size as the first distilled one are compared.
    """
    total = max((int(one.epochs[-1]) for one in learned), default=0)
    at = {max(1, round(share * total)): share for share in SHARES}
    columns = [
        [float(one.mean("cer_ctc")[one.epochs == epoch][0]) if epoch in one.epochs else math.nan for one in learned]
        for epoch in at
    ]
    return ["", *(f"{100 * share:.0f} % (epoch {epoch})" for epoch, share in at.items())], _rank(learned, columns)


def rank_by_time(learned: Sequence[Learning]) -> Tuple[List[str], List[List[str]]]:
    """The same table at the times at which the plain student of that size had done `SHARES` of its training.

    ([], []) if there is no plain student, or if cores were shared. Between two epochs the CER is interpolated.
    """
    plain = next((one for one in _comparable(learned) if one.role == "plain"), None)
    if plain is None or not all(one.alone for one in learned) or not plain.seconds[-1]:
        return [], []
    moments = [share * float(plain.seconds[-1]) for share in SHARES]
    columns = [
        [float(np.interp(t, one.seconds, one.mean("cer_ctc"), left=math.nan, right=math.nan)) for one in learned]
        for t in moments
    ]
    head = ["", *(f"{100 * share:.0f} % ({t / 60:.1f} min)" for share, t in zip(SHARES, moments))]
    return head, _rank(learned, columns)


def _comparable(learned: Sequence[Learning]) -> List[Learning]:
    """The kinds of the same size as the first distilled one; all if there is none."""
    size = next((one.params for one in learned if one.role == "student"), None)
    return [one for one in learned if size is None or one.params == size]


def _rank(learned: Sequence[Learning], columns: Sequence[Sequence[float]]) -> List[List[str]]:
    """A line for each kind, and the best kind; [] if no CER is known."""
    if not any(math.isfinite(v) for column in columns for v in column):
        return []
    body = [[one.label, *(_cell(column[i]) for column in columns)] for i, one in enumerate(learned)]
    places = [i for i, one in enumerate(learned) if any(one is other for other in _comparable(learned))]
    ahead = []
    for column in columns:
        best = min((column[i] for i in places if math.isfinite(column[i])), default=math.nan)
        ahead.append(", ".join(learned[i].label for i in places if _cell(column[i]) == _cell(best) != "–") or "–")
    of_size = "" if len(places) == len(learned) else f" of those of {learned[places[0]].params:,} parameters"
    return [*body, [f"ahead{of_size}", *ahead]]


def _cell(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "–"


def best_teacher_cer(gathered: Gathered) -> Optional[float]:
    """The lowest validation CER, in percent, of the first teacher that has one."""
    roles = {row["experiment"]: row["role"] for row in gathered.rows}
    for curve in gathered.curves:
        if roles[curve.experiment] == "teacher":
            values = [v[2] for v in _flatten(curve).values() if math.isfinite(v[2])]
            if values:
                return min(values)
    return None
