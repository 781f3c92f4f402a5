"""Pictures of the models' tokens: spikes over time above a spectrogram, and their distances between models."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from espnet_kd.report.plotting import add_legend, look, picture

SECONDS = 4.0  #: length of the part of an utterance in a picture; tokens of a longer part would not be legible on paper
FARTHEST = 4  #: frames; larger offsets are counted as this one
DYNAMICS = 80  #: dB that the spectrogram shows
_LANES = 3  # lines of token labels above each other


@dataclass
class Track:
    """The outputs of one model for an utterance."""

    label: str
    nonblank: np.ndarray  #: (T,) 1 − p(blank)
    frame_shift: float  #: seconds
    spikes: List[Tuple[float, str]]  #: (seconds, token) of the greedy path, in order


def find_window(tracks: Sequence[Track], duration: float) -> Tuple[float, float]:
    """Start and end in seconds of the window, `SECONDS` long, in which the models differ most."""
    times = {(t, token, i) for i, track in enumerate(tracks) for t, token in track.spikes}
    step = max(track.frame_shift for track in tracks)
    first = [(t, token) for t, token, i in times if i == 0]
    apart = sorted(
        t for t, token, i in times if i and not any(token == other and abs(t - s) < step / 2 for s, other in first)
    )
    if duration <= SECONDS:
        return 0.0, duration
    starts = [max(0.0, min(t - 0.2, duration - SECONDS)) for t in apart] or [0.0]
    begin = max(starts, key=lambda s: sum(s <= t < s + SECONDS for t in apart))
    return begin, begin + SECONDS


def draw_spikes(tracks: Sequence[Track], samples: np.ndarray, rate: int, path: Path) -> Dict[str, int]:
    """Draw each model's 1 − p(blank) with its tokens above the spectrogram of (N,) samples at ``rate`` Hz.

    Dotted lines carry the first track's tokens down to the others.

    Returns:
        {label: tokens drawn}; {} for no audio, and then no file is written.
    """
    if not len(samples) or not tracks:
        return {}
    begin, end = find_window(tracks, len(samples) / rate)
    drawn = {}
    heights = [1.0] * len(tracks) + [0.8]
    options: Dict[str, Any] = {"sharex": True, "gridspec_kw": {"height_ratios": heights, "hspace": 0.05}}
    with picture(path, 1.1 * sum(heights) + 0.3, len(heights), **options) as (figure, axes):
        for i, (axis, track) in enumerate(zip(axes[:, 0], tracks)):
            drawn[track.label] = _draw_track(axis, track, look(i)[0], begin, end)
            for seconds, _ in tracks[0].spikes:
                axis.axvline(seconds, color="0.55", linestyle=":", linewidth=0.7, zorder=0)
        bottom = axes[-1, 0]
        window = min(512, len(samples) // 2 + 1)
        spectrum, _, _, image = bottom.specgram(
            samples + 1e-6, NFFT=window, Fs=rate, noverlap=window // 2, cmap="Greys"
        )  # 1e-6 is added, because digital silence would be −∞ dB
        loudest = 10 * np.log10(spectrum.max())
        image.set_clim(loudest - DYNAMICS, loudest)
        bottom.set_ylabel("Hz")
        bottom.set_xlabel("seconds")
        bottom.set_xlim(begin, end)
    return drawn


def _draw_track(axis, track: Track, colour: str, begin: float, end: float) -> int:
    edges = track.frame_shift * np.arange(len(track.nonblank) + 1)
    axis.stairs(track.nonblank, edges, color=colour, fill=True, alpha=0.35)
    axis.stairs(track.nonblank, edges, color=colour, linewidth=0.9)
    axis.set_ylim(0, 2.65)
    axis.set_yticks([0, 1])
    axis.set_ylabel("1 − p(∅)")
    # The name stands outside the plot, where no token can cover it.
    axis.set_title(track.label, loc="left", pad=2, fontsize=9, color=colour, fontweight="bold")
    free = [begin] * _LANES  # the time from which each lane has room
    visible = [(t, token) for t, token in track.spikes if begin <= t < end]
    for seconds, token in visible:
        token = token.replace("▁", "_")  # SentencePiece's mark is wider than any letter
        width = (0.09 * len(token) + 0.05) * (end - begin) / 6.0  # seconds; 9-point type on a plot of 6 inches
        lane = min(range(_LANES), key=lambda k: (free[k] > seconds, free[k] if free[k] > seconds else k))
        if free[lane] > seconds or seconds + width > end:
            continue  # there is no room for the label; the spike itself is drawn
        free[lane] = seconds + width
        axis.text(seconds, 1.1 + 0.5 * lane, token, fontsize=9, ha="left", va="bottom", clip_on=True)
    return len(visible)


def draw_offsets(offsets: Dict[str, Counter], labels: Sequence[str], path: Path) -> List[str]:
    """Draw, of each {label: {frames later than the teacher: tokens}}, the share of tokens at each offset.

    The place of a label in ``labels`` gives its colour.

    Returns:
        The labels drawn; [] where no token is matched, and then no file is written.
    """
    offsets = {label: counts for label, counts in offsets.items() if sum(counts.values())}
    if not offsets:
        return []
    x = np.arange(-FARTHEST, FARTHEST + 1)
    with picture(path, 2.6) as (figure, axes):
        axis = axes[0, 0]
        for label, counts in offsets.items():
            shares = np.zeros(len(x))
            for k, n in counts.items():
                shares[min(max(k, -FARTHEST), FARTHEST) + FARTHEST] += 100.0 * n / sum(counts.values())
            i = labels.index(label)
            colour, marker = look(i)
            axis.plot(x, shares, ("-", "--", "-.", ":")[i % 4], color=colour, marker=marker, ms=5, lw=1.3, label=label)
        between = [f"{k:+d}".replace("-", "−") if k else "0" for k in x[1:-1]]
        axis.set_xticks(x, [f"≤ −{FARTHEST}", *between, f"≥ +{FARTHEST}"])
        axis.set_xlabel("frames later than the teacher")
        axis.set_ylabel("tokens, %")
        axis.set_ylim(bottom=0)
        axis.grid(True)
        add_legend(figure)
    return list(offsets)
