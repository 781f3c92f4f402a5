"""Checks of the lines of a data dir: encoding, ids, and characters of a text.

ESPnet reads these files as text and splits lines with ``str.split()``, also at U+3000 and U+00A0; a CR ends a line.
This package splits lines only at blanks and tabs. These functions find every character that makes a difference.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Optional

MAX_ID = 240  # bytes; a file name may have 255, and temporary files add a prefix and a suffix to the id
MARK = b"\xef\xbb\xbf"  # the byte order mark, U+FEFF, as UTF-8
_OTHERS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
#: Beginnings of the Unicode names of characters of scripts that are written without blanks between words.
UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")
_ODD_BLANK = re.compile(r"[^\S ]")
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\r\n\ufeff]")  # control characters and line ends
_NO_ID = re.compile("[\\s/\x00-\x1f\x7f-\x9f\ufeff]")


def encoding_fault(head: bytes) -> Optional[str]:
    """Return the fault of a file's encoding and its remedy, judged by the first bytes; None if it may be UTF-8.

    The byte order mark of UTF-8, :data:`MARK`, is not a fault, because readers can skip it.
    """
    for mark, what in _OTHERS.items():
        if head.startswith(mark):
            return f"is {what}; convert it to UTF-8: iconv -f {what} -t UTF-8 FILE"
    if b"\0" in head[:200]:
        return "has NUL bytes, as UTF-16 does; convert it to UTF-8: iconv -f UTF-16LE -t UTF-8 FILE"
    return None


def name_character(char: str) -> str:
    """Return a character's code point and name, such as ``U+3000 (IDEOGRAPHIC SPACE)``."""
    name = unicodedata.name(char, {"\t": "tab", "\n": "line feed", "\r": "carriage return", "\0": "NUL"}.get(char, ""))
    return f"U+{ord(char):04X}" + (f" ({name})" if name else "")


def odd_blank(text: str) -> Optional[str]:
    """Return the first white space in ``text`` that is not a plain blank (tab, U+00A0, U+3000 …), or None."""
    match = _ODD_BLANK.search(text)
    return match[0] if match else None


def with_plain_blanks(text: str) -> str:
    """Return ``text`` with each white space replaced by a plain blank, and without blanks at its ends."""
    return _ODD_BLANK.sub(" ", text).strip()


def text_fault(text: str) -> Optional[str]:
    """Return the fault of a text, or None: a character that ends its line in ESPnet, or a control character."""
    match = _NO_TEXT.search(text)
    if match is None:
        return None
    what = "at which a line ends" if match[0] in "\r\n" else "which is no character of a text"
    return f"the text has {name_character(match[0])}, {what}; take it out"


def id_fault(name: str) -> Optional[str]:
    """Return why a name cannot be an utterance or speaker id, or None: it names files, and white space ends it."""
    if not name:
        return "an id is empty"
    if match := _NO_ID.search(name):
        what = "files are named by ids" if match[0] == "/" else "ESPnet would take another id from this line"
        return f"the id has {name_character(match[0])} in it, and {what}; rename it"
    if name in (".", ".."):
        return "this id cannot name a file; rename it"
    size = len(name.encode())
    if size > MAX_ID:
        return f"the id has {size} bytes; files are named by ids, which may have {MAX_ID}: give it a shorter one"
    return None


def is_unspaced(character: str) -> bool:
    """Whether a character (or none, ``""``) belongs to a script that is written without blanks between words."""
    return bool(character) and unicodedata.name(character, "").startswith(UNSPACED)
