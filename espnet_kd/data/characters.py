"""What may stand in the lines of a data dir: encodings, ids, and characters of a text.

ESPnet reads these files as text and cuts lines with ``str.split()``: at a U+3000 or U+00A0 too, and a CR ends a line.
Here lines are cut at blanks and tabs; whatever the two would see differently is found with these functions.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Optional

MAX_ID = 240  # bytes: a file of this name, and a temporary one beside it, may have 255
MARK = b"\xef\xbb\xbf"  # the byte order mark, U+FEFF, as UTF-8
_OTHERS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_ODD_BLANK = re.compile(r"[^\S ]")
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\r\n\ufeff]")  # control characters, and what ends a line
_NO_ID = re.compile("[\\s/\x00-\x1f\x7f-\x9f\ufeff]")


def encoding_fault(head: bytes) -> Optional[str]:
    """What a file's first bytes say of its encoding, where that is not UTF-8, and how to mend it; None where it is.

    A byte order mark of UTF-8, :data:`MARK`, is none: it can be passed over.
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
    """The first white space in ``text`` that is no plain blank (tab, U+00A0, U+3000 …), or None."""
    match = _ODD_BLANK.search(text)
    return match[0] if match else None


def with_plain_blanks(text: str) -> str:
    """Return ``text`` with a plain blank for each other white space, and none at its ends."""
    return _ODD_BLANK.sub(" ", text).strip()


def text_fault(text: str) -> Optional[str]:
    """Why a text cannot be one: a character that ends its line in ESPnet, or that nobody says; None where it can."""
    match = _NO_TEXT.search(text)
    if match is None:
        return None
    what = "at which a line ends" if match[0] in "\r\n" else "which is no character of a text"
    return f"the text has {name_character(match[0])}, {what}; take it out"


def id_fault(name: str) -> Optional[str]:
    """Why a name cannot be that of an utterance or speaker, or None: files are named by it, and lines cut after it."""
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
