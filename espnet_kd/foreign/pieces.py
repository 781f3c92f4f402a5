"""Conversion of a Hugging Face tokenizer that cuts texts into pieces to a SentencePiece model.

ESPnet's ``token_type: hugging_face`` takes token numbers from the tokenizer itself, in which the CTC blank is not 0;
with a SentencePiece model (``token_type: bpe``) the numbers are those of the token list, and a student needs no
package of Hugging Face's. Before the SentencePiece model is used, both must cut many texts alike.
"""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from espnet_kd.cli import UserError
from espnet_kd.pieces import BLANK, SOS_EOS, UNKNOWN, WORD_START, load_sentencepiece

#: Advice to a user whose tokenizer has no equivalent SentencePiece model.
INSTEAD = "train on its transcripts instead: asr_kd_pseudo makes them a training set for any student"
TEXTS = 2000  #: number of random texts that both must cut alike
BYTE = re.compile("<0x[0-9A-F]{2}>")


def has_pieces(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers cuts texts by a tokenizer.json into pieces of words."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return False  # it reads a vocab.json, with characters or phones
    special = set(tokenizer.all_special_tokens)
    named = [t for t in tokenizer.get_vocab() if t not in special and not BYTE.fullmatch(t)]
    return _content(tokenizer)["model"].get("type") != "WordLevel" and any(len(t) > 1 or t == WORD_START for t in named)


def sentencepiece_model(tokenizer: Any, tokens: Sequence[str], path: Path) -> bytes:
    """The SentencePiece model that cuts texts as a tokenizer does, its pieces being ``tokens``.

    Args:
        tokenizer: a tokenizer of transformers, with a tokenizer.json.
        tokens: ESPnet's token list of the model, with ``<blank>`` and ``<sos/eos>``.
        path: the tokenizer's file, for messages.

    Raises:
        UserError: SentencePiece cannot cut texts in that way.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    content = _content(tokenizer)
    kind = content["model"].get("type")
    if kind not in ("Unigram", "BPE") or "ByteLevel" in json.dumps([content[k] for k in ("pre_tokenizer", "decoder")]):
        how = f"{kind} on bytes" if kind == "BPE" else str(kind)
        raise UserError(f"{path}: {how} makes its tokens, for which SentencePiece and ESPnet have no equal; {INSTEAD}")
    scores = _unigram_scores(content["model"]) if kind == "Unigram" else _bpe_scores(content["model"], path)
    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM if kind == "Unigram" else proto.TrainerSpec.BPE
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = _starts_words(tokenizer, tokens)
    charsmap = _charsmap(content.get("normalizer"))
    if charsmap:
        model.normalizer_spec.precompiled_charsmap = charsmap
    whole = {t["content"] for t in content.get("added_tokens", ()) if not t.get("special")}
    all_bytes = sum(bool(BYTE.fullmatch(t)) for t in tokens) == 256 and bool(content["model"].get("byte_fallback"))
    model.trainer_spec.byte_fallback = all_bytes
    types = proto.ModelProto.SentencePiece
    model.pieces.add(piece=UNKNOWN, score=0.0, type=types.UNKNOWN)
    for token in tokens:
        if token in (BLANK, UNKNOWN, SOS_EOS):
            continue
        if BYTE.fullmatch(token) and all_bytes:
            model.pieces.add(piece=token, score=0.0, type=types.BYTE)
        elif token in whole:
            model.pieces.add(piece=token, score=0.0, type=types.USER_DEFINED)
        elif token in scores:
            model.pieces.add(piece=token, score=scores[token], type=types.NORMAL)
        else:  # a row of the head that no text uses
            model.pieces.add(piece=token, score=0.0, type=types.UNUSED)
    made = model.SerializeToString()
    _compare(tokenizer, made, tokens, path)
    return made


def _content(tokenizer: Any) -> Dict[str, Any]:
    """The content of tokenizer.json, as transformers has read it."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _unigram_scores(model: Mapping[str, Any]) -> Dict[str, float]:
    return {token: float(score) for token, score in model["vocab"]}


def _bpe_scores(model: Mapping[str, Any], path: Path) -> Dict[str, float]:
    """Scores by which SentencePiece joins pieces in the order of a list of merges.

    SentencePiece joins any two pieces whose union is a piece, the union of the highest score first. This equals a list
    of merges in which all pairs with the same union stand together.
    """
    merges = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    pairs: List[Tuple[str, str]] = [(left, right) for left, right in merges]
    ranks: Dict[str, Set[int]] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, set()).add(rank)
    known = set(model["vocab"]) - {model.get("unk_token")}
    given = set(pairs)
    for union, places in ranks.items():
        halves = [(union[:i], union[i:]) for i in range(1, len(union))]
        lacking = [(a, b) for a, b in halves if a in known and b in known and (a, b) not in given]
        if lacking or max(places) - min(places) >= len(places):
            raise UserError(
                f"{path}: its merges cannot be ordered by the pieces that they make ({union}), as SentencePiece does; "
                f"{INSTEAD}"
            )
    scores = {token: -float(len(pairs)) for token in known}
    return {**scores, **{union: -float(min(places)) for union, places in ranks.items()}}


def _charsmap(normalizer: Optional[Mapping[str, Any]]) -> bytes:
    """SentencePiece's table of replaced characters, if the tokenizer was made from a SentencePiece model."""
    if not normalizer:
        return b""
    if normalizer.get("type") == "Precompiled":
        return base64.b64decode(normalizer["precompiled_charsmap"])
    return next(filter(None, map(_charsmap, normalizer.get("normalizers", ()))), b"")


def _starts_words(tokenizer: Any, tokens: Sequence[str]) -> bool:
    """Whether the first word of a text begins with the mark of a word's beginning, as all later words do."""
    letter = next((t for t in tokens if len(t) == 1 and t.isalnum()), "a")
    return "".join(tokenizer.tokenize(letter)).startswith(WORD_START)


def _compare(tokenizer: Any, model: bytes, tokens: Sequence[str], path: Path) -> None:
    """Cut texts with the tokenizer and the SentencePiece model; if they differ, raise :class:`UserError`."""
    processor = load_sentencepiece(model)
    known, unknown = set(tokens), tokenizer.unk_token
    for text in _texts(tokens):
        theirs = [t if t != unknown else UNKNOWN for t in tokenizer.tokenize(text)]
        mine = processor.encode_as_pieces(text)
        if theirs != mine and UNKNOWN not in theirs and known.issuperset(theirs):
            raise UserError(
                f"{path}: it cuts {text!r} into {' '.join(theirs)}, SentencePiece into {' '.join(mine)}; {INSTEAD}"
            )


def _texts(tokens: Sequence[str]) -> Iterator[str]:
    """Texts of the pieces: each alone, and joined at random; the same ones each time."""
    pieces = [t for t in tokens if t not in (BLANK, UNKNOWN, SOS_EOS) and not BYTE.fullmatch(t)]
    texts = [t.replace(WORD_START, " ").strip() for t in pieces]
    draw = random.Random(0)
    for _ in range(TEXTS):
        texts.append("".join(draw.choices(pieces, k=draw.randint(2, 12))).replace(WORD_START, " "))
    yield from dict.fromkeys(" ".join(t.split()) for t in texts if t.strip())
