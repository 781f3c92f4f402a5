"""The ESPnet options that a page's ``train:`` block may set: how a student is trained, but no paths.

Pages are shared between users, so that all other options, above all paths of data and models, belong on the command
line.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

from espnet_kd.cli import UserError
from espnet_kd.strict import check_mapping, nearest, to_yaml

OPTIMIZATION = (
    *("optim", "optim_conf", "scheduler", "scheduler_conf", "exclude_weight_decay", "exclude_weight_decay_conf"),
)
STEPS = (
    *("accum_grad", "grad_clip", "grad_clip_type", "grad_noise", "use_amp", "train_dtype", "num_iters_per_epoch"),
    *("unused_parameters", "freeze_param", "max_nonfinite"),
)
BATCHES = (
    *("batch_type", "batch_size", "batch_bins", "valid_batch_type", "valid_batch_size", "valid_batch_bins"),
    *("fold_length", "sort_in_batch", "sort_batch", "shuffle_within_batch", "drop_last_iter", "iterator_type"),
)
MODELS = (
    *("best_model_criterion", "val_scheduler_criterion", "early_stopping_criterion", "patience"),
    *("keep_nbest_models", "nbest_averaging_interval"),
)
AUGMENTATION = ("specaug", "specaug_conf")
LOGGING = ("log_interval", "num_att_plot", "use_matplotlib", "use_tensorboard")
ALLOWED = (*OPTIMIZATION, *STEPS, *BATCHES, *MODELS, *AUGMENTATION, *LOGGING)
#: Options that the training sets or reads before the page: in a ``train:`` block they would have no effect.
RESERVED = ("config", "kd_config", "kd_stage", "kd_stages", "max_epoch", "output_dir", "resume")


def check_train_options(content: Any, where: str) -> Dict[str, Any]:
    """Check a page's ``train:`` block, which may have the options in :data:`ALLOWED`.

    Their values are checked by ESPnet's own parser (:func:`espnet_kd.distill.checks.configuration.check_options`).

    Args:
        where: the block's place in messages, ``page.yaml: train``.

    Raises:
        UserError: the block is not a mapping, or has an option that a page cannot set, or a value of another type.
    """
    options = check_mapping(content, where)
    for key, value in options.items():
        if key not in ALLOWED:
            if key in RESERVED:
                raise UserError(f"{where}: {key} cannot be set by a page; give it on the command line")
            close = nearest(str(key), ALLOWED).split(" (known:")[0]
            raise UserError(
                f"{where}: {key} cannot be set by a page{close}; give it on the command line, where it is an option of "
                "training"
            )
        _check_plain(value, f"{where}.{key}")
    return options


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Refuse values other than words, numbers, and lists or mappings of them (:class:`UserError`)."""
    if isinstance(value, Mapping) and depth < 2:
        for key, inner in value.items():
            _check_plain(inner, f"{where}.{key}", depth + 1)
    elif isinstance(value, list) and depth < 3:
        for i, inner in enumerate(value):
            _check_plain(inner, f"{where}[{i}]", depth + 1)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise UserError(f"{where}: expected a word, a number or a list of them, found {value!r}")
    elif isinstance(value, str) and (value.startswith("-") or any(c in value for c in "/\\\n\0")):
        raise UserError(f"{where}: {value!r} looks like a path or an option, which a page may not hold")


def to_options(train: Mapping[str, Any]) -> List[str]:
    """A page's ``train:`` block as command line options, so that ESPnet's parser checks them."""
    options: List[str] = []
    for key, value in train.items():
        if isinstance(value, Mapping):
            for inner, v in value.items():
                options += [f"--{key}", f"{inner}={to_yaml(v)}"]
        elif isinstance(value, list):
            options += [f"--{key}", *(",".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)]
        else:
            options += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return options
