"""Gather the results of all experiments: a table, a JSON list and a picture of the training curves.

    python -m espnet_kd.bin.asr_kd_report --expdir exp [--teacher EXP]

Writes EXPDIR/results.json, EXPDIR/RESULTS.md and EXPDIR/curves.png. What is missing is named, the rest is shown.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_kd import cli


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expdir", default="exp", help="directory of the experiments")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="EXP", help="teachers that lie elsewhere")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can mend.
    """
    args = get_parser().parse_args(argv)
    from espnet_kd.report.curves import draw_curves
    from espnet_kd.report.results import gather, write_json, write_markdown

    expdir = Path(args.expdir)
    gathered = gather(expdir, [Path(t) for t in args.teacher])
    picture = expdir / "curves.png"
    if not draw_curves(gathered.curves, picture):
        picture.unlink(missing_ok=True)  # one of an earlier report would show other experiments
    write_json(gathered.rows, expdir / "results.json")
    write_markdown(gathered, expdir / "RESULTS.md", picture.name if picture.exists() else None)
    for note in gathered.notes:
        logging.warning("missing: %s", note)
    logging.info("%d rows → %s and %s", len(gathered.rows), expdir / "RESULTS.md", expdir / "results.json")


if __name__ == "__main__":
    cli.run(main)
