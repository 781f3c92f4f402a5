"""Tokenization as in ESPnet, with a token list and the files beside it, without importing ESPnet.

The directory of a token list holds ``tokens.txt`` and, if they are needed, ``bpe.model``, ``nlsyms.txt`` (symbols that
are not split into characters, one a line; ESPnet's ``non_linguistic_symbols``) and ``cleaner`` (the name of ESPnet's
text cleaner).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, List, Optional, Sequence

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import iter_lines
from espnet_kd.files import PathLike
from espnet_kd.pieces import BLANK, BPE_MODEL, SOS_EOS, SPACE, UNKNOWN, WORD_START, load_sentencepiece, read_pieces

SPECIAL = (UNKNOWN, BLANK, SOS_EOS, SPACE, "<s>", "</s>")
NLSYMS, CLEANER = "nlsyms.txt", "cleaner"


class Tokenizer:
    """Splits texts into tokens as ESPnet does.

    Args:
        token_type: "char", "bpe" or "word".
        model: bytes of the SentencePiece model, for "bpe".
        symbols: symbols that are not split into characters, for "char".
        cleaner: name of an ESPnet text cleaner, which is applied to each text first.

    Raises:
        UserError: no such token type, model or cleaner.
    """

    def __init__(
        self,
        token_type: str,
        *,
        model: Optional[bytes] = None,
        model_name: str = "the BPE model",
        symbols: Sequence[str] = (),
        cleaner: Optional[str] = None,
    ) -> None:
        self._clean = _load_cleaner(cleaner) if cleaner else None
        if token_type == "bpe":
            if model is None:
                raise UserError(f"{model_name} is needed with --token_type bpe; stage 3 puts it beside tokens.txt")
            self._split: Callable[[str], List[str]] = load_sentencepiece(model, model_name).encode_as_pieces
        elif token_type == "word":
            self._split = str.split
        else:
            self._parts = re.compile("|".join([*map(re.escape, symbols), "."]), re.DOTALL)
            self._split = self._split_characters

    def split(self, text: str) -> List[str]:
        """Return the tokens of ``text``, whether or not a token list has them."""
        return self._split(self._clean(text) if self._clean else text)

    def _split_characters(self, text: str) -> List[str]:
        return [SPACE if part == " " else part for part in self._parts.findall(text)]

    def special_fault(self, text: str) -> Optional[str]:
        """Return the fault of a text with the name of a special token in it, or None.

        A name other than ``<blank>`` and ``<sos/eos>`` is allowed if it becomes one token, as ``<unk>`` may.
        """
        for name in SPECIAL if "<" in text else ():
            if name in text:
                whole = self.split(text).count(name) == text.count(name)
                if name in (BLANK, SOS_EOS) or not whole:
                    why = "" if whole else ", which would be spelled letter by letter"
                    return f"the text has {name}, the name of a special token{why}; take it out of the text"
        return None


class TokenList(Tokenizer):
    """A token list with the files beside it."""

    def __init__(self, path: PathLike, token_type: str = "char") -> None:
        self.path = path = Path(path)
        self.tokens = [line for _, line in iter_lines(path)]
        self._number = {token: i for i, token in enumerate(self.tokens)}
        self._is_bpe = token_type == "bpe"
        model = path.parent / BPE_MODEL
        content = model.read_bytes() if token_type == "bpe" and model.is_file() else None
        super().__init__(token_type, model=content, model_name=str(model),
                         symbols=read_symbols(path.parent / NLSYMS), cleaner=read_cleaner(path.parent))  # fmt: skip
        if content is not None:
            check_model(self.tokens, content, str(model), str(path))

    def check_ids(self) -> None:
        """Refuse a list without ``<unk>``, as :meth:`ids` needs it (:class:`UserError`), before texts are made."""
        if UNKNOWN not in self._number:
            raise UserError(
                f"--token_list: {self.path} has no {UNKNOWN}, as ESPnet's token lists have; give the list that the "
                "student is trained with"
            )

    def characters(self) -> List[str]:
        """Return what texts may consist of, besides blanks: the tokens, or for BPE the characters of the pieces."""
        return characters_of(self.tokens) if self._is_bpe else self.tokens

    def ids(self, text: str) -> List[int]:
        """Return the ids of a text's tokens; as in ESPnet, a token that the list lacks has the id of ``<unk>``."""
        return [self._number.get(token, self._number[UNKNOWN]) for token in self.split(text)]

    def unknown(self, text: str) -> List[str]:
        """Return the tokens of ``text`` that the list lacks, sorted; ESPnet replaces each by ``<unk>``."""
        return sorted({token for token in self.split(text) if token not in self._number})


