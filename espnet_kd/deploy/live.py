"""Transcribing with a streaming student: text as soon as it is known, and how long it took."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Union

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.deploy import reading
from espnet_kd.deploy.backends import ABOUT
from espnet_kd.deploy.stream import Stream, StreamingStudent
from espnet_kd.deploy.transcript import Segment, Transcript, render

#: Seconds of audio that are taken at once.
CHUNK = 0.1


class LiveTranscriber:
    """A streaming student that turns audio into text as it arrives."""

    def __init__(self, model: Union[str, Path], *, threads: int = 1, longest: Optional[float] = None):
        """Load a student for ESPnet; ``longest`` does not apply, a stream has no longest.

        Raises:
            UserError: there is none, or one that needs all of the audio at once.
        """
        from espnet_kd.targets.experiment import find_experiment, load_model

        if (Path(model) / ABOUT).is_file():
            raise UserError(f"{model} is a graph, which takes whole utterances; --streaming takes an export for ESPnet")
        if longest is not None:
            raise UserError("--longest_seconds does not go with --streaming, which takes audio of any length")
        config, model_file = find_experiment(model)
        self.student = StreamingStudent(*load_model(config, model_file), config.parent)
        #: Called with each piece of text when it is known.
        self.on_text: Optional[Callable[[str], None]] = None

    def __call__(self, file: str) -> Transcript:
        """Recognise a file, or standard input (``-``) as it arrives.

        Raises:
            UserError: the file cannot be read.
        """
        student = self.student
        live = file == reading.STANDARD_INPUT
        blocks = reading.read_live(student.rate, CHUNK) if live else reading.read_blocks(file, student.rate)
        stream, latencies, shown = Stream(student), Latencies(student.rate), ""
        pieces = chunks(blocks, int(CHUNK * student.rate)) if not live else blocks
        final = np.zeros(0, dtype=np.float32)
        for piece in pieces:
            shown = self._step(stream, piece, False, latencies, shown)
        self._step(stream, final, True, latencies, shown)
        seconds = round(stream.samples / student.rate, 3)
        logging.info("%s: %s", file, latencies)
        return Transcript(file, seconds, [Segment(0.0, seconds, stream.text, stream.tokens)])

    def _step(self, stream: Stream, piece: np.ndarray, final: bool, latencies: Latencies, shown: str) -> str:
        begun, known = time.perf_counter(), len(stream.tokens)
        stream.accept(piece, final)
        latencies.add(stream, stream.tokens[known:], time.perf_counter() - begun)
        text = stream.text
        if self.on_text is not None and text != shown:
            self.on_text(text)
        return text

    def render(self, transcript: Transcript, form: str) -> str:
        """A transcript as ``text``, ``json``, ``srt`` or ``vtt``."""
        return render(transcript, form, self.student.to_text)


class Latencies:
    """How long after its end in the audio a token is known, were the audio arriving now."""

    def __init__(self, rate: int):
        self._rate = rate
        self.tokens: List[float] = []  #: seconds, of each token
        self.computing = 0.0  #: seconds
        self.longest = 0.0  #: of one step, seconds
        self.seconds = 0.0

    def add(self, stream: Stream, tokens: list, computed: float) -> None:
        """Note the tokens that came of a step, and the seconds that it took."""
        self.seconds = stream.samples / self._rate
        self.computing += computed
        self.longest = max(self.longest, computed)
        self.tokens += [max(self.seconds - token.end, 0.0) + computed for token in tokens]

    def __str__(self) -> str:
        factor = self.computing / self.seconds if self.seconds else 0.0
        shown = f"{self.seconds:.2f} s of audio, real-time factor {factor:.4f}"
        shown += f", longest step {1000 * self.longest:.0f} ms"
        if not self.tokens:
            return f"{shown}, no token"
        first, last, mean = self.tokens[0], self.tokens[-1], sum(self.tokens) / len(self.tokens)
        shown += f"; latency of the first token {1000 * first:.0f} ms, of the last {1000 * last:.0f}"
        return f"{shown}, mean {1000 * mean:.0f}"


def chunks(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the samples of blocks in pieces of ``size``, the last one shorter."""
    held = np.zeros(0, dtype=np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        whole = len(held) // size * size
        for start in range(0, whole, size):
            yield held[start : start + size]
        held = held[whole:]
    if len(held):
        yield held
