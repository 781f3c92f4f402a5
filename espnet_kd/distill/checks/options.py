"""What options of training need beside them: packages, token models, parameters that fit. Seen before the first step.

ESPnet finds out when it makes its data loader, its logger or its last plot.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_pairs
from espnet_kd.data.statistics import check_statistics
from espnet_kd.data.tokenizing import check_model
from espnet_kd.experiments.models import load_state

#: (option, value that needs it; None: true) → (module, what to install).
PACKAGES: Tuple[Tuple[str, Optional[str], str, str], ...] = (
    ("use_wandb", None, "wandb", "wandb"),
    ("use_tensorboard", None, "tensorboard", "tensorboard"),
    ("use_matplotlib", None, "matplotlib", "matplotlib"),
    ("sharded_ddp", None, "fairscale", "fairscale"),
    ("token_type", "hugging_face", "transformers", "transformers"),
    ("token_type", "whisper_en", "whisper", "openai-whisper"),
    ("token_type", "whisper_multilingual", "whisper", "openai-whisper"),
    ("cleaner", "whisper_en", "whisper", "openai-whisper"),
    ("cleaner", "whisper_basic", "whisper", "openai-whisper"),
)
#: Option → least value. With one below, ESPnet ends with a traceback, or trains in the wrong direction.
LEAST: Dict[str, int] = {
    **{"accum_grad": 1, "batch_size": 1, "valid_batch_size": 1, "batch_bins": 1, "valid_batch_bins": 1},
    **{"num_iters_per_epoch": 1, "log_interval": 1, "keep_nbest_models": 1, "num_workers": 0, "patience": 0, "seed": 0},
}
#: Options whose value must be above 0: with one below, gradients or samples change their sign.
POSITIVE = ("grad_clip", "speech_volume_normalize")
LARGEST_SEED = 4 * 10**9  #: numpy takes 32 bits, and ESPnet adds the epoch
#: Of --adapter, with --use_adapter true.
ADAPTERS = {"lora": ("loralib", "loralib"), "houlsby": ("s3prl", "s3prl")}


def check_requirements(args: argparse.Namespace) -> None:
    """Refuse options whose packages or files are missing, statistics of features that are no numbers, and
    ``--init_param`` of another model.

    Raises:
        UserError: naming the option and what it needs.
    """
    check_packages(args)
    if getattr(args, "normalize", None) == "global_mvn" and (args.normalize_conf or {}).get("stats_file"):
        check_statistics(args.normalize_conf["stats_file"])
    check_tokens(args)
    check_init_param(args)


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, a ``--fold_length`` for another number of shape files, and iterators that cannot
    read the data (:class:`UserError`).
    """
    for option, least in LEAST.items():
        value = getattr(args, option, None)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None and not number >= least:
                raise UserError(f"--{option} is {number}; it must be {least} or more")
    for option in POSITIVE:
        number = getattr(args, option, None)
        if number is not None and not number > 0:
            raise UserError(f"--{option} is {number}; it must be above 0")
    if args.seed > LARGEST_SEED:
        raise UserError(f"--seed is {args.seed}; it must be at most {LARGEST_SEED}")
    check_iterators(args)
    for part, kind in (("train", args.batch_type), ("valid", args.valid_batch_type or args.batch_type)):
        shapes = getattr(args, f"{part}_shape_file") or []
        if kind == "folded" and args.iterator_type == "sequence" and len(args.fold_length) != len(shapes):
            raise UserError(
                f"--fold_length has {len(args.fold_length)} numbers for {len(shapes)} files of --{part}_shape_file; "
                "with batch_type: folded give one for each, or take batch_type: numel"
            )


def check_iterators(args: argparse.Namespace) -> None:
    """Refuse iterators that cannot read the data of an ASR model, and a category iterator without its file.

    Raises:
        UserError: naming the option or the file.
    """
    own = getattr(args, "valid_iterator_type", None)
    for part, option in (("train", "iterator_type"), ("valid", "valid_iterator_type" if own else "iterator_type")):
        kind = getattr(args, option)
        if kind not in ("sequence", "category"):
            why = "reads nothing" if kind != "chunk" else "cuts audio into parts, which have no transcripts and lengths"
            raise UserError(f"{option}: {kind} {why}; an ASR model is trained with sequence or category")
        data = getattr(args, f"{part}_data_path_and_name_and_type") or []
        file = Path(data[0][0]).parent / "category2utt" if data else None
        if kind == "category" and file is not None and not file.is_file():
            raise UserError(f"{option}: category needs {file} (a line per category: its name, then ids)")


