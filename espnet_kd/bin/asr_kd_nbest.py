r"""Write the N-best of a teacher for data dirs, the targets of sequence-level distillation.

    python -m espnet_kd.bin.asr_kd_nbest --teacher exp/teacher --data_dir dump/raw/train dump/raw/valid \
        --output exp/teacher/nbest --nbest 5 --beam_size 20

FILE has a line 'utt_id rank score tokens…' for each hypothesis (see espnet_kd.targets.nbest), found by a CTC prefix
beam search without lexicon or language model. FILE.json describes how it was made; FILE.log_prior.npy has the log of
the tokens' mean posterior (V,), for pages with `frames: {rule: elimination, log_prior: FILE.log_prior.npy}`. Only
wav.scp is read, no text. A finished file of the same teacher, data and search is kept; --force makes it again.

A student with another token list than the teacher's learns from the text: with --token_list TOKENS.txt --token_type bpe
(and bpe.model beside it, as stage 3 of run.sh leaves them) each hypothesis is written in the tokens of that list.
"""

from __future__ import annotations

import argparse
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.decode.decodings import BEAM_SIZE_TOKEN_HELP, check_search_options
from espnet_kd.decode.nbest_list import make_nbest


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_nbest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="EXP[/FILE.pth]", help="experiment, export or packed .zip")
    parser.add_argument(
        "--data_dir",
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="one or more data dirs with wav.scp",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="e.g. exp/teacher/nbest")
    parser.add_argument("--nbest", type=int, default=5, help="largest number of hypotheses per utterance")
    parser.add_argument("--beam_size", type=int, default=20, help="hypotheses kept per frame; 4 × --nbest loses few")
    parser.add_argument("--beam_size_token", type=int, default=20, help=BEAM_SIZE_TOKEN_HELP)
    parser.add_argument("--token_list", metavar="FILE", help="the student's token list, if it is not the teacher's")
    parser.add_argument("--token_type", choices=("char", "word", "bpe"), help="how a text is split for --token_list")
    cli.add_batch_options(
        parser,
        nj="CPU: batches decoded at the same time; GPU: processes for the beam search",
        force="search again even if it is done",
        ngpu=" (the search is on the CPU)",
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can correct.
    """
    args = get_parser().parse_args(argv)
    cli.refuse_empty(args)
    check_search_options(args)
    make_nbest(args)


if __name__ == "__main__":
    cli.run(main)
