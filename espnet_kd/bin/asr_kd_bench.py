r"""Measure the costs of distillation on this machine, as ratios of the times of alternating runs.

    python -m espnet_kd.bin.asr_kd_bench
    python -m espnet_kd.bin.asr_kd_bench --only decoding --expdir exp/teacher --data_dir dump/raw/test --json

Training steps: plain CTC, CTC with a running teacher, CTC with cached targets. Loss: time and peak memory of factorized
KL, against a straightforward implementation. Decoding: against espnet2.bin.asr_inference; this needs a trained
experiment and a data dir. Times are CPU time of one thread, or of the GPU where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.decode.decodings import BEAM_SIZE_TOKEN_HELP

PARTS = ("steps", "loss", "decoding")
def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure; default: all that are possible")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[500, 5000], help="tokens V, for the steps")
    parser.add_argument("--nonblank", type=float, nargs="+", default=[0.2], help="NB shares, for the loss")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="number of rounds of alternating runs; for decoding: parts of the data dir",
    )
    parser.add_argument("--expdir", help="a trained experiment, for decoding")
    parser.add_argument("--data_dir", help="a formatted data dir with text, for decoding")
    parser.add_argument("--beam_size", type=int, default=10, help="beam size of both searches")
    parser.add_argument("--beam_size_token", type=int, default=20, help=f"{BEAM_SIZE_TOKEN_HELP}; asr_inference: all")
    parser.add_argument("--most", type=int, default=0, help="number of utterances to decode; 0: all")
    parser.add_argument(
        "--join_seconds",
        type=float,
        default=0.0,
        help="join neighbouring utterances up to this length in seconds; 0: do not join",
    )
    parser.add_argument("--json", action="store_true", help="print everything measured, as JSON")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can correct.
    """
    args = get_parser().parse_args(argv)
    cli.refuse_empty(args)
    cli.check_positive(args, "rounds", "beam_size", "beam_size_token")
    if min(args.vocabulary) < 5 or args.most < 0:
        raise cli.UserError("--vocabulary must be 5 or more, --most 0 or more")
    if not 0 <= args.join_seconds < math.inf:
        raise cli.UserError(f"--join_seconds is {args.join_seconds}; it must be 0 or more")
    parts = list(args.only or PARTS)
    if "decoding" in parts and not (args.expdir and args.data_dir):
        if args.only:
            raise cli.UserError(
                "--only decoding needs --expdir and --data_dir: a trained experiment, and what to decode"
            )
        parts.remove("decoding")

    with contextlib.redirect_stdout(sys.stderr):  # ESPnet prints when it is imported; the output must be JSON
        from espnet_kd.bench.table import headline, machine, measure, table  # imports torch

        measured = measure(parts, args)
    if args.json:
        print(json.dumps({"machine": machine(), "measured": measured, **headline(measured)}, indent=2))
    else:
        print(table(measured))


if __name__ == "__main__":
    cli.run(main)