def check_packages(args: argparse.Namespace) -> None:
    """Refuse DeepSpeed, and options that need a package which is not installed (:class:`UserError`)."""
    if getattr(args, "use_deepspeed", False):
        raise UserError(
            "--use_deepspeed true replaces the trainer and the optimizer in which KD stages and checks work; for more "
            "GPUs give --ngpu or --num_nodes"
        )
    needed = [p for p in PACKAGES if getattr(args, p[0], None) == (True if p[1] is None else p[1])]
    if getattr(args, "use_adapter", False):
        module, package = ADAPTERS.get(args.adapter, (None, None))
        if module is None or package is None:
            raise UserError(f"--adapter {args.adapter}: known are {', '.join(ADAPTERS)}")
        needed.append(("adapter", args.adapter, module, package))
    for option, value, module, package in needed:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"--{option} {'true' if value is None else value} needs {package}, which is not installed: "
                f"pip install {package}"
            )


def check_tokens(args: argparse.Namespace) -> None:
    """Refuse a text that cannot be made tokens of, tried on the first transcript (:class:`UserError`)."""
    if not getattr(args, "use_preprocessor", False):
        return
    data = args.train_data_path_and_name_and_type or []
    texts = [path for path, name, kind in data if (name, kind) == ("text", "text")]
    if args.token_type == "bpe" and texts:
        if not args.bpemodel:
            raise UserError("--token_type bpe needs --bpemodel, the SentencePiece model (stage 3 of run.sh makes one)")
        if not Path(args.bpemodel).is_file():
            raise UserError(f"--bpemodel {args.bpemodel}: no such file")
        owner = "the token list" if isinstance(args.token_list, list) else str(args.token_list)
        check_model(tokens_of(args.token_list), Path(args.bpemodel).read_bytes(), f"--bpemodel {args.bpemodel}", owner)
    from espnet_kd.offline import ASRTask

    try:
        prepare = ASRTask.build_preprocess_fn(copy.deepcopy(args), train=True)
        for path in texts[:1]:
            for utt_id, text in read_pairs(path):
                prepare(utt_id, {"text": text})
                break
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # whatever tokenizers, cleaners and their packages raise
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        given = [o for o in ("token_type", "g2p", "cleaner") if getattr(args, o, None)]
        options = ", ".join(f"--{o} {getattr(args, o)}" for o in given)
        raise UserError(f"{options}: no tokens can be made of the transcripts: {type(e).__name__}: {reason}") from e


def tokens_of(token_list: Any) -> List[str]:
    """The tokens of ``--token_list``: a file, or a list in the YAML (:class:`UserError`: unreadable)."""
    if isinstance(token_list, (list, tuple)):
        return list(token_list)
    try:
        return [line.rstrip() for line in Path(token_list).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError, TypeError) as e:
        raise UserError(f"cannot read --token_list {token_list}: {e}") from e


def check_init_param(args: argparse.Namespace) -> None:
    """Refuse ``--init_param`` with parameters that the student lacks or has in other sizes (:class:`UserError`)."""
    if not getattr(args, "init_param", None):
        return
    from espnet_kd.offline import ASRTask

    states = [(given, selected(given)) for given in args.init_param]
    if getattr(args, "ignore_init_mismatch", False):
        return  # ESPnet leaves them out, and logs each
    try:
        model = ASRTask.build_model(copy.deepcopy(args))
    except Exception as e:  # the training itself reports it for the same options
        raise UserError(f"cannot build the model of {args.config}: {type(e).__name__}: {e}") from e
    own = model.state_dict()
    for given, state in states:
        _refuse_misfit(given, state, own)


def selected(given: str) -> Dict[str, torch.Tensor]:
    """What ESPnet takes of ``FILE[:src_key[:dst_key[:exclude,…]]]``, under the student's names.

    Raises:
        UserError: unreadable, more than tensors, or nothing is left.
    """
    path, source, target, excluded = (given.split(":", 3) + ["", "", ""])[:4]
    state = load_state(path)
    if excluded:
        state = {k: v for k, v in state.items() if not k.startswith(tuple(excluded.split(",")))}
    if source:
        state = {k[len(source) + 1 :]: v for k, v in state.items() if k.startswith(source)}
    if not state:
        raise UserError(
            f"--init_param {given}: no parameter of the file is left; check the names after the file's (FILE:SOURCE:"
            "TARGET:EXCLUDED)"
        )
    return {f"{target}.{k}" if target else k: v for k, v in state.items()}


def _refuse_misfit(given: str, state: Dict[str, torch.Tensor], own: Dict[str, torch.Tensor]) -> None:
    strange = [k for k in state if k not in own]
    sizes = [k for k in state if k in own and state[k].shape != own[k].shape]
    if strange:
        components = sorted({k.split(".")[0] for k in strange})
        raise UserError(
            f"--init_param {given}: the student has no {', '.join(strange[:3])}{' …' * (len(strange) > 3)}; leave that "
            f"out with {given.split(':')[0]}:::{','.join(components)}, or give --ignore_init_mismatch true"
        )
    if sizes:
        k = sizes[0]
        raise UserError(
            f"--init_param {given}: {len(sizes)} of its parameters have another size than the student's ({k}: "
            f"{list(state[k].shape)} there, {list(own[k].shape)} in the student); give a model of the student's sizes, "
            "or --ignore_init_mismatch true, which leaves those out"
        )
