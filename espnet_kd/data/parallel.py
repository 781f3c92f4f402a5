"""One way to map a function over many items in several processes, with a progress bar."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Callable, Deque, Iterable, Iterator, List, Optional, Sized, TypeVar

from espnet_kd.cli import UserError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 16  # items that a process gets at a time


def start_worker() -> None:
    """Initialise a worker process."""
    # Ctrl-C reaches the whole process group; only the parent reports it, and stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent()


def leave_with_parent() -> None:
    """End this process when its parent ends. A killed parent cannot stop its workers, which would continue."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(process: BaseProcess) -> None:
    """Wait until ``process`` has ended, and then end this one."""
    process.join()
    os._exit(1)


def _work_all(work: Callable[[Item], Result], items: List[Item]) -> List[Result]:
    return [work(item) for item in items]


def map_with_bar(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    nj: int,
    desc: str,
    unit: str = "utt",
    total: Optional[int] = None,
) -> Iterator[Result]:
    """Yield ``work(item)`` in the order of ``items``; ``work`` has to be importable by name where ``nj`` > 1.

    Only a few items for each process are in memory at a time. ``total`` is their number for the progress bar, if
    ``items`` has no length.

    Raises:
        UserError: ``work`` raised it, a worker process died, or ``nj`` is below 1.
    """
    from tqdm import tqdm

    if nj < 1:
        raise UserError(f"--nj is {nj}; it must be 1 or more")
    if total is None and isinstance(items, Sized):
        total = len(items)
    options = {"total": total, "desc": desc, "unit": unit, "mininterval": 1.0}
    if nj == 1:
        yield from tqdm(map(work, items), **options)
        return
    # spawn: a fork would inherit the threads of whatever library is loaded here.
    context = multiprocessing.get_context("spawn")
    waiting: Deque[Future] = deque()
    source = iter(items)
    try:
        with ProcessPoolExecutor(nj, mp_context=context, initializer=start_worker) as pool, tqdm(**options) as bar:
            try:
                while True:
                    while len(waiting) < 4 * nj and (chunk := list(itertools.islice(source, CHUNK))):
                        waiting.append(pool.submit(_work_all, work, chunk))
                    if not waiting:
                        break
                    for result in waiting.popleft().result():
                        yield result
                        bar.update()
            finally:
                for future in waiting:
                    future.cancel()
    except BrokenProcessPool as e:
        raise UserError(f"{desc}: a worker process died, perhaps out of memory; try a smaller --nj") from e
