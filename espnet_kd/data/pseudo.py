"""Automatic transcripts (pseudo-labels): reading them, and filtering out those that are probably wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Collection, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple, Union

import jiwer

from espnet_kd.cli import UserError
from espnet_kd.data.characters import is_unspaced
from espnet_kd.data.datadir import iter_lines, split_line
from espnet_kd.data.text_fit import fit_text

#: Names of the three fields in the files of different recognisers; of several in one line, the first counts.
IDS, CONFIDENCES = ("utt_id", "id", "key"), ("confidence", "score")
# NeMo leaves the reference of its manifest in "text", and adds what it recognises as "pred_text".
TEXTS = ("pred_text", "text", "transcript")
#: Repetitions of longer phrases are not searched for, in words and in characters of a script without blanks.
LONGEST_PHRASE, LONGEST_PHRASE_UNSPACED = 8, 24


class Label(NamedTuple):
    """The transcript of a recogniser for an utterance."""

    text: str
    confidence: Optional[float] = None  #: higher is better; the scale depends on the recogniser


@dataclass(frozen=True)
class Limits:
    """Limits for a transcript; None: no limit."""

    min_confidence: Optional[float] = None
    max_repeats: Optional[int] = 3  #: times that a phrase may occur in a row
    min_rate: Optional[float] = 1.0  #: characters a second
    max_rate: Optional[float] = 35.0
    max_distance: Optional[float] = None  #: character edits to the CTC teacher's text, as a share of the longer one


@dataclass(frozen=True)
class Verdict:
    """Whether a transcript is kept."""

    text: str  #: in the token list's characters
    reason: str = ""  #: the reason why it is not kept; empty if it is kept
    distance: Optional[float] = None  #: to the CTC teacher's text

    @property
    def kept(self) -> bool:
        """Whether the transcript is kept."""
        return not self.reason


def read_labels(path: Union[str, Path]) -> Dict[str, Label]:
    """Read a recogniser's transcripts.

    Args:
        path: a Kaldi-style text file, an utterance id and its text in a line; or JSON, an object in a line (``utt_id``,
            ``text`` and optionally ``confidence``, or the names that NeMo and others use).

    Raises:
        UserError: a line, which the message names, is not a JSON object, lacks the id or the text, has a confidence
            that is not a number, or repeats an utterance; or there is no such file, or nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path} with transcripts")
    labels: Dict[str, Label] = {}
    for number, line in iter_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        utt_id, label = _json_label(line, where) if line.lstrip().startswith("{") else _plain_label(line)
        if utt_id in labels:
            raise UserError(f"{where}: utterance '{utt_id}' is there twice")
        labels[utt_id] = label
    if not labels:
        raise UserError(f"{path} has no transcripts in it")
    return labels


def _plain_label(line: str) -> Tuple[str, Label]:
    utt_id, text = split_line(line)
    return utt_id, Label(text)


def _json_label(line: str, where: str) -> Tuple[str, Label]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: this is no JSON: {e}") from e
    found = [next((content[n] for n in names if n in content), None) for names in (IDS, TEXTS, CONFIDENCES)]
    utt_id, text, confidence = found
    if utt_id is None and isinstance(content.get("audio_filepath"), str):
        utt_id = Path(content["audio_filepath"]).stem  # NeMo's manifests have the audio file instead of an id
    if not isinstance(utt_id, str) or not isinstance(text, str):
        raise UserError(f"{where}: it must have {' or '.join(IDS)}, and {' or '.join(TEXTS)}, both strings")
    if confidence is not None and (isinstance(confidence, bool) or not isinstance(confidence, (int, float))):
        raise UserError(f"{where}: the confidence {confidence!r} of '{utt_id}' is no number")
    if confidence is not None and not math.isfinite(confidence):
        raise UserError(f"{where}: the confidence {confidence!r} of '{utt_id}' is no number")
    return utt_id, Label(" ".join(text.split()), confidence)


def judge(
    label: Label,
    seconds: float,
    limits: Limits,
    tokens: Collection[str] = (),
    other: Optional[str] = None,
    others_characters: Collection[str] = (),
) -> Verdict:
    """Decide on one transcript.

    Args:
        seconds: length of the audio.
        tokens: characters that the text must consist of; it is rewritten to them first (:func:`fit_text`). If none
            are given, the text is not changed.
        other: the CTC teacher's text for this audio, with which the text is compared.
        others_characters: the characters of the CTC teacher, to which the text is brought for this comparison.
    """
    text = fit_text(label.text, tokens) if tokens else label.text
    verdict = Verdict(text)
    if not text:
        return replace(verdict, reason="empty")
    strange = next((c for c in text if c != " " and c not in tokens), None) if tokens else None
    if strange is not None:
        return replace(verdict, reason=f"character {strange}")
    if limits.min_confidence is not None and (label.confidence is None or label.confidence < limits.min_confidence):
        return replace(verdict, reason="confidence")
    if limits.max_repeats is not None and most_repeats(text) > limits.max_repeats:
        return replace(verdict, reason="repetition")
    rate = len(text) / max(seconds, 1e-6)
    if (limits.min_rate is not None and rate < limits.min_rate) or (
        limits.max_rate is not None and rate > limits.max_rate
    ):
        return replace(verdict, reason="speaking rate")
    if other is not None:
        same = fit_text(text, others_characters) if others_characters else text
        apart = distance(same, " ".join(other.split()))
        verdict = replace(verdict, distance=apart)
        if limits.max_distance is not None and apart > limits.max_distance:
            return replace(verdict, reason="distance to the CTC teacher")
    return verdict


def most_repeats(text: str) -> int:
    """Return the greatest number of times in a row that a phrase of up to ``LONGEST_PHRASE`` words occurs.

    In a script without blanks, each character counts as a word, and a phrase has up to ``LONGEST_PHRASE_UNSPACED``.

    Recognisers with an attention decoder repeat phrases when attention loses its position in the audio.
    """
    words: List[str] = []
    longest = LONGEST_PHRASE
    for word in text.split():
        for unspaced, group in itertools.groupby(word, is_unspaced):
            characters = list(group)
            words += characters if unspaced else ["".join(characters)]
            longest = LONGEST_PHRASE_UNSPACED if unspaced else longest
    most = 1 if words else 0
    for size in range(1, min(longest, len(words)) + 1):
        run = 0  # number of words in a row that equal the word ``size`` places before
        for i in range(size, len(words)):
            run = run + 1 if words[i] == words[i - size] else 0
            most = max(most, 1 + run // size)
    return most


def distance(text: str, other: str) -> float:
    """Edits between two texts in characters, as a share of the longer one, 0 to 1."""
    if not text or not other:
        return float(text != other)
    out = jiwer.process_characters(text, other)
    return (out.substitutions + out.deletions + out.insertions) / max(len(text), len(other))


def count_reasons(verdicts: Mapping[str, Verdict]) -> Dict[str, int]:
    """Count the transcripts that are not kept, by reason; all characters that are not tokens are one reason."""
    counts: Dict[str, int] = {}
    for verdict in verdicts.values():
        if not verdict.kept:
            reason = re.sub("^character .*", "a character that is no token", verdict.reason)
            counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def missing(labels: Mapping[str, Label], utt_ids: Iterable[str]) -> List[str]:
    """Utterances without a transcript."""
    return [u for u in utt_ids if u not in labels]
