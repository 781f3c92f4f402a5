r"""Write a teacher's outputs for data dirs to disk, so that training runs without the teacher.

    python -m espnet_kd.bin.asr_kd_cache --teacher exp/teacher --kd_config progressive_fkl \
        --data_dir dump/raw/train dump/raw/valid --output exp/teacher/targets --nj 4

The page decides what is kept: tokens on non-blank frames or on all, temperatures, hidden states. The same command
continues a run that was stopped, or checks one that is finished: every array is read, damaged shards are made again.
With --job 2/4, on several machines or GPUs at once, each does its part, all of the same number; run the command without
--job at the end. Train with --target_cache DIR.
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
    parser.add_argument("--kd_config", required=True, nargs="+", metavar="PAGE", help="method pages it is to serve")
    parser.add_argument(
        "--data_dir", required=True, nargs="+", action="extend", metavar="DIR", help="training and validation data dirs"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the cache, e.g. exp/teacher/targets")
    parser.add_argument(
        "--mass", type=float, default=MASS, help="tokens of a frame are kept until, with blank, they have this share"
    )
    parser.add_argument("--top_k", type=int, default=TOP_K, help="the most that are kept of a frame, blank apart")
    cli.add_batch_options(
        parser, nj="batches at the same time; 1 on a GPU", force="make it anew, even where another cache is"
    )
    parser.add_argument("--job", default="1/1", metavar="I/N", help="do the I-th of N parts, from 1; N is that of all")
    parser.add_argument(
        "--shard_size", type=int, default=SHARD_SIZE, help="utterances of a shard, which is redone as a whole"
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
