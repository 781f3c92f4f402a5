"""Compare method pages on a recipe's validation set, to choose a page's weights without looking at test.

    python tests/benchmarks/page_search.py --recipe an4 --pages progressive_fkl kl my_page.yaml --seeds 0 1 --ngpu 1

The recipe's stages 1 to 6 must be done for these seeds (./run_all.sh --recipe an4 …). Each page and seed is trained by
`run.sh --stage 8 --stop_stage 11` into EXPDIR and decoded greedily on the validation set. Each page is a line of a
Markdown table: mean error rates over the seeds, and the difference to the plain students of the same seeds. Students
that are already trained are not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]


def get_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="an4", help="a directory of egs2")
    parser.add_argument("--pages", nargs="+", required=True, help="names of pages, or paths")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--expdir", default="exp", help="of the recipe")
    parser.add_argument("--valid", default="dump/raw/valid", help="formatted data to decode")
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of run.sh; last")
    return parser


def rates(recipe: Path, experiment: str, args: argparse.Namespace) -> Optional[Tuple[float, float]]:
    """CER and WER of an experiment on the validation set, in percent; None where it cannot be decoded."""
    for verb in ("inference", "score"):
        command = [sys.executable, "-m", f"espnet_kd.bin.asr_kd_{verb}", "--expdir", experiment]
        command += ["--data_dir", args.valid]
        if subprocess.run(command, cwd=recipe, stdout=subprocess.DEVNULL).returncode:
            return None
    score = json.loads((recipe / experiment / f"decode_{Path(args.valid).name}" / "score.json").read_text())
    return score["cer"]["err"], score["wer"]["err"]


def train(recipe: Path, page: str, seed: int, args: argparse.Namespace) -> Optional[Tuple[float, float]]:
    """Train one student; CER and WER on the validation set, None where it failed (the log is on stderr)."""
    page = str(Path(page).resolve()) if page.endswith(".yaml") else page
    tag = "" if seed == 0 else f"_seed{seed}"
    command = ["./run.sh", "--stage", "8", "--stop_stage", "11", "--method", page, "--seed", str(seed)]
    command += ["--expdir", args.expdir, "--ngpu", str(args.ngpu), *args.options]
    if subprocess.run(command, cwd=recipe, stdin=subprocess.DEVNULL).returncode:
        return None
    return rates(recipe, f"{args.expdir}/student_{Path(page).stem}{tag}/export", args)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    args = get_parser().parse_args(argv)
    recipe = ROOT / "egs2" / args.recipe / "asr_kd1"
    plain = [rates(recipe, f"{args.expdir}/student_plain{f'_seed{s}' if s else ''}", args) for s in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {page: [pool.submit(train, recipe, page, seed, args) for seed in args.seeds] for page in args.pages}
    print("| page | seeds | CER | WER | CER to plain | WER to plain |\n|---|---|---|---|---|---|")
    show("plain", args.seeds, plain, plain)
    for page, results in waiting.items():
        show(Path(page).stem, args.seeds, [r.result() for r in results], plain)


def show(name: str, seeds: List[int], found: List[Optional[Tuple[float, float]]], plain: List) -> None:
    """Print a line of the table."""
    pairs = [(ours, theirs) for ours, theirs in zip(found, plain) if ours and theirs]
    if not pairs:
        print(f"| {name} | – | failed | | | |")
        return
    means = [sum(ours[i] for ours, _ in pairs) / len(pairs) for i in (0, 1)]
    to_plain = [means[i] - sum(theirs[i] for _, theirs in pairs) / len(pairs) for i in (0, 1)]
    numbers = " | ".join([f"{x:.2f}" for x in means] + [f"{x:+.2f}" for x in to_plain])
    print(f"| {name} | {' '.join(map(str, seeds[: len(found)]))} | {numbers} |")


if __name__ == "__main__":
    main()
