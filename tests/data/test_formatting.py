"""Stage 2: rates, segments, speed perturbation, limits, and running it again."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_layouts import snapshot

from espnet_kd.cli import UserError
from espnet_kd.data.combining import combine
from espnet_kd.data.datadir import Utterance, read_data_dir, write_data_dir
from espnet_kd.data.formatting import format_data
from espnet_kd.data.validation import validate

FS = 16000


def tone(path: Path, seconds: float, hz: float = 440, fs: int = FS, channels: int = 1) -> str:
    x = 0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * fs)) / fs)
    soundfile.write(path, np.stack([x] * channels, axis=1), fs)
    return str(path)


def pitch_of(path: str) -> float:
    x, fs = soundfile.read(path)
    return float(np.argmax(np.abs(np.fft.rfft(x))) * fs / len(x))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    seconds = (1.0, 2.0, 3.0)
    utts = [
        Utterance(f"a-{i}", "a", tone(tmp_path / f"{i}.flac", s), f"T {i}", int(s * FS)) for i, s in enumerate(seconds)
    ]
    write_data_dir(tmp_path / "src", utts)
    return tmp_path / "src"


def test_right_files_are_referenced(src: Path, tmp_path: Path) -> None:
    assert format_data(src, tmp_path / "dump") == 3
    assert list(read_data_dir(tmp_path / "dump")) == list(read_data_dir(src))
    assert not (tmp_path / "dump" / "audio").exists()


@pytest.mark.parametrize("nj", [1, 2])
def test_speed_perturbation(src: Path, tmp_path: Path, nj: int) -> None:
    assert format_data(src, tmp_path / "dump", speed_factors=(0.9, 1.0, 1.1), nj=nj) == 9
    utts = {u.utt_id: u for u in read_data_dir(tmp_path / "dump")}
    assert set(utts) == {f"{p}a-{i}" for p in ("", "sp0.9-", "sp1.1-") for i in range(3)}
    for factor, prefix in ((0.9, "sp0.9-"), (1.1, "sp1.1-")):
        for i, seconds in enumerate((1.0, 2.0, 3.0)):
            u = utts[f"{prefix}a-{i}"]
            assert u.speaker == f"{prefix}a" and u.text == f"T {i}"
            assert u.num_samples == pytest.approx(seconds * FS / factor, abs=2)
            info = soundfile.info(u.audio)
            assert info.frames == u.num_samples and info.samplerate == FS
            assert info.format == "FLAC" and info.subtype == "PCM_16"
            # Faster speech has a higher pitch, because it is resampled, as by Kaldi's speed perturbation.
            assert pitch_of(u.audio) == pytest.approx(440 * factor, abs=1.5)
    assert utts["a-0"].audio == str(tmp_path / "0.flac")
    assert validate(tmp_path / "dump") == 9


def test_other_rates_and_channels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    utts = [
        Utterance("a-1", "a", tone(tmp_path / "1.wav", 1, fs=8000), "A"),
        Utterance("a-2", "a", tone(tmp_path / "2.wav", 1, fs=44100), "A"),
        Utterance("a-3", "a", tone(tmp_path / "3.wav", 1, channels=2), "A"),
    ]
    write_data_dir(tmp_path / "src", utts)
    with caplog.at_level("INFO"):
        format_data(tmp_path / "src", tmp_path / "dump")
    assert "1 of 3 utterances resampled from 8000 to 16000 Hz" in caplog.text
    for u in read_data_dir(tmp_path / "dump"):
        assert u.num_samples == FS and pitch_of(u.audio) == pytest.approx(440, abs=1.5)
        assert soundfile.info(u.audio).channels == 1
    validate(tmp_path / "dump")


def test_segments_are_cut(tmp_path: Path) -> None:
    x = np.concatenate([np.full(FS, 0.1), np.full(FS, 0.2), np.full(FS, 0.3)])
    soundfile.write(tmp_path / "r.wav", x, FS)
    wav = str(tmp_path / "r.wav")
    utts = [Utterance(f"a-{i}", "a", wav, "A", None, "r", i + 0.25, i + 0.75) for i in range(3)]
    write_data_dir(tmp_path / "src", utts)
    format_data(tmp_path / "src", tmp_path / "dump")
    assert not (tmp_path / "dump" / "segments").exists()
    for i, u in enumerate(read_data_dir(tmp_path / "dump")):
        y, _ = soundfile.read(u.audio)
        np.testing.assert_allclose(y, np.full(FS // 2, 0.1 * (i + 1)), atol=1e-3)


def test_limits(src: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"speed_factors": (0.9, 1.0), "min_seconds": 1.05, "max_seconds": 3.1}
    assert format_data(src, tmp_path / "kept", **options) == 6
    assert "2 utterances outside 1.05 to 3.1 s kept" in caplog.text
    assert format_data(src, tmp_path / "dropped", drop_out_of_range=True, **options) == 4
    assert "dropped: a-0 (1.00 s), sp0.9-a-2 (3.33 s)" in caplog.text
    assert {u.utt_id for u in read_data_dir(tmp_path / "dropped")} == {"a-1", "a-2", "sp0.9-a-0", "sp0.9-a-1"}
    with pytest.raises(UserError, match="no utterance is left"):
        format_data(src, tmp_path / "none", drop_out_of_range=True, min_seconds=10)


def test_transcripts_without_audio_are_counted(src: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open(src / "text", "a") as f:
        f.write("b-0 NO AUDIO\nb-1 NOR HERE\n")
    assert format_data(src, tmp_path / "dump") == 3
    assert "text: 2 of 5 lines left out: no audio" in caplog.text


def test_again(src: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump"

    def times():
        return {p: p.stat().st_mtime_ns for p in dump.rglob("*") if p.is_file()}

    format_data(src, dump, speed_factors=(0.9,))
    first = times()
    format_data(src, dump, speed_factors=(0.9,))
    assert times() == first
    # After a kill before the end, whole files are kept and missing files are made.
    (dump / ".begun").write_text((dump / ".done").read_text())
    (dump / ".done").unlink()
    (dump / "wav.scp").unlink()
    (dump / "audio/sp0.9-a/sp0.9-a-1.flac").unlink()
    format_data(src, dump, speed_factors=(0.9,))
    assert set(times()) == set(first)
    kept = dump / "audio/sp0.9-a/sp0.9-a-0.flac"
    assert times()[kept] == first[kept]
    # Files of the same names with other audio are made again.
    time.sleep(0.01)
    tone(tmp_path / "0.flac", 1.0, hz=600)
    format_data(src, dump, speed_factors=(0.9,))
    assert pitch_of(str(kept)) == pytest.approx(540, abs=1.5)


@pytest.mark.parametrize(("nj", "breakage"), [(1, "cut"), (2, "cut"), (1, "missing"), (1, "pipe"), (1, "empty")])
def test_faults_name_the_utterance(src: Path, tmp_path: Path, nj: int, breakage: str) -> None:
    path = tmp_path / "1.flac"
    if breakage == "cut":
        path.write_bytes(path.read_bytes()[:60])
    elif breakage == "missing":
        path.unlink()
    elif breakage == "empty":
        soundfile.write(path, np.zeros(0), FS)
    else:
        scp = src / "wav.scp"
        scp.write_text(scp.read_text().replace(str(path), "flac -d x |"))
    with pytest.raises(UserError, match="pipe" if breakage == "pipe" else "1.flac") as e:
        format_data(src, tmp_path / "dump", speed_factors=(0.9,), nj=nj)
    assert "a-1" in str(e.value)
    assert not (tmp_path / "dump" / "wav.scp").exists()


def test_speed_is_changed_once(src: Path, tmp_path: Path) -> None:
    """As with the train_sp of an ESPnet recipe where run.sh has factors by default: ids sp0.9-sp0.9-…, speed 0.81."""
    format_data(src, tmp_path / "sp", speed_factors=(0.9, 1.0))
    with pytest.raises(UserError, match=r"sp: utterance 'sp0\.9-a-0'.*--speed_perturb_factors"):
        format_data(tmp_path / "sp", tmp_path / "dump", speed_factors=(0.9, 1.0))
    assert not (tmp_path / "dump" / "wav.scp").exists()
    assert format_data(tmp_path / "sp", tmp_path / "dump") == 6


def test_an_empty_data_dir_is_named(src: Path, tmp_path: Path) -> None:
    for path in src.iterdir():
        path.write_text("")
    with pytest.raises(UserError, match=f"{src}: there is no utterance in it"):
        format_data(src, tmp_path / "dump")
    with pytest.raises(UserError, match="1 fault.*\n.*src/wav.scp: it is empty"):
        validate(src)


def test_bad_options(src: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"fs": 700_000}, "--fs is 700000"),
        ({"nj": 0}, "--nj is 0"),
        ({"speed_factors": (1.0, 1.0)}, "--speed_factors 1.0 1.0"),
        ({"speed_factors": ()}, "--speed_factors"),
        ({"speed_factors": (9.0,)}, "--speed_factors: 9.0"),
        ({"min_seconds": 5, "max_seconds": 1}, "--min_seconds is 5 and --max_seconds is 1"),
        ({"min_seconds": -1}, "--min_seconds is -1"),
    ):
        with pytest.raises(UserError, match=message):
            format_data(src, tmp_path / "dump", **options)
        assert not (tmp_path / "dump").exists()


def test_text_is_required_optional_or_left_closed(src: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    format_data(src, tmp_path / "with", text="optional")
    assert (tmp_path / "with" / "text").read_bytes() == (src / "text").read_bytes()
    (src / "text").write_bytes(b"a-0 \xff\n")
    with caplog.at_level("INFO"):
        format_data(src, tmp_path / "closed", text="none")
    assert not (tmp_path / "closed" / "text").exists() and "3 utterances, 0.00 h, no text" in caplog.text
    (src / "text").unlink()
    with pytest.raises(UserError, match="src/text: no such file"):
        format_data(src, tmp_path / "required")
    assert format_data(src, tmp_path / "absent", text="optional") == 3
    # A text that covers only some utterances is a fault, with "required" and with "optional".
    (src / "text").write_text("a-0 T 0\n")
    for text in ("required", "optional"):
        with pytest.raises(UserError, match="has no line for a-1, a-2"):
            format_data(src, tmp_path / text, text=text)


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    """Two utterances without text, of another speaker."""
    utts = [Utterance(f"0-{i}", "0", tone(tmp_path / f"x{i}.flac", 1 + i)) for i in range(2)]
    write_data_dir(tmp_path / "extra", utts)
    return tmp_path / "extra"


def test_several_data_dirs_become_one(src: Path, extra: Path, tmp_path: Path) -> None:
    assert format_data([extra, src], tmp_path / "dump", text="none", speed_factors=(0.9, 1.0)) == 10
    with pytest.raises(UserError, match="some of them have a text"):
        format_data([extra, src], tmp_path / "mixed", text="optional")
    write_data_dir(tmp_path / "again", [Utterance("0-1", "0", str(tmp_path / "x1.flac"))])
    with pytest.raises(UserError, match=f"'0-1' is in {extra} and in {tmp_path / 'again'}"):
        format_data([extra, tmp_path / "again"], tmp_path / "twice", text="none")


def test_transcribed_and_untranscribed_audio(src: Path, extra: Path, tmp_path: Path) -> None:
    dst = tmp_path / "both"
    format_data(src, tmp_path / "known")
    format_data(extra, tmp_path / "unknown", text="none")
    (tmp_path / "unknown" / "text").write_bytes(b"\xff\n")  # not read
    assert combine(tmp_path / "known", tmp_path / "unknown", dst) == 5
    assert (dst / "text").read_text() == "0-0\n0-1\na-0 T 0\na-1 T 1\na-2 T 2\n"
    assert (dst / "utt2num_samples").read_text().splitlines()[1] == f"0-1 {2 * FS}"
    assert validate(dst, allow_empty=True) == 5
    before = (dst / "wav.scp").stat().st_mtime_ns
    combine(tmp_path / "known", tmp_path / "unknown", dst)
    assert (dst / "wav.scp").stat().st_mtime_ns == before
    # If nothing is transcribed, no text is written.
    (tmp_path / "unknown" / "text").unlink()
    combine(tmp_path / "unknown", src, tmp_path / "silent")
    assert not (tmp_path / "silent" / "text").exists() and len(list(read_data_dir(tmp_path / "silent"))) == 5


def test_a_data_dir_is_not_made_in_the_place_of_its_source(src: Path, extra: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    format_data(src, dump, speed_factors=(0.9,))
    (tmp_path / "link").symlink_to(dump)
    before = snapshot(tmp_path)
    for step in (
        lambda: format_data([extra, dump], tmp_path / "link", text="none"),
        lambda: combine(dump, extra, extra),
        lambda: combine(dump, extra, dump),
    ):
        with pytest.raises(UserError, match="is to be read, and cannot be written .*; choose another --dst"):
            step()
        assert snapshot(tmp_path) == before
    # Audio that another data dir refers to must not be replaced, either.
    combine(dump, extra, tmp_path / "both")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"'sp0.9-a-0': .*sp0.9-a-0.flac is {dump}'s own, and would be removed"):
        format_data(tmp_path / "both", dump, text="none")
    assert snapshot(tmp_path) == before


def test_faults_of_mixed_data(src: Path, extra: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"'a-0' is in {src} and in {tmp_path / 'known'}"):
        format_data(src, tmp_path / "known")
        combine(src, tmp_path / "known", tmp_path / "both")
    (src / "text").write_text("a-0 T\na-1\na-2 T\n")
    with pytest.raises(UserError, match="text: utterance 'a-1': the text is empty"):
        combine(src, extra, tmp_path / "both")
    assert not (tmp_path / "both").exists()
