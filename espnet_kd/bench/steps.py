"""The time of a training step: with CTC only, with a running teacher, and with cached targets."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import torch

from espnet_kd.bench import models
from espnet_kd.bench.timing import interleaved, median


def measure(
    vocabulary: int,
    rounds: int,
    *,
    student: models.Size = (4, 96),
    teacher: models.Size = (6, 144),
    utts: int = 16,
    seconds: float = 5.0,
    nonblank: float = 0.2,
    method: str = "progressive_fkl",
) -> Dict[str, float]:
    """Ratios of steps (forward, backward, optimizer) of one student in the last KD stage of a method.

    On a CPU, cached targets are read inside the step, because CPU time is measured. On a GPU they come with the batch,
    as from the data loader's workers, and the step copies them.

    Args:
        rounds: counted rounds of the interleaved runs; the medians of the rounds' ratios are given.
        student, teacher: blocks and width of two Conformers.
        utts, seconds: batch and length of its utterances.
        nonblank: share of the frames on which the teacher outputs a token.

    Returns:
        ``cached_step``: KD step from the cache / plain step; ``online_step``: KD step with the teacher beside / (plain
        step + one teacher forward); seconds of each; ``cache_bytes`` per frame of this cache, with the hidden states
        that the method reads, and ``cache_bytes_per_hour`` of audio.
    """
    from espnet_kd.distill.model import ESPnetASRKDModel
    from espnet_kd.distill.page import load_page
    from espnet_kd.distill.plan import make_plan
    from espnet_kd.distill.schedule import Progress
    from espnet_kd.distill.target_cache import make_cache
    from espnet_kd.targets.cached import CachedTeacher
    from espnet_kd.targets.loading import BROUGHT, to_plain
    from espnet_kd.targets.online import OnlineTeacher
    from espnet_kd.targets.teacher import Teacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    data = models.batch(utts, seconds, vocabulary)
    plain = models.random_model(models.config(vocabulary, student))
    page = load_page(method)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        experiment = models.save_experiment(root / "teacher", models.config(vocabulary, teacher), data, nonblank)
        data_dir = models.save_data_dir(root / "data", data)
        make_cache(str(experiment), [method], [str(data_dir)], str(root / "targets"))
        online, cached = OnlineTeacher(experiment), CachedTeacher(root / "targets")
        teachers: Dict[str, Teacher] = {"online": online, "cached": cached}
        kd = {
            name: ESPnetASRKDModel.adopt(
                copy.deepcopy(plain), make_plan(page, 10), targets, Progress(epoch=9, max_epoch=10), models.RATE
            )
            for name, targets in teachers.items()
        }
        plain.to(device)
        for model in kd.values():
            model.to(device)
        brought: Dict[str, Any] = {"text_lengths": data["text_lengths"].tolist()}
        batches = {"plain": data, **dict.fromkeys(kd, {**data, BROUGHT: brought})}
        if device != "cpu":
            taps = [tap for _, _, taps in kd["cached"].parts(train=False) for tap in taps or ()]
            targets = to_plain(cached.read(data["utt_id"], taps))
            batches["cached"] = {**data, BROUGHT: {**brought, "targets": targets}}
        runs: Dict[str, Callable[[], Any]] = {
            name: _step(m, batches[name], device) for name, m in {"plain": plain, **kd}.items()
        }
        inputs = models.copied(data, device)
        runs["teacher"] = lambda: online.targets((), inputs["speech"], inputs["speech_lengths"])
        times = interleaved(runs, rounds)
        counts = cached.manifest.counts
    both = [p + t for p, t in zip(times["plain"], times["teacher"])]
    return {
        "cached_step": median([c / p for c, p in zip(times["cached"], times["plain"])]),
        "online_step": median([o / b for o, b in zip(times["online"], both)]),
        **{f"{name}_seconds": median(values) for name, values in times.items()},
        "cache_bytes": counts["bytes"] / counts["frames"],
        "cache_bytes_per_hour": counts["bytes"] / (utts * seconds) * 3600,
    }


def _step(model: torch.nn.Module, data: Dict[str, Any], device: str) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        loss = model(**models.copied(data, device))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def sizes(text: str) -> Tuple[int, int]:
    """``6x144`` → (6, 144), for a command line (ValueError)."""
    blocks, _, width = text.partition("x")
    return int(blocks), int(width)
