"""An n-gram model over a model's tokens, for beam search: interpolated Kneser-Ney (Kneser and Ney, 1995), as ARPA.

Texts are tokenized as for training. n-grams are stored as numbers in sorted arrays, about 50 bytes each.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import iter_lines, os_errors_as_user_errors, split_line
from espnet_kd.data.tokenizing import BLANK, SOS_EOS, UNKNOWN, TokenList
from espnet_kd.files import PathLike, replacing

START, END = "<s>", "</s>"
NEVER = -99.0  # log10 probability of a token that is never predicted


@dataclass
class _Order:
    """The different n-grams of one length, in the order of their keys."""

    prefix: np.ndarray  # (N,) index of the n-gram without its last token, in the list of the next shorter n-grams
    last: np.ndarray  # (N,) the last token
    suffix: np.ndarray  # (N,) index of the n-gram without its first token, in the same list
    count: np.ndarray  # (N,) occurrences
    starts: np.ndarray  # (N,) bool: whether the first token is <s>


def make_ngram(
    texts: Sequence[PathLike], token_list: TokenList, out: PathLike, order: int = 4, lm_texts: Sequence[PathLike] = ()
) -> None:
    """Estimate an n-gram model and write it to ``out`` as ARPA; every token of the list is in it.

    Args:
        texts: Kaldi-style ``text`` files.
        token_list: the token list of the model that is decoded.
        order: the longest n-gram.
        lm_texts: further texts without ids, a sentence in a line.

    Raises:
        UserError: a bad order, or no text.
    """
    if not 2 <= order <= 6:
        raise UserError(f"--order is {order}; KenLM, which reads it, takes 2 to 6")
    # The tokens of hypotheses, which never contain blank or <sos/eos>.
    words = [START, END, UNKNOWN, *(t for t in token_list.tokens if t not in (BLANK, SOS_EOS, UNKNOWN, START, END))]
    number = {word: i for i, word in enumerate(words)}
    sentences = [np.fromiter((number.get(t, 2) for t in token_list.split(text)), np.int32)
                 for text in _read(texts, lm_texts)]  # fmt: skip
    if not sentences:
        raise UserError(f"{', '.join(map(str, (*texts, *lm_texts)))}: no text to make an n-gram model of")
    orders = _count(sentences, order, len(words))
    unknown = sum(int((s == 2).sum()) for s in sentences)
    with os_errors_as_user_errors(out), replacing(out) as f:
        f.write("\\data\\\n" + "".join(f"ngram {k}={len(o.last)}\n" for k, o in enumerate(orders, 1)))
        probabilities = _estimate(orders, len(words))
        names: Optional[np.ndarray] = None
        for k, (o, (p, backoff)) in enumerate(zip(orders, probabilities), 1):
            last = np.array(words, dtype=object)[o.last]
            names = last if names is None else names[o.prefix] + " " + last
            f.write(f"\n\\{k}-grams:\n")
            for i, name in enumerate(names):
                f.write(f"{p[i]:.7g}\t{name}" + (f"\t{backoff[i]:.7g}\n" if k < order else "\n"))
        f.write("\n\\end\\\n")
    total = sum(map(len, sentences))
    logging.info("%s: %s n-grams of %d sentences, %d tokens, %d of them unknown", out,
                 " + ".join(str(len(o.last)) for o in orders), len(sentences), total, unknown)  # fmt: skip


def _read(texts: Sequence[PathLike], lm_texts: Sequence[PathLike]) -> Iterator[str]:
    for path in texts:
        yield from (text for _, line in iter_lines(path) if (text := split_line(line)[1]).strip())
    for path in lm_texts:
        yield from (line.strip() for _, line in iter_lines(path) if line.strip())


def _count(sentences: List[np.ndarray], order: int, words: int) -> List[_Order]:
    """Number and count the n-grams of each length up to ``order`` in ``<s> sentence </s>``."""
    x = np.concatenate([part for s in sentences for part in ([0], s, [1])]).astype(np.int64)
    place = np.concatenate([np.arange(len(s) + 2) for s in sentences])  # position of each token in its sentence
    everything = np.arange(words)
    count = np.bincount(x, minlength=words)
    orders = [_Order(np.zeros(words, np.int64), everything, np.zeros(words, np.int64), count, everything == 0)]
    ending = x  # for each position, the index of the n-gram that ends there
    for k in range(2, order + 1):
        at = np.flatnonzero(place >= k - 1)
        keys, first, inverse, count = np.unique(
            ending[at - 1] * words + x[at], return_index=True, return_inverse=True, return_counts=True
        )
        prefix = keys // words
        orders.append(_Order(prefix, keys % words, ending[at[first]], count, orders[-1].starts[prefix]))
        longer = np.full(len(x), -1)
        longer[at] = inverse
        ending = longer
    return orders


def _estimate(orders: List[_Order], words: int) -> List[tuple]:
    """Return (log10 probabilities, log10 backoff weights) of the n-grams of each length."""
    out: List[tuple] = []
    lower: Optional[np.ndarray] = None
    for k, o in enumerate(orders):
        count = o.count.astype(np.float64)
        # Kneser-Ney counts a shorter n-gram by the number of different tokens before it; before <s> there is none.
        if k + 1 < len(orders):
            after = np.bincount(orders[k + 1].suffix, minlength=len(count))
            count = np.where(o.starts, count, after).astype(np.float64)
        if k == 0:
            count[0] = 0  # <s> is never predicted
        once, twice = (count == 1).sum(), (count == 2).sum()
        discount = once / (once + 2 * twice) if once and twice else 0.5
        heads = len(orders[k - 1].last) if k else 1
        total = np.bincount(o.prefix, count, heads)
        kinds = np.bincount(o.prefix, count > 0, heads)
        total[total == 0] = 1
        left = discount * kinds / total  # the probability mass that goes to the shorter n-gram
        shorter = np.full(len(count), 1 / (words - 1)) if lower is None else lower[o.suffix]
        p = np.maximum(count - discount, 0) / total[o.prefix] + left[o.prefix] * shorter
        if k:
            with np.errstate(divide="ignore"):
                # If no token follows a history, the shorter n-gram gets all the mass: the log10 of its weight is 0.
                out[-1][1][:] = np.where(kinds > 0, np.log10(left), 0.0)
        log = np.log10(p)
        if k == 0:
            log[0] = NEVER
        out.append((log, np.zeros(len(count))))
        lower = p
    return out
