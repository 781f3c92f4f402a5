"""Find and load a finished ESPnet ASR experiment: as a teacher, for decoding, for export."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pickle
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence, Tuple, Union

import numpy as np
import torch
import yaml

from espnet_kd.cli import UserError, trusts_pickles
from espnet_kd.targets.packed import is_packed, unpack

#: Prefix of what is trained beside a student (projections, heads) and dropped from it afterwards.
KD_PREFIX = "kd_heads."


def find_experiment(path: Union[str, Path]) -> Tuple[Path, Path]:
    """Return (config.yaml, model file) of an experiment ``EXP``, ``EXP/FILE.pth`` or a model packed by ESPnet.

    Without a file: the averaged model of the first ``best_model_criterion``, else its best epoch, else
    ``latest.pth``; in an exported directory ``model.pth``.

    Raises:
        UserError: nothing there, no config.yaml, or no model in it; as :func:`espnet_kd.targets.packed.unpack`.
    """
    path = Path(path)
    if is_packed(path):
        path = unpack(path)
    if path.suffix == ".pth":
        config, candidates = path.parent / "config.yaml", [path]
    elif path.is_dir():
        config, candidates = path / "config.yaml", []
    else:
        raise UserError(
            f"no experiment at {path}: give a directory with config.yaml and a .pth file, the .pth file, "
            "or a .zip made by espnet2.bin.pack"
        )
    if not config.is_file():
        raise UserError(f"{config} is missing: an ESPnet experiment has a config.yaml beside its .pth files")
    if not candidates:
        candidates = [path / "model.pth"]
        for phase, key, *_ in read_config(config).get("best_model_criterion") or []:
            candidates += sorted(path.glob(f"{phase}.{key}.ave.pth"))
            candidates += sorted(path.glob(f"{phase}.{key}.ave_*best.pth"))
            candidates.append(path / f"{phase}.{key}.best.pth")
        candidates.append(path / "latest.pth")
    for model in candidates:
        if model.is_file():
            return config, model
    raise UserError(f"no finished model in {path}: looked for {', '.join(c.name for c in candidates)}")


def read_config(config: Union[str, Path]) -> Dict:
    """Read an ESPnet config.yaml (safe loader).

    Raises:
        UserError: unreadable, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"cannot read {config}: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{config} is not a mapping of options")
    return content


def load_safely(path: Union[str, Path], allowed: Sequence[Any] = (), mmap: bool = False) -> Any:
    """Load what ``torch.save`` wrote onto the CPU: tensors, plain values and ``allowed`` classes.

    With ``ESPNET_KD_TRUST_PICKLE=1`` everything is loaded.

    Raises:
        UserError: a whole file that holds something else: to read that could run code.
        Whatever torch raises for a file that is absent, damaged or of another kind.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=not trusts_pickles(), mmap=mmap)
    except pickle.UnpicklingError as e:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(e))
        if found is None or (zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is not None):
            raise
        raise UserError(
            f"{path} holds more than tensors ({found[1]}), and reading that could run code; "
            "if you trust who made it, set ESPNET_KD_TRUST_PICKLE=1"
        ) from e


def load_state(model_file: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """Load a state dict, refusing anything but tensors (:func:`load_safely`).

    Raises:
        UserError: unreadable, damaged, or holding other objects.
    """
    try:
        state = load_safely(model_file)
    except UserError:
        raise
    except Exception as e:  # pickle, zip, runtime or OS error: all of them say that this file is no good
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"cannot load {model_file}: {reason}; is the file damaged, or not a model?") from e
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{model_file} is not a model (a mapping of names to tensors); give an …epoch.pth or ….ave.pth")
    return state


def student_only(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Leave out what is trained beside the student (keys under ``kd_heads.``)."""
    return {k: v for k, v in state.items() if not k.startswith(KD_PREFIX)}


def load_model(config: Union[str, Path], model_file: Union[str, Path], device: str = "cpu"):
    """Build the ESPnet ASR model of ``config`` and load ``model_file`` into it, in eval mode.

    Every key must match (ESPnet's own loader lets missing ones pass); keys under ``kd_heads.`` are left out.

    Returns:
        (ESPnetASRModel, argparse.Namespace of the config)

    Raises:
        UserError: the files don't fit each other, or cannot be read.
    """
    from espnet_kd.offline import ASRTask

    args = argparse.Namespace(**read_config(config))
    args.init = None  # the values come from the file
    state = student_only(load_state(model_file))
    try:
        with _statistics(args, Path(config).parent, state):
            model = ASRTask.build_model(args)
    except Exception as e:
        raise UserError(f"cannot build the model of {config}: {type(e).__name__}: {e}") from e
    try:
        model.load_state_dict(state)
    except RuntimeError as e:  # torch's message lists missing keys, unexpected keys and sizes
        raise UserError(f"{model_file} does not fit {config}: {e}") from e
    logging.info("loaded %s", model_file)
    return model.to(device).eval(), args


@contextlib.contextmanager
def _statistics(args: argparse.Namespace, directory: Path, state: Dict[str, torch.Tensor]) -> Iterator[None]:
    """Give GlobalMVN a file to open: it insists on one, although mean and deviation are in the model.

    ESPnet writes its path relative to the recipe's directory, so that from elsewhere it is not found: then the one
    beside config.yaml serves, or one made of the model's own values.
    """
    conf = getattr(args, "normalize_conf", None) or {}
    stats, mean = conf.get("stats_file"), state.get("normalize.mean")
    if not stats or Path(stats).is_file() or mean is None:
        yield
        return
    with tempfile.TemporaryDirectory() as scratch:
        beside = directory / Path(stats).name
        if not beside.is_file():
            beside = Path(scratch) / "feats_stats.npz"
            mean, std = mean.double().numpy(), state["normalize.std"].double().numpy()
            np.savez(beside, count=1, sum=mean, sum_square=std**2 + mean**2)
        args.normalize_conf = {**conf, "stats_file": str(beside)}
        yield
        args.normalize_conf = conf
