"""Finding and loading finished ESPnet ASR experiments, as teachers, for decoding and for export."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pickle
import pickletools
import re
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ContextManager, Dict, Iterator, List, Sequence, Tuple, Union

import numpy as np
import torch

from espnet_kd.cli import UserError, trusts_pickles
from espnet_kd.experiments.named_files import read_token_list
from espnet_kd.experiments.packed import check_expansion, is_packed, unpack_model
from espnet_kd.experiments.portable import PORTABLE, unfold_config, unfold_state
from espnet_kd.experiments.states import fit_state
from espnet_kd.experiments.trust import FOREIGN, check_components, guarded
from espnet_kd.safe_yaml import parse_yaml

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

#: Prefix of the modules that are trained with a student (projections, heads) and not exported.
KD_PREFIX = "kd_heads."


def find_experiment(path: Union[str, Path]) -> Tuple[Path, Path]:
    """Return (config.yaml, model file) of an experiment ``EXP``, ``EXP/FILE.pth`` or a model packed by ESPnet.

    If ``path`` is a directory, the model is ``model.pth`` of an export; else the averaged model of the first
    ``best_model_criterion`` of validation, or its best epoch; then those of training; then ``latest.pth``; then
    ``student.pth`` of a KD stage.

    Raises:
        UserError: there is no such path, no config.yaml, or no model in it; or
            :func:`espnet_kd.experiments.packed.unpack_model` refuses the archive.
    """
    path = Path(path)
    if is_packed(path):
        path = unpack_model(path)
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
        for phase, key in _criteria(read_config(config), config):
            candidates += sorted(path.glob(f"{phase}.{key}.ave.pth"))
            candidates += sorted(path.glob(f"{phase}.{key}.ave_*best.pth"))
            candidates.append(path / f"{phase}.{key}.best.pth")
        candidates += [path / "latest.pth", path / "student.pth"]
    for model in candidates:
        if model.is_file():
            return config, model
    raise UserError(f"no finished model in {path}: looked for {', '.join(c.name for c in candidates)}")


def _criteria(content: Dict, config: Path) -> List[Tuple[str, str]]:
    """(phase, key) of each ``best_model_criterion``, those of validation first.

    The best model on the training data may be overfitted, and ESPnet's default begins with the training loss.
    """
    criteria = content.get("best_model_criterion") or []
    if not isinstance(criteria, list) or not all(isinstance(c, list) and len(c) > 1 for c in criteria):
        raise UserError(f"{config}: best_model_criterion: expected a list of [phase, key, mode], found {criteria!r}")
    found = [(str(phase), str(key)) for phase, key, *_ in criteria]
    # The parts become parts of file names, so that only plain names are safe.
    found = [pair for pair in found if all(re.fullmatch(r"[\w.-]+", part) for part in pair)]
    return sorted(found, key=lambda pair: pair[0] != "valid")


def read_config(config: Union[str, Path]) -> Dict:
    """Read an ESPnet config.yaml (safe loader).

    Raises:
        UserError: unreadable, or not a mapping.
    """
    try:
        text = Path(config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {config}: {e}") from e
    content = parse_yaml(text, f"cannot read {config}")
    if not isinstance(content, dict):
        raise UserError(f"{config} is not a mapping of options")
    return content


def load_safely(path: Union[str, Path], allowed: Sequence[Any] = (), mmap: bool = False) -> Any:
    """Load a file of ``torch.save`` onto the CPU if it has only tensors, plain values and ``allowed`` classes.

    With ``ESPNET_KD_TRUST_PICKLE=1`` everything is loaded.

    Raises:
        UserError: the file has other objects, which could run code when they are read; or it unpacks to many times its
            size.
        Any error of torch for a file that is absent, damaged or of another kind, without its advice on how to load the
            file nevertheless.
    """
    archive = zipfile.is_zipfile(path)
    if archive:
        check_expansion(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=not trusts_pickles(), mmap=mmap)
    except pickle.UnpicklingError as e:
        found = re.search(r"(?:Unsupported global:|unsupported) GLOBAL (\S+)", str(e))
        damaged = archive and zipfile.ZipFile(path).testzip() is not None
        if damaged or (found is None and not _has_pickled_objects(path)):
            raise pickle.UnpicklingError("it is no file that torch.save has written whole") from e
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path} holds more than tensors{what}, and reading that could run code; "
            "if you trust who made it, set ESPNET_KD_TRUST_PICKLE=1"
        ) from e


def _has_pickled_objects(path: Union[str, Path]) -> bool:
    """Whether a file is a complete pickle that imports something, judged without running it."""
    imports = False
    try:
        with open(path, "rb") as f:
            for opcode, _, _ in pickletools.genops(f):
                imports = imports or opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE")
    except Exception:  # the file is not a pickle, or an incomplete one
        return False
    return imports


def load_state(model_file: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """Load a state dict, refusing anything but tensors (:func:`load_safely`); also the ``module`` of a DeepSpeed file.

    Raises:
        UserError: unreadable, damaged, or holding other objects.
    """
    try:
        state = load_safely(model_file)
    except UserError:
        raise
    except Exception as e:  # pickle, zip, runtime or OS error: the file cannot be loaded
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise UserError(f"cannot load {model_file}: {reason}; is the file damaged, or not a model?") from e
    if isinstance(state, dict) and isinstance(state.get("module"), dict):
        state = state["module"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{model_file} is not a model (a mapping of names to tensors); give an …epoch.pth or ….ave.pth")
    return state


def student_only(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Leave out the modules that were trained with the student (keys under ``kd_heads.``)."""
    return {k: v for k, v in state.items() if not k.startswith(KD_PREFIX)}


