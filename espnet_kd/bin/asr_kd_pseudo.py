"""Make a training set from audio and automatic transcripts, without transcripts that are probably wrong.

    python -m espnet_kd.bin.asr_kd_pseudo --data_dir dump/raw/extra --labels whisper.jsonl --out dump/raw/pseudo \\
        --token_list data/token_list/char/tokens.txt --ctc_teacher exp/teacher --max_distance 0.3
    python -m espnet_kd.bin.asr_kd_pseudo --data_dir dump/raw/extra --teacher exp/teacher --out dump/raw/pseudo

--labels is the output of any recogniser: a Kaldi-style text, or JSON, one object a line with utt_id, text and
optionally confidence. --teacher makes the transcripts here. Each transcript is rewritten by the rules of --rewrite
(digits to words), brought to the token list's characters (case, apostrophes, punctuation), and left out if it is empty,
has other characters, repeats a phrase, is too long or too short for its audio, or is far from a CTC teacher's output.
OUT becomes a data dir with the rest; OUT/nbest has its text in the tokens of --token_list, for sequence-level KD, and
OUT/pseudo.tsv has the reason for each utterance.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from espnet_kd import cli
from espnet_kd.files import check_writable, replacing


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="asr_kd_pseudo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="formatted data dir; a text in it is not read")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--labels", metavar="FILE", help="transcripts of a recogniser")
    source.add_argument("--teacher", metavar="EXP[/FILE.pth]", help="the experiment that makes the transcripts")
    parser.add_argument("--out", required=True, help="data dir to make")
    parser.add_argument("--token_list", help="the student's tokens.txt, of whose characters transcripts must consist")
    parser.add_argument("--token_type", choices=("char", "bpe"), default="char", help="of --token_list")
    parser.add_argument("--rewrite", metavar="FILE", help="first rewrite them by these rules, a regular expression, a "
                        "tab and what comes in its place in each line, such as for digits")  # fmt: skip
    parser.add_argument("--ctc_teacher", metavar="EXP[/FILE.pth]", help="its greedy output is compared with them")
    limits = parser.add_argument_group("limits; a negative number switches one off, except --min_confidence")
    limits.add_argument(
        "--min_confidence", type=float,
        help="lowest confidence, of --labels that have it, in the units of their recogniser; no default",
    )
    limits.add_argument(
        "--max_repeats", type=int, default=3,
        help="largest number of times that a phrase may be repeated in a row (3)",
    )
    limits.add_argument("--min_rate", type=float, default=1.0, help="fewest characters per second (1)")
    limits.add_argument("--max_rate", type=float, default=35.0, help="most characters per second (35)")
    limits.add_argument(
        "--max_distance", type=float, default=0.3,
        help="largest edit distance to the output of --ctc_teacher, as a share (0.3)",
    )
    parser.add_argument("--ngpu", type=int, default=0, choices=(0, 1), help="0: CPU, 1: GPU")
    parser.add_argument("--nj", type=int, default=1, help="batches decoded at the same time")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Filter (see the module's docstring)."""
    args = get_parser().parse_args(cmd)
    cli.refuse_empty(args)
    from espnet_kd.data.datadir import Utterance, read_data_dir, refuse_same, write_data_dir
    from espnet_kd.data.pseudo import Label, Limits, count_reasons, judge, missing, read_labels
    from espnet_kd.data.text_fit import read_rules, rewrite
    from espnet_kd.data.tokenizing import TokenList
    from espnet_kd.inference.recognise import read_utterances
    from espnet_kd.targets.nbest import Hypotheses, write_nbest

    refuse_same([args.data_dir], args.out, "--out")
    check_writable(args.out)  # before teachers decode the data, which may take hours
    tokens = TokenList(args.token_list, args.token_type) if args.token_list else None
    if tokens is not None:
        tokens.check_ids()
    characters = tokens.characters() if tokens else ()
    if any(len(c) > 1 and not c.startswith("<") for c in characters):
        raise cli.UserError(
            f"--token_list: {args.token_list} has tokens of several characters; give one of characters, or "
            "--token_type bpe"
        )
    rules = read_rules(args.rewrite) if args.rewrite else ()
    labels = read_labels(args.labels) if args.labels else {}
    utterances = list(read_data_dir(args.data_dir, read_text=False))
    lengths = {u.utt_id: u.samples / u.rate for u in read_utterances(args.data_dir)}
    if args.teacher:
        labels = {u: Label(text) for u, text in _texts(args.teacher, args)[0].items()}
    labels = {u: label._replace(text=rewrite(label.text, rules)) for u, label in labels.items()}
    lost = missing(labels, lengths)
    if len(lost) == len(lengths):
        raise cli.UserError(f"--labels: {args.labels} has none of the utterances of {args.data_dir}, such as {lost[0]}")
    others, theirs = _texts(args.ctc_teacher, args) if args.ctc_teacher else ({}, [])
    given = ("max_repeats", "min_rate", "max_rate", "max_distance")
    limits = Limits(args.min_confidence, *(v if (v := getattr(args, name)) >= 0 else None for name in given))
    verdicts = {
        u: judge(labels[u], seconds, limits, characters, others.get(u), theirs)
        for u, seconds in lengths.items()
        if u in labels
    }
    kept = [u for u in utterances if u.utt_id in verdicts and verdicts[u.utt_id].kept]
    if not kept:
        raise cli.UserError(
            f"none of {len(verdicts)} transcripts is kept: {count_reasons(verdicts)}; are the limits too narrow?"
        )
    out = Path(args.out)
    (out / "nbest").unlink(missing_ok=True)  # of an earlier run, with other transcripts
    write_data_dir(
        out, (Utterance(u.utt_id, u.speaker, u.audio, verdicts[u.utt_id].text, u.num_samples) for u in kept)
    )
    if tokens:
        found: Dict[str, Hypotheses] = {u.utt_id: [(0.0, tokens.ids(verdicts[u.utt_id].text))] for u in kept}
        write_nbest(out / "nbest", found, tokens.tokens)
    with replacing(out / "pseudo.tsv") as f:
        table = csv.writer(f, delimiter="\t", lineterminator="\n")
        table.writerow(["utt_id", "kept", "reason", "seconds", "confidence", "distance", "text"])
        for utt_id, verdict in verdicts.items():
            shown = ["" if x is None else f"{x:.3f}" for x in (labels[utt_id].confidence, verdict.distance)]
            table.writerow([utt_id, int(verdict.kept), verdict.reason, f"{lengths[utt_id]:.2f}", *shown, verdict.text])
    reasons = {**count_reasons(verdicts), **({"no transcript": len(lost)} if lost else {})}
    with replacing(out / "pseudo.json") as f:
        json.dump({"utterances": len(lengths), "kept": len(kept), "left_out": reasons}, f, indent=1)
    hours = sum(lengths[u.utt_id] for u in kept) / 3600
    logging.info(
        "%s: %d of %d utterances kept (%.1f %%, %.2f h); left out: %s", out, len(kept), len(lengths),
        100 * len(kept) / len(lengths), hours, ", ".join(f"{n} {r}" for r, n in reasons.items()) or "none",
    )  # fmt: skip


def _texts(experiment: str, args: argparse.Namespace) -> Tuple[Dict[str, str], List[str]]:
    """Greedy transcripts of the data dir by an experiment, and the characters that its tokens consist of."""
    import espnet_kd.offline  # noqa: F401, I001  (before espnet2)
    from espnet_kd.data.tokenizing import characters_of
    from espnet_kd.inference.recognise import Recogniser, choose_device, read_utterances, recognise
    from espnet_kd.experiments.models import find_experiment, load_model

    config, model_file = find_experiment(experiment)
    device = choose_device(args)
    model, options = load_model(config, model_file, device)
    recogniser = Recogniser(model, options, config.parent)
    found, _ = recognise(recogniser, read_utterances(args.data_dir, recogniser.rate), nj=args.nj)
    texts = {u: hypotheses[0].text for u, hypotheses in found.items()}
    return texts, characters_of(recogniser.token_list)


if __name__ == "__main__":
    cli.run(main)
