"""The special tokens of a token list, and the pieces of a SentencePiece model, without importing ESPnet."""

from __future__ import annotations

from typing import Any, List

from espnet_kd.cli import UserError

BLANK, UNKNOWN, SOS_EOS, SPACE = "<blank>", "<unk>", "<sos/eos>", "<space>"
WORD_START = "\u2581"  #: stands for the space before a word in a SentencePiece model's pieces
BPE_MODEL = "bpe.model"  #: name of the SentencePiece model beside a token list


def load_sentencepiece(model: bytes, name: str = "the BPE model") -> Any:
    """Return the SentencePiece processor of a model (:class:`UserError` with ``name`` if it is not a model)."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
        raise UserError(f"{name} is not a SentencePiece model: {e}") from e


def read_pieces(model: bytes, name: str = "the BPE model") -> List[str]:
    """Return all pieces of a SentencePiece model, in order (:class:`UserError` with ``name`` if it is not a model)."""
    processor = load_sentencepiece(model, name)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
