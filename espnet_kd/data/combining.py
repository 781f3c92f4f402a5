"""A formatted data dir with transcripts and one without become one data dir (``--untranscribed``)."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Iterator

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import (
    Utterance,
    os_errors_as_user_errors,
    read_data_dir,
    read_pairs,
    refuse_same,
    write_data_dir,
)
from espnet_kd.data.formatting import merge
from espnet_kd.files import PathLike


def combine(transcribed: PathLike, untranscribed: PathLike, dst: PathLike) -> int:
    """Write the utterances of two formatted data dirs into ``dst`` and return their number; the audio stays in place.

    ``dst/text`` has the transcripts of ``transcribed``, and the id alone for each utterance of ``untranscribed``, whose
    ``text`` is not opened. If ``transcribed`` has no text, ``dst`` has none. A ``dst`` with this content is kept.

    Raises:
        UserError: an utterance id is in both, a transcript is empty or missing, or the system refuses to write.
    """
    transcribed, untranscribed, dst = Path(transcribed), Path(untranscribed), Path(dst)
    refuse_same([transcribed, untranscribed], dst, "--dst")
    has_text = (transcribed / "text").exists()
    silent = 0

    def both() -> Iterator[Utterance]:
        nonlocal silent
        silent = 0
        for source, u in merge({transcribed: True, untranscribed: False}):
            if source == transcribed and has_text and not u.text:
                why = "has no line in it" if u.text is None else "the text is empty"
                raise UserError(f"{transcribed / 'text'}: utterance '{u.utt_id}': {why}; "
                                "move untranscribed audio to the other data dir")  # fmt: skip
            silent += not u.text
            yield replace(u, text="") if has_text and u.text is None else u

    with os_errors_as_user_errors(dst):
        if (dst / "wav.scp").exists() and all(a == b for a, b in itertools.zip_longest(read_data_dir(dst), both())):
            number = sum(1 for _ in read_pairs(dst / "utt2spk"))
        else:
            number = write_data_dir(dst, both())
    logging.info("%s: %d utterances, %d of them without text", dst, number, silent)
    return number
