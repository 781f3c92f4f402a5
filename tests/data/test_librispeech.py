"""LibriSpeech: any parts in the original layout, a split by speaker, and a download that goes on where it broke."""

from __future__ import annotations

import hashlib
import http.server
import tarfile
import threading
from pathlib import Path
from typing import Dict, Iterator, List

import pytest
import soundfile
from tiny_layouts import LAYOUTS, PARTS, needs_layout, seconds_of, snapshot, write_librispeech

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data import librispeech
from espnet_kd.data.datadir import read_data_dir, read_map
from espnet_kd.data.librispeech import prepare_librispeech
from espnet_kd.data.validation import validate


def test_each_part_in_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_librispeech(tmp_path / "LibriSpeech", {**PARTS, "train-other-500": "20 1180"})
    with caplog.at_level("INFO"):
        counts = prepare_librispeech(
            tmp_path / "data", tmp_path, train_parts=["train-clean-100 train-other-500"], valid_parts=["dev-clean"]
        )
    assert counts == {"train": 20, "valid": 4, "test_clean": 8, "test_other": 4}
    for name, number in counts.items():
        assert validate(tmp_path / "data" / name) == number
        assert f"{name}: left out: 0" in caplog.text
        assert seconds_of(tmp_path / "data" / name) == pytest.approx(0.5 * number)
    train = list(read_data_dir(tmp_path / "data/train"))
    # Sorted over both parts as bytes: 118-, 1180-, 19-, 20-, 26-; and chapter 12 before 7.
    assert list(dict.fromkeys(u.speaker for u in train)) == ["118", "1180", "19", "20", "26"]
    assert train[0].utt_id == "118-12-0000" and train[0].text == "WORDS OF 0" and train[0].num_samples == 8000
    assert train[0].audio == str(root / "train-clean-100/118/12/118-12-0000.flac")
    assert f"{tmp_path / 'data/train'}: 20 utterances, 5 speakers, 0.00 h" in caplog.text


def test_processes_and_repetition_change_nothing(tmp_path: Path) -> None:
    root = write_librispeech(tmp_path / "LibriSpeech")
    options = {"train_parts": ["train-clean-100"], "valid_parts": ["dev-clean"], "test_parts": []}
    prepare_librispeech(tmp_path / "data", root, **options)
    first = snapshot(tmp_path / "data")
    (tmp_path / "data/train/segments").write_text("of an earlier run\n")
    prepare_librispeech(tmp_path / "data", root, nj=2, **options)
    assert snapshot(tmp_path / "data") == first and "test_clean/text" not in first


def test_split_by_speaker(tmp_path: Path) -> None:
    speakers = {"19", "26", "118", "32", "201"}
    root = write_librispeech(tmp_path / "LibriSpeech", {"train-clean-5": " ".join(speakers), "test-clean": "61"})
    chosen = set()
    for seed in range(6):
        counts = prepare_librispeech(tmp_path / "data", root, split_by_speaker=["train-clean-5"], speakers_valid=1,
                                     speakers_test=2, seed=seed, test_parts=["test-clean"])  # fmt: skip
        assert counts == {"train": 8, "valid": 4, "test": 8, "test_clean": 4}
        found = {name: set(read_map(tmp_path / "data" / name / "spk2utt")) for name in ("train", "valid", "test")}
        assert set.union(*found.values()) == speakers and sum(map(len, found.values())) == 5
        chosen.add((tuple(found["valid"]), tuple(sorted(found["test"]))))
    assert len(chosen) > 1
    with pytest.raises(UserError, match="has 5 speakers; take 1 to 4"):
        prepare_librispeech(tmp_path / "data", root, split_by_speaker=["train-clean-5"], speakers_test=5)
    with pytest.raises(UserError, match="give the part with --split_by_speaker"):
        prepare_librispeech(tmp_path / "data", root, train_parts=["train-clean-5"], valid_parts=[], speakers_test=1)