def load_model(
    config: Union[str, Path], model_file: Union[str, Path], device: str = "cpu"
) -> Tuple[Any, argparse.Namespace]:
    """Build the ESPnet ASR model of ``config`` and load ``model_file`` into it, in eval mode.

    Nothing that the configuration names is loaded, downloaded or run (:mod:`espnet_kd.experiments.trust`). Every key
    must match (ESPnet's own loader accepts missing ones), except for the differences of older files that
    :func:`espnet_kd.experiments.states.fit_state` handles; keys under ``kd_heads.`` are left out.

    Returns:
        (ESPnetASRModel, argparse.Namespace of the config)

    Raises:
        UserError: the files don't fit each other, cannot be read, or could run code.
    """
    from espnet_kd.offline import ASRTask

    content = read_config(config)
    args = argparse.Namespace(**unfold_config(content, str(config)))
    args.init = None  # the values come from the file
    check_components(args, config)
    args.token_list = read_token_list(args.token_list, Path(config))
    frontend_conf = getattr(args, "frontend_conf", None)
    state = student_only(load_state(model_file))
    if PORTABLE in content:
        state = unfold_state(state)
    try:
        with _statistics(args, state, f"{model_file} does not fit {config}"), foreign(args), guarded():
            model = ASRTask.build_model(args)
            if getattr(args, "use_adapter", False):
                _add_adapter(model, args)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"cannot build the model of {config}: {type(e).__name__}: {e}") from e
    args.frontend_conf = frontend_conf  # restored, because ESPnet empties it if there is input_size
    state = fit_state(model, state, model_file)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:  # torch's message lists missing keys, unexpected keys and sizes
        raise UserError(f"{model_file} does not fit {config}: {e}") from e
    drop_nothing(model)
    logging.info("loaded %s", model_file)
    return model.to(device).eval(), args


def foreign(args: argparse.Namespace) -> ContextManager:
    """Register this package's encoders while ESPnet builds a model of another toolkit."""
    if str(args.encoder).lower() not in FOREIGN:
        return contextlib.nullcontext()
    from espnet_kd.foreign.encoders import known_to_espnet

    return known_to_espnet()


def drop_nothing(model: ESPnetASRModel) -> None:
    """Switch off the dropout of ESPnet's RNN encoders, which is active in eval mode too."""
    for module in model.modules():
        if type(module).__name__ == "RNNP":
            module.dropout = 0.0


def _add_adapter(model: ESPnetASRModel, args: argparse.Namespace) -> None:
    """Add the layers of ESPnet's fine-tuning, in the state in which it saves them."""
    from espnet2.layers.create_adapter import create_adapter

    try:
        create_adapter(model, args.adapter, getattr(args, "adapter_conf", None) or {})
    except ImportError as e:
        raise UserError(f"adapter: {args.adapter} needs a package that is not installed: pip install loralib") from e


@contextlib.contextmanager
def _statistics(args: argparse.Namespace, state: Dict[str, torch.Tensor], where: str) -> Iterator[None]:
    """Give GlobalMVN a file to open, made of the mean and deviation that are in the model.

    GlobalMVN requires a file when it is built. The one in config.yaml may be missing, or belong to another recipe.
    """
    if str(getattr(args, "normalize", None)).lower() != "global_mvn":
        yield
        return
    mean, std = (state.get(f"normalize.{name}") for name in ("mean", "std"))
    if mean is None or std is None:
        raise UserError(f"{where}: normalize: global_mvn, but the file lacks normalize.mean or normalize.std")
    conf = args.normalize_conf or {}
    with tempfile.TemporaryDirectory() as scratch:
        args.normalize_conf = {**conf, "stats_file": f"{scratch}/feats_stats.npz"}
        write_statistics(Path(scratch) / "feats_stats.npz", mean, std)
        yield
        args.normalize_conf = conf


def write_statistics(path: Path, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Write a feats_stats.npz from which ESPnet computes this mean and deviation, each (D,)."""
    first, spread = mean.double().cpu().numpy(), std.double().cpu().numpy()
    np.savez(path, count=1, sum=first, sum_square=spread**2 + first**2)
