"""Encodings, white space and ids: input that ESPnet would read differently is converted, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import pytest
import soundfile

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import Utterance, read_data_dir, write_data_dir

ODD_BLANKS = {"tab": "\t", "U+00A0": "\xa0", "U+3000": "\u3000", "U+2028": "\u2028", "U+0085": "\x85", "U+001F": "\x1f",
              "U+200A": "\u200a"}  # fmt: skip
NO_TEXT = {"U+000D": "A\rB", "U+FEFF": "A\ufeffB", "U+0000": "A\0B", "U+0007": "A\x07"}
BAD_IDS = {"/": "s-a/b", "U+3000": "s-\u3000a", "U+00A0": "s-\xa0", "U+FEFF": "s-\ufeff", "U+0001": "s-\x01",
           "244 bytes": "s-" + "x" * 242, "302 bytes": "s-" + "语" * 100}  # fmt: skip


@pytest.fixture
def src(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000, subtype="PCM_16")
    utts = [Utterance(f"s-{i}", "s", str(tmp_path / "a.wav"), f"HELLO {'AB'[i]}") for i in range(2)]
    write_data_dir(tmp_path / "src", utts)
    return tmp_path / "src"


def change(path: Path, old: str, new: str) -> None:
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode()))


def format_it(src: Path) -> List[Utterance]:
    asr_kd_data.main(["format", "--src", str(src), "--dst", str(src.parent / "dump")])
    return list(read_data_dir(src.parent / "dump"))


def tokens_of(src: Path, *options: str) -> List[str]:
    asr_kd_data.main(["tokens", "--text", str(src / "text"), "--out", str(src.parent / "tokens"), *options])
    return (src.parent / "tokens/tokens.txt").read_text(encoding="utf-8").split("\n")


COMMANDS: Dict[str, Callable[[Path], object]] = {
    "validate": lambda src: asr_kd_data.main(["validate", str(src)]),
    "format": format_it,
    "tokens": tokens_of,
}


@pytest.mark.faults("faulty data dirs")
@pytest.mark.parametrize("name", ODD_BLANKS)
def test_white_space_that_is_no_blank(src: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Stage 2 replaces it by a blank and logs that; commands that read a data dir as ESPnet does refuse it."""
    change(src / "text", "HELLO B", f"HELLO{ODD_BLANKS[name]}B{ODD_BLANKS[name]}")
    code = f"U+{ord(ODD_BLANKS[name]):04X}"
    for command in ("validate", "tokens"):
        with pytest.raises(UserError, match=f"(?s)text:2: utterance 's-1'.*{re.escape(code)}"):
            COMMANDS[command](src)
    assert [u.text for u in format_it(src)] == ["HELLO A", "HELLO B"]
    assert f"{code}" in caplog.text and "1 utterances, such as s-1" in caplog.text
    assert tokens_of(src.parent / "dump").count("<space>") == 1
    asr_kd_data.main(["validate", str(src.parent / "dump"), "--token_list", str(src.parent / "tokens/tokens.txt")])


@pytest.mark.faults("faulty data dirs")
@pytest.mark.parametrize("text", ["\u3000", "\xa0", "\t", " ", "\u2003 \x1d"])
def test_a_text_of_white_space_is_empty(src: Path, text: str) -> None:
    change(src / "text", " HELLO B", f" {text}")
    for command in ("validate", "tokens"):
        with pytest.raises(UserError, match="text:2: utterance 's-1': the text is empty"):
            COMMANDS[command](src)
    assert not format_it(src)[1].text
    with pytest.raises(UserError, match="dump/text:2: utterance 's-1': the text is empty"):
        tokens_of(src.parent / "dump")


@pytest.mark.faults("faulty data dirs")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NO_TEXT)
def test_characters_that_no_text_has(src: Path, name: str, command: str) -> None:
    change(src / "text", "HELLO B", NO_TEXT[name])
    with pytest.raises(UserError, match=f"(?s)text.*{re.escape(name)}|text.*NUL"):
        COMMANDS[command](src)


