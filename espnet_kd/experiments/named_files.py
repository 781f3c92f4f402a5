"""Finding the files that a config.yaml names, and reading them only in their expected format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Union

from espnet_kd.cli import UserError
from espnet_kd.pieces import BLANK, SOS_EOS, UNKNOWN, read_pieces


def places(given: Union[str, Path], config: Path) -> Iterator[Path]:
    """Candidates for a file named in ``config``: beside it, an absolute path, in a directory above it, and here.

    ESPnet's paths are relative to the recipe's directory, which is one of the directories above the experiment.
    """
    given, home = Path(given), Path(config).resolve().parent
    yield home / given.name
    if given.is_absolute():
        yield given
        return
    yield from (parent / given for parent in home.parents)
    yield given


def read_token_list(value: Any, config: Path) -> List[str]:
    """The tokens of a saved configuration: a list, as ESPnet saves it, or a file with one token a line.

    Raises:
        UserError: no such list, or the file is no token list of ESPnet's.
    """
    if isinstance(value, (list, tuple)):
        if not value or not all(isinstance(token, str) for token in value):
            raise UserError(f"{config}: token_list: expected a list of texts")
        return list(value)
    if not isinstance(value, str):
        raise UserError(f"{config}: token_list: expected a list of texts, found {value!r}")
    found = next((p for p in places(value, config) if p.is_file()), None)
    if found is None:
        raise UserError(f"{config}: token_list: no such file: {value}; lay it beside config.yaml")
    try:
        tokens = [line.rstrip() for line in found.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{config}: token_list: cannot read {found}: {e}") from e
    if BLANK not in tokens[:1] or UNKNOWN not in tokens or len(set(tokens)) < len(tokens):
        raise UserError(f"{config}: token_list: {found} must begin with {BLANK}, have {UNKNOWN}, and each token once")
    return tokens


def find_token_model(args: argparse.Namespace, config: Path) -> Path:
    """The SentencePiece model of a configuration (``bpemodel``) whose pieces are the tokens of its list.

    Raises:
        UserError: no such file, or it is something else.
    """
    given = getattr(args, "bpemodel", None)
    if not isinstance(given, str) or not given:
        raise UserError(f"{config}: token_type: bpe without bpemodel, the SentencePiece model")
    refusal = None
    for path in dict.fromkeys(places(given, config)):
        if path.is_file():
            reason = check_token_model(path, getattr(args, "token_list", ()))
            if reason is None:
                return path
            refusal = refusal or reason
    raise UserError(refusal or f"the token model {given} of {config} does not exist; lay it beside config.yaml")


def check_token_model(path: Path, token_list: Sequence[str]) -> Optional[str]:
    """The reason why a file is not the SentencePiece model of a token list; None if it is.

    A few tokens may have been added to the list afterwards: the check of stage 3 of run.sh is stricter
    (:func:`espnet_kd.data.tokenizing.check_model`).
    """
    try:
        pieces = set(read_pieces(path.read_bytes(), f"the token model {path}"))
    except UserError as e:
        return " ".join(str(e).split())
    except OSError as e:
        return f"cannot read the token model {path}: {e.strerror}"
    strange = [t for t in token_list if t not in pieces and t not in (BLANK, UNKNOWN, SOS_EOS)]
    if len(strange) > 0.1 * len(token_list):
        return f"the token model {path} has other pieces than the token list ({' '.join(strange[:3])} …)"
    return None
