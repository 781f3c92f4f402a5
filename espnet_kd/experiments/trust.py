"""Limits on what an untrusted config.yaml can make ESPnet do while a model is built.

Some of ESPnet's components unpickle a file that config.yaml names, download one, or import a module that it names. Each
of these can run code of the file's author. Only components that do none of it are built; the others need
``ESPNET_KD_TRUST_PICKLE=1``. See docs/trust.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import unittest.mock
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple, Union

import torch

from espnet_kd.cli import UserError, trusts_pickles
from espnet_kd.strict import nearest

#: Encoders of this package for models of other toolkits, which read only the experiment's own files.
FOREIGN = ("hugging_face_ctc", "onnx_ctc")
#: Components of ``espnet2.tasks.asr`` (202511) that open no file, reach for no network and import nothing by name.
#: global_mvn opens its statistics, but :mod:`espnet_kd.experiments.models` replaces the file that config.yaml names.
LOADS_NOTHING: Dict[str, Tuple[str, ...]] = {
    "frontend": ("default", "sliding_window", "fused", "wav2vec_cnn"),
    "specaug": ("specaug",),
    "normalize": ("global_mvn", "utterance_mvn"),
    "model": ("espnet", "maskctc"),
    "preencoder": ("sinc", "linear"),
    "encoder": (
        *("conformer", "transformer", "branchformer", "e_branchformer", "multiconv_conformer"),
        *("contextual_block_transformer", "contextual_block_conformer", "rnn", "vgg_rnn"),
        *FOREIGN,
    ),
    "postencoder": ("length_adaptor",),
    "decoder": (
        *("transformer", "lightweight_conv", "lightweight_conv2d", "dynamic_conv", "dynamic_conv2d", "rnn"),
        *("transducer", "mlm", "linear_decoder"),
    ),
    "adapter": ("lora",),
    "token_type": ("bpe", "char", "word", "phn"),
}
#: Parts of ``frontend: fused`` that load nothing.
FUSED = ("default",)
TRUST = "ESPNET_KD_TRUST_PICKLE=1"
NETWORK = "ESPNET_KD_ALLOW_NETWORK"


def allows_network() -> bool:
    """Whether building a model may download: ``ESPNET_KD_ALLOW_NETWORK=1``."""
    return os.environ.get(NETWORK) == "1"


def check_components(args: argparse.Namespace, where: Union[str, Path]) -> None:
    """Refuse a configuration whose model could run code of its author, or that is of another ESPnet task.

    Args:
        args: contents of the config.yaml ``where``.

    Raises:
        UserError: a component is unknown or could run code; the message names it and its option.
    """
    _refuse_other_tasks(args, where)
    known = _choices()
    for option, harmless in LOADS_NOTHING.items():
        if option == "adapter" and not getattr(args, "use_adapter", False):
            continue
        chosen = getattr(args, option, None)
        if chosen is None:
            continue
        if not isinstance(chosen, str):
            raise UserError(f"{where}: {option}: expected a name, found {chosen!r}")
        name = chosen.lower()
        if name in ("none", "null", "nil"):
            continue
        if name not in known[option]:
            raise UserError(
                f"cannot build the model of {where}: {option}: unknown {chosen!r}{nearest(chosen, known[option])}"
            )
        if name not in harmless:
            _refuse_untrusted(f"{where}: {option}: {chosen}")
        if option == "frontend" and name == "fused":
            for i, part in enumerate((getattr(args, "frontend_conf", None) or {}).get("frontends") or []):
                kind = part.get("frontend_type") if isinstance(part, dict) else part
                if kind not in FUSED:
                    _refuse_untrusted(f"{where}: frontend_conf.frontends[{i}].frontend_type: {kind}")


def _refuse_untrusted(component: str) -> None:
    if not trusts_pickles():
        raise UserError(
            f"{component} may load or download what the configuration names, and that could run code; if you trust who "
            f"made it, set {TRUST} (to let it download as well, {NETWORK}=1)"
        )


def _refuse_other_tasks(args: argparse.Namespace, where: Union[str, Path]) -> None:
    """Refuse models of another ``espnet2.bin.*_train``, whose options are not those of asr_train."""
    model, encoder = (str(getattr(args, name, None)).lower() for name in ("model", "encoder"))
    if str(getattr(args, "preprocessor", "")).startswith("s2t") or encoder == "e_branchformer_ctc":
        found = "of espnet2.bin.s2t_train (OWSM)"
    elif hasattr(args, "joint_network_conf"):
        found = "of espnet2.bin.asr_transducer_train"
    elif hasattr(args, "subtask_series"):
        found = "of espnet2.bin.enh_s2t_train"
    elif hasattr(args, "src_token_list"):
        found = "of espnet2.bin.st_train"
    elif model in ("pit_espnet", "espnet_ctc") or encoder == "transformer_multispkr":
        found = f"with {'encoder' if model == 'espnet' else 'model'}: {encoder if model == 'espnet' else model}"
    elif encoder == "none" or not hasattr(args, "token_list"):
        found = "without encoder or token_list"
    else:
        return
    raise UserError(f"{where}: a model {found} is not supported; known are models of espnet2.bin.asr_train")


def _choices() -> Dict[str, Tuple[str, ...]]:
    """The classes that ESPnet has for each option, in lower case as ESPnet compares them."""
    from espnet_kd.offline import ASRTask

    known = {c.name: tuple(name.lower() for name in c.classes) for c in ASRTask.class_choices_list}
    known["encoder"] += FOREIGN
    known["adapter"] = ("lora", "houlsby")
    known["token_type"] = ("bpe", "char", "word", "phn", "hugging_face", "whisper_en", "whisper_multilingual")
    return {option: known[option] for option in LOADS_NOTHING}


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """While ESPnet builds a model, load only tensors from pickles, and refuse network connections.

    This is the second line of defence, in case a component of :data:`LOADS_NOTHING` is not harmless.
    """
    load, connect = torch.load, socket.socket.connect

    def load_tensors(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "weights_only": True})

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == getattr(socket, "AF_UNIX", None):
            return connect(self, address)
        raise UserError(f"the model would connect to {address}; to let it, set {NETWORK}=1")

    with contextlib.ExitStack() as stack:
        if not trusts_pickles():
            stack.enter_context(unittest.mock.patch.object(torch, "load", load_tensors))
        if not allows_network():
            stack.enter_context(unittest.mock.patch.object(socket.socket, "connect", refuse))
        yield
