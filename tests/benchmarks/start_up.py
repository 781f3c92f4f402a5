"""Cost of a command before it starts to work: CPU seconds (user + system) of a fresh process, and imported modules.

    python tests/benchmarks/start_up.py --root . --root ../before

The figure is the least of ``--rounds`` runs, because CPU time also grows when other processes use the caches. Each
--root is a checkout; the checkouts take turns.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

COMMANDS: Dict[str, List[str]] = {
    "import torch": ["-c", "import torch"],
    "import espnet_kd.offline": ["-c", "import espnet_kd.offline"],
    "asr_kd_train --help": ["-m", "espnet_kd.bin.asr_kd_train", "--help"],
    "asr_kd_page progressive_fkl": ["-m", "espnet_kd.bin.asr_kd_page", "progressive_fkl"],
    "asr_kd_score (250 utterances)": [
        *("-m", "espnet_kd.bin.asr_kd_score", "--hyp", "text", "--ref", "text", "--output_dir", "out"),
    ],
    "asr_kd_report --watch --once": ["-m", "espnet_kd.bin.asr_kd_report", "--watch", "--once", "exp"],
    "asr_kd_export --help": ["-m", "espnet_kd.bin.asr_kd_export", "--help"],
}


def measure(root: Path, argv: Sequence[str], cwd: Path) -> Tuple[float, int]:
    """CPU seconds and imported modules of one run."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # -X importtime costs about 0.01 s, and lists the imported modules on standard error.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv], cwd=cwd, env=environment, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{root}: {' '.join(argv)}: {done.stderr.strip().splitlines()[-1]}")
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, sum(line.startswith("import time:") for line in done.stderr.splitlines())


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, action="append", help="a checkout to import from (this one)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    roots = [r.resolve() for r in args.root or [Path(__file__).resolve().parents[2]]]
    print(f"| command | {' | '.join(f'{r.name}: seconds | modules' for r in roots)} |")
    print(f"|---|{'---|---|' * len(roots)}")
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "exp" / "student").mkdir(parents=True)
        (Path(work) / "exp" / "student" / "config.yaml").write_text("max_epoch: 3\n")
        (Path(work) / "text").write_text("".join(f"utt{i:03} a few words {i}\n" for i in range(250)))
        for name, command in COMMANDS.items():
            runs = [[measure(root, command, Path(work)) for root in roots] for _ in range(args.rounds)]
            cells = [f"{min(r[i][0] for r in runs):.2f} | {runs[0][i][1]}" for i in range(len(roots))]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
