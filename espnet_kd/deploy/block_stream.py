"""A streaming student in onnxruntime: it cuts arriving audio into blocks and carries the state on; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.deploy.backends import MODEL, read_about, text_of
from espnet_kd.deploy.session import onnx_session


@dataclass
class Geometry:
    """Sizes in a stream: a block is computed from a window of samples; blocks begin every ``hop`` frames."""

    block: int  #: frames in a block
    hop: int  #: frames from a block to the next
    look_ahead: int  #: frames at the end of a block that serve only as context
    stride: int  #: samples from a frame to the next
    receptive: int  #: samples that one frame is computed from
    reach: int  #: samples that the audio is reflected by at its ends
    width: int  #: dimension of a context vector
    layers: int

    @property
    def offset(self) -> int:
        """Frames at the beginning of a block whose outputs come from earlier blocks, except in the first block."""
        return self.block - self.look_ahead - self.hop

    @property
    def window(self) -> int:
        """Samples that a block is computed from."""
        return self.receptive + (self.block - 1) * self.stride

    def frames(self, samples: int) -> int:
        """Number of frames in ``samples`` samples, reflections included."""
        return max((samples - self.receptive) // self.stride + 1, 0)


class Windows:
    """Computes log-probabilities of audio that arrives in pieces, with a graph of `espnet_kd.deploy.block_graph`."""

    def __init__(self, session: Any, geometry: Geometry, vocabulary: int):
        self._session, self._geometry, self._vocabulary = session, geometry, vocabulary
        g = geometry
        self._held = np.zeros(0, dtype=np.float32)  # samples from the beginning of the next block on
        self._tail = np.zeros(0, dtype=np.float32)  # the last samples, which are reflected at the end
        self._begun, self._step = False, 0
        self._state: Dict[str, np.ndarray] = {
            "mean": np.zeros((1, 1, g.width), np.float32),
            "context": np.zeros((1, g.layers, g.width), np.float32),
        }

    def push(self, samples: np.ndarray, final: bool) -> np.ndarray:
        """Take (n,) samples and give the (T, V) log-probabilities of the frames that are known now."""
        g, found = self._geometry, [np.zeros((0, self._vocabulary), dtype=np.float32)]
        samples = np.asarray(samples, dtype=np.float32)
        self._held = np.concatenate([self._held, samples])
        self._tail = np.concatenate([self._tail, samples])[-(g.reach + 1) :]
        if not self._begun and len(self._held) > g.reach:
            self._held = np.concatenate([self._held[g.reach : 0 : -1], self._held])
            self._begun = True
        if not self._begun:
            return found[0]
        if final:
            self._held = np.concatenate([self._held, self._tail[-2::-1]])
        # A block is not the last one if a frame follows it; the last block is computed below.
        while g.frames(len(self._held)) > g.block:
            out = self._run(g.block, short=False)
            found.append(out[0 if self._step == 0 else g.offset : g.offset + g.hop])
            self._held = self._held[g.hop * g.stride :]
            self._step += 1
        rest = g.frames(len(self._held)) if final else 0
        if rest:
            out = self._run(rest, short=self._step == 0)
            found.append(out[0 if self._step == 0 else g.offset : rest])
        return np.concatenate(found)

    def _run(self, frames: int, short: bool) -> np.ndarray:
        """Run the graph on the next window, which has ``frames`` frames."""
        window = np.zeros((1, self._geometry.window), dtype=np.float32)
        part = self._held[: self._geometry.window]
        window[0, : len(part)] = part
        numbers = {"frames": frames, "step": self._step, "short": int(short)}
        inputs = {"window": window, **{k: np.array([v], dtype=np.int64) for k, v in numbers.items()}, **self._state}
        log_probs, mean, context = self._session.run(None, inputs)
        self._state = {"mean": mean, "context": context}
        return log_probs[0]


class OnnxStreamingStudent:
    """A streaming student from an export of ``--format stream``."""

    def __init__(self, folder: Path, threads: int = 1):
        """Load the export.

        Raises:
            UserError: the export is damaged, or has another format.
        """
        about = read_about(folder)
        if about["format"] != "stream" or not isinstance(about.get("geometry"), dict):
            raise UserError(
                f"{folder} is a graph for whole utterances; --streaming takes an export of --format stream or espnet"
            )
        try:
            self._geometry = Geometry(**about["geometry"])
        except TypeError as e:
            raise UserError(f"{folder / 'student.json'}: geometry: {e}; export the student again") from e
        self.rate, self.frame_shift = about["sampling_rate"], about["frame_shift"]
        self.tokens: List[str] = about["tokens"]
        self.no_text: List[int] = about["no_text"]
        self.to_text = text_of(about, folder)
        self._session = onnx_session(str(folder / MODEL), threads)

    def open(self) -> Windows:
        """Return the computation of a new stream."""
        return Windows(self._session, self._geometry, len(self.tokens))
