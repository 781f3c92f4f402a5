"""Check whether a result of run.sh is complete and made from the current inputs, or record that it is.

    python -m espnet_kd.bin.asr_kd_record check --record exp/stats/.done --file data/tokens.txt --value=fs=16000
    python -m espnet_kd.bin.asr_kd_record finish --record exp/stats/.done --file data/tokens.txt --value=fs=16000
    python -m espnet_kd.bin.asr_kd_record check --model exp/teacher --fixed data/tokens.txt --file conf/teacher.yaml

check ends with exit code 0 if the result is finished and made from these files and values, and with 3 if it must be
made. A record of an earlier version, which is an empty file, is valid if no input file is newer. A model that was begun
with other files of --fixed is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.experiments.record import Record, inputs_of, is_trained, newer_than

TO_BE_MADE = 3  # exit code


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("check", "finish"))
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--record", metavar="FILE", help="the record of a result")
    place.add_argument("--model", metavar="DIR", help="a training's directory, whose record is .done")
    parser.add_argument("--file", nargs="*", default=[], help="files that the result is made from")
    parser.add_argument("--value", nargs="*", default=[], help="settings that it is made with")
    parser.add_argument("--fixed", nargs="*", default=[], help="files that cannot change once a training has begun")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: a file is missing, or a model was begun with other files.
    """
    args = get_parser().parse_args(argv)
    inputs = inputs_of(args.file, args.value, args.fixed)
    if args.model:
        directory = Path(args.model)
        record = Record(directory / ".done", directory / ".begun")
    else:
        record = Record(Path(args.record))
    if args.verb == "finish":
        record.finish(inputs)
        return
    if args.model:
        finished = is_trained(directory, inputs)
    else:
        earlier = record.path.is_file() and not record.path.stat().st_size and newer_than(record.path, args.file)
        finished = earlier or record.is_of(inputs)
    if not finished:
        sys.exit(TO_BE_MADE)


if __name__ == "__main__":
    cli.run(main)
