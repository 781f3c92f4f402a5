"""Checks that a graph has the same outputs as ESPnet, before anything is written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, List, Optional, Sequence

import numpy as np
import torch

from espnet_kd.cli import UserError
from espnet_kd.deploy.graph import example_batch
from espnet_kd.deploy.session import Run, Waves
from espnet_kd.inference.recognise import normalise

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

#: Largest difference of log-probabilities, in nats.
TOLERANCE = 1e-4
#: Log-probabilities in nats below this value count as equal.
FLOOR = -50.0
#: Seconds of the longest utterance of a batch, and numbers of utterances in a batch.
LENGTHS, BATCHES = (0.5, 2.3, 9.7), (1, 3)


def reference_of(model: ESPnetASRModel, volume: Optional[float] = None) -> Run:
    """Return a function that runs ESPnet's own model on each utterance alone."""

    @torch.no_grad()
    def run(waves: Waves) -> List[np.ndarray]:
        found = []
        for wave in waves:
            speech = torch.from_numpy(normalise(wave, volume))[None].clone()
            encoded, _ = model.encode(speech, torch.tensor([len(wave)]))
            encoded = encoded[0] if isinstance(encoded, tuple) else encoded
            found.append(model.ctc.ctc_lo(encoded).log_softmax(dim=-1)[0].numpy())
        return found

    return run


def check_graph(
    run: Run,
    reference: Run,
    *,
    rate: float,
    max_seconds: float,
    lengths: Sequence[float] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    tolerance: float = TOLERANCE,
) -> float:
    """Compare a graph with ESPnet at several lengths, alone and in batches; return the largest difference in nats.

    Args:
        run, reference: the graph, and ESPnet.
        rate: Hz.
        max_seconds: longest audio that the graph accepts.
        lengths: seconds of the longest utterance of each batch.
        batches: utterances in a batch.
        tolerance: nats.

    Raises:
        UserError: the graph fails, or differs by more than ``tolerance``; the message has length and difference.
    """
    largest = 0.0
    for number, seconds in enumerate(min(s, max_seconds) for s in lengths):
        for size in batches:
            shares = (1.0, 0.55, 0.8)[:size]
            _, _, waves = example_batch(rate, [seconds * share for share in shares], seed=number)
            arrays = [w.numpy() for w in waves]
            where = f"at {seconds:g} s, {size} in a batch"
            try:
                found = run(arrays)
            except Exception as e:  # onnxruntime's exceptions have no common base class
                raise UserError(f"the graph fails {where}: {str(e).splitlines()[0]}; nothing was written") from e
            for one, other in zip(found, reference(arrays)):
                if one.shape != other.shape:
                    raise UserError(f"the graph gives {one.shape} {where}, ESPnet {other.shape}; nothing was written")
                largest = max(largest, difference(one, other))
                if not largest <= tolerance:
                    raise UserError(
                        f"the graph's log-probabilities differ from ESPnet's by {largest:.3g} {where}, more than "
                        f"{tolerance:g}; nothing was written"
                    )
    return largest


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of two (T, V) log-probabilities in nats; infinite if any value is not finite."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return math.inf
    return float(np.abs(one.clip(min=FLOOR) - other.clip(min=FLOOR)).max(initial=0.0))
