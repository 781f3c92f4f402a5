"""Transcripts in the characters that a teacher's token list has: case, apostrophes and punctuation."""

from __future__ import annotations

import logging
import re
import unicodedata
from pathlib import Path
from typing import Collection, Dict, List, Pattern, Sequence, Tuple, Union

from espnet_kd.cli import UserError
from espnet_kd.data.characters import name_character
from espnet_kd.data.datadir import iter_lines, read_map
from espnet_kd.files import replacing

#: Characters that stand for an apostrophe.
APOSTROPHES = "\u2019\u2018\u02bc\u0060\u00b4"


def fit_text(text: str, tokens: Collection[str]) -> str:
    """``text`` in the characters of ``tokens``.

    In this order: letters get the case that the tokens have, where they have one only; other signs for an apostrophe
    become ``'``; punctuation that is no token is taken out. All else stays as it is.
    """
    letters = {t for t in tokens if len(t) == 1 and t.isalpha()}
    if letters and not any(t.islower() for t in letters):
        text = text.upper()
    elif letters and not any(t.isupper() for t in letters):
        text = text.lower()
    kept = []
    for char in text:
        if char in APOSTROPHES and char not in tokens:
            char = "'"
        if char in tokens or not unicodedata.category(char).startswith(("P", "S")):
            kept.append(char)
        elif char in "-\u2013\u2014/":  # these part words
            kept.append(" ")
    return " ".join("".join(kept).split())


#: What is looked for, and what comes in its place.
Rules = Sequence[Tuple[Pattern[str], str]]


def read_rules(path: Union[str, Path]) -> List[Tuple[Pattern[str], str]]:
    """Read a file of rules by which texts are rewritten, such as digits to words.

    A line has a regular expression of Python's, a tab, and what comes in its place, in which ``\\1`` is the first
    group; lines that are empty or begin with ``#`` do not count.

    Raises:
        UserError: there is no such file; or naming the line: no tab, no regular expression, or a group that it lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path} with rules")
    rules: List[Tuple[Pattern[str], str]] = []
    for number, line in iter_lines(path):
        if not line.strip() or line.startswith("#"):
            continue
        expression, tab, replacement = line.partition("\t")
        if not tab or not expression:
            raise UserError(f"{path}:{number}: a rule is a regular expression, a tab, and what comes in its place")
        try:
            pattern = re.compile(expression)
            pattern.sub(replacement, "")  # whether it has the groups that the replacement names
        except (re.error, IndexError) as e:
            raise UserError(f"{path}:{number}: {expression!r} → {replacement!r} is no rule: {e}") from e
        rules.append((pattern, replacement))
    return rules


def rewrite(text: str, rules: Rules) -> str:
    """``text`` after each of the rules in turn; what comes in by a rule is parted by blanks from what stands beside."""
    for pattern, replacement in rules:
        text = pattern.sub(f" {replacement} " if replacement else "", text)
    return " ".join(text.split()) if rules else text


def fit_data_dir(data_dir: Union[str, Path], tokens: Collection[str], rules: Rules = ()) -> Tuple[int, int]:
    """Rewrite ``text`` of a data dir by :func:`rewrite` and :func:`fit_text`; a text that fits is left as it is.

    Returns:
        utterances that were changed, utterances with a text

    Raises:
        UserError: a character, such as a digit, that is no token afterwards; nothing is changed then.
    """
    path = Path(data_dir) / "text"
    if not path.is_file():
        return 0, 0
    texts = read_map(path)
    fitted = {u: fit_text(rewrite(t, rules), tokens) for u, t in texts.items()}
    strange: Dict[str, str] = {}
    for utt_id, text in fitted.items():
        if left := next((c for c in text if c != " " and c not in tokens), None):
            strange[utt_id] = left
    if strange:
        utt_id, char = next(iter(strange.items()))
        raise UserError(
            f"{path}: utterance {utt_id} has {char!r} ({name_character(char)}), for which the teacher has no token; "
            f"{len(strange)} of {len(texts)} utterances have such: write them in letters (rules for it: asr_kd_data "
            "fit_text --rewrite FILE), or leave them out"
        )
    changed = [u for u, text in fitted.items() if text != " ".join(texts[u].split())]
    if changed:
        with replacing(path) as f:
            f.writelines(f"{u} {text}\n" if text else f"{u}\n" for u, text in fitted.items())
        logging.info(
            "%s: %d of %d texts were changed to the teacher's characters, such as that of %s: %r → %r",
            path, len(changed), len(texts), changed[0], texts[changed[0]], fitted[changed[0]],
        )  # fmt: skip
    return len(changed), len(texts)
