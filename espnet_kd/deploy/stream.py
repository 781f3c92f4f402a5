"""Streaming recognition. Nothing here needs torch."""

from __future__ import annotations

from typing import Callable, List, Protocol

import numpy as np

from espnet_kd.deploy.transcript import Token


class Blocks(Protocol):
    """The computation of one stream."""

    def push(self, samples: np.ndarray, final: bool) -> np.ndarray:
        """Take (n,) samples and give the (T, V) log-probabilities of the frames that are known now."""
        ...


class Streaming(Protocol):
    """A loaded streaming student, from which any number of streams may be opened."""

    rate: int  #: Hz
    frame_shift: float  #: seconds
    tokens: List[str]
    no_text: List[int]
    to_text: Callable[[List[str]], str]

    def open(self) -> Blocks:
        """Return the computation of a new stream."""
        ...


class Stream:
    """Recognition of one piece of audio as it arrives.

    ``text`` and ``tokens`` are the result so far. Later audio changes only the end and confidence of the last token.
    """

    def __init__(self, student: Streaming):
        self.student = student
        self.tokens: List[Token] = []
        self.frames = self.samples = 0
        self._blocks = student.open()
        self._last = 0  # label of the previous frame
        self._sum, self._count = 0.0, 0  # sum and number of the last token's posteriors
        self._ended = False

    @property
    def text(self) -> str:
        """The text recognised so far."""
        return self.student.to_text([t.token for t in self.tokens])

    def accept(self, samples: np.ndarray, final: bool = False) -> np.ndarray:
        """Take (n,) samples at the student's rate; ``final``: these are the last samples.

        Returns:
            (T, V) log-probabilities of the frames that are known now; T may be 0.
        """
        if self._ended:
            raise ValueError("the stream has ended; open another one")
        self._ended = final
        self.samples += len(samples)
        log_probs = self._blocks.push(samples, final)
        self._search(log_probs)
        return log_probs

    def _search(self, log_probs: np.ndarray) -> None:
        """Greedy CTC search over further frames (T, V)."""
        student = self.student
        for row in log_probs:
            label = int(row.argmax())
            start, end = self.frames * student.frame_shift, (self.frames + 1) * student.frame_shift
            if label != 0 and label not in student.no_text:
                if label != self._last:
                    self._sum, self._count = 0.0, 0
                    self.tokens.append(Token(student.tokens[label], round(start, 3), 0.0, 0.0))
                self._sum, self._count = self._sum + float(np.exp(row[label])), self._count + 1
                self.tokens[-1].end = round(end, 3)
                self.tokens[-1].confidence = round(min(self._sum / self._count, 1.0), 4)
            self._last = label
            self.frames += 1
