"""The N-best of a teacher for data dirs, with a record of its inputs."""

from __future__ import annotations

import argparse
import datetime
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Mapping

from espnet_kd import cli
from espnet_kd.data.tokenizing import BPE_MODEL, CLEANER, NLSYMS, UNKNOWN, TokenList
from espnet_kd.decode.decodings import audio_has_changed, describe_inputs, hash_audio, with_times
from espnet_kd.experiments.record import Record
from espnet_kd.files import check_writable, replacing, sha256_of
from espnet_kd.targets.nbest import Hypotheses

if TYPE_CHECKING:
    from espnet_kd.decode.beam_recognise import NbestRecogniser


def make_nbest(args: argparse.Namespace) -> None:
    """Write the N-best of a teacher, as the options of ``asr_kd_nbest`` describe.

    Raises:
        UserError: whatever the user can correct in the options, the teacher or the data.
    """
    output = Path(args.output)
    if output.is_dir():
        raise cli.UserError(f"--output {output} is a directory; give a file, e.g. {output / 'nbest'}")
    if bool(args.token_list) != bool(args.token_type):
        raise cli.UserError("--token_list and --token_type go together: a token list, and how a text is split for it")
    tokens = TokenList(args.token_list, args.token_type) if args.token_list else None
    if tokens is not None:
        tokens.check_ids()
    search = {"nbest": args.nbest, "beam_size": args.beam_size, "beam_size_token": args.beam_size_token}
    inputs = {**search, "data": [describe_inputs(Path(args.teacher), Path(d)) for d in args.data_dir]}
    if tokens is not None:
        inputs["tokens"] = {"type": args.token_type, "files": hashes_of_list(Path(args.token_list))}
    record, log_prior = Record(Path(f"{output}.json"), key="inputs"), Path(f"{output}.log_prior.npy")
    there = output.is_file() and (tokens or log_prior.is_file()) and record.is_of(inputs)
    if there and not args.force and not audio_has_changed(record.path, args.data_dir):
        logging.info("%s is done already with this teacher, data and search (--force makes it again)", output)
        return

    check_writable(output.parent)
    # Imported here, so that --help, mistakes in the command line and finished files do not wait for the import.
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
    log_prior.unlink(missing_ok=True)
    if tokens is None:
        write_nbest(output, found, recogniser.token_list)
        with replacing(log_prior, "wb") as f:
            np.save(f, recogniser.log_prior())
    else:
        found = _in_tokens(found, recogniser, tokens, args)
        write_nbest(output, found, tokens.tokens)
    facts = {
        "teacher": str(model_file),
        "data_dirs": args.data_dir,
        "utterances": len(found),
        "hypotheses": sum(map(len, found.values())),
        "audio_seconds": round(timing.audio_seconds, 3),
        "decode_seconds": round(timing.decode_seconds, 4),
        "read_seconds": round(timing.read_seconds, 4),
        "audio_sha256": hash_audio(with_times(u.path for u in utterances)),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    record.finish(inputs, **facts)
    logging.info(
        "%d hypotheses of %d utterances → %s, in %.0f s for %.0f s of audio",
        facts["hypotheses"], len(found), output, timing.decode_seconds + timing.read_seconds, timing.audio_seconds,
    )  # fmt: skip


def hashes_of_list(token_list: Path) -> Dict[str, str]:
    """The sha256 of a token list and of the files beside it that decide how a text is split."""
    files = (token_list, *(token_list.parent / name for name in (BPE_MODEL, NLSYMS, CLEANER)))
    return {path.name: sha256_of(path) for path in files if path.is_file()}


def _in_tokens(
    found: Mapping[str, Hypotheses], recogniser: NbestRecogniser, tokens: TokenList, args: argparse.Namespace
) -> Dict[str, Hypotheses]:
    """Convert N-best to the student's tokens, and log how many hypotheses changed."""
    from espnet_kd.targets.nbest import retokenise

    if recogniser.token_list == tokens.tokens:
        return dict(found)
    names = recogniser.token_list
    done = retokenise(
        found,
        lambda ids: recogniser.to_text([names[i] for i in ids if names[i] != UNKNOWN]),
        tokens.ids,
        tokens.tokens.index(UNKNOWN),
    )
    logging.info(
        "the teacher has %d tokens, the student %d others (%s, %s): hypotheses were written in the student's tokens "
        "by their text; %d had the tokens of another one and were added to it, %d have a piece that is no token (%s)",
        len(names), len(tokens.tokens), args.token_list, args.token_type, done.merged, done.unknown, UNKNOWN,
    )  # fmt: skip
    return done.nbest
