"""The N-best of a teacher for data dirs, with a record of its inputs."""

from __future__ import annotations

import argparse
import datetime
import logging
from pathlib import Path

from espnet_kd import cli
from espnet_kd.decode.decodings import describe_inputs
from espnet_kd.experiments.record import Record
from espnet_kd.files import check_writable, replacing


def make_nbest(args: argparse.Namespace) -> None:
    """Write the N-best of a teacher, as the options of ``asr_kd_nbest`` describe.

    Raises:
        UserError: whatever the user can correct in the options, the teacher or the data.
    """
    output = Path(args.output)
    if output.is_dir():
        raise cli.UserError(f"--output {output} is a directory; give a file, e.g. {output / 'nbest'}")
    search = {"nbest": args.nbest, "beam_size": args.beam_size, "beam_size_token": args.beam_size_token}
    inputs = {**search, "data": [describe_inputs(Path(args.teacher), Path(d)) for d in args.data_dir]}
    record, log_prior = Record(Path(f"{output}.json"), key="inputs"), Path(f"{output}.log_prior.npy")
    if not args.force and output.is_file() and log_prior.is_file() and record.is_of(inputs):
        logging.info("%s is done already with this teacher, data and search (--force makes it again)", output)
        return

    check_writable(output.parent)
    # Imported here: --help, mistakes in the command line and finished files are answered at once.
    import numpy as np

    from espnet_kd.decode.beam_recognise import NbestRecogniser
    from espnet_kd.experiments.models import find_experiment, load_model
    from espnet_kd.inference.recognise import choose_device, read_all_utterances, recognise
    from espnet_kd.targets.nbest import write_nbest

    device = choose_device(args)
    config, model_file = find_experiment(args.teacher)
    model, train_args = load_model(config, model_file, device)
    recogniser = NbestRecogniser(model, train_args, config.parent, search_jobs=args.search_jobs, **search)
    utterances = read_all_utterances(args.data_dir, recogniser.rate)
    found, timing = recognise(recogniser, utterances, args.batch_seconds, args.nj)

    record.begin()
    write_nbest(output, found, recogniser.token_list)
    with replacing(log_prior, "wb") as f:
        np.save(f, recogniser.log_prior())
    facts = {
        "teacher": str(model_file),
        "data_dirs": args.data_dir,
        "utterances": len(found),
        "hypotheses": sum(map(len, found.values())),
        "audio_seconds": round(timing.audio_seconds, 3),
        "decode_seconds": round(timing.decode_seconds, 4),
        "read_seconds": round(timing.read_seconds, 4),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    record.finish(inputs, **facts)
    logging.info(
        "%d hypotheses of %d utterances → %s, in %.0f s for %.0f s of audio",
        facts["hypotheses"], len(found), output, timing.decode_seconds + timing.read_seconds, timing.audio_seconds,
    )  # fmt: skip
