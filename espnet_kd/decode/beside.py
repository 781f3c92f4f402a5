"""Beam search in other processes than the one that runs the model, so that a GPU does not wait for the search.

The search holds Python's lock, so that threads would take turns. Only the likeliest labels of each
frame, which the search tries, are sent to the processes.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch

from espnet_kd.cli import UserError
from espnet_kd.data.parallel import start_worker
from espnet_kd.decode.beam import BeamSearch, check_batch
from espnet_kd.targets.nbest import Hypotheses

_search: BeamSearch  #: the search of a worker process


class BesideSearch:
    """`BeamSearch` in ``jobs`` processes; log-probabilities may lie on any device."""

    ahead = 4  #: batches that may be searched while the next one is computed

    def __init__(
        self,
        tokens: Sequence[str],
        jobs: int,
        *,
        beam_size_token: Optional[int] = None,
        drop: Sequence[int] = (),
        **options: Any,
    ):
        """Take the number of processes, 1 or more, and the arguments of `BeamSearch`.

        Raises:
            ValueError, UserError: see `BeamSearch`.
        """
        options = {**options, "beam_size_token": beam_size_token, "drop": tuple(drop)}
        BeamSearch(tokens, **options)  # raises errors here, because errors at a worker's start would be lost
        self._jobs, self._tokens, self._drop = jobs, list(tokens), list(drop)
        self._tried = min(beam_size_token or len(self._tokens), len(self._tokens))
        # Not fork: the child would inherit the state of the GPU's driver, but not the driver's threads.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(self._tokens, options))

    def begin(self, log_probs: torch.Tensor, lengths: torch.Tensor) -> Callable[[], List[Hypotheses]]:
        """Start to search a batch, (B, T, V) and (B,) as in `BeamSearch`; the returned function waits for the result.

        Raises:
            ValueError, FloatingPointError: see `BeamSearch`.
            UserError: (when waiting) a process died.
        """
        check_batch(log_probs, lengths, len(self._tokens))
        likely = log_probs.float().index_fill(2, torch.tensor(self._drop, device=log_probs.device), -torch.inf)
        values, labels = (x.cpu().numpy() for x in likely.topk(self._tried, dim=2))
        labels = labels.astype(np.int32)
        utterances = [(values[i, :n], labels[i, :n]) for i, n in enumerate(lengths.tolist())]
        # Utterances are sorted by length in a batch; with this stride each process gets long and short ones.
        shares = [slice(job, None, self._jobs) for job in range(min(self._jobs, len(utterances)))]
        futures = [self._pool.submit(_search_all, utterances[share]) for share in shares]

        def finish() -> List[Hypotheses]:
            found: List[Hypotheses] = [[] for _ in utterances]
            for share, future in zip(shares, futures):
                try:
                    found[share] = future.result()
                except BrokenProcessPool as e:
                    raise UserError("a process of the beam search died (out of memory?); try a smaller --nj") from e
            return found

        return finish

    def __call__(self, log_probs: torch.Tensor, lengths: torch.Tensor) -> List[Hypotheses]:
        """Search a batch, and wait for it."""
        return self.begin(log_probs, lengths)()


def _start(tokens: Sequence[str], options: Dict[str, Any]) -> None:
    """Initialise a worker process."""
    global _search
    start_worker()
    torch.set_num_threads(1)
    _search = BeamSearch(tokens, **options)


def _search_all(utterances: Sequence[tuple]) -> List[Hypotheses]:
    """Search utterances in a worker process, each given by its likeliest labels' values (T, K) and ids (T, K)."""
    found = []
    for values, labels in utterances:
        log_probs = torch.full((1, len(values), _search.vocabulary), -torch.inf)
        log_probs[0].scatter_(1, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(values))
        found += _search(log_probs, torch.tensor([len(values)]))
    return found