@pytest.mark.faults("faulty data dirs")
@pytest.mark.parametrize("command", ["validate", "format"])
@pytest.mark.parametrize("file", ["all", "utt2spk"])
@pytest.mark.parametrize("name", BAD_IDS)
def test_ids_that_cannot_be(src: Path, name: str, file: str, command: str) -> None:
    """A bad id of an utterance or a speaker is refused by ``validate`` and ``format`` alike."""
    if file == "all":
        for each in ("wav.scp", "text", "utt2spk", "spk2utt"):
            change(src / each, "s-1", BAD_IDS[name])
    else:
        change(src / "utt2spk", "s-1 s", f"s-1 {BAD_IDS[name]}")
    expected = {"/": "U\\+002F"}.get(name, re.escape(name))
    with pytest.raises(UserError, match=f"(wav.scp|utt2spk|text):2: .*(the id has|expected one speaker).*{expected}"):
        COMMANDS[command](src)


def test_an_id_that_is_too_long_with_what_a_speed_factor_adds(src: Path) -> None:
    name = "s-" + "x" * 237
    for each in ("wav.scp", "text", "utt2spk", "spk2utt"):
        change(src / each, "s-1", name)
    format_it(src)
    asr_kd_data.main(["validate", str(src)])
    with pytest.raises(UserError, match=f"{name}': the id has 245 bytes; .* may have 240: give it a shorter one"):
        asr_kd_data.main(["format", "--src", str(src), "--dst", str(src.parent / "dump"), "--speed_factors", "0.9"])


@pytest.mark.parametrize("file", ["wav.scp", "text", "utt2spk", "spk2utt"])
def test_a_byte_order_mark(src: Path, file: str) -> None:
    """Stage 2 skips the mark; ``validate`` refuses it, because ESPnet would not skip it."""
    (src / file).write_bytes(b"\xef\xbb\xbf" + (src / file).read_bytes())
    with pytest.raises(UserError, match=rf"{file}:1: a byte order mark \(U\+FEFF\).*sed -i"):
        asr_kd_data.main(["validate", str(src)])
    assert [u.utt_id for u in format_it(src)] == ["s-0", "s-1"]
    assert b"\xef\xbb\xbf" not in (src.parent / "dump" / file).read_bytes()
    asr_kd_data.main(["validate", str(src.parent / "dump")])


@pytest.mark.faults("faulty data dirs")
@pytest.mark.parametrize("command", ["validate", "format"])
@pytest.mark.parametrize("file", ["wav.scp", "text", "utt2spk"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings(src: Path, file: str, encoding: str, command: str) -> None:
    (src / file).write_bytes((src / file).read_text().encode(encoding))
    with pytest.raises(UserError, match=rf"{file}: .*UTF-(16|32).*iconv -f UTF-(16|16LE|32) -t UTF-8 .*{file}"):
        COMMANDS[command](src)


def test_a_file_name_that_espnet_would_cut(src: Path) -> None:
    soundfile.write(src / "b.wav\u3000", np.zeros(16000), 16000, format="WAV")
    (src / "wav.scp").write_text(f"s-0 {src}/b.wav\u3000\ns-1 {src}/b.wav\u3000\n")
    with pytest.raises(UserError, match="s-0.*white space at an end"):
        format_it(src)


@pytest.mark.parametrize("seconds", [0.02, 0.3, 0.49, 0.51, 2.0])
def test_a_segment_that_ends_late_is_the_same_for_both(src: Path, seconds: float) -> None:
    wav = str(src.parent / "a.wav")
    write_data_dir(src, [Utterance("s-0", "s", wav, "A", None, "r", 0.0, 1 + seconds)])
    for command in ("validate", "format"):
        if seconds < 0.5:
            COMMANDS[command](src)
        else:
            with pytest.raises(UserError, match="s-0"):
                COMMANDS[command](src)
