"""Measures size, memory, speed and error rates of exports, each format in a process of its own.

    python -m espnet_kd.deploy.measure EXPORT DATA_DIR

prints the measurements and the recognised texts as JSON. One thread is used; the real-time factor is CPU time, on which
other processes have little influence.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

from espnet_kd.cli import UserError
from espnet_kd.environment import peak_memory
from espnet_kd.files import replacing

EXPORTS = "exports.json"
#: Keys of a row of exports.json, in this order.
KEYS = (
    "format", "quantize", "testset", "utterances", "bytes", "memory_bytes", "load_seconds", "first_result_seconds",
    "latency_seconds", "rtf", "same_text", "cer", "wer",
)  # fmt: skip


def measure_exports(
    expdir: Path, folders: Sequence[Path], data_dirs: Sequence[Union[str, Path]], reference: Path
) -> List[Dict[str, Any]]:
    """Measure exports of one student on data dirs with transcripts, and write the rows to ``EXPDIR/exports.json``.

    Args:
        folders: exports of any form.
        reference: an export for ESPnet or an experiment, whose texts are the reference; it is measured too.

    Returns:
        A row for each, keys ``KEYS``; ``same_text`` counts the utterances whose text is that of ``reference``, ``cer``
        and ``wer`` are percentages (None without transcripts).

    Raises:
        UserError: a data dir or an export cannot be read.
    """
    rows = []
    for data_dir in map(Path, data_dirs):
        texts: Dict[str, str] = {}
        for folder in [reference, *(f for f in folders if f != reference)]:
            found = _in_a_process(folder, data_dir)
            recognised = found.pop("texts")
            texts = texts or recognised
            same = sum(recognised[u] == text for u, text in texts.items())
            testset = data_dir.resolve().name
            row = {**found, "testset": testset, "same_text": same, **_rates(recognised, data_dir / "text")}
            rows.append({key: row[key] for key in KEYS})
    # Keep the rows of exports that were measured earlier.
    new = {_key(row) for row in rows}
    kept = [row for row in read_rows(expdir) if _key(row) not in new]
    with replacing(expdir / EXPORTS) as f:
        json.dump([*kept, *rows], f, indent=2)
        f.write("\n")
    return rows


def _key(row: Dict[str, Any]) -> Tuple[str, str, str]:
    return row["format"], row["quantize"], row["testset"]


def _rates(recognised: Dict[str, str], transcripts: Path) -> Dict[str, Any]:
    from espnet_kd.data.datadir import read_map
    from espnet_kd.decode.score import count_errors, summarise

    if not transcripts.is_file():
        return {"cer": None, "wer": None}
    pairs = {u: (" ".join(recognised[u].split()), t) for u, t in read_map(transcripts).items() if u in recognised}
    return {
        key: summarise(count_errors(pairs, unit), resamples=1)["err"] if pairs else None
        for key, unit in (("cer", "char"), ("wer", "word"))
    }


def _in_a_process(folder: Path, data_dir: Path) -> Dict[str, Any]:
    command = [sys.executable, "-m", "espnet_kd.deploy.measure", str(folder), str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise UserError(f"{folder} cannot be measured: {reason.removeprefix('error: ')}")
    return json.loads(done.stdout)


def measure(folder: Path, data_dir: Path) -> Dict[str, Any]:
    """Recognise every utterance of a data dir, in this process."""
    from espnet_kd.data.datadir import read_map
    from espnet_kd.deploy.live import CHUNK, LiveTranscriber, chunks
    from espnet_kd.deploy.reading import read_blocks
    from espnet_kd.deploy.transcriber import Transcriber

    about = folder / "student.json"
    facts = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    streaming = facts.get("format") == "stream"
    begun = time.perf_counter()
    transcriber: Any = LiveTranscriber(folder) if streaming else Transcriber(folder)
    rate = transcriber.student.rate if streaming else transcriber.backend.rate
    loaded = time.perf_counter() - begun
    texts, seconds, computing, first = {}, 0.0, 0.0, None
    latencies: List[float] = []
    for utt_id, path in read_map(data_dir / "wav.scp").items():
        blocks = list(read_blocks(path, rate))
        begun, cpu = time.perf_counter(), time.process_time()
        if streaming:
            transcript, found = transcriber.follow(chunks(blocks, int(CHUNK * rate)))
            latencies += found.tokens
        else:
            transcript = transcriber.transcribe(blocks)
        if first is None:
            first = time.perf_counter() - begun
        else:  # the first utterance has one-time costs, so it is left out of the real-time factor
            computing += time.process_time() - cpu
            seconds += transcript.seconds
        texts[utt_id] = transcript.text
    files = [p for p in folder.rglob("*") if p.is_file()] if (folder / "model.pth").is_file() or facts else []
    return {
        "format": facts.get("format", "espnet"),
        "quantize": facts.get("quantize", "none"),
        "utterances": len(texts),
        "bytes": sum(p.stat().st_size for p in files) or None,
        "memory_bytes": peak_memory(),
        "load_seconds": round(loaded, 3),
        "first_result_seconds": round(first or 0.0, 4),
        "latency_seconds": sum(latencies) / len(latencies) if latencies else None,
        "rtf": computing / seconds if seconds else None,
        "texts": texts,
    }


def exports_table(rows: Sequence[Dict[str, Any]]) -> Tuple[Sequence[str], List[Sequence[str]]]:
    """Format rows of exports.json as a table: its head and its lines."""
    head = ("form", "test set", "size", "memory", "loading", "first result", "latency", "real-time factor")

    def line(row: Dict[str, Any]) -> Sequence[str]:
        form = row["format"] if row["quantize"] == "none" else f"{row['format']}, {row['quantize']}"
        percent = ["–" if row[k] is None else f"{row[k]:.2f}" for k in ("cer", "wer")]
        size = "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f} MB"
        late = "–" if row["latency_seconds"] is None else f"{1000 * row['latency_seconds']:.0f} ms"
        factor = "–" if row["rtf"] is None else f"{row['rtf']:.5f}"
        return (
            form, row["testset"], size, f"{row['memory_bytes'] / 1e6:.0f} MB", f"{row['load_seconds']:.2f} s",
            f"{1000 * row['first_result_seconds']:.0f} ms", late, factor, f"{row['same_text']} of {row['utterances']}",
            *percent,
        )  # fmt: skip

    return (*head, "same text", "CER", "WER"), [line(row) for row in rows]


def read_rows(expdir: Path) -> List[Dict[str, Any]]:
    """The rows of ``EXPDIR/exports.json``; none where it is missing or damaged."""
    try:
        rows = json.loads((expdir / EXPORTS).read_text(encoding="utf-8"))
        return [row for row in rows if set(KEYS) <= set(row)]
    except (OSError, ValueError, TypeError):
        return []


def main(argv: Sequence[str]) -> None:
    """Measure one export (see the module's docstring)."""
    with contextlib.redirect_stdout(sys.stderr):  # ESPnet prints lines when it is imported
        found = measure(Path(argv[0]), Path(argv[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    from espnet_kd.cli import run

    run(lambda _: main(sys.argv[1:]))
