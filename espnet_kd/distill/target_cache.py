"""Makes the target cache of a teacher for the needs of some methods and for data dirs."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Sequence, Tuple

from espnet_kd import cli

#: Defaults of ``--mass``, ``--top_k`` and ``--shard_size``.
MASS, TOP_K, SHARD_SIZE = 0.995, 96, 200


def make_cache(
    teacher: str,
    kd_config: Sequence[str],
    data_dir: Sequence[str],
    output: str,
    *,
    mass: float = MASS,
    top_k: int = TOP_K,
    ngpu: int = 0,
    batch_seconds: float = 60.0,
    nj: int = 1,
    job: str = "1/1",
    shard_size: int = SHARD_SIZE,
    force: bool = False,
) -> None:
    """Write a target cache, or a part of one; the arguments are the options of ``asr_kd_cache``.

    Raises:
        UserError: whatever the user can correct in the options, the teacher or the data.
    """
    args = argparse.Namespace(**locals())
    cli.check_positive(args, "nj", "top_k", "shard_size")
    if not 0 < args.mass <= 1:
        raise cli.UserError(f"--mass is {args.mass}; it must be above 0 and at most 1")
    part, parts = parse_job(job)
    place = Path(output)
    if force and parts > 1:
        raise cli.UserError(f"--force with --job would remove what other jobs wrote; remove {place} first instead")

    # Imported here, so that --help and mistakes in the command line do not wait for the import.
    from espnet_kd.inference.recognise import choose_device
    from espnet_kd.targets.cache_writer import holding

    device = choose_device(args)
    with holding(place, part, parts):
        _write(args, place, part, parts, device)


def _write(args: argparse.Namespace, output: Path, job: int, jobs: int, device: str) -> None:
    """Write the shards of part ``job`` of ``jobs``; if it is the only one, finish the cache (:class:`UserError`)."""
    from tqdm import tqdm

    from espnet_kd.distill.page import needed_targets
    from espnet_kd.experiments.models import find_experiment, load_model
    from espnet_kd.files import sha256_of
    from espnet_kd.inference.encode import ctc_tokens, measure_frame_shift
    from espnet_kd.inference.recognise import read_all_utterances, recognise
    from espnet_kd.targets import cache_writer as writer
    from espnet_kd.targets.cache import Manifest, Policy, hash_tokens
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
        writer.remove_cache_leftovers(output)
    mine = list(enumerate(shards))[job - 1 :: jobs]
    with tqdm(total=sum(len(u) for _, u in mine), unit="utt", desc=output.name) as bar:
        written = writer.write_shards(
            output, manifest, mine,
            lambda utterances: recognise(recogniser, utterances, args.batch_seconds, args.nj, progress=False)[0],
            bar.update,
        )  # fmt: skip
    logging.info("%s: %d of %d shards written, %d found whole", output, written, len(mine), len(mine) - written)
    if jobs > 1:
        logging.info("when all %d jobs are finished, run the same command without --job", jobs)
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
        UserError: ``job`` does not have this form.
    """
    first, _, last = job.partition("/")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise cli.UserError(f"--job {job}: give the part and the number of parts, such as 2/4")
