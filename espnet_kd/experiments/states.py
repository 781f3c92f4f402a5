"""Conversion of state dicts of older ESPnet versions to the names of the current model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Union

import torch

from espnet_kd.cli import UserError

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

#: Components that ESPnet does not build if the loss does not use them; older files still have their parameters.
UNUSED = ("decoder", "joint_network", "ctc")
#: Parameter names of ESPnet's s3prl frontend before and after its commit 0a625088.
OLD_S3PRL, S3PRL = "frontend.upstream.model", "frontend.upstream.upstream.model"


def fit_state(
    model: ESPnetASRModel, state: Dict[str, torch.Tensor], model_file: Union[str, Path]
) -> Dict[str, torch.Tensor]:
    """Return ``state`` with the names of ``model``, without parameters of components that ``model`` does not have.

    Raises:
        UserError: the file holds an adapter without its model.
    """
    names = model.state_dict().keys()
    if any(k.startswith(S3PRL) for k in names) and not any(k.startswith(S3PRL) for k in state):
        state = {k.replace(OLD_S3PRL, S3PRL, 1): v for k, v in state.items()}
    for component in UNUSED:
        left = [k for k in state if k.startswith(f"{component}.")]
        if left and getattr(model, component, None) is None:
            logging.info("%s: %d parameters of its %s, which the model does not use", model_file, len(left), component)
            state = {k: v for k, v in state.items() if k not in left}
    if any("lora_" in k or "adapter" in k for k in state) and not any(k.startswith("ctc.") for k in state):
        raise UserError(
            f"{model_file} holds an adapter without the model that it was added to; give the file of the whole model "
            "(adapter training with save_strategy: all)"
        )
    return state
