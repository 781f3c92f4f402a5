"""An export's normalisation as a diagonal linear layer before the encoder, which ESPnet builds without a file.

ESPnet's GlobalMVN opens a file of statistics, relative to the working directory, although the model has them too.
An export computes the same with ``preencoder: linear``, whose values are parameters. The statistics stay in the model
file under their own names, which ESPnet ignores, and the entry ``PORTABLE`` of config.yaml describes the replacement,
so that this package loads an export as the original student, equal in every bit.
"""

from __future__ import annotations

from typing import Any, Dict, Tuple

import torch

from espnet_kd.cli import UserError
from espnet_kd.strict import check_mapping

PORTABLE = "espnet_kd_portable"
LAYER = "preencoder.linear_out"
StateDict = Dict[str, torch.Tensor]


def can_fold(config: Dict[str, Any], state: StateDict) -> bool:
    """Whether a model's normalisation can become a layer.

    With a contextual-block encoder it cannot, because ESPnet's streaming search does not run a pre-encoder.
    """
    mean = state.get("normalize.mean")
    return (
        str(config.get("normalize")).lower() == "global_mvn"
        and mean is not None
        and mean.dim() == 1
        and config.get("preencoder") is None
        and not str(config.get("encoder")).lower().startswith("contextual_block")
    )


def fold(config: Dict[str, Any], state: StateDict) -> Tuple[Dict[str, Any], StateDict]:
    """Configuration and parameters that compute the same without a statistics file; see :func:`can_fold`."""
    conf = {k: v for k, v in (config.get("normalize_conf") or {}).items() if k != "stats_file"}
    mean, std = (state[f"normalize.{name}"].double() for name in ("mean", "std"))
    scale = 1 / std if conf.get("norm_vars", True) else torch.ones_like(std)
    shift = -mean * scale if conf.get("norm_means", True) else torch.zeros_like(mean)
    width = len(mean)
    return (
        {
            **config,
            "normalize": None,
            "normalize_conf": {},
            "preencoder": "linear",
            "preencoder_conf": {"input_size": width, "output_size": width},
            PORTABLE: {"normalize_conf": conf},
        },
        {**state, f"{LAYER}.weight": torch.diag(scale).float(), f"{LAYER}.bias": shift.float()},
    )


def unfold_config(config: Dict[str, Any], where: str) -> Dict[str, Any]:
    """The inverse of :func:`fold` for the configuration; any other configuration is returned unchanged.

    Raises:
        UserError: the entry ``PORTABLE`` is not as it was written.
    """
    if PORTABLE not in config:
        return config
    entry = check_mapping(config[PORTABLE], f"{where}: {PORTABLE}", ["normalize_conf"])
    conf = check_mapping(
        entry.get("normalize_conf"), f"{where}: {PORTABLE}.normalize_conf", ["norm_means", "norm_vars", "eps"]
    )
    if config.get("preencoder") != "linear" or config.get("normalize") is not None:
        raise UserError(f"{where}: {PORTABLE} goes with preencoder: linear and normalize: null; export the model again")
    plain = {k: v for k, v in config.items() if k != PORTABLE}
    plain.update(normalize="global_mvn", normalize_conf=conf, preencoder=None, preencoder_conf={})
    return plain


def unfold_state(state: StateDict) -> StateDict:
    """The inverse of :func:`fold` for the parameters."""
    return {k: v for k, v in state.items() if not k.startswith(f"{LAYER}.")}
