"""Memory of data preparation does not grow with the corpus: stages 1 to 3, and the functions that they use."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Dict

import numpy as np
import pytest

from espnet_kd.cli import UserError
from espnet_kd.data import datadir, tokens
from espnet_kd.data.combining import combine
from espnet_kd.data.datadir import Utterance, join_sorted, read_data_dir, read_sorted, sort_externally, write_data_dir
from espnet_kd.data.formatting import format_data
from espnet_kd.data.librispeech import prepare_librispeech
from espnet_kd.data.parallel import CHUNK, map_with_bar
from espnet_kd.data.validation import validate

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from data_scale import PART, write_listing  # noqa: E402

LIMIT = 64  # bytes for each utterance added


def untranscribed(number: int):
    return (Utterance(f"x{i:07d}", f"x{i // 100}", f"/x/{i}.flac", num_samples=3200) for i in range(number))


def peaks_of(work: Path, number: int) -> Dict[str, int]:
    """Peak bytes of Python's own memory in each command, on a listing of ``number`` utterances."""
    write_listing(work / "L", number, words=6)
    write_data_dir(work / "extra", untranscribed(number))
    corpus = {"train_parts": [PART], "valid_parts": [], "test_parts": []}
    token_list = work / "bpe/tokens.txt"
    commands = {
        "librispeech": lambda: prepare_librispeech(work / "data", work / "L", **corpus)["train"],
        # All utterances are outside the limits, and are named in a file.
        "format": lambda: format_data(work / "data/train", work / "dump", max_seconds=0.15),
        "format again": lambda: format_data(work / "data/train", work / "dump", max_seconds=0.15),
        "combine": lambda: combine(work / "dump", work / "extra", work / "both") // 2,
        "combine again": lambda: combine(work / "dump", work / "extra", work / "both") // 2,
        "tokens": lambda: tokens.make_token_list([work / "dump/text"], work / "bpe", "bpe", 100) and number,
        "validate": lambda: validate(work / "dump", token_list=token_list, token_type="bpe"),
    }
    peaks = {}
    for name, command in commands.items():
        tracemalloc.start()
        assert command() == number
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len((work / "dump/out_of_range").read_text().splitlines()) == number
    return peaks