def characters_of(tokens: Sequence[str]) -> List[str]:
    """Return the characters, without blanks, that tokens consist of; tokens such as ``<unk>`` have none."""
    named = (token for token in tokens if not (token.startswith("<") and token.endswith(">")))
    return sorted(set("".join(named)) - {WORD_START})


def usable_pieces(model: bytes, name: str = "the BPE model") -> List[str]:
    """Return the pieces of a SentencePiece model that a text can have, in order; errors as in :func:`read_pieces`."""
    processor = load_sentencepiece(model, name)
    idle = (processor.is_unknown, processor.is_control, processor.is_unused, processor.is_byte)
    numbers = range(processor.get_piece_size())
    return [processor.id_to_piece(i) for i in numbers if not any(is_idle(i) for is_idle in idle)]


def check_model(tokens: Sequence[str], model: bytes, name: str, owner: str) -> None:
    """Refuse a BPE model that does not belong to a token list: a piece that one has and the other lacks.

    Args:
        name, owner: names of the model and the token list in messages.

    Raises:
        UserError: they do not belong together, or the model is not a SentencePiece model.
    """
    pieces = set(read_pieces(model, name))
    absent = [token for token in tokens if token not in pieces and token not in (BLANK, UNKNOWN, SOS_EOS)]
    if absent:
        raise UserError(f"{name} does not belong to {owner}: it has no pieces {' '.join(absent[:5])}")
    known = set(tokens)
    extra = [piece for piece in usable_pieces(model, name) if piece not in known]
    if extra:
        raise UserError(f"{name} does not belong to {owner}: {len(extra)} of its {len(pieces)} pieces are none of "
                        f"the {len(tokens)} tokens ({' '.join(extra[:5])}), and would become {UNKNOWN}; give the model "
                        "that the list was made from")  # fmt: skip


def read_symbols(path: Path) -> List[str]:
    """Return the symbols of a ``non_linguistic_symbols`` file, one a line; none where there is no file.

    Raises:
        UserError: one of them is the beginning of another, or has white space in it.
    """
    if not path.is_file():
        return []
    lines = [(number, line.rstrip()) for number, line in iter_lines(path)]
    symbols = list(dict.fromkeys(line for _, line in lines if line))
    for number, symbol in lines:
        longer = next((other for other in symbols if other.startswith(symbol) and other != symbol), None)
        if symbol and (re.search(r"\s", symbol) or longer):
            why = "white space in it" if longer is None else f"the beginning of {longer}"
            raise UserError(f"{path}:{number}: '{symbol}' cannot be a symbol that stays whole: {why}; rename it")
    return symbols


def read_cleaner(directory: Path) -> Optional[str]:
    """Return the name of the text cleaner of a token list's directory, or None."""
    path = directory / CLEANER
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None


def _load_cleaner(name: str) -> Callable[[str], str]:
    import espnet_kd.offline  # noqa: F401  (before espnet2.text, which looks for downloads)

    try:
        from espnet2.text.cleaner import TextCleaner

        cleaner = TextCleaner(name)
        cleaner("a")
    except Exception as e:  # a missing package, an unknown cleaner, or any error of the cleaner
        raise UserError(f"the teacher's text cleaner '{name}' cannot be used here: {e}; install what it needs") from e
    return cleaner
