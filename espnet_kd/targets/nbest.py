"""The teacher's N-best on disk, for sequence-level distillation.

A UTF-8 text file with one hypothesis per line; the hypotheses of an utterance are on consecutive lines:

    utt_id rank score token token …

``rank`` counts from 1, the best; ``score`` is the log-probability in nats; tokens are written by
name, so that the file stays valid if the token list is reordered. A token that is empty or contains white space is
written by its number, ``<id:12>``. An empty hypothesis has no tokens.
"""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import iter_lines
from espnet_kd.files import PathLike, replacing

#: Hypotheses of one utterance, best first: (log-probability in nats, token ids).
Hypotheses = List[Tuple[float, Sequence[int]]]


def weights(scores: Sequence[float]) -> List[float]:
    """Renormalise log-probabilities (N,) in nats over the N-best: their softmax; an empty list for an empty list.

    These are the weights of the hypotheses in sequence-level KD (Takashima et al.).
    """
    if not scores:
        return []
    best = max(scores)
    odds = [math.exp(s - best) for s in scores]
    total = sum(odds)
    return [o / total for o in odds]


class Retokenised(NamedTuple):
    """N-best in the tokens of another list, with counts of the hypotheses that changed."""

    nbest: Dict[str, Hypotheses]
    merged: int  #: hypotheses with the tokens of another one, to which their probability was added
    unknown: int  #: hypotheses with ``<unk>``, because a piece of their text is not a token


def retokenise(
    nbest: Mapping[str, Hypotheses],
    to_text: Callable[[Sequence[int]], str],
    to_ids: Callable[[str], Sequence[int]],
    unknown_id: int,
) -> Retokenised:
    """Convert N-best to the tokens of another list, through their text.

    Args:
        nbest: hypotheses in token ids of the model that found them.
        to_text: the text of these ids.
        to_ids: the token ids of a text in the other list (:meth:`espnet_kd.data.tokenizing.TokenList.ids`).
        unknown_id: the id of ``<unk>`` in the other list.
    """
    found: Dict[str, Hypotheses] = {}
    merged = unknown = 0
    for utt_id, hypotheses in nbest.items():
        scores: Dict[Tuple[int, ...], float] = {}
        for score, ids in hypotheses:
            # By ids, not by text: texts that differ only in unknown words have equal ids.
            new = tuple(to_ids(" ".join(to_text(ids).split())))
            if new in scores:
                merged += 1
                high, low = max(score, scores[new]), min(score, scores[new])
                score = high + math.log1p(math.exp(low - high))
            scores[new] = score
        unknown += sum(unknown_id in new for new in scores)
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        found[utt_id] = [(score, array("i", new)) for new, score in ranked]
    return Retokenised(found, merged, unknown)


def write_nbest(path: PathLike, nbest: Mapping[str, Hypotheses], token_list: Sequence[str]) -> None:
    """Write the N-best of utterances in the given order; the file is whole or absent."""
    names = _names(token_list)
    with replacing(path) as f:
        for utt_id, hypotheses in nbest.items():
            for rank, (score, ids) in enumerate(hypotheses, 1):
                f.write(" ".join([utt_id, str(rank), f"{score:.6f}", *(names[i] for i in ids)]) + "\n")


def _names(token_list: Sequence[str]) -> List[str]:
    """The written form of each token: its name, or its number if the name is empty or contains white space."""
    return [f"<id:{i}>" if not t or any(c in t for c in " \t\n\r") else t for i, t in enumerate(token_list)]


def read_nbest(path: PathLike, token_list: Sequence[str], blank_id: int = 0) -> Dict[str, Hypotheses]:
    """Read an N-best file whole.

    Args:
        path: written by `write_nbest`, or by hand.
        token_list: the V tokens of the model that is trained with it.
        blank_id: a token that no hypothesis may contain.

    Returns:
        For each utterance (score in nats, token ids) best first. The ids are an ``array`` of C ints, which
        ``torch.tensor`` accepts: it needs half the memory of a list, and a large corpus has millions of ids.

    Raises:
        UserError: the file is missing or empty, or a line has a fault, which the message names: not UTF-8, too few
            columns, a rank out of order, a score that is not a number, an unknown token, a duplicate utterance or
            hypothesis.
    """
    id_of = {name: i for i, name in enumerate(_names(token_list)) if i != blank_id}
    found: Dict[str, Hypotheses] = {}
    current = None
    for where, fields in _read_fields(Path(path)):
        if len(fields) < 3:
            raise UserError(f"{where}: expected 'utterance rank score tokens…', found '{' '.join(fields)}'")
        utt_id, rank, number, *tokens = fields
        if utt_id != current:
            if utt_id in found:
                raise UserError(f"{where}: utterance '{utt_id}' stands twice; its lines must follow each other")
            current = utt_id
            found[utt_id] = []
        hypotheses = found[utt_id]
        if rank != str(len(hypotheses) + 1):
            raise UserError(f"{where}: '{utt_id}' has rank '{rank}' where {len(hypotheses) + 1} must come")
        try:
            score = float(number)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise UserError(f"{where}: the score '{number}' of '{utt_id}' is not a number (a log-probability in nats)")
        try:
            ids = array("i", [id_of[t] for t in tokens])
        except KeyError as e:
            raise UserError(
                f"{where}: token '{e.args[0]}' of '{utt_id}' is no text token of the token list; "
                "make the N-best with a teacher that has the student's token list, or in the student's tokens: "
                "asr_kd_nbest --token_list FILE"
            ) from e
        if any(ids == other for _, other in hypotheses):
            raise UserError(f"{where}: this hypothesis of '{utt_id}' stands there already; keep one of the lines")
        hypotheses.append((score, ids))
    if not found:
        raise UserError(f"{path}: no hypotheses in it; make it with asr_kd_nbest")
    return found


def _read_fields(path: Path) -> Iterator[Tuple[str, List[str]]]:
    """Yield ("file:line", columns) of lines that are not blank."""
    try:
        for number, line in iter_lines(path):
            # Not split(): it would also cut at U+3000 and U+00A0, which may be part of a token.
            fields = [f for f in line.replace("\t", " ").split(" ") if f]
            if fields:
                yield f"{path}:{number}", fields
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
