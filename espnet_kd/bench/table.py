"""All measurements of ``asr_kd_bench``, their headline ratios and their table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from espnet_kd.environment import processor

#: Rows of the table: key of a ratio, its meaning.
TABLE = (
    ("cached_step", "KD step from the cache / plain step"),
    ("online_step", "KD step with the teacher / (plain step + teacher forward)"),
    ("fkl_time", "factorized KL beside CTC: extra time, plainly written / ours"),
    ("fkl_memory", "factorized KL beside CTC: extra peak memory, plainly written / ours"),
    ("fkl_bandwidth", "factorized KL alone: bytes it must move in a second / bytes a copy moves"),
    ("cache_bytes", "cache, bytes per frame"),
    ("cache_bytes_per_hour", "cache, bytes per hour of audio"),
    ("greedy", "greedy decoding: asr_inference / ours, time"),
    ("beam", "beam search of equal width: asr_inference / ours, time"),
    ("beam_for_greedy", "asr_inference of width 1 / our beam search, time"),
)


def measure(parts: Sequence[str], args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Measure each part; the results contain the options that were used."""
    import torch

    torch.set_num_threads(1)
    measured: List[Dict[str, Any]] = []
    if "steps" in parts:
        from espnet_kd.bench import steps

        for vocabulary in args.vocabulary:
            measured.append({"part": "steps", "vocabulary": vocabulary, **steps.measure(vocabulary, args.rounds)})
    if "loss" in parts:
        from espnet_kd.bench import loss

        for share in args.nonblank:
            measured.append({"part": "loss", "nonblank": share, **loss.measure(share, args.rounds)})
    if "decoding" in parts:
        from espnet_kd.bench import decoding

        found = decoding.measure(
            Path(args.expdir),
            Path(args.data_dir),
            args.rounds,
            beam_size=args.beam_size,
            beam_size_token=args.beam_size_token,
            most=args.most,
            join_seconds=args.join_seconds,
        )
        searches = {name: getattr(args, name) for name in ("beam_size", "beam_size_token", "join_seconds")}
        measured.append({"part": "decoding", **searches, **found})
    return measured


def headline(measured: Sequence[Dict[str, Any]]) -> Dict[str, Optional[float]]:
    """The ratios by their names, for the first of several vocabularies or shares. None: hidden by noise."""
    return {key: next(m[key] for m in measured if key in m) for key, _ in TABLE if any(key in m for m in measured)}


def table(measured: Sequence[Dict[str, Any]]) -> str:
    """The ratios as a Markdown table, with the options that were used and the machine."""
    from espnet_kd.bench.decoding import PAIRS  # imports torch

    rows: List[Tuple[str, str, str]] = []
    for m in measured:
        what = ", ".join(
            f"{k} = {m[k]:g}"
            for k in ("vocabulary", "nonblank", "beam_size", "beam_size_token", "join_seconds")
            if m.get(k)
        )
        rows += [(meaning, what, shown(m[key])) for key, meaning in TABLE if key in m]
        for key, name in (("greedy", "greedy"), ("beam", "beam"), ("beam_for_greedy", "our beam, its width 1")):
            if f"wer_{key}_difference" in m:
                ours, stock = (m[f"wer_{search}"] for search in PAIRS[key])
                difference, low, high = m[f"wer_{key}_difference"]
                wers = f"{ours:.2f} − {stock:.2f} = {difference:.2f} [{low:.2f}, {high:.2f}]"
                rows.append((f"WER in percent, {name}: ours − asr_inference [95 % interval]", what, wers))
                likelier = " / ".join(map(str, m[f"likelier_{key}"]))
                rows.append((f"likelier texts found, {name}: by ours / by asr_inference", what, likelier))
    lines = ["| | with | ratio |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in machine().items())])


def shown(value: Optional[float]) -> str:
    """Format a number of the table."""
    if value is None:
        return "too noisy: give more --rounds"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def machine() -> Dict[str, str]:
    """Processor and versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        espnet = version("espnet")
    except PackageNotFoundError:  # measuring only the loss does not need it
        espnet = "not installed"

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, one thread",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "ESPnet": espnet,
    }