def test_bad_choices_of_parts(tmp_path: Path) -> None:
    root = write_librispeech(tmp_path / "LibriSpeech")
    for options, message in (
        ({"train_parts": ["dev-clean"]}, "dev-clean: named by --train_parts and by --valid_parts"),
        ({"split_by_speaker": ["test-clean"], "test_parts": ["test-clean"]}, "--split_by_speaker and by --test_parts"),
        ({"train_parts": [], "valid_parts": [""], "test_parts": []}, "no part at all"),
        ({}, "train-clean-360: this part is missing; fetch train-clean-360.tar.gz"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_librispeech(tmp_path / "data", root, **options)
    with pytest.raises(UserError, match="'train-cleen' is no part"):
        prepare_librispeech(tmp_path / "data", train_parts=["train-cleen"], downloads=tmp_path)
    with pytest.raises(UserError, match="nowhere: no such directory"):
        prepare_librispeech(tmp_path / "data", tmp_path / "nowhere")
    assert not (tmp_path / "data").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_librispeech(tmp_path / "LibriSpeech")
    asr_kd_data.main(["librispeech", "--out", f"{tmp_path}/data", "--librispeech", str(root), "--train_parts",
                      "train-clean-100", "--valid_parts", "", "--test_parts", "test-clean test-other"])  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["test_clean", "test_other", "train"]
    for command in ("librispeech", "aishell", "tedlium2"):
        with pytest.raises(SystemExit) as e:
            asr_kd_data.main([command, "--help"])
        assert e.value.code == 0 and f"asr_kd_data {command} --out" in capsys.readouterr().out


@needs_layout("LibriSpeech")
def test_the_real_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, root = tmp_path / "data", LAYOUTS / "LibriSpeech"
    with caplog.at_level("INFO"):
        counts = prepare_librispeech(out, LAYOUTS, train_parts=["train-clean-100"], valid_parts=["test-clean"])
    assert counts == {"train": 12, "valid": 5, "test_clean": 5, "test_other": 8}
    assert caplog.text.count("left out: 0") == 4
    # The expected content is made in another way, directly from the transcripts and files.
    for name, part in {"train": "train-clean-100", "valid": "test-clean", "test_other": "test-other"}.items():
        lines = sorted(x for p in (root / part).glob("*/*/*.trans.txt") for x in p.read_text().splitlines())
        assert (out / name / "text").read_text().splitlines() == lines
        audio = sorted((root / part).glob("*/*/*.flac"), key=lambda p: p.name)
        assert (out / name / "wav.scp").read_text() == "".join(f"{p.stem} {p}\n" for p in audio)
        assert (out / name / "utt2spk").read_text() == "".join(f"{p.stem} {p.parts[-3]}\n" for p in audio)
        frames = [soundfile.info(str(p)).frames for p in audio]
        assert [int(n) for n in read_map(out / name / "utt2num_samples").values()] == frames
        assert not (out / name / "segments").exists()
        assert validate(out / name) == len(lines)
    assert (out / "train/spk2utt").read_text().splitlines()[1] == "118 118-47824-0002 118-47824-0013 118-47824-0015"
    assert read_map(out / "train/text")["118-47824-0015"] == "THE MANAGER TOOK MY ADVICE BUT MARIA'S STILL MISSING"
    assert seconds_of(out / "train") == pytest.approx(46.935)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` with ranges, and breaks the connection after ``breaks_after`` bytes, once."""

    content = b""
    breaks_after = 0
    knows_ranges = True
    ranges: List[str] = []

    def do_GET(self) -> None:
        start = 0
        if "Range" in self.headers and self.knows_ranges:
            self.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].split("=")[1].rstrip("-"))
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        body = self.content[start:]
        if Server.breaks_after:
            body, Server.breaks_after = body[: Server.breaks_after], 0
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dict]:
    """A server that has train-clean-5 as OpenSLR packs it; the value is the options to prepare it."""
    write_librispeech(tmp_path / "src/LibriSpeech", {"train-clean-5": "19 26 32"})
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "src/LibriSpeech", "LibriSpeech")
    Server.content, Server.ranges, Server.breaks_after = (tmp_path / "x.tar.gz").read_bytes(), [], 0
    Server.knows_ranges = True
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(librispeech, "URL", f"http://127.0.0.1:{server.server_port}/{{set}}/{{part}}.tar.gz")
    monkeypatch.setitem(librispeech.ARCHIVES, "train-clean-5", (31, hashlib.md5(Server.content).hexdigest()))
    yield {"downloads": tmp_path / "downloads", "split_by_speaker": ["train-clean-5"], "speakers_test": 1}
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_broken_download_goes_on(tmp_path: Path, served: Dict) -> None:
    half = len(Server.content) // 2
    Server.breaks_after = half
    with pytest.raises(UserError, match=rf"cannot download http.*after {half} of \d+ bytes\n.*goes on"):
        prepare_librispeech(tmp_path / "data", **served)
    assert not (tmp_path / "data").exists()
    assert [p.name for p in served["downloads"].iterdir()] == ["train-clean-5.tar.gz.part"]
    # A kill during unpacking leaves this directory, which must not be taken for the part.
    (served["downloads"] / "LibriSpeech/.train-clean-5.partial/LibriSpeech/train-clean-5/19").mkdir(parents=True)
    assert prepare_librispeech(tmp_path / "data", **served) == {"train": 8, "test": 4}
    assert Server.ranges == [f"bytes={half}-"]
    assert sorted(p.name for p in served["downloads"].iterdir()) == ["LibriSpeech", "train-clean-5.tar.gz"]
    assert [p.name for p in (served["downloads"] / "LibriSpeech").iterdir()] == ["train-clean-5"]
    # Now the part is there, and no network is needed.
    Server.content = b""
    assert prepare_librispeech(tmp_path / "data", **served) == {"train": 8, "test": 4}


def test_a_server_without_ranges_sends_all_of_it_again(tmp_path: Path, served: Dict) -> None:
    Server.knows_ranges = False
    served["downloads"].mkdir()
    (served["downloads"] / "train-clean-5.tar.gz.part").write_bytes(Server.content[:1000])
    assert prepare_librispeech(tmp_path / "data", **served) == {"train": 8, "test": 4}


def test_all_came_but_the_name(tmp_path: Path, served: Dict) -> None:
    served["downloads"].mkdir()
    (served["downloads"] / "train-clean-5.tar.gz.part").write_bytes(Server.content)
    assert prepare_librispeech(tmp_path / "data", remove_archives=True, **served) == {"train": 8, "test": 4}
    assert [p.name for p in served["downloads"].iterdir()] == ["LibriSpeech"]


def test_another_md5_is_refused(tmp_path: Path, served: Dict) -> None:
    Server.content = Server.content[:-9] + b"changed.\n"
    with pytest.raises(UserError, match="another md5 .*; it was removed"):
        prepare_librispeech(tmp_path / "data", **served)
    assert not list(served["downloads"].iterdir()) and not (tmp_path / "data").exists()
