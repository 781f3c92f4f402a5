"""Picture of training curves: one panel for each loss, one colour for each kind of experiment."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Literal, Sequence, Tuple

from espnet_kd.experiments.history import History
from espnet_kd.report.plotting import add_legend, look, picture, scale_log


@dataclass
class Curve:
    """Training of one experiment: ``label`` groups (seeds share colour and legend entry), ``stages`` in order.

    ``changes``: where on the axis of epochs another KD stage begins: n within epoch n, n + 0.5 after it.
    """

    label: str
    stages: List[History] = field(default_factory=list)
    experiment: str = ""
    changes: List[float] = field(default_factory=list)


def draw_curves(curves: Sequence[Curve], labels: Sequence[str], path: Path) -> List[str]:
    """Draw the ``loss`` and ``loss_*`` statistics of all experiments over the epochs into a PNG file.

    Epochs of a progressive method count on from KD stage to KD stage; a dotted line marks each change. Validation is
    a solid line, training a dashed one. The place of a curve's label in ``labels`` gives its colour.

    Returns:
        The statistics drawn, one panel each; [] where none has two epochs, and then no file is written.
    """
    every = [stats for c in curves for history in c.stages for phases in history.values() for stats in phases.values()]
    names = sorted({name for stats in every for name in stats if name == "loss" or name.startswith("loss_")})
    names = [n for n in names if n != "loss_scale"]  # this is the factor of mixed precision, not a loss
    names = [n for n in names if any(_drawable(c, phase, n) for c in curves for phase in ("train", "valid"))]
    if not names:
        return []
    from matplotlib.lines import Line2D

    shown = list(dict.fromkeys(c.label for c in curves if c.stages))
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    height = 2.3 * rows + 0.3
    with picture(path, height, rows, columns, sharex=True) as (figure, axes):
        for axis, name in zip(axes.flat, names):
            _draw_panel(axis, name, curves, labels)
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        handles = []
        for label in shown:
            colour, marker = look(labels.index(label))
            handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=label))
        styles: Sequence[Tuple[Literal["-", "--"], str]] = (("-", "validation"), ("--", "training"))
        for style, label in styles:
            handles.append(Line2D([], [], color="0.3", linestyle=style, label=label))
        add_legend(figure, handles)
    return names


def _points(curve: Curve, phase: str, name: str) -> Tuple[List[float], List[float]]:
    """Epochs, counted over all KD stages, and values of one statistic; both are empty if no value is finite.

    A NaN between KD stages breaks the line, because a statistic such as ``loss`` has another meaning in each stage.
    """
    epochs: List[float] = []
    values: List[float] = []
    done = 0
    for history in curve.stages:
        for epoch in sorted(history):
            epochs.append(done + epoch)
            values.append(history[epoch].get(phase, {}).get(name, math.nan))
        done += max(history)
        epochs.append(done + 0.5)
        values.append(math.nan)
    return (epochs, values) if any(map(math.isfinite, values)) else ([], [])


def _drawable(curve: Curve, phase: str, name: str) -> bool:
    """Whether a statistic has at least two finite points, which a line needs."""
    return sum(map(math.isfinite, _points(curve, phase, name)[1])) > 1


def _draw_panel(axis, name: str, curves: Sequence[Curve], labels: Sequence[str]) -> None:
    drawn: List[float] = []
    for curve in (c for c in curves if c.stages):
        colour, marker = look(labels.index(curve.label))
        for phase, style, alpha in (("train", "--", 0.6), ("valid", "-", 0.95)):
            epochs, values = _points(curve, phase, name)
            drawn += filter(math.isfinite, values)
            every = max(1, len(epochs) // 8)
            axis.plot(epochs, values, style, color=colour, alpha=alpha, lw=1.3, marker=marker, ms=4, markevery=every)
        done = 0
        for history in curve.stages[:-1]:
            done += max(history)
            axis.axvline(done + 0.5, color=colour, linestyle=":", linewidth=0.8, alpha=0.7)
        for change in curve.changes:
            axis.axvline(change, color=colour, linestyle=":", linewidth=0.8, alpha=0.7)
    if drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
        scale_log(axis, "y")
    axis.set_title(name)
    axis.set_xlabel("epoch")
    axis.tick_params(labelbottom=True)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(True)
