"""Records of results: finished, begun, or of other inputs; records of earlier versions; models of other data."""

import json
import os
import subprocess

import pytest

from espnet_kd.bin import asr_kd_record
from espnet_kd.cli import UserError
from espnet_kd.experiments.record import Record, inputs_of, is_trained


def state(*options):
    """The answer of asr_kd_record check."""
    try:
        asr_kd_record.main(["check", *map(str, options)])
    except SystemExit as e:
        return {3: "to be made"}[e.code]
    return "finished"


@pytest.fixture
def files(tmp_path):
    for name in ("tokens.txt", "wav.scp", "config.yaml"):
        (tmp_path / name).write_text(f"{name}\n")
    return tmp_path


def options(files, value="0 --lr 1"):
    fixed = ["--fixed", files / "tokens.txt", files / "wav.scp"]
    return ["--model", files / "exp", *fixed, "--file", files / "config.yaml", f"--value={value}"]


def test_a_result_is_finished_when_its_record_is_written(files):
    record = ["--record", files / "stats/.done", "--file", files / "wav.scp", "--value=--fs 16000"]
    assert state(*record) == "to be made"
    asr_kd_record.main(["finish", *map(str, record)])
    assert state(*record) == "finished"
    os.utime(files / "wav.scp", (9e9, 9e9))
    assert state(*record) == "finished", "a newer date is no other content"
    assert state(*record[:-1], "--value=--fs 8000") == "to be made"
    (files / "wav.scp").write_text("other\n")
    assert state(*record) == "to be made"


def test_audio_under_its_old_names_is_compared_by_content(files):
    audio = files / "audio.wav"
    audio.write_bytes(b"one")
    (files / "wav.scp").write_text(f"utt {audio}\n")
    where = ["--record", files / "exp/stats/.done", "--file", files / "wav.scp"]
    record = [*where, "--audio", files, "--expdir", files / "exp"]
    asr_kd_record.main(["finish", *map(str, record)])
    os.utime(files / "exp/stats/.done.audio", (1, 1))  # the clock of file systems is coarse
    assert state(*record) == "finished"
    audio.write_bytes(b"one")
    assert state(*record) == "finished", "a newer date is no other content"
    audio.write_bytes(b"two")
    assert state(*record) == "to be made" and state(*where) == "finished"
    (files / "exp/student").mkdir()
    (files / "exp/student/checkpoint.pth").touch()
    with pytest.raises(UserError, match=r"audio of .* is not that of .*exp/stats, .*\(student\).*--expdir"):
        state(*record)
    (files / "exp/stats/.done.audio").unlink()
    assert state(*record) == "finished", "an earlier version has recorded no audio"


def test_of_many_audio_files_some_are_compared(files, monkeypatch):
    """A large corpus is not read whole; if it is made again, each of its files differs."""
    monkeypatch.setattr(asr_kd_record, "COMPARED_FILES", 2)
    audio = [files / f"{i}.wav" for i in range(5)]
    for path in audio:
        path.write_bytes(b"one")
    (files / "wav.scp").write_text("".join(f"{path.stem} {path}\n" for path in audio))
    record = ["--record", files / "exp/stats/.done", "--audio", files]
    asr_kd_record.main(["finish", *map(str, record)])
    os.utime(files / "exp/stats/.done.audio", (1, 1))
    audio[1].write_bytes(b"two")
    assert state(*record) == "finished"
    audio[3].write_bytes(b"two")
    assert state(*record) == "to be made"


@pytest.mark.parametrize("content", ["{", "[]", '{"files": 1}', "null", "\0"])
def test_a_damaged_record_is_none(files, content):
    (files / ".done").write_text(content)
    assert state("--record", files / ".done", "--file", files / "wav.scp") == "to be made"


def test_an_empty_record_of_an_earlier_version_counts_by_date(files):
    record = ["--record", files / ".done", "--file", files / "wav.scp"]
    (files / ".done").touch()
    assert state(*record) == "finished"
    os.utime(files / "wav.scp", (9e9, 9e9))
    assert state(*record) == "to be made"
    (files / "wav.scp").unlink()
    with pytest.raises(UserError, match="wav.scp"):
        state(*record)


def test_a_model_of_other_options_is_trained_on_and_of_other_data_refused(files):
    assert state(*options(files)) == "to be made"
    (files / "exp/checkpoint.pth").touch()
    assert state(*options(files)) == "to be made", "begun, not finished"
    asr_kd_record.main(["finish", *map(str, options(files))])
    assert state(*options(files)) == "finished"
    assert state(*options(files, "0 --lr 2")) == "to be made", "the training compares options by name"
    assert state(*options(files)) == "finished", "the other options were not accepted"
    (files / "wav.scp").write_text("other audio\n")
    with pytest.raises(UserError, match=r"exp holds a model of other .*wav\.scp"):
        state(*options(files))
    assert (files / "exp/.done").is_file()
    (files / "exp/checkpoint.pth").unlink()
    assert state(*options(files)) == "to be made", "nothing was trained yet"


def test_a_checkpoint_without_a_record_is_refused(files):
    (files / "exp").mkdir()
    (files / "exp/checkpoint.pth").touch()
    with pytest.raises(UserError, match="nothing is recorded"):
        state(*options(files))


def cksum(text):
    return " ".join(subprocess.run(["cksum"], input=text.encode(), capture_output=True).stdout.decode().split()[:2])


@pytest.mark.parametrize("of, expected", [("all", "finished"), ("data", "to be made"), ("one", "to be made")])
def test_the_settings_of_an_earlier_version_are_read(files, of, expected):
    data, settings = cksum("tokens.txt\nwav.scp\n"), cksum("config.yaml\n0 --lr 1\n")
    (files / "exp").mkdir()
    for name in ("checkpoint.pth", ".done"):
        (files / "exp" / name).touch()
    found = {"all": f"{data} {settings}", "data": f"{data} 1 2", "one": settings}[of]
    (files / "exp/.settings").write_text(f"{found}\n")
    assert state(*options(files)) == expected
    (files / "exp/.settings").write_text("1 2 3 4\n")
    for name in (".done", ".begun"):
        (files / "exp" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="exp holds a model of other"):
        state(*options(files))


def test_facts_stand_beside_the_inputs(tmp_path):
    record = Record(tmp_path / "decode.json", key="inputs")
    record.finish({"a": 1}, rtf=0.5)
    assert json.loads((tmp_path / "decode.json").read_text()) == {"rtf": 0.5, "inputs": {"a": 1}}
    assert record.is_of({"a": 1}) and not record.is_of({"a": 2}) and not record.is_of(None)
    record.begin()
    assert record.inputs() is None


def test_what_is_begun_becomes_the_record(files):
    record = Record(files / ".done", files / ".begun")
    record.begin([1])
    assert record.inputs() is None and record.inputs_of_begun() == [1]
    record.finish([1])
    assert record.is_of([1]) and not (files / ".begun").exists()
    assert is_trained(files / "new", inputs_of([], [])) is False
