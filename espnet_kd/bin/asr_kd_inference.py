r"""Decode data dirs with the CTC heads of ESPnet experiments in batches, greedily or with a beam search.

    python -m espnet_kd.bin.asr_kd_inference --expdir exp/teacher exp/student_plain exp/student_kl/export \
        --data_dir dump/raw/test
    python -m espnet_kd.bin.asr_kd_inference --expdir exp/student_kl --data_dir dump/raw/test \
        --beam_size 10 --nbest 5 --ngram_file 4gram.bin --ngram_weight 0.5

Every experiment decodes every data dir into EXP/decode_<name of the data dir>; a decoding with EXP/export is written
there too. Each directory has 1best_recog/{text,token,token_int,score} in ESPnet's layout, 2best_recog and so
on up to --nbest, and decode.json. A finished decoding of the same model, data and search is kept; --force decodes
again. A new decoding removes the error rates of the earlier one. With --ctc_weight below 1 espnet2.bin.asr_inference
decodes, one utterance at a time, with the attention decoder in its search.
"""

from __future__ import annotations

import argparse
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.decode.decodings import BEAM_SIZE_TOKEN_HELP, check_search_options, decode_experiments


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_inference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--expdir",
        required=True,
        nargs="+",
        metavar="EXP[/FILE.pth]",
        help="experiments, exports or packed models (.zip) to decode with",
    )
    parser.add_argument("--data_dir", required=True, nargs="+", metavar="DIR", help="data dirs with wav.scp")
    parser.add_argument(
        "--output_dir", help="output directory for one experiment and one data dir; default: EXP/decode_<data dir>"
    )
    cli.add_batch_options(
        parser,
        nj="CPU: batches decoded at the same time; GPU: processes for the beam search; "
        "1 with --ctc_weight below 1",
        force="decode again even if it is done",
    )
    parser.add_argument("--beam_size", type=int, default=1, help="hypotheses kept per frame; 1: greedy")
    parser.add_argument("--nbest", type=int, default=1, help="largest number of hypotheses to write per utterance")
    parser.add_argument("--beam_size_token", type=int, default=20, help=BEAM_SIZE_TOKEN_HELP)
    parser.add_argument("--ngram_file", help="n-gram model over the model's tokens, ARPA or KenLM's binary format")
    parser.add_argument(
        "--ngram_weight", type=float, default=0.9,
        help="factor of the n-gram model's log10 probabilities, as in ESPnet",
    )
    parser.add_argument(
        "--ctc_weight", type=float, default=1.0, help="weight of CTC; below 1, the attention decoder has the rest"
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
    decode_experiments(args)


if __name__ == "__main__":
    cli.run(main)
