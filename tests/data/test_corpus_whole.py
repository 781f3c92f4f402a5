"""An incomplete corpus: the log names the parts that the original has and this copy lacks."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from tiny_layouts import write_aishell, write_librispeech, write_noise, write_tedlium2

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data import aishell, librispeech, tedlium2
from espnet_kd.data.an4 import find_audio
from espnet_kd.data.datadir import Utterance, read_map, write_data_dir

SPEAKERS = """;ID  |SEX| SUBSET           |MINUTES| NAME
19   | F | train-clean-100  | 25.19 | Kara
26   | M | train-clean-100  | 25.08 | Denys
118  | F | train-clean-100  | 25.08 | Sayers
150  | F | train-clean-100  | 25.08 | Missing
84   | F | dev-clean        | 8.02  | Christie
"""


@pytest.mark.faults("faulty corpora")
@pytest.mark.parametrize("split", [False, True])
def test_librispeech(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch, split: bool) -> None:
    root = write_librispeech(tmp_path / "LibriSpeech")
    (root / "SPEAKERS.TXT").write_text(SPEAKERS)
    command = ["librispeech", "--out", str(tmp_path / "data"), "--librispeech", str(root)]
    command += ["--split_by_speaker", "train-clean-100", "--speakers_valid", "1"] if split else [
        "--train_parts", "train-clean-100", "--valid_parts", "dev-clean", "--test_parts", ""]  # fmt: skip
    asr_kd_data.main(command)
    lacking = [r.getMessage() for r in caplog.records if "corpus is incomplete" in r.getMessage()]
    assert lacking[0].startswith(f"{tmp_path}/data/train: the corpus is incomplete: 3 of 251 speakers of ")
    assert f"train-clean-100 (missing of {root}/SPEAKERS.TXT: 150); 12 of 28539 utterances" in lacking[0]
    assert len(lacking) == (1 if split else 2)
    # If nothing is missing, nothing is logged.
    caplog.clear()
    (root / "SPEAKERS.TXT").write_text(SPEAKERS.replace("150 ", "118 "))
    monkeypatch.setattr(librispeech, "SIZES", {"train-clean-100": (3, 12), "dev-clean": (1, 4)})
    asr_kd_data.main(command)
    assert "corpus is incomplete" not in caplog.text


@pytest.mark.faults("faulty corpora")
@pytest.mark.parametrize("where", ["wav", "wav/train"])
def test_aishell_packed_beside(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch, where: str) -> None:
    """A speaker who is still packed is unpacked, wherever the archive lies; a missing speaker is logged."""
    monkeypatch.chdir(tmp_path)
    root = write_aishell(tmp_path / "data_aishell")
    with tarfile.open(root / where / "S0003.tar.gz", "w:gz") as tar:
        tar.add(root / "wav/train/S0003", "train/S0003")
    shutil.rmtree(root / "wav/train/S0003")
    command = ["aishell", "--out", "data", "--aishell", str(root)]
    asr_kd_data.main(command)
    assert len(read_map("data/train/text")) == 6
    assert "data/train: the corpus is incomplete: 2 of 340 speakers; 6 of 120098 utterances" in caplog.text
    caplog.clear()
    monkeypatch.setattr(aishell, "SIZES", {"train": (2, 6), "valid": (1, 3), "test": (1, 3)})
    asr_kd_data.main(command)
    assert "corpus is incomplete" not in caplog.text


@pytest.mark.faults("faulty corpora")
def test_tedlium2(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    command = ["tedlium2", "--out", str(tmp_path / "data"), "--tedlium2", str(write_tedlium2(tmp_path / "ted"))]
    asr_kd_data.main(command)
    assert "valid: the corpus is incomplete: 1 of 8 talks; add" in caplog.text and "2 of 1495" in caplog.text
    caplog.clear()
    monkeypatch.setattr(tedlium2, "TALKS", {"train": 2, "dev": 1, "test": 1})
    asr_kd_data.main(command)
    assert "corpus is incomplete" not in caplog.text


def test_links_that_loop(tmp_path: Path) -> None:
    """Two links of this kind could be followed without end."""
    write_noise(tmp_path / "elsewhere/an1-x-b.wav")
    (tmp_path / "an4/wav").mkdir(parents=True)
    for name, target in (("a", ".."), ("b", ".."), ("audio", tmp_path / "elsewhere")):
        (tmp_path / "an4/wav" / name).symlink_to(target)
    assert list(find_audio(tmp_path / "an4")) == ["an1-x-b"]


@pytest.mark.parametrize(("entry", "message"), [("a.ark:4", "a.ark:4 is a place in an ark.*asr_kd_data espnet"),
                                                ("gone.wav", "a relative path counts from here, {here}")])  # fmt: skip
@pytest.mark.parametrize("command", [["format", "--dst", "out", "--text", "none", "--src"], ["validate"]])
def test_audio_that_is_no_file(tmp_path: Path, monkeypatch, entry: str, message: str, command: list) -> None:
    monkeypatch.chdir(tmp_path)
    write_data_dir("d", [Utterance("s-u", "s", entry, "A")])
    Path("a.ark").write_bytes(b"s-u RIFF")
    message = message.format(here=tmp_path) if command[0] == "format" or "ark" in entry else "relative paths count from"
    with pytest.raises(UserError, match=f"(?s)s-u'.*{message}"):
        asr_kd_data.main([*command, "d"])
