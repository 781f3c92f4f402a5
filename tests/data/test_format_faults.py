"""Faults between stages 1 and 2, or of the disk in stages 2 and 3: one clear message, the old data dir or none, and
after a repair the same command succeeds. Each fault is made in three corpora."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, Tuple

import pytest
from test_corpus_faults import AUDIO, CORPORA, WRITE, cut, empty_audio
from tiny_layouts import snapshot

from espnet_kd.cli import UserError
from espnet_kd.data.combining import combine
from espnet_kd.data.formatting import format_data
from espnet_kd.data.tokens import make_token_list

ROOT = Path(__file__).parents[2]
UTTERANCE = {
    "librispeech": "26-7-0001",
    "aishell": "BAC009S0003W0001",
    "tedlium2": "CD_2011-0000200-0000325",
}


def change_line(path: Path, key: str, change: Callable[[bytes], bytes]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(x) if x.split()[0] == key.encode() else x for x in lines))


# For each fault: the damage to (data dir, audio file, utterance), and the message with {u} (utterance) and {a} (file).
FAULTS: Dict[str, Tuple[Callable, str]] = {
    "truncated audio": (lambda d, a, u: cut(a), "utterance '{u}': {a} is cut"),
    "truncated header": (lambda d, a, u: a.write_bytes(a.read_bytes()[:30]), "utterance '{u}': .*{a}"),
    "zero-length audio": (lambda d, a, u: empty_audio(a), "utterance '{u}': .*{a}"),
    "file of zero length": (lambda d, a, u: a.write_bytes(b""), "utterance '{u}': unreadable audio {a}"),
    "transcript without audio": (lambda d, a, u: a.unlink(), "wav.scp: utterance '{u}': {a}: No such file"),
    "audio without transcript": (
        lambda d, a, u: change_line(d / "text", u, lambda x: b""), "text has no line for {u}; add them, or take",
    ),
    "no text": (lambda d, a, u: (d / "text").unlink(), "text: no such file; untranscribed audio needs --text"),
    "missing part": (lambda d, a, u: shutil.rmtree(d), "train/wav.scp: no such file"),
    "no speaker": (
        lambda d, a, u: change_line(d / "utt2spk", u, lambda x: b""), "utt2spk: utterance '{u}' is missing; add its",
    ),
    "duplicate id": (
        lambda d, a, u: change_line(d / "text", u, lambda x: x + x), "text:[0-9]+: utterance '{u}' stands twice",
    ),
    "bad UTF-8": (
        lambda d, a, u: change_line(d / "text", u, lambda x: x[:-1] + b"\xe9\n"), "text:[0-9]+: not UTF-8 .*at byte",
    ),
}  # fmt: skip


@pytest.fixture(params=list(CORPORA))
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Tuple[str, Path]:
    """The name of a corpus, and its data dir ``train`` as stage 1 leaves it."""
    corpus = request.param
    CORPORA[corpus](tmp_path / "data", WRITE[corpus](tmp_path / "corpus"))
    return corpus, tmp_path / "data/train"


def keep(tmp_path: Path) -> None:
    for name in ("corpus", "data"):
        shutil.copytree(tmp_path / name, tmp_path / "kept" / name)


def mend(tmp_path: Path) -> None:
    """Restore what :func:`keep` has copied, with its times."""
    for name in ("corpus", "data"):
        shutil.rmtree(tmp_path / name)
        shutil.copytree(tmp_path / "kept" / name, tmp_path / name)


@pytest.mark.faults("faulty data dirs")
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_before_stage_two(prepared: Tuple[str, Path], fault: str, tmp_path: Path) -> None:
    (corpus, src), dst = prepared, tmp_path / "dump"
    factors = (0.9, 1.0) if corpus == "aishell" else (1.0,)  # AISHELL: decoded, LibriSpeech: referred to, others: cut
    audio, utt_id = tmp_path / "corpus" / AUDIO[corpus], UTTERANCE[corpus]
    damage, message = FAULTS[fault]
    format_data(src, dst, speed_factors=factors)
    want = snapshot(dst)
    shutil.rmtree(dst)
    keep(tmp_path)
    damage(src, audio, utt_id)
    # A fault of a talk's audio is reported for the talk's first utterance.
    told = utt_id if corpus != "tedlium2" or "text" in message or "utt2spk" in message else "CD_2011-0000050-0000175"
    with pytest.raises(UserError, match=message.format(u=told, a=audio)) as e:
        format_data(src, dst, speed_factors=factors)
    assert "\n" not in str(e.value)
    assert not (dst / "wav.scp").exists() and not (dst / ".partial").exists()
    mend(tmp_path)
    format_data(src, dst, speed_factors=factors)
    assert snapshot(dst) == want
    # A data dir that was there already is left whole, or without the files that would let it pass for whole.
    damage(src, audio, utt_id)
    with pytest.raises(UserError):
        format_data(src, dst, speed_factors=factors)
    assert not (dst / "wav.scp").exists() or snapshot(dst) == want
    mend(tmp_path)
    format_data(src, dst, speed_factors=factors)
    assert snapshot(dst) == want


@pytest.mark.faults("faulty data dirs")
def test_a_segment_that_is_none(tmp_path: Path) -> None:
    CORPORA["tedlium2"](tmp_path / "data", WRITE["tedlium2"](tmp_path / "corpus"))
    src, utt_id = tmp_path / "data/train", UTTERANCE["tedlium2"]
    for times, message in (
        (b"CD_2011 3.250 2.000", f"segments:4: utterance '{utt_id}': start 3.25 and end 2.0 make no segment"),
        (b"CD_2011 2.000", f"segments:4: utterance '{utt_id}': expected 'recording start end \\[channel\\]'"),
        (b"XY_2011 2.000 3.250", f"segments: recording 'XY_2011' of '{utt_id}' is not in wav.scp"),
        (b"CD_2011 4.500 5.250", f"utterance '{utt_id}': no audio in .*segment 4.5 to 5.25 s of 4.00 s"),
        # A segment may end a little behind the recording, as in Kaldi; far behind, the recording or unit is wrong.
        (b"CD_2011 2.000 4.750", f"utterance '{utt_id}': not all of its audio in .*segment 2.0 to 4.75 s of 4.00 s"),
    ):
        change_line(src / "segments", utt_id, lambda x, t=times: b" ".join([x.split()[0], t]) + b"\n")
        with pytest.raises(UserError, match=message):
            format_data(src, tmp_path / "dump")
        assert not (tmp_path / "dump/wav.scp").exists()
    change_line(src / "segments", utt_id, lambda x: x.split()[0] + b" CD_2011 2.000 4.250\n")
    assert format_data(src, tmp_path / "dump") == 4


@pytest.mark.faults("a full disk")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_system_that_refuses(
    prepared: Tuple[str, Path], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = prepared[1], tmp_path / "dump"
    told = f"{os.strerror(code)}; .*, and give the same command again"

    refused = []

    def refuse(*_, **__) -> None:
        refused.append(True)
        raise OSError(code, os.strerror(code))

    # Refuse a file, a temporary file, a directory, the end of writing, a new name; at the first or the fourth call.
    places = [(tempfile, "mkstemp"), (tempfile, "TemporaryFile"), (os, "mkdir"), (os, "fsync"), (os, "replace")]
    for where, name in places:
        for allowed in (0, 3):
            refused.clear()
            (dst / ".done").unlink(missing_ok=True)
            calls = iter([getattr(where, name)] * allowed)
            with monkeypatch.context() as m:
                m.setattr(where, name, lambda *a, _calls=calls, **k: next(_calls, refuse)(*a, **k))
                try:
                    format_data(src, dst, speed_factors=(0.9, 1.0), max_seconds=0.52)
                except UserError as e:
                    assert re.search(told, str(e))
                else:
                    assert allowed and not refused
            assert not list(tmp_path.glob("dump/**/.*.flac.*")) and not (dst / ".partial").exists()
    shutil.rmtree(dst, ignore_errors=True)
    format_data(src, dst, speed_factors=(0.9, 1.0), max_seconds=0.52)
    want = snapshot(dst)
    for step in (
        lambda: combine(dst, src.parent / "valid", tmp_path / "both"),
        lambda: make_token_list([dst / "text"], tmp_path / "tokens"),
    ):
        with monkeypatch.context() as m:
            for where, name in places:
                m.setattr(where, name, refuse)
            with pytest.raises(UserError, match=told):
                step()
    assert not (tmp_path / "both/wav.scp").exists() and not (tmp_path / "tokens/tokens.txt").exists()
    assert snapshot(dst) == want


@pytest.mark.faults("a full disk")
def test_a_disk_that_is_full_while_audio_is_written(prepared: Tuple[str, Path], tmp_path: Path) -> None:
    """A limit on the size of files makes real writes fail, in the worker processes as well."""
    src, dst = prepared[1], tmp_path / "dump"
    options = ["--src", str(src), "--dst", str(dst), "--speed_factors", "0.9", "1.0", "--nj", "2"]
    command = [sys.executable, "-m", "espnet_kd.bin.asr_kd_data", "format", *options]

    def run(limit: int) -> subprocess.CompletedProcess:
        def before() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=before)

    done = run(4000)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large, and give the same command again" in done.stderr
    assert not (dst / "wav.scp").exists()
    assert not [p for p in dst.rglob("*") if p.is_file() and p.name != ".begun"]
    assert run(resource.RLIM_INFINITY).returncode == 0
    again = snapshot(dst)
    shutil.rmtree(dst)
    format_data(src, dst, speed_factors=(0.9, 1.0))
    assert snapshot(dst) == again
