"""Turn a trained student into a plain ESPnet experiment that stock ESPnet decodes, packs and serves.

Example:
    python -m espnet_kd.bin.asr_kd_export --expdir exp/student_progressive_fkl

It writes EXPDIR/export with config.yaml (no KD keys), model.pth (student keys only), feats_stats.npz, bpe.model if
any, decode.yaml (the options that a CTC model is decoded with) and README.md (how to use it), and EXPDIR/export.zip,
which is that of espnet2.bin.pack. ESPnet loads them from any directory. Paths in config.yaml are relative to the
directory the command runs in, as ESPnet writes them.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_kd.cli import refuse_empty, run


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expdir", required=True, metavar="EXP[/FILE.pth]", help="the student's experiment")
    parser.add_argument("--output_dir", type=Path, help="default: EXP/export")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Export (see the module's docstring)."""
    args = get_parser().parse_args(cmd)
    refuse_empty(args)
    from espnet_kd.distill.export import export  # --help and mistakes in the command line are answered at once

    out = export(args.expdir, args.output_dir)
    logging.info("exported to %s", out)


if __name__ == "__main__":
    run(main)
