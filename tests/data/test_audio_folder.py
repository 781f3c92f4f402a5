"""A directory of audio without transcripts becomes data dirs."""

import errno
import os
import shutil

import pytest
import soundfile
import tiny_asr

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_data_dir


@pytest.fixture
def audio(tmp_path):
    home = tmp_path / "audio"
    for i in range(20):
        path = home / f"speaker {i % 3}" / f"file{i}.{('wav', 'flac')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tiny_asr.audio(0.5, i), 16000)
    return home


def run(tmp_path, audio, *more):
    asr_kd_data.main(["audio", "--audio", str(audio), "--out", str(tmp_path / "data"), *more])
    return {n: list(read_data_dir(tmp_path / "data" / n)) for n in ("train", "valid", "test")}


def test_files_of_any_depth_and_format(tmp_path, audio):
    found = run(tmp_path, audio)
    assert {n: len(u) for n, u in found.items()} == {"train": 16, "valid": 2, "test": 2}  # at most a tenth each
    ids = [u.utt_id for utts in found.values() for u in utts]
    assert len(set(ids)) == 20 and "speaker_0-file0" in ids and not any(u.text for u in found["train"])


def test_more_audio_moves_none_out_of_validation_and_test(tmp_path, audio):
    before = run(tmp_path, audio, "--valid", "2", "--test", "2")
    for i in range(20, 23):
        soundfile.write(audio / f"more{i}.wav", tiny_asr.audio(0.5, i), 16000)
    after = run(tmp_path, audio, "--valid", "2", "--test", "2")
    old = {u.utt_id for n in ("valid", "test") for u in before[n]}
    new = {u.utt_id for n in ("valid", "test") for u in after[n]}
    assert all(name.startswith("more") for name in new - old)


def test_long_files_become_several_utterances(tmp_path, audio):
    soundfile.write(audio / "long.wav", tiny_asr.audio(3.5, 0), 16000)
    found = run(tmp_path, audio, "--longest", "1")
    parts = [u for utts in found.values() for u in utts if u.recording == "long"]
    assert [(u.start, u.end) for u in parts] == [(0.0, 0.875), (0.875, 1.75), (1.75, 2.625), (2.625, 3.5)]


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path, audio, caplog):
    caplog.set_level("INFO")
    (audio / "broken.wav").write_bytes(b"no audio")
    assert sum(map(len, run(tmp_path, audio).values())) == 20
    assert "left out: 1" in caplog.text and "broken.wav" in caplog.text


def test_a_set_of_which_no_file_can_be_read_is_explained(tmp_path, audio):
    valid = run(tmp_path, audio)["valid"]
    for utt in valid:
        open(utt.audio, "w").close()
    with pytest.raises(UserError, match=f"--audio .*none of the 2 files for valid .*{valid[1].audio}"):
        run(tmp_path, audio)


def test_links_to_directories_are_followed_once(tmp_path, audio):
    (audio / "speaker 2").rename(tmp_path / "other disk")
    (audio / "speaker 2").symlink_to(tmp_path / "other disk")
    (audio / "speaker 2" / "back").symlink_to(audio)  # a loop
    (audio / "z").symlink_to(tmp_path / "other disk")  # the same directory again
    ids = {u.utt_id for utts in run(tmp_path, audio).values() for u in utts}
    assert len(ids) == 20 and "speaker_2-file2" in ids


def test_hidden_copies_are_no_utterances(tmp_path, audio):
    """A file in a git annex would be a second copy in another set, and the notes of macOS are no audio."""
    for hidden in (".git/annex/objects/a/a.wav", "speaker 0/._file0.wav"):
        (audio / hidden).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(audio / "speaker 0" / "file0.wav", audio / hidden)
    ids = [u.utt_id for utts in run(tmp_path, audio).values() for u in utts]
    assert len(ids) == 20 and not any("annex" in name or "._" in name for name in ids)


def test_a_directory_that_cannot_be_read_is_named(tmp_path, audio, caplog, monkeypatch):
    caplog.set_level("INFO")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("speaker 2"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert sum(map(len, run(tmp_path, audio).values())) == 14
    assert "left out: 1" in caplog.text and "speaker 2" in caplog.text


def test_a_file_that_is_cut_is_left_out(tmp_path, audio, caplog):
    """Stage 2 would refuse it, and stop."""
    caplog.set_level("INFO")
    cut = audio / "speaker 0" / "file0.wav"
    cut.write_bytes(cut.read_bytes()[:5000])
    assert sum(map(len, run(tmp_path, audio).values())) == 19
    assert "left out: 1" in caplog.text and "file0.wav is cut" in caplog.text


def test_audio_of_other_formats_is_counted(tmp_path, audio, caplog):
    for name in ("a.m4a", "b.M4A", "c.wma", "notes.txt"):
        (audio / name).touch()
    soundfile.write(audio / "d.aif", tiny_asr.audio(0.5, 0), 16000, format="AIFF")
    assert sum(map(len, run(tmp_path, audio).values())) == 21
    assert "2 .m4a, 1 .wma" in caplog.text and ".txt" not in caplog.text


def test_a_name_that_is_not_utf_8_is_refused(tmp_path, audio):
    soundfile.write(audio / "x.wav", tiny_asr.audio(0.5, 0), 16000)
    os.rename(audio / "x.wav", os.fsencode(audio) + b"/caf\xe9.wav")
    with pytest.raises(UserError, match=r"caf\\udce9\.wav"):
        run(tmp_path, audio)


def test_mistakes(tmp_path, audio):
    with pytest.raises(UserError, match="--audio .*nowhere"):
        run(tmp_path, tmp_path / "nowhere")
    (tmp_path / "few").mkdir()
    with pytest.raises(UserError, match="--audio .*few: 0 audio files"):
        run(tmp_path, tmp_path / "few")
    soundfile.write(audio / "speaker 0" / "file0.flac", tiny_asr.audio(0.5, 0), 16000)
    with pytest.raises(UserError, match="speaker_0-file0"):
        run(tmp_path, audio)


@pytest.mark.parametrize(
    "option, value", [("--longest", "0"), ("--longest", "nan"), ("--valid", "0"), ("--test", "-1")]
)
def test_numbers_out_of_range(tmp_path, audio, option, value):
    with pytest.raises(UserError, match=f"{option} is {value}"):
        run(tmp_path, audio, option, value)
    assert not (tmp_path / "data").exists()
