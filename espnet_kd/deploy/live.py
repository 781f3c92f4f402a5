"""Transcription with a streaming student: text as soon as it is recognised, and its latency."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Optional, Tuple, Union

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.deploy import reading
from espnet_kd.deploy.backends import ABOUT
from espnet_kd.deploy.stream import Stream, Streaming
from espnet_kd.deploy.transcript import Segment, Transcript, render

#: Seconds of audio that are taken at once.
CHUNK = 0.1


class LiveTranscriber:
    """A streaming student that turns audio into text as it arrives."""

    def __init__(self, model: Union[str, Path], *, threads: int = 1, longest: Optional[float] = None):
        """Load a student; ``longest`` must be None, because a stream may have any length.

        Raises:
            UserError: there is no student, or it needs all of the audio at once.
        """
        if longest is not None:
            raise UserError("--longest_seconds does not go with --streaming, which takes audio of any length")
        self.student = _load(Path(model), threads)
        #: Called with the whole text so far whenever it has grown.
        self.on_text: Optional[Callable[[str], None]] = None
        self.latencies: Optional[Latencies] = None  #: latencies in the last file

    def __call__(self, file: str) -> Transcript:
        """Recognise a file, or standard input (``-``) as it arrives.

        Raises:
            UserError: the file cannot be read.
        """
        rate = self.student.rate
        if file == reading.STANDARD_INPUT:
            pieces = reading.read_live(rate, CHUNK)
        else:
            pieces = chunks(reading.read_blocks(file, rate), int(CHUNK * rate))
        transcript, self.latencies = self.follow(pieces, file)
        return transcript

    def follow(self, pieces: Iterable[np.ndarray], name: str = "") -> Tuple[Transcript, Latencies]:
        """Recognise pieces of samples (n,) as they arrive."""
        rate = self.student.rate
        stream, latencies = Stream(self.student), Latencies(rate)
        for piece in pieces:
            self._step(stream, piece, False, latencies)
        self._step(stream, np.zeros(0, dtype=np.float32), True, latencies)
        seconds = round(stream.samples / rate, 3)
        return Transcript(name, seconds, [Segment(0.0, seconds, stream.text, stream.tokens)]), latencies

    def _step(self, stream: Stream, piece: np.ndarray, final: bool, latencies: Latencies) -> None:
        begun, known = time.perf_counter(), len(stream.tokens)
        stream.accept(piece, final)
        latencies.add(stream, stream.tokens[known:], time.perf_counter() - begun)
        if self.on_text is not None and len(stream.tokens) > known:
            self.on_text(stream.text)

    def render(self, transcript: Transcript, form: str) -> str:
        """A transcript as ``text``, ``json``, ``srt`` or ``vtt``."""
        return render(transcript, form, self.student.to_text)


def _load(path: Path, threads: int) -> Streaming:
    """Load a graph for streams, or a student that ESPnet runs."""
    if (path / ABOUT).is_file():
        from espnet_kd.deploy.block_stream import OnnxStreamingStudent

        return OnnxStreamingStudent(path, threads)
    from espnet_kd.deploy.espnet_stream import StreamingStudent
    from espnet_kd.experiments.models import find_experiment, load_model

    config, model_file = find_experiment(path)
    return StreamingStudent(*load_model(config, model_file), config.parent)


class Latencies:
    """The latency of each token: the time from its end in the audio until it is recognised, if the audio were live."""

    def __init__(self, rate: int):
        self._rate = rate
        self.tokens: List[float] = []  #: seconds, of each token
        self.computing = 0.0  #: seconds
        self.longest = 0.0  #: longest step, seconds
        self.seconds = 0.0

    def add(self, stream: Stream, tokens: list, computed: float) -> None:
        """Note the tokens of a step, and its duration in seconds."""
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


def chunks(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
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
