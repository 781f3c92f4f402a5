"""Picture of training curves: one panel for each loss, one colour for each kind of experiment."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Sequence, Tuple

from espnet_kd.files import replacing
from espnet_kd.report.history import History

#: Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too light for paper.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "os^Dv<>P"  # so that black-and-white paper tells lines apart too


@dataclass
class Curve:
    """Training of one experiment: ``label`` groups (seeds share colour and legend entry), ``stages`` in order."""

    label: str
    stages: List[History] = field(default_factory=list)


def draw_curves(curves: Sequence[Curve], path: Path) -> List[str]:
    """Draw the ``loss`` and ``loss_*`` statistics of all experiments over the epochs into a PNG file.

    Epochs of a progressive method count on from KD stage to KD stage; a dotted line marks each change. Validation is
    a solid line, training a dashed one.

    Returns:
        The statistics drawn, one panel each; [] where there is nothing to draw, and then no file is written.
    """
    every = [stats for c in curves for history in c.stages for phases in history.values() for stats in phases.values()]
    names = sorted({name for stats in every for name in stats if name == "loss" or name.startswith("loss_")})
    names = [n for n in names if n != "loss_scale"]  # of mixed precision: no loss
    names = [n for n in names if any(_points(c, phase, n)[0] for c in curves for phase in ("train", "valid"))]
    if not names:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    labels = list(dict.fromkeys(c.label for c in curves if c.stages))
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    height = 3.2 * rows + 0.5 + 0.22 * math.ceil((len(labels) + 2) / 3)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.5 * columns, height), squeeze=False, sharex=True, dpi=130, layout="constrained"
    )
    try:
        for axis, name in zip(axes.flat, names):
            _draw_panel(axis, name, curves, labels)
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        handles = []
        for i, label in enumerate(labels):
            colour, marker = _look(i)
            handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=label))
        for style, label in (("-", "validation"), ("--", "training")):
            handles.append(Line2D([], [], color="0.3", linestyle=style, label=label))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        with replacing(path, "wb") as f:
            figure.savefig(f, format="png")
    finally:
        plt.close(figure)
    return names


def _look(index: int) -> Tuple[str, str]:
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _points(curve: Curve, phase: str, name: str) -> Tuple[List[float], List[float]]:
    """Epochs, counted over all KD stages, and values of one statistic; a NaN between stages breaks the line.

    (A statistic such as ``loss`` means something else in each stage.)  Both are empty if no value is finite.
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


def _draw_panel(axis, name: str, curves: Sequence[Curve], labels: List[str]) -> None:
    drawn: List[float] = []
    for curve in (c for c in curves if c.stages):
        colour, marker = _look(labels.index(curve.label))
        for phase, style, alpha in (("train", "--", 0.6), ("valid", "-", 0.95)):
            epochs, values = _points(curve, phase, name)
            drawn += filter(math.isfinite, values)
            every = max(1, len(epochs) // 8)
            axis.plot(epochs, values, style, color=colour, alpha=alpha, lw=1.3, marker=marker, ms=4, markevery=every)
        done = 0
        for history in curve.stages[:-1]:
            done += max(history)
            axis.axvline(done + 0.5, color=colour, linestyle=":", linewidth=0.8, alpha=0.7)
    if drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
        axis.set_yscale("log")
    axis.set_title(name, fontsize=11)
    axis.set_xlabel("epoch")
    axis.tick_params(labelbottom=True)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(True, color="0.9", linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
