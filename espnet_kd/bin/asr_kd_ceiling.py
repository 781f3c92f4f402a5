"""Print how many tokens of a teacher are lost when its outputs are aligned with the frames of a slower student.

    python -m espnet_kd.bin.asr_kd_ceiling --teacher exp/wav2vec2 --data_dir dump/raw/valid \\
        --student_config conf/train_student.yaml

A student frame that covers several teacher frames gets the output of one of them, so that tokens which follow each
other too closely are lost, and no student can learn them. The command decodes some utterances with the teacher at its
own frame rate and on the student's frames, and warns above 3 % of the tokens.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Optional, Sequence

from espnet_kd import cli

if TYPE_CHECKING:
    from espnet_kd.data.tokenizing import Tokenizer

WARN = 3.0  #: percent of the tokens
POOLS = ("least_blank", "mean")


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="asr_kd_ceiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, metavar="EXP[/FILE.pth]", help="a finished experiment")
    parser.add_argument("--data_dir", required=True, help="formatted data dir; a text in it is the reference")
    parser.add_argument("--student_config", required=True, help="the student's ESPnet training YAML")
    parser.add_argument(
        "--student_args",
        default="",
        metavar="OPTIONS",
        help="further options of asr_train for the student, such as --student_args='--frontend_conf fs=8000'",
    )
    parser.add_argument(
        "--utterances", type=int, default=200, help="number of utterances, from the beginning of the data dir"
    )
    parser.add_argument("--pool", choices=POOLS, default=POOLS[0], help="pool of the method page")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Measure (see the module's docstring)."""
    args = get_parser().parse_args(cmd)
    cli.refuse_empty(args, may_be=("student_args",))
    if args.utterances < 1:
        raise cli.UserError(f"--utterances: must be 1 or more, not {args.utterances}")
    if not Path(args.student_config).is_file():
        raise cli.UserError(f"--student_config: there is no file {args.student_config}")
    import espnet_kd.offline  # noqa: F401, I001  (before espnet2)
    import tempfile

    from espnet_kd.data.lengths import espnet_encoder
    from espnet_kd.frames import nearest_multiple
    from espnet_kd.decode.ceiling import measure_ceiling
    from espnet_kd.experiments.models import find_experiment, read_config
    from espnet_kd.targets.online import OnlineTeacher

    path = find_experiment(args.teacher)[0]
    config = read_config(path)
    teacher = OnlineTeacher(args.teacher)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as tokens:
        tokens.write("".join(f"{t}\n" for t in teacher.token_list))
        tokens.flush()
        frames_of, rate = espnet_encoder(["--config", args.student_config, *args.student_args.split()], tokens.name)
    if rate != teacher.sampling_rate:
        raise cli.UserError(
            f"{args.student_config}: the student takes audio of {rate} Hz, the teacher {teacher.sampling_rate:g} Hz; "
            f"give the student that rate (--student_args='--frontend_conf fs={teacher.sampling_rate:g}')"
        )
    long, short = 30 * rate, 10 * rate
    shift = nearest_multiple((long - short) / rate / (frames_of(long) - frames_of(short)), 0.0005) * 0.0005
    tokenizer = _tokenizer(config, path)
    found = measure_ceiling(
        teacher, args.data_dir, frames_of, shift, utterances=args.utterances, pool=args.pool, tokenizer=tokenizer
    )
    at = f"on the student's frames of {1000 * found.student_shift:g} ms"
    logging.info(
        "the teacher %s %s loses %.1f %% of the tokens that it gives in its own frames of %g ms "
        "(%d utterances of %s, %d tokens)",
        args.teacher, at, found.lost, 1000 * found.teacher_shift, found.utterances, args.data_dir, found.tokens,
    )  # fmt: skip
    if found.own is not None:
        logging.info("its token error rate: %.1f %%, %s %.1f %%", found.own, at, found.aligned)
    if found.lost > WARN:
        logging.warning(
            "a student with these frames cannot learn the lost tokens from this teacher: give it less subsampling "
            "(encoder_conf: input_layer: conv2d1 or conv2d2; conf/models/conformer_6x96_20ms.yaml has frames of 20 ms)"
        )


def _tokenizer(config: Mapping[str, Any], path: Path) -> Optional[Tokenizer]:
    """A tokenizer that cuts references into the teacher's tokens; None for other types of tokens."""
    from espnet_kd.data.tokenizing import Tokenizer
    from espnet_kd.experiments.named_files import find_token_model

    if config.get("token_type") == "bpe":
        model = find_token_model(argparse.Namespace(**config), path)
        return Tokenizer("bpe", model=model.read_bytes(), model_name=str(model))
    return Tokenizer("char") if config.get("token_type") == "char" else None


if __name__ == "__main__":
    cli.run(main)
