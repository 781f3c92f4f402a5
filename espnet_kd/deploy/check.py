"""Whether a graph gives what ESPnet gives, tried before anything is written."""

from __future__ import annotations

import math
from typing import Any, Callable, List, Optional, Sequence

import numpy as np
import torch

from espnet_kd.cli import UserError
from espnet_kd.decode.recognise import normalise
from espnet_kd.deploy.graph import example_batch

#: Largest difference of log-probabilities, in nats.
TOLERANCE = 1e-4
#: Nats below which a probability is none: two values below are equal.
FLOOR = -50.0
#: Seconds of the longest utterance of a batch, and the utterances of a batch.
LENGTHS, BATCHES = (0.5, 2.3, 9.7), (1, 3)
Waves = Sequence[np.ndarray]
#: Maps utterances (N_i,) to log-probabilities (T_i, V) of each.
Run = Callable[[Waves], List[np.ndarray]]


def onnx_session(model: Any, threads: int = 1) -> Any:
    """An onnxruntime session on the CPU of a file, or of its bytes.

    Raises:
        UserError: onnxruntime is not installed, or cannot load the model.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise UserError("onnxruntime is not installed: pip install 'espnet_kd[onnx]'") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # of onnxruntime's own kinds, which have no common base
        name = "the graph" if isinstance(model, bytes) else model
        raise UserError(f"onnxruntime cannot load {name}: {str(e).splitlines()[0]}") from e


def pad(waves: Waves) -> np.ndarray:
    """(B, N) float32 of utterances (N_i,), with zeros; N is 1 or more."""
    padded = np.zeros((len(waves), max(1, *(len(w) for w in waves))), dtype=np.float32)
    for row, wave in zip(padded, waves):
        row[: len(wave)] = wave
    return padded


def run_of(session: Any) -> Run:
    """What a session of a graph with ``speech`` and ``speech_lengths`` gives."""

    def run(waves: Waves) -> List[np.ndarray]:
        lengths = np.array([len(w) for w in waves], dtype=np.int64)
        log_probs, frames = session.run(None, {"speech": pad(waves), "speech_lengths": lengths})
        return [row[:n] for row, n in zip(log_probs, frames)]

    return run


def reference_of(model: torch.nn.Module, volume: Optional[float] = None) -> Run:
    """What ESPnet's own model gives to each utterance alone."""

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
    batches: Sequence[int] = BATCHES,
    tolerance: float = TOLERANCE,
) -> float:
    """Compare a graph with ESPnet at three lengths, alone and in batches; return the largest difference in nats.

    Raises:
        UserError: the graph fails, or differs by more than ``tolerance``; where, and by how much.
    """
    largest = 0.0
    for number, seconds in enumerate(min(s, max_seconds) for s in LENGTHS):
        for size in batches:
            shares = (1.0, 0.55, 0.8)[:size]
            _, _, waves = example_batch(rate, [seconds * share for share in shares], seed=number)
            waves = [w.numpy() for w in waves]
            where = f"at {seconds:g} s, {size} in a batch"
            try:
                found = run(waves)
            except Exception as e:  # of onnxruntime's own kinds, which have no common base
                raise UserError(f"the graph fails {where}: {str(e).splitlines()[0]}; nothing was written") from e
            for one, other in zip(found, reference(waves)):
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
    """Largest difference of two (T, V) log-probabilities in nats; infinite where one of them is no number."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return math.inf
    return float(np.abs(one.clip(min=FLOOR) - other.clip(min=FLOOR)).max(initial=0.0))
