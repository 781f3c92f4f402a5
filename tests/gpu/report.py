"""Run the parts of tests/gpu/run.sh, each in a process, and write a table and JSON of them. It imports only torch."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
LOSS_TESTS = ("tests/losses", "tests/test_select.py", "tests/test_frames.py", "tests/test_late.py")
#: Tests that replace the GPU's own tests of waits on a CPU.
STAND_INS = ("tests/distill/test_no_wait.py", "tests/distill/test_waits.py")
PARTS = ("losses", "training", "bench")
SECONDS = 1500  #: limit for a part


@dataclass
class Row:
    """One line of the table."""

    part: str
    what: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    reasons: List[str] = field(default_factory=list)  #: why tests were left out


class Report:
    """The results of the parts that have run."""

    def __init__(self, output: Path, cpu: bool):
        self.output, self.cpu = output, cpu
        self.rows: List[Row] = []
        self.bench: Dict[str, object] = {}

    def run(self, name: str, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess:
        """Run a command with a log; return it with its standard output."""
        device = "cpu" if self.cpu else "cuda"
        env = {**os.environ, "ESPNET_KD_TEST_DEVICE": device, **environment}
        print(f"… {name}", file=sys.stderr, flush=True)
        with open(self.output / f"{name}.log", "w") as log:
            try:
                done = subprocess.run(
                    [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True,
                    timeout=SECONDS,
                )  # fmt: skip
            except subprocess.TimeoutExpired as e:
                printed = e.stdout.decode(errors="replace") if isinstance(e.stdout, bytes) else e.stdout or ""
                done = subprocess.CompletedProcess(command, 124, printed)
        with open(self.output / f"{name}.log", "a") as log:
            log.write(done.stdout)
        return done

    def script(self, part: str, what: str, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess:
        """Run a command that is one line of the table."""
        start = time.monotonic()
        done = self.run(what.replace(" ", "_"), command, **environment)
        good = done.returncode == 0
        self.rows.append(Row(part, what, int(good), int(not good), 0, time.monotonic() - start))
        return done

    def tests(self, part: str, paths: Sequence[str], *options: str) -> None:
        """Run tests; each test function is one line of the table."""
        name = f"{part}_{len(self.rows)}"
        xml = self.output / f"{name}.xml"
        command = ["-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={xml}", *options, *paths]
        start = time.monotonic()
        done = self.run(name, command)
        rows: Dict[str, Row] = defaultdict(lambda: Row(part, ""))
        for case in ElementTree.parse(xml).iter("testcase") if xml.exists() else ():
            test = case.get("name", "").partition("[")[0]
            row = rows[f"{case.get('classname', '').rpartition('.')[2]}.{test}"]
            row.what = test.removeprefix("test_").replace("_", " ")
            outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
            row.passed += outcome == "passed"
            row.failed += outcome in ("failure", "error")
            row.skipped += outcome == "skipped"
            row.seconds += float(case.get("time", 0))
            if outcome == "skipped":
                row.reasons.append(str(case.find("skipped").get("message")))
        self.rows += rows.values()
        if done.returncode not in (0, 1) or not rows:  # pytest did not begin, or a signal ended it in a test
            what = f"pytest ended with {done.returncode}: {name}.log"
            self.rows.append(Row(part, what, failed=1, seconds=time.monotonic() - start))

    def table(self) -> str:
        """The table in Markdown, and a list of what was left out."""
        lines = ["| | | passed | failed | left out | seconds |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {r.part} | {r.what} | {r.passed} | {r.failed or ''} | {r.skipped or ''} | {r.seconds:.1f} |"
            for r in self.rows
        ]
        out = [f"- {r.what} ({r.reasons.count(x)}): {x}" for r in self.rows for x in dict.fromkeys(r.reasons)]
        lines += ["", "Left out:", *out] if out else []
        return "\n".join(lines)


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def losses(report: Report) -> None:
    """Test losses, selections and alignment."""
    tested = installed("pytest")
    if report.cpu:
        report.script("losses", "kernels in Triton's interpreter", ["tests/losses/grid.py"], TRITON_INTERPRET="1")
        if tested and installed("espnet2"):
            report.tests("losses", STAND_INS)
    if tested:
        # tests/conftest.py is left out, because it imports ESPnet.
        report.tests("losses", LOSS_TESTS, "-m", "gpu", "--confcutdir", "tests/losses")
    elif not report.cpu:
        report.script("losses", "losses against float64", ["tests/losses/grid.py", "cuda"])
        reasons = ["large vocabularies, waits: pytest is not installed"]
        report.rows.append(Row("losses", "the others", skipped=1, reasons=reasons))


def training(report: Report) -> None:
    """Test pages, cache, resume and decoding."""
    lacking = [name for name in ("pytest", "espnet2", "kaldiio", "soundfile", "flashlight") if not installed(name)]
    if lacking:
        reason = f"not installed: {', '.join(lacking)}"
        report.rows.append(Row("training", "all", skipped=1, reasons=[reason]))
        return
    report.tests("training", ["tests/gpu"], "-m", "gpu")


def bench(report: Report) -> None:
    """Measure the ratios."""
    parts = ["loss", "steps"] if installed("espnet2") else ["loss"]
    for part in parts:
        command = ["-m", "espnet_kd.bin.asr_kd_bench", "--only", part, "--rounds", "5", "--json"]
        done = report.script("bench", part, [*command, *(["--nonblank", "0.2", "0.5"] if part == "loss" else [])])
        if done.returncode == 0:
            report.bench[part] = json.loads(done.stdout)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description="See tests/gpu/run.sh --help.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)
    import torch

    if not args.cpu and not torch.cuda.is_available():
        print("error: no CUDA device (torch.cuda.is_available() is False): give --cpu", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from espnet_kd.bench.table import machine, table

    start = time.monotonic()
    report = Report(args.output, args.cpu)
    for part in args.only:
        {"losses": losses, "training": training, "bench": bench}[part](report)
    seconds = time.monotonic() - start
    failed = sum(row.failed for row in report.rows)
    print(report.table())
    for found in report.bench.values():
        print("", table(found["measured"]), sep="\n")
    print(f"\n{sum(r.passed for r in report.rows)} passed, {failed} failed, {seconds:.0f} s; {args.output}/gpu.json")
    device = machine() if not args.cpu else {**machine(), "device": "CPU (--cpu)"}
    content = {"machine": device, "seconds": seconds, "rows": list(map(asdict, report.rows)), "bench": report.bench}
    (args.output / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
