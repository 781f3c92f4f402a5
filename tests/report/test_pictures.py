"""Each drawing function returns the names of what it drew, and the picture is not empty."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from espnet_kd.report.compare import Kind, Rate
from espnet_kd.report.curves import Curve, draw_curves
from espnet_kd.report.plotting import DPI, WIDTH, add_legend, picture
from espnet_kd.report.spikes import SECONDS, Track, draw_offsets, draw_spikes, find_window
from espnet_kd.report.tradeoff import draw_tradeoff


def check(path: Path) -> None:
    """Assert that a picture has the width of a page and is not blank."""
    pixels = imread(path)
    assert abs(pixels.shape[1] - WIDTH * DPI) <= 1 and pixels[..., :3].std() > 0.05


def kind(label, params, rtf, error, testset="test"):
    row = {"params": params, "rtf": rtf, "testset": testset}
    return Kind(label, [row], {unit: Rate(error, error - 1, error + 1) for unit in ("cer", "wer")}, rtf=rtf)


def history(epochs, **losses):
    return {e: {phase: {k: v / e for k, v in losses.items()} for phase in ("train", "valid")} for e in range(1, epochs)}


def test_curves(tmp_path):
    curves = [
        Curve("plain", [history(5, loss=3.0, loss_ctc=9.0, loss_scale=1.0, acc=1.0)]),
        Curve("kl, $x$ 漢", [history(3, loss=1e-3), history(6, loss=900.0, loss_kd=math.nan)]),
    ]
    names = draw_curves(curves, ["plain", "kl, $x$ 漢"], tmp_path / "a.png")
    assert names == ["loss", "loss_ctc"]  # only losses, and only with a finite value
    check(tmp_path / "a.png")
    for curve in (Curve("a"), Curve("a", [history(2, loss=3.0)])):  # fewer than two points are no curve
        assert draw_curves([curve], ["a"], tmp_path / "b.png") == [] and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("key", ["params", "rtf"])
def test_tradeoff(tmp_path, key):
    labels = ["teacher", "plain", "kl"]
    kinds = [kind("teacher", 9_000_000, 0.01, 8), kind("plain", 300_000, 0.001, 12), kind("kl", 300_000, 0.001, 10)]
    kinds += [kind("plain", 300_000, 0.001, 14, "other"), kind("kl", None, None, 9, "other")]
    drawn = draw_tradeoff(kinds, key, labels, tmp_path / "a.png")
    assert drawn == {"test": labels}  # the other test set has a single point
    check(tmp_path / "a.png")
    for few in (kinds[-1:], kinds[1:3]):  # first: size and speed unknown; then: all the same
        assert draw_tradeoff(few, key, labels, tmp_path / "b.png") == {} and not (tmp_path / "b.png").exists()


def track(label, *spikes, frames=50, frame_shift=0.04):
    return Track(label, np.linspace(0, 1, frames), frame_shift, [*spikes])


def test_spikes(tmp_path):
    samples = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    tracks = [track("teacher", (0.4, "▁A"), (0.44, "$"), (1.0, "漢")), track("kl", (0.48, "▁A"), (5.0, "B"))]
    assert draw_spikes(tracks, samples, 16000, tmp_path / "a.png") == {"teacher": 3, "kl": 1}
    check(tmp_path / "a.png")
    assert draw_spikes(tracks, samples[:0], 16000, tmp_path / "b.png") == {} and not (tmp_path / "b.png").exists()
    draw_spikes(tracks, np.zeros(100, dtype=np.float32), 16000, tmp_path / "c.png")  # silence, shorter than a window
    check(tmp_path / "c.png")


def test_the_window_is_where_models_differ():
    same = [(float(t), "A") for t in range(20)]
    assert find_window([track("t", *same), track("s", *same)], 20.0) == (0.0, SECONDS)
    moved = [(t + (0.1 if 9 < t < 12 else 0.0), "A") for t, _ in same]
    begin, end = find_window([track("t", *same), track("s", *moved)], 20.0)
    assert begin < 10.1 and end > 11.1 and end - begin == SECONDS
    begin, end = find_window([track("t", *same), track("s", *same[:-1], (19.9, "B"))], 20.0)
    assert (begin, end) == (20.0 - SECONDS, 20.0)
    assert find_window([track("t"), track("s")], 1.5) == (0.0, 1.5)


def test_offsets(tmp_path):
    labels = ["teacher", "plain", "kl"]
    drawn = draw_offsets({"plain": Counter({0: 3, -9: 1}), "kl": Counter()}, labels, tmp_path / "a.png")
    assert drawn == ["plain"]
    check(tmp_path / "a.png")
    assert draw_offsets({"kl": Counter()}, labels, tmp_path / "b.png") == [] and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "label", ["plain", "progressive_fkl, KD stages 3 (student_progressive_fkl_3_cached)", "x y " * 60]
)
def test_legends_fit_the_picture(label, tmp_path):
    with picture(tmp_path / "a.png", 2.0) as (figure, axes):
        for i in range(5):
            axes[0, 0].plot([0, 1], [0, i], label=f"{label} {i}")
        add_legend(figure)
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
        assert axes[0, 0].get_window_extent().height > 0.5 * 72  # the panel stays large enough
