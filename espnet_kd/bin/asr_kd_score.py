"""Score recognised text: CER and WER with their 95 % bootstrap intervals.

    python -m espnet_kd.bin.asr_kd_score --hyp exp/student/decode_test/1best_recog/text \
        --ref dump/raw/test/text --output_dir exp/student/decode_test

Writes score.json, score.txt (ESPnet's table) and per_utt.tsv (counts of every utterance) to OUTPUT_DIR.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.files import replacing


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hyp", required=True, help="recognised text, 'utt_id words…' a line")
    parser.add_argument("--ref", required=True, help="reference in the same form")
    parser.add_argument("--output_dir", required=True, help="where the results go, e.g. EXP/decode_test")
    parser.add_argument("--testset", help="name of the test set (default: the directory of --ref)")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap draws, 1000 or more")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can mend.
    """
    args = get_parser().parse_args(argv)
    if args.resamples < 1000:
        raise cli.UserError(f"--resamples is {args.resamples}; an interval needs 1000 or more")
    if args.seed < 0:
        raise cli.UserError(f"--seed is {args.seed}; it must be 0 or more")
    # Imported here: --help and mistakes in the command line are answered at once.
    from espnet_kd.decode.score import COUNTS, count_errors, format_table, pair_texts, summarise

    testset = args.testset or Path(args.ref).resolve().parent.name
    pairs = pair_texts(args.hyp, args.ref)
    counts = {"cer": count_errors(pairs, "char"), "wer": count_errors(pairs, "word")}
    summaries = {k: summarise(v, resamples=args.resamples, seed=args.seed) for k, v in counts.items()}

    output_dir = Path(args.output_dir)
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
    logging.info("%s: CER %s, WER %s over %d utterances", testset, rates["cer"], rates["wer"], len(pairs))


if __name__ == "__main__":
    cli.run(main)
