"""A graph in onnxruntime; nothing here needs torch."""

from __future__ import annotations

from typing import Any, Callable, List, Sequence

import numpy as np

from espnet_kd.cli import UserError

#: Frame shift in seconds that sherpa-onnx assumes for models of its kind "omnilingual".
SHERPA_FRAME = 0.02
Waves = Sequence[np.ndarray]
#: Maps utterances (N_i,) to log-probabilities (T_i, V) of each.
Run = Callable[[Waves], List[np.ndarray]]


def onnx_session(model: Any, threads: int = 1) -> Any:
    """Open an onnxruntime session on the CPU for a model file, or for its bytes.

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
    except Exception as e:  # onnxruntime's exceptions have no common base class
        name = "the graph" if isinstance(model, bytes) else model
        raise UserError(f"onnxruntime cannot load {name}: {str(e).splitlines()[0]}") from e


def pad_waves(waves: Waves) -> np.ndarray:
    """Pad utterances (N_i,) with zeros to a batch (B, N) of float32; N is 1 or more."""
    padded = np.zeros((len(waves), max(1, *(len(w) for w in waves))), dtype=np.float32)
    for row, wave in zip(padded, waves):
        row[: len(wave)] = wave
    return padded


def run_of(session: Any) -> Run:
    """Return a function that runs a graph with the inputs ``speech`` and ``speech_lengths``."""

    def run(waves: Waves) -> List[np.ndarray]:
        lengths = np.array([len(w) for w in waves], dtype=np.int64)
        log_probs, frames = session.run(None, {"speech": pad_waves(waves), "speech_lengths": lengths})
        return [row[:n] for row, n in zip(log_probs, frames)]

    return run


def standardise(wave: np.ndarray) -> np.ndarray:
    """Normalise audio (N,) as sherpa-onnx does for models of its kind "omnilingual"."""
    wave = wave.astype(np.float64)
    return ((wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)).astype(np.float32)


def run_of_sherpa(session: Any, repeats: int) -> Run:
    """Return a function that runs a graph for sherpa-onnx, and keeps the first of the repetitions of every frame."""

    def run(waves: Waves) -> List[np.ndarray]:
        return [session.run(None, {"x": wave[None]})[0][0, ::repeats] for wave in map(standardise, waves)]

    return run
