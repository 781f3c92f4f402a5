"""One way to map a function over many items in several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, Iterator, Sequence, TypeVar

from espnet_kd.cli import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def _ignore_interrupt() -> None:
    # Ctrl-C reaches the whole process group; the parent alone speaks, and stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def map_with_bar(
    work: Callable[[Item], Result], items: Sequence[Item], *, nj: int, desc: str, unit: str = "utt"
) -> Iterator[Result]:
    """Yield ``work(item)`` in the order of ``items``; ``work`` has to be importable by name where ``nj`` > 1.

    Raises:
        UserError: from ``work``, or where a worker process died.
    """
    from tqdm import tqdm

    options = {"total": len(items), "desc": desc, "unit": unit, "mininterval": 1.0}
    if nj == 1:
        yield from tqdm(map(work, items), **options)
        return
    # spawn: a fork would inherit the threads of whatever library is loaded here.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(nj, mp_context=context, initializer=_ignore_interrupt) as pool:
            yield from tqdm(pool.map(work, items, chunksize=16), **options)
    except BrokenProcessPool as e:
        raise UserError(f"{desc}: a worker process died, for want of memory perhaps; try a smaller --nj") from e
