r"""Write the N-best of a teacher for data dirs, the targets of sequence-level distillation.

    python -m espnet_kd.bin.asr_kd_nbest --teacher exp/teacher --data_dir dump/raw/train dump/raw/valid \
        --output exp/teacher/nbest --nbest 5 --beam_size 20

FILE gets a line 'utt_id rank score tokens…' for each hypothesis (see espnet_kd.targets.nbest), found by CTC prefix
beam search without lexicon or language model; FILE.json says how it was made, FILE.log_prior.npy holds the log of the
tokens' mean posterior (V,), for pages with `frames: {rule: elimination, log_prior: FILE.log_prior.npy}`. Only
wav.scp is read, no text. A finished file of the same teacher, data and search is kept; --force makes it again.

A student with another token list than the teacher's learns from the text: with --token_list TOKENS.txt --token_type bpe
(and bpe.model beside it, as stage 3 of run.sh leaves them) each hypothesis is written in the tokens of that list.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Mapping, Optional, Sequence

from espnet_kd import cli
from espnet_kd.bin.asr_kd_inference import BEAM_SIZE_TOKEN_HELP, check_options, describe_inputs
from espnet_kd.data.tokenizing import BPE_MODEL, CLEANER, NLSYMS, UNKNOWN, TokenList
from espnet_kd.files import check_writable, replacing, sha256_of

if TYPE_CHECKING:
    from espnet_kd.decode.beam_recognise import NbestRecogniser


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_nbest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="EXP[/FILE.pth]", help="experiment, export or packed .zip")
    parser.add_argument(
        "--data_dir", required=True, nargs="+", action="extend", metavar="DIR", help="data dirs with wav.scp, several"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="e.g. exp/teacher/nbest")
    parser.add_argument("--nbest", type=int, default=5, help="hypotheses of an utterance, at most")
    parser.add_argument("--beam_size", type=int, default=20, help="hypotheses kept per frame; 4 × --nbest misses few")
    parser.add_argument("--beam_size_token", type=int, default=20, help=BEAM_SIZE_TOKEN_HELP)
    parser.add_argument("--token_list", metavar="FILE", help="write them in these tokens, the student's, by their text")
    parser.add_argument("--token_type", choices=("char", "word", "bpe"), help="how --token_list cuts a text")
    parser.add_argument("--ngpu", type=int, default=0, choices=(0, 1), help="0: CPU, 1: GPU (the search is on the CPU)")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="audio in a batch, padding included")
    parser.add_argument("--nj", type=int, default=1, help="batches at the same time; on a GPU processes that search")
    parser.add_argument("--force", action="store_true", help="search again even if it is done")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can mend.
    """
    args = get_parser().parse_args(argv)
    cli.refuse_empty(args)
    check_options(args)
    output = Path(args.output)
    if output.is_dir():
        raise cli.UserError(f"--output {output} is a directory; give a file, e.g. {output / 'nbest'}")
    if bool(args.token_list) != bool(args.token_type):
        raise cli.UserError("--token_list and --token_type go together: a token list, and how it cuts a text")
    tokens = TokenList(args.token_list, args.token_type) if args.token_list else None
    search = {"nbest": args.nbest, "beam_size": args.beam_size, "beam_size_token": args.beam_size_token}
    inputs = {**search, "data": [describe_inputs(Path(args.teacher), Path(d)) for d in args.data_dir]}
    if tokens is not None:
        inputs["tokens"] = {"type": args.token_type, "files": hashes_of_list(Path(args.token_list))}
    sidecar, log_prior = Path(f"{output}.json"), Path(f"{output}.log_prior.npy")
    if not args.force and output.is_file() and (tokens or log_prior.is_file()) and _read_inputs(sidecar) == inputs:
        logging.info("%s is done already with this teacher, data and search (--force makes it again)", output)
        return

    check_writable(output.parent)
    # Imported here: --help, mistakes in the command line and finished files are answered at once.
    import numpy as np

    from espnet_kd.decode.beam_recognise import NbestRecogniser
    from espnet_kd.decode.recognise import choose_device, recognise
    from espnet_kd.targets.experiment import find_experiment, load_model
    from espnet_kd.targets.nbest import write_nbest

    device = choose_device(args)
    config, model_file = find_experiment(args.teacher)
    model, train_args = load_model(config, model_file, device)
    recogniser = NbestRecogniser(model, train_args, config.parent, search_jobs=args.search_jobs, **search)
    utterances = read_all_utterances(args.data_dir, recogniser.rate)
    found, timing = recognise(recogniser, utterances, args.batch_seconds, args.nj)

    # The sidecar vouches for the file: it goes before that is replaced, and comes back last.
    sidecar.unlink(missing_ok=True)
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
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "inputs": inputs,
    }
    with replacing(sidecar) as f:
        json.dump(facts, f, indent=2)
        f.write("\n")
    logging.info(
        "%d hypotheses of %d utterances → %s, in %.0f s for %.0f s of audio",
        facts["hypotheses"], len(found), output, timing.decode_seconds + timing.read_seconds, timing.audio_seconds,
    )  # fmt: skip


def hashes_of_list(token_list: Path) -> Dict[str, str]:
    """The sha256 of a token list and of what lies beside it and decides how a text is cut."""
    files = (token_list, *(token_list.parent / name for name in (BPE_MODEL, NLSYMS, CLEANER)))
    return {path.name: sha256_of(path) for path in files if path.is_file()}


def _in_tokens(found: Mapping, recogniser: NbestRecogniser, tokens: TokenList, args: argparse.Namespace) -> Dict:
    """N-best in the student's tokens; the log says what was done."""
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
        "the teacher has %d tokens, the student %d others (%s, %s): its hypotheses were written in the student's by "
        "their text; %d had the text of a better one and were added to it, %d have a piece that is no token (%s)",
        len(names), len(tokens.tokens), args.token_list, args.token_type, done.merged, done.unknown, UNKNOWN,
    )  # fmt: skip
    return done.nbest


def read_all_utterances(data_dirs: Sequence[str], rate: Optional[int]) -> List:
    """List the utterances of several data dirs as one (see `espnet_kd.decode.recognise.read_utterances`).

    Raises:
        UserError: an utterance stands in two of them, or what `read_utterances` refuses.
    """
    from espnet_kd.decode.recognise import read_utterances

    utterances: List = []
    home: Dict[str, str] = {}
    for data_dir in data_dirs:
        for utterance in read_utterances(data_dir, rate):
            if utterance.utt_id in home:
                other = home[utterance.utt_id]
                raise cli.UserError(
                    f"{data_dir}/wav.scp: {utterance.utt_id} stands in {other}/wav.scp too; leave one data dir out"
                )
            home[utterance.utt_id] = data_dir
            utterances.append(utterance)
    return utterances


def _read_inputs(sidecar: Path) -> Optional[Dict]:
    """What a finished file was made from; None where nothing vouches for it."""
    try:
        return json.loads(sidecar.read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    cli.run(main)
