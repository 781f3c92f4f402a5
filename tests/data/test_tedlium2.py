"""TED-LIUM 2: STM lines become segments and words, as in ESPnet's recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
from tiny_layouts import LAYOUTS, needs_layout, seconds_of, write_tedlium2

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import Utterance, read_data_dir, read_map
from espnet_kd.data.formatting import format_data
from espnet_kd.data.tedlium2 import clean, pad_segments, prepare_tedlium2
from espnet_kd.data.validation import validate


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it 's what you 'd say", "it's what you'd say"),
        ("don 't", "don't"),
        ("we 'd 've gone", "we'd 've gone"),  # ESPnet's join_suffix.py joins only pairs
        ("'cause it is", "'cause it is"),
        ("<s> the(2) cat <sil> sat </s>", "the cat sat"),
        ("the cat sat (AlGore_2009-12)", "the cat sat"),
        ("{BREATH} well {NOISE} <unk> yes [COUGH]", "[BREATH] well [NOISE] <unk> yes [COUGH]"),
        ("<sil> </s>", ""),
    ],
)
def test_words(text: str, words: str) -> None:
    assert clean(text) == words


def test_fillers_can_be_dropped() -> None:
    assert clean("{BREATH} it {NOISE} 's <unk> fine [COUGH]", drop_fillers=True) == "it's fine"


def test_segments_and_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tedlium2(tmp_path / "TEDLIUM_release2")
    stm = root / "train/stm/AB_2010.stm"
    with open(stm, "a") as f:
        f.write(";; a comment\n\nAB_2010 1 AB_2010 3.30 3.50 no labels\n"
                "AB_2010 1 AB_2010 3.50 3.60 <sil> as a word\n"
                "AB_2010 1 AB_2010 3.60 3.70 <F0_F> old labels\nAB_2010 1 AB_2010 3.60 3.70 <F0_F> old labels\n"
                "AB_2010 1 AB_2010 3.75 3.80 <o,f0,male> <sil>\n"
                "AB_2010 1 AB_2010 3.9 4.02 <o,f0,male> end\n")  # fmt: skip
    with caplog.at_level("INFO"):
        assert prepare_tedlium2(tmp_path / "data", tmp_path) == {"train": 8, "valid": 2, "test": 2}
    assert read_map(tmp_path / "data/train/text") == {
        "AB_2010-0000050-0000175": "it's one [BREATH] word",
        "AB_2010-0000200-0000325": "<unk> and two words",
        "AB_2010-0000330-0000350": "no labels",
        "AB_2010-0000350-0000360": "as a word",
        "AB_2010-0000360-0000370": "old labels",
        "AB_2010-0000390-0000402": "end",
        "CD_2011-0000050-0000175": "it's one [BREATH] word",
        "CD_2011-0000200-0000325": "<unk> and two words",
    }
    segments = (tmp_path / "data/train/segments").read_text().splitlines()
    assert segments[0] == "AB_2010-0000050-0000175 AB_2010 0.500 1.750"
    assert segments[5] == "AB_2010-0000390-0000402 AB_2010 3.900 4.000"  # the recording ends there
    assert (tmp_path / "data/valid/wav.scp").read_text() == f"EF_2012X {root}/dev/sph/EF_2012X.sph\n"
    assert (tmp_path / "data/valid/utt2spk").read_text().splitlines()[0] == "EF_2012X-0000050-0000175 EF_2012X"
    assert "train: left out: 2: 1 line repeated (AB_2010-0000360-0000370); 1 line without words" in caplog.text
    assert "valid: left out: 1: 1 ignore_time_segment_in_scoring (EF_2012X-0000175-0000200)" in caplog.text
    for name in ("train", "valid", "test"):
        validate(tmp_path / "data" / name, min_seconds=0.05)


def test_padding_keeps_to_half_the_gap() -> None:
    talk = [Utterance("a", "s", "x", "T", None, "r", *times) for times in ((0.1, 1.0), (1.1, 2.0), (1.9, 3.0), (5, 6))]
    spans = [(round(u.start, 3), round(u.end, 3)) for u in pad_segments(talk, 0.15, 0.1)]
    assert spans == [(0.0, 1.05), (1.05, 2.0), (1.9, 3.1), (4.85, 6.1)]
    assert pad_segments(talk, 0, 0) == talk


def test_padding_is_for_training(tmp_path: Path) -> None:
    root = write_tedlium2(tmp_path / "TEDLIUM_release2")
    asr_kd_data.main(["tedlium2", "--out", f"{tmp_path}/data", "--tedlium2", str(root), "--padding", "0.15", "0.1",
                      "--drop_fillers"])  # fmt: skip
    assert (tmp_path / "data/train/segments").read_text().splitlines()[0].endswith("AB_2010 0.350 1.850")
    assert (tmp_path / "data/test/segments").read_text().splitlines()[0].endswith("GH_2013 0.500 1.750")
    assert read_map(tmp_path / "data/test/text")["GH_2013-0000200-0000325"] == "and two words"
    for padding, said in (((-1, 0), "-1 0"), ((float("nan"), 0), "nan 0")):
        with pytest.raises(UserError, match=f"--padding {said}"):
            prepare_tedlium2(tmp_path / "data", root, padding=padding)


@needs_layout("TEDLIUM_release2")
def test_the_real_layout_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, out = LAYOUTS / "TEDLIUM_release2", tmp_path / "data"
    with caplog.at_level("INFO"):
        assert prepare_tedlium2(out, root) == {"train": 8, "valid": 2, "test": 6}
    assert "valid: left out: 3: 3 ignore" in caplog.text and "test: left out: 8: 8 ignore" in caplog.text
    assert "train: left out: 0" in caplog.text
    for name, theirs in {"train": "train", "valid": "dev", "test": "test"}.items():
        lines = [x.split(None, 5) for p in (root / theirs / "stm").glob("*.stm") for x in p.read_text().splitlines()]
        spoken = sorted((x for x in lines if "ignore_time" not in x[5]), key=lambda x: (x[0], float(x[3])))
        utts = list(read_data_dir(out / name))
        assert [(u.recording, u.start, u.end) for u in utts] == [(x[0], float(x[3]), float(x[4])) for x in spoken]
        assert [u.audio for u in utts] == [str(root / theirs / "sph" / f"{x[0]}.sph") for x in spoken]
        assert not any(mark in u.text for u in utts for mark in ("<", "(", " '", "ignore"))
        validate(out / name)
        # Stage 2 cuts pieces that have the length given by the STM and the samples of the talk.
        number = format_data(out / name, tmp_path / "dump" / name)
        assert number == len(utts)
        total = 0
        for u, source in zip(read_data_dir(tmp_path / "dump" / name), utts):
            x, rate = soundfile.read(u.audio, dtype="int16")
            y, _ = soundfile.read(source.audio, dtype="int16", start=round(source.start * rate))
            assert abs(x.astype(int) - y[: len(x)]).max() <= 1
            total += len(x) / rate
        assert total == pytest.approx(seconds_of(out / name), abs=0.001 * number)
    text = read_map(out / "train/text")
    assert text["Speaker118_2015-0001852-0003286"].startswith("i must decide what to do")
    assert "don't dare he echoed graham's words there's" in text["Speaker118_2015-0000155-0001656"]
