"""Transcripts with times: tokens, words, subtitles."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Callable, Dict, List, Sequence

import numpy as np

from espnet_kd.data.characters import is_unspaced

#: Limits of a subtitle: characters, seconds, and seconds of a pause, which ends it.
MOST_CHARACTERS, MOST_SECONDS, PAUSE = 84, 6.0, 0.8
FORMATS = ("text", "json", "srt", "vtt")


@dataclass(slots=True)  # slots save memory: an hour of audio has thousands of tokens
class Token:
    """A token, its start and end in seconds, and its mean posterior over the frames between."""

    token: str
    start: float
    end: float
    confidence: float


@dataclass
class Segment:
    """A piece of audio, its start and end in seconds, and the text and tokens recognised in it."""

    start: float
    end: float
    text: str
    tokens: List[Token] = field(default_factory=list)


@dataclass
class Transcript:
    """The recognised text of one file."""

    file: str
    seconds: float
    segments: List[Segment] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole text, in one line."""
        text = ""
        for part in (s.text.strip() for s in self.segments):
            text += f"{_between(text, part)}{part}" if text and part else part
        return text

    @property
    def tokens(self) -> List[Token]:
        """All tokens in their order."""
        return [token for segment in self.segments for token in segment.tokens]


def read_tokens(
    log_probs: np.ndarray,
    tokens: Sequence[str],
    frame_shift: float,
    *,
    blank: int = 0,
    no_text: Sequence[int] = (),
    offset: float = 0.0,
) -> List[Token]:
    """Return the tokens of the best path (greedy CTC search) with their times.

    Args:
        log_probs: (T, V) log-probabilities; T may be 0.
        tokens: names of the V labels.
        frame_shift: seconds per frame.
        blank: the blank label.
        no_text: labels taken out after repeats are merged.
        offset: seconds at which the audio begins.
    """
    best = log_probs.argmax(axis=-1) if len(log_probs) else np.zeros(0, dtype=np.int64)
    edges = np.flatnonzero(np.diff(best)) + 1
    found = []
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(best)]):
        if start == end or best[start] == blank or best[start] in no_text:
            continue
        confidence = float(np.exp(log_probs[start:end, best[start]]).mean())
        times = (round(offset + start * frame_shift, 3), round(offset + end * frame_shift, 3))
        found.append(Token(tokens[best[start]], *times, round(min(confidence, 1.0), 4)))
    return found


def words_of(tokens: Sequence[Token], to_text: Callable[[List[str]], str]) -> List[Segment]:
    """Group tokens into words with their times; words are separated by the spaces in the output of ``to_text``.

    In scripts without spaces between words (Chinese, Japanese) every token is a word.
    """
    words: List[Segment] = []
    held: List[str] = []  # tokens of the last word only, so that the run time is not quadratic in the text
    before = ""  # text of the held tokens
    for token in tokens:
        text = to_text([*held, token.token]).strip()
        added = text[len(before) :] if text.startswith(before) else ""
        blank = len(text.split()) > len(before.split())
        if held and (blank or (is_unspaced(before[-1:]) and is_unspaced(added[:1]))):
            held, text = [], to_text([token.token]).strip()
        if text and not held:
            words.append(Segment(token.start, token.end, text))
        elif text and text != before:
            words[-1].text, words[-1].end = text, token.end
        held = [*held, token.token] if text else []
        before = text
    return words


def _between(text: str, following: str) -> str:
    """What stands between two texts: a blank, except in scripts without blanks."""
    return "" if is_unspaced(text[-1]) and is_unspaced(following[0]) else " "


def subtitles(words: Sequence[Segment]) -> List[Segment]:
    """Group words into subtitles."""
    found: List[Segment] = []
    for word in words:
        last = found[-1] if found else None
        if (
            last is None
            or len(last.text) + 1 + len(word.text) > MOST_CHARACTERS
            or word.end - last.start > MOST_SECONDS
            or word.start - last.end > PAUSE
        ):
            found.append(Segment(word.start, word.end, word.text))
        else:
            last.text, last.end = f"{last.text}{_between(last.text, word.text)}{word.text}", word.end
    return found


def render(transcript: Transcript, form: str, to_text: Callable[[List[str]], str]) -> str:
    """A transcript as ``text``, ``json``, ``srt`` or ``vtt``, ending in a line feed."""
    if form == "text":
        return f"{transcript.text}\n"
    if form == "json":
        content: Dict[str, Any] = {**asdict(transcript), "text": transcript.text}
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    cues = [cue for s in transcript.segments for cue in subtitles(words_of(s.tokens, to_text))]
    mark = "," if form == "srt" else "."
    blocks = [
        f"{number}\n{_clock(cue.start, mark)} --> {_clock(cue.end, mark)}\n{_plain(cue.text, form)}\n"
        for number, cue in enumerate(cues, 1)
    ]
    return "\n".join(["WEBVTT\n", *blocks] if form == "vtt" else blocks)


def _plain(text: str, form: str) -> str:
    """Text of a subtitle, with the characters of markup escaped."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") if form == "vtt" else text


def _clock(seconds: float, mark: str) -> str:
    """``hours:minutes:seconds,milliseconds``."""
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"
