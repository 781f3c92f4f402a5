"""The common style of all pictures: legible on a screen and on A4, for colour-blind readers and in black and white."""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

from espnet_kd.files import replacing

#: Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too light for paper.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "os^Dv<>P"  # they distinguish lines also in black and white
WIDTH = 6.7  #: inches: the text width of A4, so that type is printed at its size
DPI = 180  # 1206 pixels wide
#: Fonts for tokens that matplotlib's own font lacks; those that are installed are used.
MORE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans CN", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "Microsoft YaHei", "PingFang SC", "Noto Sans"),
)


@contextlib.contextmanager
def picture(path: Path, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Tuple[Any, Any]]:
    """Give a matplotlib Figure and its axes (rows, columns); write them as PNG when the block ends well.

    ``height`` is in inches; ``options`` are those of ``Figure.subplots``. No type is below 9 points.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure  # not pyplot, which keeps figures in memory and looks for a display

    installed = set(font_manager.get_font_names())
    style: Dict[Any, Any] = {
        **{"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 9},
        **{"xtick.labelsize": 9, "ytick.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False},
        **{"grid.color": "0.9", "grid.linewidth": 0.6, "axes.axisbelow": True},
        "text.parse_math": False,  # a token may hold a $
        "font.family": ["DejaVu Sans", *(f for f in MORE_FONTS if f in installed)],
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        with replacing(path, "wb") as f, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a box is drawn for a character without glyph
            figure.savefig(f, format="png")


def add_legend(figure: Any, handles: Optional[Sequence[Any]] = None) -> None:
    """Put a legend below the panels, in two columns where the labels leave room; the picture grows by its height."""
    if handles is None:
        handles = [h for axis in figure.axes for h in axis.get_legend_handles_labels()[0]]
    labels = ["\n".join(textwrap.wrap(str(h.get_label()), 85)) for h in handles]
    columns = 2 if max(map(len, labels), default=0) <= 38 else 1
    lines = sum(label.count("\n") + 1 for label in labels) if columns == 1 else (len(labels) + 1) // 2
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def scale_log(axes: Any, which: str) -> None:
    """Make the ``x`` or ``y`` axis of matplotlib's ``axes`` logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axis.set_minor_formatter(NullFormatter())


def _short(x: float) -> str:
    """A short form of a number for an axis: 2 M, 500 k, 0.005."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if x >= unit:
            return f"{x / unit:g}{name}"
    return f"{x:g}"


def look(index: int) -> Tuple[str, str]:
    """Colour and marker of the n-th line; there are 64 different pairs."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
