"""Measuring times of alternating functions, and peak memory in separate processes."""

from __future__ import annotations

import statistics
import time
from multiprocessing import get_context
from typing import Any, Callable, Dict, List, Mapping

import torch

from espnet_kd import environment
from espnet_kd.cli import UserError

try:
    from tqdm import tqdm
except ImportError:  # with torch only, the loss can still be measured, without a progress bar
    def tqdm(items: Any, **_: Any) -> Any:
        """Return the items unchanged."""
        return items


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> Dict[str, List[float]]:
    """Seconds of each function in each round; the functions take turns, so that a noisy moment affects all alike.

    On a CPU this is CPU time, on which other programs have less influence than on wall time. ``warm_up`` rounds are not
    counted.
    """
    clock = _gpu_clock if torch.cuda.is_available() else time.process_time
    seconds: Dict[str, List[float]] = {name: [] for name in runs}
    for i in tqdm(range(warm_up + rounds), desc=" / ".join(runs), leave=False):
        for name, run in runs.items():
            start = clock()
            run()
            if i >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def median(values: List[float]) -> float:
    """The median, which one slow round does not change."""
    return statistics.median(values)


def peak_memory_of(run: Callable[..., Any], *args: Any) -> int:
    """Peak memory of ``run(*args)`` in bytes, measured in a new process; on a GPU, the memory allocated there.

    Raises:
        UserError: the process died, most likely out of memory.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*args)
        return torch.cuda.max_memory_allocated() - before
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, run, args))
    process.start()
    sender.close()  # the process has the only sender left, so that the pipe ends if it dies
    try:
        return receiver.recv()
    except EOFError as e:
        process.join()
        raise UserError(
            f"the process that measures memory ended with exit code {process.exitcode} (-9: killed, when memory runs "
            "out); free some, or leave the loss out (--only)"
        ) from e
    finally:
        process.join()


def _measure(sender: Any, run: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    run(*args)
    sender.send(environment.peak_memory())
