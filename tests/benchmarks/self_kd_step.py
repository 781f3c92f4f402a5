"""Time a self-KD training step against a plain one of the same encoder, and count what self-KD adds to train.

    OMP_NUM_THREADS=1 python tests/benchmarks/self_kd_step.py --vocabulary 500 5000

Each step is forward, backward and optimizer step on random speech, plain and self-KD in turn. The figure is the median
of the ratios of neighbouring steps, so that a slow moment of the machine affects both. Times are CPU time of one
thread, which does not include the time of other processes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import List, Optional, Sequence

import torch
from tqdm import tqdm

from espnet_kd.bench import models
from espnet_kd.distill.model import ESPnetASRKDModel
from espnet_kd.distill.page import load_page
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.schedule import Progress


def measure(vocabulary: int, args: argparse.Namespace) -> None:
    """Measure both steps for one size of the vocabulary, and print one line."""
    torch.manual_seed(0)
    plain = models.random_model(models.config(vocabulary, (args.blocks, args.width)))
    page = load_page("self_kd")
    page.teacher = "none"  # the encoder's initial weights do not change the times
    page.stages[0].objectives = [o for o in page.stages[0].objectives if o.name == "self_kd"]
    progress = Progress(epoch=5, max_epoch=10)
    student = ESPnetASRKDModel.adopt(copy.deepcopy(plain), make_plan(page, 10), None, progress, models.RATE)
    batch = models.batch(args.batch, args.seconds, vocabulary)
    kinds = {"plain": plain.train(), "self_kd": student.train()}
    optimizers = {k: torch.optim.Adam(m.parameters(), lr=1e-4) for k, m in kinds.items()}
    times = {k: [] for k in kinds}
    for step in tqdm(range(args.steps + 2), desc=f"V = {vocabulary}"):
        for name in sorted(kinds, reverse=bool(step % 2)):
            start = time.process_time()
            loss = kinds[name](**models.copied(batch))[0]
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            times[name].append(time.process_time() - start)
    ratios: List[float] = [a / b for a, b in zip(times["self_kd"][2:], times["plain"][2:])]
    low, _, high = statistics.quantiles(ratios, n=4)
    added = sum(p.numel() for p in student.parameters()) - sum(p.numel() for p in plain.parameters())
    print(
        f"V = {vocabulary}: plain step {statistics.median(times['plain'][2:]):.3f} s, self-KD / plain "
        f"{statistics.median(ratios):.3f} (quartiles {low:.3f}, {high:.3f}; {args.steps} pairs), parameters added in "
        f"training {added} = one linear layer {args.width} × {vocabulary} + {vocabulary}"
    )
    assert added == (args.width + 1) * vocabulary


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=144)
    parser.add_argument("--batch", type=int, default=16, help="utterances")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each utterance")
    parser.add_argument("--steps", type=int, default=15, help="pairs of steps")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for vocabulary in args.vocabulary:
        measure(vocabulary, args)


if __name__ == "__main__":
    main()
