"""Kaldi's two-column text files (wav.scp, text): one utterance a line, its id first."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterable, Union

from espnet_kd.cli import UserError


def read_table(path: Union[str, Path], *, empty_values: bool = False) -> Dict[str, str]:
    """Read ``id value…`` lines in file order; the value is stripped and may hold blanks.

    Raises:
        UserError: unreadable, an id twice, no id, or (without ``empty_values``) no value; names file and line.
    """
    table: Dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        key, value = (line.split(maxsplit=1) + ["", ""])[:2]
        if not key:
            raise UserError(f"{path}:{number}: empty line; remove it")
        if key in table:
            raise UserError(f"{path}:{number}: utterance {key} stands there twice; remove one")
        if not value.strip() and not empty_values:
            raise UserError(f"{path}:{number}: utterance {key} has nothing after its id")
        table[key] = value.strip()
    return table


def name_some(ids: Iterable[str], limit: int = 5) -> str:
    """List a few ids for a message: ``a, b, … (12 in all)``."""
    ids = sorted(ids)
    return ", ".join(ids) if len(ids) <= limit else f"{', '.join(ids[:limit])}, … ({len(ids)} in all)"
