"""Data dirs are written sorted and whole, and every fault is named with file, line and utterance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import Utterance, read_data_dir, write_data_dir
from espnet_kd.data.validation import validate


def write_audio(path: Path, seconds: float = 0.5, fs: int = 16000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(seconds * fs), 0.1), fs)
    return str(path)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    utts = [
        Utterance(f"s{i}-u{i}", f"s{i}", write_audio(tmp_path / f"{i}.wav"), f"HELLO {'AB'[i % 2]}", 8000)
        for i in range(3)
    ]
    write_data_dir(tmp_path / "data", utts)
    return tmp_path / "data"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def faults_of(data_dir: Path, **options) -> str:
    with pytest.raises(UserError) as e:
        validate(data_dir, **options)
    return str(e.value)


def test_round_trip_and_c_locale_order(tmp_path: Path) -> None:
    # In a dictionary's order, b would come before Z, and 你 would have no fixed place.
    ids = ["b", "Z", "a-1", "a1", "你"]
    write_data_dir(tmp_path / "d", [Utterance(i, "s", f"{i}.wav", f"T {i}") for i in ids])
    want = sorted(ids, key=lambda x: x.encode())
    assert [u.utt_id for u in read_data_dir(tmp_path / "d")] == want == ["Z", "a-1", "a1", "b", "你"]
    assert (tmp_path / "d" / "text").read_text(encoding="utf-8").splitlines()[0] == "Z T Z"
    assert (tmp_path / "d" / "spk2utt").read_text(encoding="utf-8") == f"s {' '.join(want)}\n"
    assert not (tmp_path / "d" / "utt2num_samples").exists()


def test_segments_round_trip(tmp_path: Path) -> None:
    wav = write_audio(tmp_path / "r.wav", 2)
    utts = [Utterance(f"s-{i}", "s", wav, "A", recording="r", start=i * 0.5, end=i * 0.5 + 0.4) for i in range(3)]
    write_data_dir(tmp_path / "d", utts)
    assert list(read_data_dir(tmp_path / "d")) == utts
    assert (tmp_path / "d" / "wav.scp").read_text() == f"r {wav}\n"
    assert validate(tmp_path / "d") == 3
    edit(tmp_path / "d" / "segments", "s-2 r 1.000 1.400", "s-2 r 1.000 2.700")
    assert f"{tmp_path / 'd' / 'segments'}:3: utterance 's-2': goes from 1.0 to 2.7 s" in faults_of(tmp_path / "d")


def test_an_old_file_is_not_left_beside_new_ones(data_dir: Path, tmp_path: Path) -> None:
    write_data_dir(data_dir, [Utterance("x-1", "x", write_audio(tmp_path / "x.wav"))])
    assert not (data_dir / "text").exists() and not (data_dir / "utt2num_samples").exists()
    assert validate(data_dir, need_text=False) == 1
    assert f"{data_dir / 'text'}: no such file" in faults_of(data_dir)


@pytest.mark.parametrize(
    ("utt", "words"),
    [
        (Utterance("a", "s", "a.wav"), "comes twice"),
        (Utterance("a b", "s", "a.wav"), r"the id has U\+0020"),
        (Utterance("b", "", "a.wav"), "empty"),
        (Utterance("b", "s", "a.wav", "A\nB"), r"the text has U\+000A"),
    ],
)
def test_bad_utterances_are_not_written(tmp_path: Path, utt: Utterance, words: str) -> None:
    with pytest.raises(UserError, match=words):
        write_data_dir(tmp_path / "d", [Utterance("a", "s", "a.wav", "A"), utt])
    assert not (tmp_path / "d" / "wav.scp").exists()


def test_untranscribed_utterances_pass_only_when_told_so(data_dir: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("\n".join("HELOAB"))
    edit(tokens, "H", "<space>\nH")
    edit(data_dir / "text", "s1-u1 HELLO B\n", "s1-u1\n")
    assert f"{data_dir / 'text'}:2: utterance 's1-u1': the text is empty" in faults_of(data_dir)
    assert validate(data_dir, allow_empty=True, token_list=tokens) == 3
    edit(data_dir / "text", "s0-u0 HELLO A", "s0-u0 HELLO X")
    assert "utterance 's0-u0': not in" in faults_of(data_dir, allow_empty=True, token_list=tokens)


def test_a_text_is_left_closed(data_dir: Path) -> None:
    (data_dir / "text").write_bytes(b"\xff")
    assert [u.text for u in read_data_dir(data_dir, read_text=False)] == [None] * 3


def test_a_good_dir_passes(data_dir: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<blank>\n<unk>\nH\nE\nL\nO\nA\nB\n<space>\n<sos/eos>\n")
    assert validate(data_dir, token_list=tokens) == 3


@pytest.mark.parametrize(
    ("file", "old", "new", "where", "words"),
    [
        ("text", "s0-u0 HELLO A\ns1-u1 HELLO B\n", "s1-u1 HELLO B\ns0-u0 HELLO A\n", "text:2: utterance 's0-u0'",
         "is not sorted"),
        ("text", "s1-u1 HELLO B\n", "s1-u1 HELLO B\ns1-u1 HELLO B\n", "text:3: utterance 's1-u1'", "already in line 2"),
        ("text", "s1-u1 HELLO B\n", "", "wav.scp:2: utterance 's1-u1'", "is missing in text"),
        ("text", "s1-u1 HELLO B\n", "s1-u1 HELLO B\ns1-u2 A\n", "text:3: utterance 's1-u2'", "is missing in wav.scp"),
        ("text", "s1-u1 HELLO B\n", "s1-u1 \n", "text:2: utterance 's1-u1'", "the text is empty"),
        ("text", "s1-u1 HELLO B\n", "s1-u1 HELLO B\n\n", "text:3", "an empty line"),
        ("utt2spk", "s1-u1 s1", "s1-u1 s9", "utt2spk:2: utterance 's1-u1'", "speaker s9 here, s1 in spk2utt"),
        ("utt2spk", "s1-u1 s1", "s1-u1", "utt2spk:2: utterance 's1-u1'", "expected one speaker"),
        ("wav.scp", "s1-u1 ", "s1-u1 sox x.wav -t wav - |\ns1-u1x ", "wav.scp:2: 's1-u1'", "shell pipe"),
        ("wav.scp", "1.wav", "9.wav", "wav.scp:2: 's1-u1'", "no such audio file"),
    ],
)  # fmt: skip
def test_each_fault_is_named(data_dir: Path, file: str, old: str, new: str, where: str, words: str) -> None:
    edit(data_dir / file, old, new)
    message = faults_of(data_dir)
    assert any(str(data_dir / where) in line and words in line for line in message.splitlines()), message


def test_each_fault_of_the_audio_is_named(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "wav.scp"
    (tmp_path / "0.wav").write_bytes(b"no audio at all")
    soundfile.write(tmp_path / "1.wav", np.zeros(0), 16000)
    write_audio(tmp_path / "2.wav", 0.5, 8000)
    message = faults_of(data_dir)
    assert f"{path}:1: 's0-u0': unreadable audio" in message
    assert f"{path}:2: 's1-u1': the audio has zero length" in message
    assert f"{path}:3: 's2-u2': sampling rate 8000 Hz, expected 16000" in message
    assert validate(data_dir, check_audio=False) == 3


def test_durations_outside_the_limits(data_dir: Path, tmp_path: Path) -> None:
    write_audio(tmp_path / "0.wav", 0.05)
    write_audio(tmp_path / "1.wav", 3)
    message = faults_of(data_dir, max_seconds=2)
    assert f"{data_dir / 'wav.scp'}:1: utterance 's0-u0': 0.05 s, shorter than 0.1 s" in message
    assert f"{data_dir / 'wav.scp'}:2: utterance 's1-u1': 3.00 s, longer than 2 s" in message
    assert "2 fault(s)" in message


def test_bad_utf8_and_unknown_characters(data_dir: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<blank>\n<unk>\n<space>\nH\nE\nL\nO\nA\n<sos/eos>\n")
    assert f"{data_dir / 'text'}:2: utterance 's1-u1': not in {tokens}: B" in faults_of(data_dir, token_list=tokens)
    (data_dir / "text").write_bytes(b"s0-u0 A\ns1-u1 \xff\xfe\ns2-u2 A\n")
    assert f"{data_dir / 'text'}:2: utterance 's1-u1': not UTF-8" in faults_of(data_dir)
    with pytest.raises(UserError, match="text:2: not UTF-8"):
        list(read_data_dir(data_dir))


def test_the_blank_is_a_character(data_dir: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<blank>\n<unk>\nH\nE\nL\nO\nA\nB\n<sos/eos>\n")  # without <space>, ESPnet would read <unk>
    assert f"utterance 's0-u0': not in {tokens}: <space>" in faults_of(data_dir, token_list=tokens)


def test_a_speakers_utterance_that_is_nowhere_else(data_dir: Path) -> None:
    edit(data_dir / "spk2utt", "s1 s1-u1", "s1 s1-u1 s1-u9")
    assert f"{data_dir / 'spk2utt'}:2: utterance 's1-u9' of speaker 's1' is missing in utt2spk" in faults_of(data_dir)


def test_audio_that_does_not_say_what_it_is(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "0.raw").write_bytes(bytes(1000))
    edit(data_dir / "wav.scp", "0.wav", "0.raw")
    # A FLAC encoder that writes to a pipe leaves the number of samples at 0, which is 36 bits of the header.
    soundfile.write(tmp_path / "1.flac", np.full(8000, 0.1), 16000)
    content = bytearray((tmp_path / "1.flac").read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    (tmp_path / "1.flac").write_bytes(content)
    edit(data_dir / "wav.scp", "1.wav", "1.flac")
    message = faults_of(data_dir)
    assert "'s0-u0': " in message and "0.raw has no header with its sampling rate: convert" in message
    assert "'s1-u1': " in message and "1.flac has no length in its header" in message and "2 fault(s)" in message


def test_numbers_of_samples_that_are_none(data_dir: Path) -> None:
    edit(data_dir / "utt2num_samples", "s1-u1 8000", "s1-u1 8²")
    assert [u.num_samples for u in read_data_dir(data_dir)] == [8000, None, 8000]


def test_many_faults_are_counted(tmp_path: Path) -> None:
    write_data_dir(tmp_path / "d", [Utterance(f"s-{i:03}", "s", f"{tmp_path}/no{i}.wav", "A") for i in range(40)])
    message = faults_of(tmp_path / "d")
    assert "40 fault(s)" in message and "and 30 more" in message and len(message.splitlines()) == 12
