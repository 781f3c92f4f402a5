"""Convert tokens to text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Callable, List, Union

from espnet_kd.experiments.named_files import find_token_model


def build_detokeniser(args: argparse.Namespace, config_dir: Union[str, Path]) -> Callable[[List[str]], str]:
    """Return a function from tokens to text for the token type of a configuration.

    Raises:
        UserError: the SentencePiece model is missing, unreadable, or has other tokens.
    """
    kind = getattr(args, "token_type", None)
    if kind == "char":
        space = getattr(args, "space_symbol", "<space>")
        return lambda tokens: "".join(" " if t == space else t for t in tokens)
    if kind == "word":
        return " ".join
    if kind == "bpe":
        import sentencepiece

        path = find_token_model(args, Path(config_dir) / "config.yaml")
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).DecodePieces
    from espnet2.text.build_tokenizer import build_tokenizer  # for the rarer token types

    return build_tokenizer(kind, bpemodel=getattr(args, "bpemodel", None)).tokens2text
