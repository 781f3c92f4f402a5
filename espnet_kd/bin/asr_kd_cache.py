r"""Write a teacher's outputs for data dirs to disk, so that training does not run the teacher.

    python -m espnet_kd.bin.asr_kd_cache --teacher exp/teacher --kd_config progressive_fkl \
        --data_dir dump/raw/train dump/raw/valid --output exp/teacher/targets --nj 4

The method page decides what is kept: tokens on non-blank frames or on all frames, temperatures, hidden states. The same
command resumes a run that was stopped, or checks a finished cache: every array is read, and damaged shards are made
again. With --job I/N several machines or GPUs share the work, each with another I and the same N; run the command
without --job at the end. Train with --target_cache DIR.
"""

from __future__ import annotations

import argparse
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.distill.target_cache import MASS, SHARD_SIZE, TOP_K, make_cache


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="EXP[/FILE.pth]", help="experiment, export or packed .zip")
    parser.add_argument(
        "--kd_config", required=True, nargs="+", metavar="PAGE", help="method pages that will use the cache"
    )
    parser.add_argument(
        "--data_dir", required=True, nargs="+", action="extend", metavar="DIR", help="training and validation data dirs"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="directory of the cache, e.g. exp/teacher/targets"
    )
    parser.add_argument(
        "--mass",
        type=float,
        default=MASS,
        help="keep the likeliest tokens of a frame until, with blank, they have this probability",
    )
    parser.add_argument(
        "--top_k", type=int, default=TOP_K, help="keep at most this number of tokens per frame, without blank"
    )
    cli.add_batch_options(
        parser, nj="batches at the same time; 1 on a GPU", force="make the cache again, also in place of another cache"
    )
    parser.add_argument(
        "--job", default="1/1", metavar="I/N", help="make part I of N, counted from 1; N is the same for all jobs"
    )
    parser.add_argument(
        "--shard_size",
        type=int,
        default=SHARD_SIZE,
        help="utterances in a shard; a damaged shard is made again as a whole",
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can correct.
    """
    args = get_parser().parse_args(argv)
    cli.refuse_empty(args)
    make_cache(**vars(args))


if __name__ == "__main__":
    cli.run(main)
