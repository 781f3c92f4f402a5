"""Pictures of error rates against model size and against decoding time."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Sequence

from espnet_kd.report.compare import UNITS, Kind
from espnet_kd.report.plotting import add_legend, look, picture, scale_log

#: {key of a row: label of its axis}.
AXES = {"params": "parameters", "rtf": "real-time factor (smaller is faster)"}


def draw_tradeoff(kinds: Sequence[Kind], key: str, labels: Sequence[str], path: Path) -> Dict[str, List[str]]:
    """Draw CER and WER, with their intervals, over one of `AXES` (logarithmic); a row of panels for each test set.

    The place of a kind's label in ``labels`` gives its colour. Points of equal x are moved apart a little. A test set
    is left out if all its models have the same size or speed.

    Returns:
        {test set: labels drawn}; {} where there is nothing to draw, and then no file is written.
    """
    points: Dict[str, List[Kind]] = {}
    for kind in kinds:
        if _place(kind, key):
            points.setdefault(kind.rows[0]["testset"], []).append(kind)
    points = {testset: members for testset, members in points.items() if len({_place(k, key) for k in members}) > 1}
    if not points:
        return {}
    from matplotlib.lines import Line2D

    shown = list(dict.fromkeys(kind.label for members in points.values() for kind in members))
    height = 2.6 * len(points) + 0.2
    with picture(path, height, len(points), len(UNITS)) as (figure, axes):
        for row, (testset, members) in zip(axes, points.items()):
            for axis, unit in zip(row, UNITS):
                places = [place for kind in members if (place := _place(kind, key))]
                for i, (kind, x) in enumerate(zip(members, places)):
                    colour, marker = look(labels.index(kind.label))
                    x *= 1.07 ** (places[:i].count(x) - (places.count(x) - 1) / 2)
                    rate = kind.rates[unit]
                    if rate.low is not None and rate.high is not None:
                        axis.plot([x, x], [rate.low, rate.high], "-_", color=colour, lw=1, ms=8)
                    axis.plot([x], [rate.value], marker, color=colour, ms=6)
                scale_log(axis, "x")
                axis.set_xlim(min(places) / 2, max(places) * 2)  # wide enough for ticks at 1, 2, 5
                axis.margins(y=0.15)
                axis.set_title(f"{unit.upper()}, {testset}")
                axis.set_xlabel(AXES[key])
                axis.set_ylabel("errors, %")
                axis.grid(True)
        handles = []
        for label in shown:
            colour, marker = look(labels.index(label))
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=label))
        add_legend(figure, handles)
    return {testset: [kind.label for kind in members] for testset, members in points.items()}


def _place(kind: Kind, key: str) -> Optional[float]:
    return kind.rtf if key == "rtf" else kind.mean(key)
