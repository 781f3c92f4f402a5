"""Compare exported forms of a student with ESPnet on every utterance of a data dir: results and CPU time.

    python tests/benchmarks/exports.py exp/student/export exp/student/export_onnx --data_dir dump/raw/test
    python tests/benchmarks/exports.py exp/student/export exp/student/export_web --data_dir dump/raw/test --browser 20
    python tests/benchmarks/exports.py exp/live/export exp/live/export_stream --data_dir dump/raw/test --minutes 60

The first argument is the export for ESPnet, or an experiment. ESPnet runs it on each utterance alone, and other forms
are compared with its text, log-probabilities and times. A folder of --format sherpa is run by sherpa_onnx itself. A
folder of --format stream gets pieces of 0.1 s, and so does the first if its encoder works in blocks. The forms take
turns on each utterance, on one thread; times are CPU time. --browser N opens the page in a headless Chromium that
reaches no other host, and gives N of the files to it. --minutes N gives N minutes of the audio, end to end, to graphs
for streams, in processes that hold nothing else, and shows their memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from espnet_kd.cli import UserError, run
from espnet_kd.data.datadir import read_map
from espnet_kd.deploy import backends
from espnet_kd.deploy.live import CHUNK, Latencies, LiveTranscriber, chunks
from espnet_kd.deploy.reading import read_blocks
from espnet_kd.deploy.stream import Stream
from espnet_kd.deploy.transcript import read_tokens

#: The text, the start of the last token in seconds, and log-probabilities (T, V) if the form gives them.
Result = Tuple[str, Optional[float], Optional[np.ndarray]]


@dataclass
class Form:
    """A form and its results."""

    name: str
    recognise: Callable[[np.ndarray], Result]
    megabytes: Optional[float] = None
    results: List[Result] = field(default_factory=list)
    cpu: float = 0.0  #: seconds
    latencies: List[List[float]] = field(default_factory=list)  #: seconds, of the tokens of each utterance


def whole(name: str, backend: backends.Backend) -> Form:
    """A form that gets an utterance as a whole."""

    def recognise(samples: np.ndarray) -> Result:
        log_probs = backend.log_probs(samples)
        tokens = read_tokens(
            log_probs, backend.tokens, backend.frame_shift, blank=backend.blank, no_text=backend.no_text
        )
        return backend.to_text([t.token for t in tokens]), tokens[-1].start if tokens else None, log_probs

    return Form(name, recognise)


def stock_sherpa(name: str, folder: Path, rate: int) -> Form:
    """A folder for sherpa-onnx, run by sherpa-onnx itself."""
    import sherpa_onnx

    recogniser = sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc(
        model=str(folder / "model.onnx"), tokens=str(folder / "tokens.txt"), num_threads=1
    )

    def recognise(samples: np.ndarray) -> Result:
        stream = recogniser.create_stream()
        stream.accept_waveform(rate, samples)
        recogniser.decode_stream(stream)
        times = stream.result.timestamps
        return stream.result.text, times[-1] if times else None, None

    return Form(name, recognise)


def streamed(name: str, student: Any) -> Form:
    """A streaming student that gets an utterance in pieces, as they would arrive."""

    def recognise(samples: np.ndarray) -> Result:
        stream, latencies, found = Stream(student), Latencies(student.rate), []
        pieces = [*chunks([samples], int(CHUNK * student.rate)), samples[:0]]
        for number, piece in enumerate(pieces, 1):
            known, begun = len(stream.tokens), time.perf_counter()
            found.append(stream.accept(piece, final=number == len(pieces)))
            latencies.add(stream, stream.tokens[known:], time.perf_counter() - begun)
        form.latencies.append(latencies.tokens)
        return stream.text, stream.tokens[-1].start if stream.tokens else None, np.concatenate(found)

    form = Form(name, recognise)
    return form


def load_forms(reference: Path, espnet: backends.EspnetBackend, folders: Sequence[Path]) -> List[Form]:
    """The reference as it is (``espnet``), also on streams if its encoder can do that, and the other forms."""
    from espnet_kd.deploy.espnet_stream import ENCODERS  # imports torch, which --minutes must not load

    forms = [whole("ESPnet", espnet)]
    if type(espnet.recogniser.model.encoder).__name__ in ENCODERS:
        forms.append(streamed("ESPnet, on a stream", LiveTranscriber(reference).student))
    for folder in folders:
        about = backends.read_about(folder)
        name = about["format"] if about["quantize"] == "none" else f"{about['format']}, {about['quantize']}"
        if about["format"] == "stream":
            form = streamed(name, LiveTranscriber(folder).student)
        elif about["format"] == "sherpa":
            form = stock_sherpa(name, folder, espnet.rate)
        else:
            form = whole(name, backends.load(folder))
        form.megabytes = (folder / "model.onnx").stat().st_size / 1e6
        forms.append(form)
    return forms


def compare(forms: Sequence[Form], waves: Sequence[np.ndarray], rounds: int) -> None:
    """Let the forms take turns on every utterance; results and latencies are those of the first round."""
    for form in forms:
        form.recognise(waves[0])  # the first call includes work that is done only once
        form.latencies.clear()
    for number in range(rounds):
        for wave in tqdm(waves, desc=f"round {number + 1} of {rounds}", disable=None):
            for form in forms:
                begun = time.process_time()
                result = form.recognise(wave)
                form.cpu += time.process_time() - begun
                if number == 0:
                    form.results.append(result)


def table(forms: Sequence[Form], seconds: float) -> List[str]:
    """Lines of a Markdown table; ``seconds`` is the length of the audio that each form got."""
    from espnet_kd.deploy.check import difference

    head = "form|model.onnx|same text|largest difference|last token off|CPU time / ESPnet's|real-time factor|latency"
    lines = [f"|{head}: first, last, all|", "|---" * 8 + "|"]
    first = forms[0]
    for form in forms:
        same = sum(one[0].split() == other[0].split() for one, other in zip(form.results, first.results))
        pairs = [(a[2], b[2]) for a, b in zip(form.results, first.results) if a[2] is not None]
        equal = pairs and all(a.shape == b.shape for a, b in pairs)
        off = f"{max(difference(a, b) for a, b in pairs):.1e}" if equal else "–"
        pairs = [(a[1], b[1]) for a, b in zip(form.results, first.results)]
        times = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        late = f"{1000 * max(times):.0f} ms" if times else "–"
        latency = "–"
        known = [tokens for tokens in form.latencies[: len(form.results)] if tokens]
        if known:
            kinds = [t[0] for t in known], [t[-1] for t in known], [x for t in known for x in t]
            latency = ", ".join(f"{1000 * sum(k) / len(k):.0f}" for k in kinds) + " ms"
        size = f"{form.megabytes:.2f} MB" if form.megabytes else "–"
        lines.append(
            f"|{form.name}|{size}|{same} of {len(form.results)}|{off}|{late}|{form.cpu / first.cpu:.2f}|"
            f"{form.cpu / seconds:.5f}|{latency}|"
        )
    return lines


def in_browser(folder: Path, files: Dict[str, str], expected: Dict[str, str]) -> str:
    """Give files {utterance: path} to the page; return a line about its texts and its requests."""
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests), str(tests / "deploy")]
    from browser import BROWSER, open_page

    if BROWSER is None:
        raise UserError("--browser: no Chromium is installed")
    names = {utt_id: f"{utt_id}{Path(path).suffix}" for utt_id, path in files.items()}
    audio = {names[utt_id]: Path(path).read_bytes() for utt_id, path in files.items()}
    with tempfile.TemporaryDirectory() as scratch:
        results, asked, elsewhere = open_page(folder, audio, scratch)
    texts = {utt_id: results.get(name, "").rpartition("\n")[0] for utt_id, name in names.items()}
    same = sum(texts[utt_id].split() == expected[utt_id].split() for utt_id in files)
    own = sorted({path for path in asked if not path.startswith(("/audio/", "/files", "/driver"))})
    return f"Chromium: same text {same} of {len(files)}; requests to other hosts: {len(elsewhere)}; to its own: {own}"


def last_long(student: Any, waves: Sequence[np.ndarray], minutes: int, keep: bool) -> str:
    """Give a stream minutes of audio; return a line about this process's memory. ``keep``: tokens stay to the end."""
    audio = np.concatenate(waves)
    size = int(CHUNK * student.rate)
    stream, marks, found, begun = Stream(student), [], 0, time.process_time()
    minute = round(60 / CHUNK)
    for step in tqdm(range(minutes * minute), desc=f"{minutes} minutes", disable=None):
        stream.accept(np.take(audio, range(step * size, (step + 1) * size), mode="wrap"))
        if not keep and len(stream.tokens) > 1:  # the last token may still go on
            found += len(stream.tokens) - 1
            del stream.tokens[:-1]
        done = (step + 1) / minute
        if done in (1, minutes) or done % 10 == 0:
            marks.append(f"{_memory() / 1e6:.1f} ({done:g})")
    found += len(stream.tokens)
    how = "kept" if keep else "dropped as they come"
    return (
        f"{found} tokens, {how}: memory in MB (after minutes) {', '.join(marks)}; "
        f"CPU {time.process_time() - begun:.0f} s"
    )


