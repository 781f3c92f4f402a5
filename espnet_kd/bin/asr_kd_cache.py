r"""Keep what a teacher says of data dirs on disk, so that training runs without the teacher.

    python -m espnet_kd.bin.asr_kd_cache --teacher exp/teacher --kd_config progressive_fkl \
        --data_dir dump/raw/train dump/raw/valid --output exp/teacher/targets --nj 4

The page says what is kept: tokens on non-blank frames or on all, temperatures, hidden states. The same command
continues a run that was stopped, or checks one that is finished: every array is read, damaged shards are made again.
With --job 2/4, on several machines or GPUs at once, each does its part, all of the same number; run the command without
--job at the end. Train with --target_cache DIR.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Optional, Sequence, Tuple

from espnet_kd import cli


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
        "--mass", type=float, default=0.995, help="tokens of a frame are kept until, with blank, they have this share"
    )
    parser.add_argument("--top_k", type=int, default=96, help="the most that are kept of a frame, blank apart")
    parser.add_argument("--ngpu", type=int, default=0, choices=(0, 1), help="0: CPU, 1: GPU")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="audio in a batch, padding included")
    parser.add_argument("--nj", type=int, default=1, help="batches at the same time; 1 on a GPU")
    parser.add_argument("--job", default="1/1", metavar="I/N", help="do the I-th of N parts, from 1; N is that of all")
    parser.add_argument("--shard_size", type=int, default=200, help="utterances of a shard, which is redone as a whole")
    parser.add_argument("--force", action="store_true", help="make it anew, even where another cache is")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can mend.
    """
    args = get_parser().parse_args(argv)
    cli.refuse_empty(args)
    for name in ("nj", "top_k", "shard_size"):
        if getattr(args, name) < 1:
            raise cli.UserError(f"--{name} is {getattr(args, name)}; it must be 1 or more")
    if not 0 < args.mass <= 1:
        raise cli.UserError(f"--mass is {args.mass}; it must be above 0 and at most 1")
    if not (args.batch_seconds > 0 and math.isfinite(args.batch_seconds)):
        raise cli.UserError(f"--batch_seconds is {args.batch_seconds}; it must be a number above 0")
    job, jobs = parse_job(args.job)
    output = Path(args.output)
    if args.force and jobs > 1:
        raise cli.UserError(f"--force with --job would remove what other jobs wrote; remove {output} first instead")

    # Imported here: --help and mistakes in the command line are answered at once.
    from espnet_kd.decode.recognise import choose_device
    from espnet_kd.targets.cache_writer import holding

    device = choose_device(args)
    with holding(output, job, jobs):
        write(args, output, job, jobs, device)


def write(args: argparse.Namespace, output: Path, job: int, jobs: int, device: str) -> None:
    """Write the shards of part ``job`` of ``jobs``; if it is the only one, finish the cache (:class:`UserError`)."""
    from tqdm import tqdm

    from espnet_kd.bin.asr_kd_nbest import read_all_utterances
    from espnet_kd.decode.recognise import recognise
    from espnet_kd.distill.page import needed_targets
    from espnet_kd.files import sha256_of
    from espnet_kd.targets import cache_writer as writer
    from espnet_kd.targets.cache import Manifest, Policy, hash_tokens
    from espnet_kd.targets.encode import ctc_tokens, measure_frame_shift
    from espnet_kd.targets.experiment import find_experiment, load_model
    from espnet_kd.targets.online import sampling_rate

    config, model_file = find_experiment(args.teacher)
    model, train_args = load_model(config, model_file, device)
    top_k = min(args.top_k, len(ctc_tokens(model)) - 1)
    policy = Policy(top_k, args.mass, **asdict(needed_targets(args.kd_config)))
    rate = sampling_rate(train_args)
    shift = measure_frame_shift(model, rate)
    recogniser = writer.TargetRecogniser(model, train_args, config.parent, policy=policy)
    utterances = read_all_utterances(args.data_dir, recogniser.rate)
    shards = writer.split(utterances, args.shard_size)
    data = writer.hash_data(utterances)
    manifest = Manifest(
        str(model_file), sha256_of(model_file), sha256_of(config), hash_tokens(recogniser.token_list),
        len(recogniser.token_list), shift, rate, model.encoder.output_size(), policy, data, len(shards), {},
    )  # fmt: skip
    if args.force:
        writer.remove(output)
    writer.write_manifest(output, manifest, recogniser.token_list)
    if jobs == 1:
        writer.remove_leftovers(output)
    mine = list(enumerate(shards))[job - 1 :: jobs]
    with tqdm(total=sum(len(u) for _, u in mine), unit="utt", desc=output.name) as bar:
        written = writer.write_shards(
            output, manifest, mine,
            lambda utterances: recognise(recogniser, utterances, args.batch_seconds, args.nj, progress=False)[0],
            bar.update,
        )  # fmt: skip
    logging.info("%s: %d of %d shards written, %d found whole", output, written, len(mine), len(mine) - written)
    if jobs > 1:
        logging.info("when all %d jobs are through, run the same command without --job", jobs)
        return
    counts = writer.finish(output, manifest).counts
    frames = max(counts["frames"], 1)
    logging.info(
        "%s: %d utterances, %d frames, %.1f %% of them with tokens, %.1f bytes a frame, %.2f MB an hour of audio",
        output, counts["utterances"], counts["frames"], 100 * counts["rows"] / frames, counts["bytes"] / frames,
        counts["bytes"] / frames / shift * 3600 / 1e6,
    )  # fmt: skip


def parse_job(job: str) -> Tuple[int, int]:
    """``2/4`` → (2, 4).

    Raises:
        UserError: no such pair.
    """
    first, _, last = job.partition("/")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise cli.UserError(f"--job {job}: give the part and the number of parts, such as 2/4")


if __name__ == "__main__":
    cli.run(main)
