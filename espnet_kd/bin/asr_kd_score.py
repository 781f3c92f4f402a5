r"""Score recognised text: CER and WER with 95 % bootstrap intervals.

    python -m espnet_kd.bin.asr_kd_score --expdir exp/teacher exp/student_plain exp/student_kl/export \
        --data_dir dump/raw/test
    python -m espnet_kd.bin.asr_kd_score --hyp exp/student/decode_test/1best_recog/text \
        --ref dump/raw/test/text --output_dir exp/student/decode_test

The first form scores the decodings that asr_kd_inference has made with the same options. The command writes
score.json, score.txt (ESPnet's table) and per_utt.tsv (counts of every utterance) beside the hypotheses, or to
OUTPUT_DIR.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.decode.decodings import REFERENCE_IS_TEACHER, list_decodings
from espnet_kd.files import replacing


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expdir", nargs="+", metavar="EXP[/FILE.pth]", help="decoded experiments or exports")
    parser.add_argument("--data_dir", nargs="+", metavar="DIR", help="data dirs with text")
    reference = "for data dirs without text: use the output of this experiment as reference"
    parser.add_argument("--reference_exp", metavar="EXP[/FILE.pth]", help=reference)
    parser.add_argument("--hyp", help="recognised text, one line 'utt_id words…' per utterance")
    parser.add_argument("--ref", help="reference in the same form")
    parser.add_argument("--output_dir", help="with --hyp: where the results go, e.g. EXP/decode_test")
    parser.add_argument("--testset", help="with --hyp: name of the test set (default: the directory of --ref)")
    parser.add_argument("--resamples", type=int, default=2000, help="number of bootstrap samples, 1000 or more")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can correct.
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    cli.refuse_empty(args)
    many, one = (args.expdir, args.data_dir), (args.hyp, args.ref, args.output_dir)
    if not (all(many) and not any([*one, args.testset]) or all(one) and not any(many)):
        parser.error("give either --expdir and --data_dir, or --hyp, --ref and --output_dir")
    if args.resamples < 1000:
        raise cli.UserError(f"--resamples is {args.resamples}; an interval needs 1000 or more")
    if args.seed < 0:
        raise cli.UserError(f"--seed is {args.seed}; it must be 0 or more")
    if args.hyp:
        testset = args.testset or Path(args.ref).resolve().parent.name
        score(Path(args.hyp), Path(args.ref), Path(args.output_dir), testset, args.resamples, args.seed)
        return
    places = list_decodings(args.expdir, args.data_dir)
    references = {}
    if args.reference_exp:
        reference = list_decodings([args.reference_exp], args.data_dir)
        references = {data_dir: decoded for _, data_dir, decoded in reference if not (data_dir / "text").is_file()}
    for expdir, data_dir, decoded in places:  # check all before the first is scored
        if not (decoded / "1best_recog" / "text").is_file():
            raise cli.UserError(
                f"{decoded}/1best_recog/text is missing; decode first: asr_kd_inference --expdir {expdir}"
                f" --data_dir {data_dir}"
            )
    from tqdm import tqdm

    for _, data_dir, decoded in tqdm(places, desc="scoring", unit="set", disable=len(places) < 2):
        testset, text = decoded.name[len("decode_") :], data_dir / "text"
        if data_dir in references:
            testset, text = f"{testset}{REFERENCE_IS_TEACHER}", references[data_dir] / "1best_recog" / "text"
        score(decoded / "1best_recog" / "text", text, decoded, testset, args.resamples, args.seed)


def score(hyp: Path, ref: Path, output_dir: Path, testset: str, resamples: int, seed: int) -> None:
    """Score one text against its reference and write the three files.

    Raises:
        UserError: the texts cannot be read, or do not have the same utterances.
    """
    # Imported here, so that --help and mistakes in the command line do not wait for the import.
    from espnet_kd.decode.score import COUNTS, count_errors, format_table, pair_texts, summarise

    pairs = pair_texts(hyp, ref)
    counts = {"cer": count_errors(pairs, "char"), "wer": count_errors(pairs, "word")}
    summaries = {k: summarise(v, resamples=resamples, seed=seed) for k, v in counts.items()}

    with replacing(output_dir / "per_utt.tsv") as f:
        f.write("\t".join(["utt_id", *(f"{k}_{c}" for k in counts for c in COUNTS)]) + "\n")
        for i, utt_id in enumerate(pairs):
            f.write("\t".join([utt_id, *(str(n) for c in counts.values() for n in c.table[i])]) + "\n")
    table = format_table(testset, len(pairs), [("WER", summaries["wer"]), ("CER", summaries["cer"])])
    with replacing(output_dir / "score.txt") as f:
        f.write(table)
    with replacing(output_dir / "score.json") as f:
        json.dump({"testset": testset, **summaries, "utterances": len(pairs)}, f, indent=2)
        f.write("\n")
    rates = {k: "–" if s["err"] is None else f"{s['err']:.2f} %" for k, s in summaries.items()}
    logging.info("%s: CER %s, WER %s over %d utterances", output_dir, rates["cer"], rates["wer"], len(pairs))


if __name__ == "__main__":
    cli.run(main)