@pytest.mark.trains
def test_stages_one_to_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command keeps anything for each utterance added, not even a set of ids, which takes 100 bytes each."""
    monkeypatch.setattr(datadir, "RUN", 600)  # each run is an open file, which takes 9 kB
    monkeypatch.setattr(tokens, "MAX_CHARACTERS", 20_000)
    peaks_of(tmp_path / "warm", 100)  # imports are counted here, and not below
    small = peaks_of(tmp_path / "small", 1000)
    for attempt in range(3):  # Python's table of interned strings may grow by megabytes, but not in each attempt
        large = peaks_of(tmp_path / str(attempt), 3000)
        grown = {name: (large[name] - small[name]) / 2000 for name in small}
        if max(grown.values()) < LIMIT:
            return
    pytest.fail(f"bytes for each utterance added: {grown}")


def test_faults_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "RUN", 600)
    peaks = {}
    for number in (100, 1000, 3000):
        write_data_dir(tmp_path / "d", untranscribed(number))  # their audio does not exist
        tracemalloc.start()
        with pytest.raises(UserError, match=rf": {number} fault.s. found(?s:.)*and {number - 10} more"):
            validate(tmp_path / "d", need_text=False)
        peaks[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[3000] - peaks[1000]) / 2000 < LIMIT, peaks


def test_the_writing_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "RUN", 1000)
    peaks = {}
    for number in (1000, 5000, 20_000):  # the first number warms up
        tracemalloc.start()
        assert write_data_dir(tmp_path / "d", untranscribed(number)) == number
        peaks[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[20_000] < 1.3 * peaks[5000], peaks


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """The script measures whole processes with children. Libraries take most of the memory, so few lines are enough."""
    command = [sys.executable, BENCHMARKS / "data_scale.py", "--lines", "100", "--nbpe", "100", "--dir", tmp_path / "d"]
    done = subprocess.run([*map(str, command), "--json", str(tmp_path / "rows")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows").read_text())
    assert [row["command"] for row in rows] == ["librispeech", "format", "tokens", "validate"]
    assert [row["utterances"] for row in rows] == [100, 300, 300, 300] and not any((tmp_path / "d").iterdir())
    # The workers of the three commands that have workers were seen.
    assert all(20 < row["mb"] < 1024 and (row["processes"] >= 3 or row["command"] == "tokens") for row in rows), rows


def test_sorting_through_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "RUN", 7)
    rng = np.random.default_rng(0)
    for number in (0, 1, 6, 7, 8, 14, 100):
        items = [(f"{i:03d}", i) for i in rng.permutation(number)]
        assert list(sort_externally(items, lambda x: x[0], tmp_path)) == sorted(items)
        utts = [Utterance(f"b{i % 3}-{name}", f"b{i % 3}", f"{name}.wav", name, i + 1) for name, i in items]
        if number:
            assert write_data_dir(tmp_path / "d", utts) == number
            assert list(read_data_dir(tmp_path / "d")) == sorted(utts, key=lambda u: u.utt_id)
            spk2utt = (tmp_path / "d/spk2utt").read_text().splitlines()
            assert sorted(x for line in spk2utt for x in line.split()[1:]) == sorted(u.utt_id for u in utts)
            assert [line.split()[0] for line in spk2utt] == sorted({u.speaker for u in utts})
    assert [p.name for p in tmp_path.iterdir()] == ["d"] and not (tmp_path / "d/.partial").exists()
    with pytest.raises(UserError, match="'b-1' comes twice .x.wav, y.wav."):
        write_data_dir(tmp_path / "d", [Utterance("b-1", "b", "x.wav"), *utts[:20], Utterance("b-1", "b", "y.wav")])
    assert (tmp_path / "d/wav.scp").exists()


def test_files_in_any_order_are_read_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "RUN", 3)
    utts = [Utterance(f"a-{i}", "a", f"{i}.wav", f"T {i}", i + 1) for i in range(9)]
    write_data_dir(tmp_path / "d", utts)
    for name, shift in (("wav.scp", 2), ("text", 5), ("utt2spk", 7), ("utt2num_samples", 1)):
        lines = (tmp_path / "d" / name).read_text().splitlines(keepends=True)
        (tmp_path / "d" / name).write_text("\n".join(["".join(lines[shift:]), "".join(lines[:shift])]))
    assert list(read_data_dir(tmp_path / "d")) == utts
    assert list(read_sorted(tmp_path / "d/text"))[5:7] == [("a-5", 1, "T 5"), ("a-6", 2, "T 6")]
    for name in ("wav.scp", "text", "utt2spk", "utt2num_samples"):
        before = (tmp_path / "d" / name).read_text()
        (tmp_path / "d" / name).write_text(f"{before}a-3 again\n")
        with pytest.raises(UserError, match=rf"{name}:11: utterance 'a-3' stands twice in this file; keep one"):
            list(read_data_dir(tmp_path / "d"))
        (tmp_path / "d" / name).write_text(before)


def test_joining() -> None:
    left, right = [("a", 1), ("b", 2), ("b", 3), ("d", 4)], [("b", 5), ("c", 6)]
    assert list(join_sorted({"x": left, "y": right})) == [
        ("a", {"x": [("a", 1)]}),
        ("b", {"x": [("b", 2), ("b", 3)], "y": [("b", 5)]}),
        ("c", {"y": [("c", 6)]}),
        ("d", {"x": [("d", 4)]}),
    ]


def test_a_sample_of_the_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample fills its limit, has each sentence once, and does not depend on the order and copies of sentences."""
    rng = np.random.default_rng(0)
    sentences = [f"{i} " * rng.integers(1, 9) for i in range(200)]
    monkeypatch.setattr(tokens, "MAX_CHARACTERS", 1500)
    sample = tokens._sample(sentences)
    length = sum(map(len, sample))
    assert 1500 - 40 < length <= 1500 and len(set(sample)) == len(sample) and set(sample) <= set(sentences)
    assert tokens._sample(list(rng.permutation(sentences * 3))) == sample
    monkeypatch.setattr(tokens, "MAX_CHARACTERS", 10**6)
    assert sorted(tokens._sample(sentences * 2)) == sorted(sentences)


class Counted(list):
    """A list that counts how many of its items were requested."""

    taken = 0

    def __iter__(self):
        for item in super().__iter__():
            self.taken += 1
            yield item


def test_few_items_are_on_their_way() -> None:
    items = Counted(range(2000))
    for done, result in enumerate(map_with_bar(abs, items, nj=2, desc="x"), 1):
        assert result == done - 1 and items.taken <= done + 4 * 2 * CHUNK
    assert done == 2000


def test_items_without_a_number() -> None:
    for nj in (1, 2):
        stream = itertools.chain(range(50), range(50, 100))
        assert list(map_with_bar(abs, stream, nj=nj, desc="x", total=100)) == list(range(100))
