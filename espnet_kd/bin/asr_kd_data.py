"""Prepare data: corpora to data dirs, formatting, token lists, checks (stages 1 to 4 of run.sh).

python -m espnet_kd.bin.asr_kd_data mini --out data --nj 2
python -m espnet_kd.bin.asr_kd_data an4 --out data --an4 /corpora/an4
python -m espnet_kd.bin.asr_kd_data librispeech --out data --librispeech /corpora/LibriSpeech --nj 8
python -m espnet_kd.bin.asr_kd_data aishell --out data --aishell /corpora/data_aishell --nj 8
python -m espnet_kd.bin.asr_kd_data tedlium2 --out data --tedlium2 /corpora/TEDLIUM_release2 --nj 8
python -m espnet_kd.bin.asr_kd_data audio --out data --audio /recordings
python -m espnet_kd.bin.asr_kd_data espnet --espnet_data /espnet/egs2/an4/asr1 --sets train_nodev train_dev test
python -m espnet_kd.bin.asr_kd_data format --src data/train --dst dump/raw/train_sp --speed_factors 0.9 1.0 1.1
python -m espnet_kd.bin.asr_kd_data combine --transcribed dump/raw/a --untranscribed dump/raw/b --dst dump/raw/ab
python -m espnet_kd.bin.asr_kd_data tokens --text dump/raw/train/text --out data/token_list/char
python -m espnet_kd.bin.asr_kd_data fit_text dump/raw/train --token_list data/token_list/teacher_x/tokens.txt
python -m espnet_kd.bin.asr_kd_data validate data/train data/valid --token_list data/token_list/char/tokens.txt
python -m espnet_kd.bin.asr_kd_data lengths --model 'student=--config conf/train_student.yaml' --stats … (--help)
python -m espnet_kd.bin.asr_kd_data ngram --text dump/raw/train/text --token_list … --out exp/4gram.arpa
python -m espnet_kd.bin.asr_kd_data statistics exp/stats_train_char/train/feats_stats.npz
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Callable, Optional, Sequence

from espnet_kd.cli import UserError, refuse_empty, run


def _add_an4(sub: argparse.ArgumentParser) -> None:
    from espnet_kd.data.an4 import MIRROR

    sub.add_argument("--out", default="data", help="directory that gets train/, valid/, test/")
    sub.add_argument("--an4", help="the corpus, in any of its forms; without it the original is downloaded")
    sub.add_argument("--downloads", default="downloads", help="directory for the download")
    sub.add_argument("--mirror", default=MIRROR, help="URL of the directory with an4_sphere.tar.gz")
    sub.add_argument("--raw_endian", choices=("auto", "big", "little"), default="auto", help="byte order of .raw files")
    sub.add_argument("--valid_speakers", type=int, default=8, help="number of training speakers for valid/")
    sub.add_argument("--seed", type=int, default=0, help="seed for the choice of these speakers")


def _an4(args: argparse.Namespace) -> None:
    from espnet_kd.data.an4 import prepare_an4
    from espnet_kd.data.datadir import os_errors_as_user_errors

    with os_errors_as_user_errors(args.out):
        prepare_an4(args.out, args.an4, downloads=args.downloads, mirror=args.mirror, raw_endian=args.raw_endian,
                    valid_speakers=args.valid_speakers, seed=args.seed)  # fmt: skip


def _add_corpus(sub: argparse.ArgumentParser, gets: str) -> None:
    """Options of every corpus that is read in parallel."""
    sub.add_argument("--out", default="data", help=f"directory that gets {gets}")
    sub.add_argument("--skip_faulty", action="store_true",
                     help="leave out faulty utterances, and list them, instead of stopping")  # fmt: skip
    sub.add_argument("--nj", type=int, default=1, help="processes that read the audio files")


def _add_librispeech(sub: argparse.ArgumentParser) -> None:
    from espnet_kd.data.librispeech import MIRROR, TEST, TRAIN, VALID

    _add_corpus(sub, "train/, valid/, and test_clean/ for test-clean and so on")
    sub.add_argument("--librispeech", help="directory with the parts; without it those needed are downloaded")
    sub.add_argument("--downloads", default="downloads", help="where a download goes")
    sub.add_argument("--mirror", default=MIRROR, help="URL to download from, e.g. https://us.openslr.org/resources")
    sub.add_argument("--remove_archives", action="store_true", help="remove a downloaded archive once it is unpacked")
    for name, default in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        sub.add_argument(f"--{name}_parts", nargs="+", metavar="PART", help=f"parts, also several in one word; \"\": "
                         f"none; not given: {default} (none with --split_by_speaker)")  # fmt: skip
    sub.add_argument("--split_by_speaker", nargs="+", metavar="PART", default=[],
                     help="parts whose speakers are divided among train/, valid/, test/ (train-clean-5)")  # fmt: skip
    sub.add_argument("--speakers_valid", type=int, default=0, help="number of these speakers for valid/")
    sub.add_argument("--speakers_test", type=int, default=0, help="number of these speakers for test/")
    sub.add_argument("--seed", type=int, default=0, help="seed for the choice of these speakers")


def _librispeech(args: argparse.Namespace) -> None:
    from espnet_kd.data.librispeech import prepare_librispeech

    prepare_librispeech(args.out, args.librispeech, train_parts=args.train_parts, valid_parts=args.valid_parts,
                        test_parts=args.test_parts, split_by_speaker=args.split_by_speaker,
                        speakers_valid=args.speakers_valid, speakers_test=args.speakers_test, seed=args.seed,
                        downloads=args.downloads, mirror=args.mirror, remove_archives=args.remove_archives,
                        skip_faulty=args.skip_faulty, nj=args.nj)  # fmt: skip


def _add_aishell(sub: argparse.ArgumentParser) -> None:
    _add_corpus(sub, "train/, valid/, test/")
    sub.add_argument("--aishell", required=True, help="data_aishell: the directory with transcript/ and wav/")
    sub.add_argument("--unpacked", default="downloads/aishell_wav", help="directory to unpack wav/S????.tar.gz to")


def _aishell(args: argparse.Namespace) -> None:
    from espnet_kd.data.aishell import prepare_aishell

    prepare_aishell(args.out, args.aishell, unpacked=args.unpacked, skip_faulty=args.skip_faulty, nj=args.nj)


def _add_tedlium2(sub: argparse.ArgumentParser) -> None:
    _add_corpus(sub, "train/, valid/, test/")
    sub.add_argument("--tedlium2", required=True, help="TEDLIUM_release2: the directory with train/, dev/, test/")
    sub.add_argument("--drop_fillers", action="store_true", help="take [NOISE] and <unk> out of the text")
    sub.add_argument("--padding", type=float, nargs=2, default=[0.0, 0.0], metavar=("BEFORE", "AFTER"),
                     help="seconds added to training segments; ESPnet's recipe has 0.15 0.1")  # fmt: skip


def _tedlium2(args: argparse.Namespace) -> None:
    from espnet_kd.data.tedlium2 import prepare_tedlium2

    prepare_tedlium2(args.out, args.tedlium2, drop_fillers=args.drop_fillers, padding=args.padding,
                     skip_faulty=args.skip_faulty, nj=args.nj)  # fmt: skip


def _add_espnet(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--espnet_data", required=True, metavar="DIR",
                     help="an ESPnet recipe's directory; commands (… |) in its wav.scp are run")  # fmt: skip
    sub.add_argument("--sets", required=True, nargs="+", metavar="NAME", help="its data dirs, e.g. train_nodev")
    sub.add_argument("--out", default="data", help="directory for the data dirs")
    sub.add_argument("--nj", type=int, default=1, help="processes that convert arks and commands to files")


def _espnet(args: argparse.Namespace) -> None:
    from espnet_kd.data.espnet_dump import take_espnet_data

    take_espnet_data(args.espnet_data, args.sets, args.out, nj=args.nj)


def _add_audio(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--audio", required=True, help="directory with audio files (wav, flac, mp3, ogg, opus, sph, aiff) "
                     "at any depth; no transcripts")  # fmt: skip
    sub.add_argument("--out", default="data", help="directory that gets train/, valid/, test/")
    sub.add_argument("--valid", type=int, default=100, help="files for validation, at most a tenth of all")
    sub.add_argument("--test", type=int, default=100, help="files for testing, at most a tenth of all")
    sub.add_argument("--longest", type=float, default=15.0, help="seconds; a longer file is cut into equal parts")


def _audio(args: argparse.Namespace) -> None:
    from espnet_kd.data.audio_folder import prepare_audio_folder

    prepare_audio_folder(args.out, args.audio, valid=args.valid, test=args.test, longest=args.longest)


def _add_mini(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", default="data", help="directory that gets train/, valid/, test/, wav/, mini.json")
    sub.add_argument("--nj", type=int, default=1, help="processes; the bytes do not depend on it")
    sub.add_argument("--seed", type=int, default=0, help="seed of all that is drawn at random")
    sub.add_argument("--language", choices=("en", "cmn"), default="en", help="cmn: Mandarin, characters as tokens")
    sub.add_argument("--train", type=int, default=2400, help="number of utterances")
    sub.add_argument("--valid", type=int, default=100, help="number of utterances, of voices that are not in train")
    sub.add_argument("--test", type=int, default=250, help="number of utterances, of voices not in train and valid")
    sub.add_argument("--snr_low", type=float, default=20.0, help="lowest signal-to-noise ratio, dB")
    sub.add_argument("--snr_high", type=float, default=40.0, help="highest signal-to-noise ratio, dB")
    sub.add_argument("--reverb_ratio", type=float, default=0.1, help="share of utterances with reverberation, 0 to 1")


def _mini(args: argparse.Namespace) -> None:
    from espnet_kd.data.datadir import os_errors_as_user_errors
    from espnet_kd.data.mini import prepare_mini

    with os_errors_as_user_errors(args.out):
        prepare_mini(args.out, sizes={"train": args.train, "valid": args.valid, "test": args.test}, nj=args.nj,
                     seed=args.seed, language=args.language, snr_low=args.snr_low, snr_high=args.snr_high,
                     reverb_ratio=args.reverb_ratio)  # fmt: skip


def _add_format(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--src", required=True, nargs="+", help="data dirs to read; several become one")
    sub.add_argument("--dst", required=True, help="directory to make, e.g. dump/raw/train")
    sub.add_argument("--text", choices=("required", "optional", "none"), default="required",
                     help="optional: use a text if there is one; none: do not read it")  # fmt: skip
    sub.add_argument("--fs", type=int, default=16000, help="sampling rate, Hz")
    sub.add_argument("--speed_factors", type=float, nargs="+", default=[1.0], help="1.0 keeps an unchanged copy")
    sub.add_argument("--min_seconds", type=float, default=0.1, help="shortest utterance")
    sub.add_argument("--max_seconds", type=float, default=30.0, help="longest utterance")
    sub.add_argument("--drop_out_of_range", action="store_true",
                     help="leave out shorter and longer utterances (for train and valid, not for test)")  # fmt: skip
    sub.add_argument("--nj", type=int, default=1, help="processes")


def _format(args: argparse.Namespace) -> None:
    from espnet_kd.data.formatting import format_data

    format_data(args.src, args.dst, text=args.text, fs=args.fs, speed_factors=args.speed_factors,
                max_seconds=args.max_seconds, min_seconds=args.min_seconds,
                drop_out_of_range=args.drop_out_of_range, nj=args.nj)  # fmt: skip


def _add_combine(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--transcribed", required=True, help="formatted data dir; without text the result has none")
    sub.add_argument("--untranscribed", required=True, help="formatted data dir; a text there is not read")
    sub.add_argument("--dst", required=True, help="directory to make; its text has the id alone for the untranscribed")


def _combine(args: argparse.Namespace) -> None:
    from espnet_kd.data.combining import combine

    combine(args.transcribed, args.untranscribed, args.dst)


def _add_tokens(sub: argparse.ArgumentParser) -> None:
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", help="Kaldi-style text files, of training data only")
    source.add_argument("--teacher", metavar="EXP[/FILE.pth]", help="take this experiment's tokens (and BPE model)")
    sub.add_argument("--out", required=True, help="directory that gets tokens.txt (and bpe.model)")
    sub.add_argument("--token_type", choices=("char", "word", "bpe"), default="char", help="how a text is split")
    sub.add_argument("--nbpe", type=int, default=500, help="size of the list with --token_type bpe, made of --text")
    sub.add_argument("--nlsyms", help="file of symbols that stay whole, one a line, e.g. [NOISE]; not with --teacher, "
                     "whose own are taken")  # fmt: skip


def _tokens(args: argparse.Namespace) -> None:
    from espnet_kd.data.tokens import make_token_list, take_token_list

    if args.teacher is not None and args.nlsyms:
        raise UserError("--nlsyms: the symbols that stay whole are the teacher's; leave this option out")
    if args.teacher is not None:
        from espnet_kd.experiments.models import find_experiment, read_config  # imports torch

        config, _ = find_experiment(args.teacher)
        path = take_token_list(config, read_config(config), args.out, args.token_type)
    else:
        path = make_token_list(args.text, args.out, args.token_type, args.nbpe, args.nlsyms)
    logging.info("token list: %s", path)


def _add_fit_text(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data_dirs", nargs="+", metavar="DATA_DIR", help="formatted data dirs, whose text is rewritten")
    sub.add_argument("--token_list", help="tokens.txt with the characters to use; required without --undo")
    sub.add_argument("--token_type", choices=("char", "bpe"), default="char", help="bpe: those of its pieces")
    sub.add_argument("--rewrite", metavar="FILE", help="first by these rules, a regular expression, a tab and what "
                     "comes in its place in each line, such as for digits")  # fmt: skip
    sub.add_argument("--undo", action="store_true", help="give the data dirs the texts again that they had before")


def _fit_text(args: argparse.Namespace) -> None:
    from espnet_kd.data.text_fit import fit_data_dir, read_rules, unfit_data_dir
    from espnet_kd.data.tokenizing import TokenList

    if args.undo == bool(args.token_list or args.rewrite):
        raise UserError("give either --token_list, with or without --rewrite, or --undo")
    for data_dir in args.data_dirs:
        if not os.path.isdir(data_dir):
            raise UserError(f"{data_dir}: no such data directory")
    if args.undo:
        for data_dir in args.data_dirs:
            if unfit_data_dir(data_dir):
                logging.info("%s: the texts are those from before the conversion to a teacher's characters", data_dir)
        return
    tokens = TokenList(args.token_list, args.token_type).characters()
    rules = read_rules(args.rewrite) if args.rewrite else ()
    for data_dir in args.data_dirs:
        changed, number = fit_data_dir(data_dir, tokens, rules)
        logging.info("%s: %d of %d texts changed", data_dir, changed, number)


def _add_validate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data_dirs", nargs="+", metavar="DATA_DIR", help="data dirs to check")
    sub.add_argument("--token_list", help="tokens.txt that must have all tokens of the texts")
    sub.add_argument("--token_type", choices=("char", "word", "bpe"), default="char", help="how a text is split")
    sub.add_argument("--allow_unknown", action="store_true",
                     help="only count tokens that are not in the list (for validation data)")  # fmt: skip
    sub.add_argument("--min_seconds", type=float, default=0.1, help="shortest utterance")
    sub.add_argument("--max_seconds", type=float, default=30.0, help="longest utterance")
    sub.add_argument("--fs", type=int, default=16000, help="expected sampling rate, Hz; 0 accepts any")
    sub.add_argument("--no_text", action="store_true", help="text may be missing")
    sub.add_argument("--allow_empty", action="store_true",
                     help="a line in text with only an id is untranscribed audio, not a fault")  # fmt: skip
    sub.add_argument("--no_audio", action="store_true", help="do not open the audio files")
    sub.add_argument("--headers_only", action="store_true",
                     help="do not decode FLAC and floating-point files, which formatting has done already")  # fmt: skip
    sub.add_argument("--nj", type=int, default=1, help="processes that read the audio files")


def _validate(args: argparse.Namespace) -> None:
    from espnet_kd.data.validation import validate

    errors = []
    for data_dir in args.data_dirs:
        try:
            number = validate(data_dir, need_text=not args.no_text, allow_empty=args.allow_empty,
                              token_list=args.token_list, token_type=args.token_type, nj=args.nj,
                              allow_unknown=args.allow_unknown, min_seconds=args.min_seconds, fs=args.fs or None,
                              max_seconds=args.max_seconds, check_audio=not args.no_audio,
                              decode=not args.headers_only)  # fmt: skip
            logging.info("%s: %d utterances, no fault", data_dir, number)
        except UserError as e:
            errors.append(str(e))
    if errors:
        raise UserError("\n".join(errors))


def _add_statistics(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("files", nargs="+", metavar="FILE", help="feats_stats.npz")


def _statistics(args: argparse.Namespace) -> None:
    from espnet_kd.data.statistics import check_statistics

    for path in args.files:
        check_statistics(path)


def _add_lengths(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", required=True, action="append", metavar="NAME=OPTIONS",
                     help="options of asr_train that make it, in quotes; several times for several models")  # fmt: skip
    sub.add_argument("--stats", required=True, help="directory with {train,valid}/speech_shape (stage 4)")
    sub.add_argument("--data_dirs", required=True, nargs=2, metavar=("TRAIN", "VALID"), help="data dirs with the texts")
    sub.add_argument("--token_list", required=True, help="tokens.txt")
    sub.add_argument("--token_type", choices=("char", "word", "bpe"), default="char", help="how a text is split")


def _lengths(args: argparse.Namespace) -> None:
    from espnet_kd.data.lengths import FrameCounter, check_lengths, espnet_encoder, parse_model, read_needs
    from espnet_kd.data.tokenizing import TokenList

    models = [parse_model(model) for model in args.model]
    tokens = TokenList(args.token_list, args.token_type)
    for name, options in models:
        encode, rate = espnet_encoder(options, args.token_list)
        counter = FrameCounter(encode, rate)
        for part, data_dir in zip(("train", "valid"), args.data_dirs):
            needs = read_needs(f"{args.stats}/{part}/speech_shape", f"{data_dir}/text", tokens)
            check_lengths(data_dir, needs, counter, f"the {name}", rate, f"{args.stats}/{part}/too_short.{name}")


def _add_ngram(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--text", nargs="+", default=[], help="Kaldi-style text files, such as that of the training data")
    sub.add_argument("--lm_text", nargs="+", default=[], help="texts without ids, a sentence in a line")
    sub.add_argument("--token_list", required=True, help="tokens.txt of the model that is decoded")
    sub.add_argument("--token_type", choices=("char", "word", "bpe"), default="char", help="how a text is split")
    sub.add_argument("--order", type=int, default=4, help="the longest n-gram, in tokens")
    sub.add_argument("--out", required=True, help="ARPA file, for asr_kd_inference --beam_size 10 --ngram_file FILE")


def _ngram(args: argparse.Namespace) -> None:
    from espnet_kd.data.ngram import make_ngram
    from espnet_kd.data.tokenizing import TokenList

    if not args.text and not args.lm_text:
        raise UserError("no --text and no --lm_text: there is nothing to make an n-gram model of")
    make_ngram(args.text, TokenList(args.token_list, args.token_type), args.out, args.order, args.lm_text)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser; each subcommand leaves its function in ``args.do``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subs = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, what: str, fill: Callable, do: Callable, example: str) -> None:
        sub = subs.add_parser(
            name,
            help=what,
            description=what,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            epilog=f"example: python -m espnet_kd.bin.asr_kd_data {name} {example}",
        )
        fill(sub)
        sub.set_defaults(do=do)

    add("an4", "CMU AN4 to data dirs", _add_an4, _an4, "--out data --an4 /corpora/an4")
    add("librispeech", "LibriSpeech, any of its parts, to data dirs", _add_librispeech, _librispeech,
        "--out data --librispeech /corpora/LibriSpeech --train_parts train-clean-100 --nj 8")  # fmt: skip
    add("aishell", "AISHELL-1 to data dirs", _add_aishell, _aishell,
        "--out data --aishell /corpora/data_aishell --nj 8")  # fmt: skip
    add("tedlium2", "TED-LIUM release 2 to data dirs with segments", _add_tedlium2, _tedlium2,
        "--out data --tedlium2 /corpora/TEDLIUM_release2 --nj 8")  # fmt: skip
    add("audio", "a directory of audio without transcripts to data dirs", _add_audio, _audio,
        "--out data --audio /recordings --valid 200 --test 200")  # fmt: skip
    add("mini", "synthesise the embedded corpus", _add_mini, _mini, "--out data --nj 2")
    add("espnet", "data of an ESPnet recipe (dump/raw) to data dirs", _add_espnet, _espnet,
        "--espnet_data /espnet/egs2/an4/asr1 --sets train_nodev train_dev test --out data")  # fmt: skip
    add("format", "data dir to formatted audio, with speed perturbation", _add_format, _format,
        "--src data/train --dst dump/raw/train_sp --speed_factors 0.9 1.0 1.1 --drop_out_of_range --nj 4")  # fmt: skip
    add("combine", "transcribed and untranscribed audio to one training set", _add_combine, _combine,
        "--transcribed dump/raw/train --untranscribed dump/raw/extra --dst dump/raw/all")  # fmt: skip
    add("tokens", "token list of the training text, or a teacher's", _add_tokens, _tokens,
        "--text dump/raw/train/text --out data/token_list/bpe500 --token_type bpe --nbpe 500")  # fmt: skip
    add("fit_text", "texts in a teacher's characters: case, apostrophes, punctuation", _add_fit_text, _fit_text,
        "dump/raw/train dump/raw/valid --token_list data/token_list/teacher_x/tokens.txt")  # fmt: skip
    add("validate", "check data dirs; every fault names file, line and utterance", _add_validate, _validate,
        "data/train data/valid --max_seconds 20")  # fmt: skip
    add("ngram", "n-gram model over a model's tokens, for beam search", _add_ngram, _ngram,
        "--text dump/raw/train/text --token_list data/token_list/char/tokens.txt --out exp/4gram.arpa")  # fmt: skip
    add("statistics", "check that the statistics of features are finite", _add_statistics, _statistics,
        "exp/stats_train_char/train/feats_stats.npz")  # fmt: skip
    add("lengths", "check that utterances have enough frames for the models and for CTC", _add_lengths, _lengths,
        "--model 'student=--config conf/train_student.yaml' --stats exp/stats_train_char "
        "--data_dirs dump/raw/train dump/raw/valid --token_list data/token_list/char/tokens.txt")  # fmt: skip
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the subcommand given in ``cmd`` (default: the shell's arguments)."""
    args = get_parser().parse_args(cmd)
    refuse_empty(args, may_be=("train_parts", "valid_parts", "test_parts", "split_by_speaker"))
    args.do(args)


if __name__ == "__main__":
    run(main)
