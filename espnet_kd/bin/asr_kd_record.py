"""Check whether a result of run.sh is complete and made from the current inputs, or record that it is.

    python -m espnet_kd.bin.asr_kd_record check --record exp/stats/.done --file data/tokens.txt --value=fs=16000
    python -m espnet_kd.bin.asr_kd_record finish --record exp/stats/.done --file data/tokens.txt --value=fs=16000
    python -m espnet_kd.bin.asr_kd_record check --model exp/teacher --fixed data/tokens.txt --file conf/teacher.yaml

--audio names the data dirs whose audio the result of a --record is made from, which may be made again under the same
names. The contents of up to 1000 files, evenly spaced, are compared if one of these is newer than the record. If they
differ and --expdir holds trained models, check ends with an error, because these models may have been trained on the
earlier audio.

check ends with exit code 0 if the result is finished and made from these files and values, and with 3 if it must be
made. A record of an earlier version, which is an empty file, is valid if no input file is newer. A model that was begun
with other files of --fixed is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.experiments.record import Record, inputs_of, is_trained, newer_than
from espnet_kd.files import replacing

TO_BE_MADE = 3  # exit code
#: Files of --audio that are compared. A corpus that is made again differs in every file, and reading a large one whole
#: would take many minutes.
COMPARED_FILES = 1000


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("check", "finish"))
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--record", metavar="FILE", help="the record of a result")
    place.add_argument("--model", metavar="DIR", help="a training's directory, whose record is .done")
    parser.add_argument("--file", nargs="*", default=[], help="files that the result is made from")
    parser.add_argument("--value", nargs="*", default=[], help="settings that it is made with")
    parser.add_argument("--audio", nargs="*", default=[], metavar="DIR", help="data dirs with the audio of a --record")
    parser.add_argument("--expdir", metavar="DIR", help="directory of the models that are trained on --audio")
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
        if args.audio:
            record_audio(record.path, args.audio)
        record.finish(inputs)
        return
    if args.model:
        finished = is_trained(directory, inputs)
    else:
        earlier = record.path.is_file() and not record.path.stat().st_size and newer_than(record.path, args.file)
        finished = (earlier or record.is_of(inputs)) and not is_of_other_audio(record.path, args.audio, args.expdir)
    if not finished:
        sys.exit(TO_BE_MADE)


def record_audio(record: Path, data_dirs: Sequence[str]) -> None:
    """Write the hash of the audio of data dirs beside a record."""
    from espnet_kd.decode.decodings import audio_of, hash_audio

    with replacing(_audio_record(record)) as f:
        json.dump({"audio_sha256": hash_audio(audio_of(data_dirs, COMPARED_FILES))}, f)


def is_of_other_audio(record: Path, data_dirs: Sequence[str], expdir: Optional[str]) -> bool:
    """Whether the audio of data dirs has another content than recorded beside ``record``; no if nothing is recorded.

    Raises:
        UserError: it has, and ``expdir`` holds models.
    """
    if not data_dirs or not _audio_record(record).is_file():
        return False
    from espnet_kd.decode.decodings import audio_has_changed

    if not audio_has_changed(_audio_record(record), data_dirs, COMPARED_FILES):
        return False
    models = sorted(path.parent.name for path in Path(expdir or record.parent).glob("*/checkpoint.pth"))
    if models:
        raise cli.UserError(
            f"the audio of {' and '.join(data_dirs)} is not that of {record.parent}, and models in {expdir} "
            f"({', '.join(models)}) may have been trained on the earlier one; give another --expdir, or remove "
            f"{record.parent} and those models"
        )
    return True


def _audio_record(record: Path) -> Path:
    return record.with_name(f"{record.name}.audio")


if __name__ == "__main__":
    cli.run(main)
