"""Recognition of audio of any length as text with times: the class behind :mod:`espnet_kd.transcribe`."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Optional, Union

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.deploy import backends, reading
from espnet_kd.deploy.transcript import Segment, Transcript, read_tokens, render

#: Seconds of audio that are recognised at once, at most.
LONGEST = 20.0


class Transcriber:
    """A student that turns audio into text with times."""

    def __init__(self, model: Union[str, Path], *, threads: int = 1, longest: Optional[float] = None):
        """Load a student.

        Args:
            model: folder of an export, or an experiment.
            threads: number of onnxruntime's threads.
            longest: seconds; longer audio is cut at pauses. Default: 20, or the limit of the export if that is less.

        Raises:
            UserError: there is no student, it is damaged, or ``longest`` is above its limit.
        """
        self.backend = backends.load(model, threads)
        self.longest = backends.choose_longest(self.backend, longest, LONGEST)

    def __call__(self, audio: Union[str, Path, np.ndarray], rate: Optional[int] = None) -> Transcript:
        """Recognise a file (``-``: standard input), or samples (N,) in [-1, 1] at ``rate`` Hz (default: the student's).

        Raises:
            UserError: the file cannot be read, or the samples have another shape or type.
        """
        wanted = self.backend.rate
        if isinstance(audio, np.ndarray):
            if audio.ndim != 1 or audio.dtype.kind != "f":
                raise UserError(
                    f"samples of shape {audio.shape}, {audio.dtype}: give one channel, (N,), as floats in [-1, 1]"
                )
            name, blocks = "", reading.resampled([(audio[:, None], rate or wanted)], wanted)
        else:
            name, blocks = str(audio), reading.read_blocks(str(audio), wanted)
        return self.transcribe(blocks, name)

    def transcribe(self, blocks: Iterable[np.ndarray], name: str = "") -> Transcript:
        """Recognise blocks of samples (n,) at the student's rate."""
        backend, transcript = self.backend, Transcript(name, 0.0)
        for start, samples in reading.cut_at_pauses(blocks, backend.rate, self.longest):
            tokens = read_tokens(
                backend.log_probs(samples),
                backend.tokens,
                backend.frame_shift,
                blank=backend.blank,
                no_text=backend.no_text,
                offset=start,
            )
            end = start + len(samples) / backend.rate
            text = backend.to_text([t.token for t in tokens])
            transcript.segments.append(Segment(round(start, 3), round(end, 3), text, tokens))
            transcript.seconds = round(end, 3)
        return transcript

    def render(self, transcript: Transcript, form: str) -> str:
        """A transcript as ``text``, ``json``, ``srt`` or ``vtt``."""
        return render(transcript, form, self.backend.to_text)
