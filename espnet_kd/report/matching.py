"""Alignment of the units of two sequences with the fewest edits, as the error rates count them."""

from __future__ import annotations

from typing import Iterator, List, Sequence, Tuple

import jiwer

#: (kind, text): ``equal`` for text in both, ``del`` for missing text, ``ins`` for inserted text.
Piece = Tuple[str, str]


def match(reference: Sequence[str], hypothesis: Sequence[str]) -> Iterator[Tuple[str, slice, slice]]:
    """Yield (``equal`` | ``substitute`` | ``delete`` | ``insert``, units of the reference, units of the hypothesis).

    Units are not empty and hold no blank.
    """
    if not reference or not hypothesis:  # versions of jiwer treat empty sequences differently
        if reference or hypothesis:
            yield "delete" if reference else "insert", slice(0, len(reference)), slice(0, len(hypothesis))
        return
    for chunk in jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]:
        yield chunk.type, slice(chunk.ref_start_idx, chunk.ref_end_idx), slice(chunk.hyp_start_idx, chunk.hyp_end_idx)


def mark(reference: str, hypothesis: str, unit: str = "word") -> List[Piece]:
    """The hypothesis as pieces in reading order, with its deletions and insertions marked.

    ``unit`` is ``word``, or ``char`` for a language without blanks between words (blanks are left out then).
    """
    between = " " if unit == "word" else ""
    ref, hyp = ([*text.split()] if between else [*"".join(text.split())] for text in (reference, hypothesis))
    pieces: List[Piece] = []
    for kind, there, here in match(ref, hyp):
        if kind == "equal":
            pieces.append(("equal", between.join(hyp[here])))
            continue
        for name, units in (("del", ref[there]), ("ins", hyp[here])):
            if units:
                pieces.append((name, between.join(units)))
    return pieces
