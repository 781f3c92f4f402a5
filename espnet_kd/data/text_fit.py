"""Rewriting of transcripts to the characters of a teacher's token list: case, apostrophes and punctuation."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from pathlib import Path
from typing import Collection, Dict, List, Mapping, Optional, Pattern, Sequence, Tuple, Union

from espnet_kd.cli import UserError
from espnet_kd.data.characters import name_character
from espnet_kd.data.datadir import OWN_TEXT, iter_lines, read_map, read_pairs
from espnet_kd.experiments.record import Record
from espnet_kd.files import replacing, sha256_of

#: Characters that stand for an apostrophe.
APOSTROPHES = "\u2019\u2018\u02bc\u0060\u00b4"
#: Symbols that stand for words (beside those of currencies), and brackets of annotations such as ``[Music]`` and
#: ``<unk>``: without them a text would lack a word, or would have one that nobody has spoken.
SYMBOLS = "%\u2030&@#*+=\u00b1\u00d7\u00f7\u00b0\u00a7<>[]{}"


def fit_text(text: str, tokens: Collection[str]) -> str:
    """Return ``text`` rewritten to the characters of ``tokens``.

    In this order: letters get the case of the tokens, if these have only one case; characters with marks, such as
    ``é``, get the normal form of the tokens (NFC or NFD); other apostrophe characters become ``'``; punctuation that is
    not a token is removed, except ``SYMBOLS``. All other characters are kept.
    """
    letters = {t for t in tokens if len(t) == 1 and t.isalpha()}
    if letters and not any(t.islower() for t in letters):
        text = text.upper()
    elif letters and not any(t.isupper() for t in letters):
        text = text.lower()
    kept = []
    for char in _in_normal_form(text, tokens):
        if char in APOSTROPHES and char not in tokens:
            char = "'"
        category = unicodedata.category(char)
        if char in tokens or char in SYMBOLS or category == "Sc" or not category.startswith(("P", "S")):
            kept.append(char)
        elif char in "-\u2013\u2014/":  # these separate words
            kept.append(" ")
    return " ".join("".join(kept).split())


def _in_normal_form(text: str, tokens: Collection[str]) -> str:
    """Return ``text``, its NFC or its NFD: that with the fewest characters that are no tokens."""
    forms = dict.fromkeys((text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))))
    return min(forms, key=lambda form: sum(char not in tokens for char in form)) if len(forms) > 1 else text


#: Pairs of a pattern and its replacement.
Rules = Sequence[Tuple[Pattern[str], str]]


def read_rules(path: Union[str, Path]) -> List[Tuple[Pattern[str], str]]:
    """Read a file of rules by which texts are rewritten, such as digits to words.

    A line has a Python regular expression, a tab and the replacement, in which ``\\1`` is the first group; lines that
    are empty or begin with ``#`` are skipped.

    Raises:
        UserError: there is no such file; or a line, which the message names, has no tab, no valid regular expression,
            or a group that the expression lacks.
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
            pattern.sub(replacement, "")  # an error if it lacks a group that the replacement names
        except (re.error, IndexError) as e:
            raise UserError(f"{path}:{number}: {expression!r} → {replacement!r} is no rule: {e}") from e
        rules.append((pattern, replacement))
    return rules


def rewrite(text: str, rules: Rules) -> str:
    """Return ``text`` after applying the rules in turn; blanks separate a replacement from the text around it."""
    for pattern, replacement in rules:
        text = pattern.sub(f" {replacement} " if replacement else "", text)
    return " ".join(text.split()) if rules else text


def fit_data_dir(data_dir: Union[str, Path], tokens: Collection[str], rules: Rules = ()) -> Tuple[int, int]:
    """Rewrite ``text`` of a data dir by :func:`rewrite` and :func:`fit_text`; a text that fits is left as it is.

    The texts before are kept in ``OWN_TEXT``, after ``rules``. A later call for other tokens begins with them, because
    punctuation and case that one teacher lacks another teacher may have; :func:`unfit_data_dir` restores them.

    Returns:
        utterances that were changed, utterances with a text

    Raises:
        UserError: a text still has a character, such as a digit, that is not a token; then nothing is changed.
    """
    path = Path(data_dir) / "text"
    if not path.is_file():
        return 0, 0
    record, own_path = _record_of(path), path.with_name(OWN_TEXT)
    characters = hashlib.sha256("\n".join(sorted(tokens)).encode()).hexdigest()
    if not rules and record.is_of(_inputs(path, characters)):
        return 0, sum(1 for _ in read_pairs(path))
    texts = read_map(path)
    fitted_before = is_fitted(path)
    own = {u: rewrite(t, rules) for u, t in (read_map(own_path) if fitted_before else texts).items()}
    fitted = {u: fit_text(t, tokens) for u, t in own.items()}
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
    if not fitted_before:
        own_path.unlink(missing_ok=True)  # of a text that was replaced since
    changed = [u for u, text in fitted.items() if text != " ".join(texts[u].split())]
    if changed:
        # A kill between any two of these leaves a text that is known to be fitted, or the texts before in its place.
        if fitted_before:
            _write(path, own)
        _write(own_path, own)
        record.finish({"text": hashlib.sha256(_lines(fitted)).hexdigest(), "characters": characters})
        _write(path, fitted)
        logging.info(
            "%s: %d of %d texts were changed to the teacher's characters, such as that of %s: %r → %r",
            path, len(changed), len(texts), changed[0], texts[changed[0]], fitted[changed[0]],
        )  # fmt: skip
    record.finish(_inputs(path, characters))
    return len(changed), len(texts)


def _write(path: Path, texts: Mapping[str, str]) -> None:
    with replacing(path, "wb") as f:
        f.write(_lines(texts))


def _lines(texts: Mapping[str, str]) -> bytes:
    return "".join(f"{u} {text}\n" if text else f"{u}\n" for u, text in texts.items()).encode()


def unfit_data_dir(data_dir: Union[str, Path]) -> bool:
    """Restore the texts that :func:`fit_data_dir` has changed; return whether there were any.

    A ``text`` that was written since then is kept.
    """
    path = Path(data_dir) / "text"
    fitted = is_fitted(path)
    if fitted:
        os.replace(path.with_name(OWN_TEXT), path)
    path.with_name(OWN_TEXT).unlink(missing_ok=True)
    _record_of(path).path.unlink(missing_ok=True)
    return fitted


def is_fitted(text: Path) -> bool:
    """Whether a ``text`` is as :func:`fit_data_dir` has written it, and the texts before are there."""
    there = text.is_file() and text.with_name(OWN_TEXT).is_file()
    found = _record_of(text).inputs() if there else None
    return isinstance(found, dict) and found == _inputs(text, found.get("characters"))


def _record_of(text: Path) -> Record:
    """The record of a fitted ``text``."""
    return Record(text.with_name(".fitted"))


def _inputs(text: Path, characters: Optional[str]) -> Dict[str, Optional[str]]:
    """What the record holds: the hash of the text, and that of the characters that it was fitted to."""
    return {"text": sha256_of(text), "characters": characters}