def _memory() -> int:
    """The resident memory of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"^VmRSS:\s*(\d+) kB", status, re.MULTILINE)[1])


def last_long_in_a_process(folder: Path, data_dir: Path, minutes: int, keep: bool) -> None:
    """Print :func:`last_long` of a process of its own, which for a graph loads neither torch nor ESPnet."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import exports; "
        "student = exports.LiveTranscriber(Path(sys.argv[2])).student; "
        "waves = exports.read_waves(Path(sys.argv[3]), student.rate)[1]; "
        "print(exports.last_long(student, waves, int(sys.argv[4]), sys.argv[5] == 'True'))"
    )
    command = [sys.executable, "-c", code, *map(str, (Path(__file__).parent, folder, data_dir, minutes, keep))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{folder}: {done.stdout.strip().splitlines()[-1]}")


def read_waves(data_dir: Path, rate: int) -> Tuple[Dict[str, str], List[np.ndarray]]:
    """Files {utterance: path} of a data dir and their samples (N,)."""
    files = read_map(data_dir / "wav.scp")
    return files, [np.concatenate(list(read_blocks(path, rate))) for path in files.values()]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, metavar="EXPORT", help="for ESPnet, or an experiment")
    parser.add_argument("exports", type=Path, nargs="*", metavar="FOLDER", help="of other forms of the same student")
    parser.add_argument("--data_dir", type=Path, required=True, help="its wav.scp names the utterances")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each form on each utterance (default: 2)")
    parser.add_argument("--browser", type=int, default=0, metavar="N", help="so many files go to the page in Chromium")
    parser.add_argument("--minutes", type=int, default=0, metavar="N", help="streams get so many minutes of audio")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # ESPnet prints as it is imported
        espnet = backends.EspnetBackend(args.reference)
        forms = load_forms(args.reference, espnet, args.exports)
    files, waves = read_waves(args.data_dir, espnet.rate)
    compare(forms, waves, args.rounds)
    print("\n".join(table(forms, args.rounds * sum(map(len, waves)) / espnet.rate)))
    kinds = {folder: json.loads((folder / backends.ABOUT).read_text())["format"] for folder in args.exports}
    for folder, kind in kinds.items():
        if kind == "web" and args.browser:
            chosen = dict(list(files.items())[:: max(1, len(files) // args.browser)][: args.browser])
            expected = {utt_id: result[0] for utt_id, result in zip(files, forms[0].results)}
            print(in_browser(folder, chosen, expected))
        if kind == "stream" and args.minutes:
            for keep in (False, True):
                last_long_in_a_process(folder, args.data_dir, args.minutes, keep)


if __name__ == "__main__":
    run(main)
