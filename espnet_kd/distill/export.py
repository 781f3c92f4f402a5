"""From a student's experiment to a plain ESPnet one."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch
import yaml

from espnet_kd.cli import UserError
from espnet_kd.distill.checkpoints import RECORD
from espnet_kd.distill.page import objective_class
from espnet_kd.targets.experiment import find_experiment, load_model, load_state, read_config, student_only

#: Options that the task adds to ESPnet's; an exported config.yaml has none of them.
KD_OPTIONS = (
    *("teacher", "target_cache", "kd_config", "kd_stage", "kd_stages", "teacher_memory", "augmented_teacher", "nbest"),
    "max_nonfinite",
)
#: What an export consists of.
FILES = ("config.yaml", "model.pth", "feats_stats.npz", "bpe.model")


def export(experiment: Union[str, Path], output_dir: Optional[Path] = None) -> Path:
    """Write ``EXP/export`` (config.yaml, model.pth, feats_stats.npz, bpe.model if any) and check that it loads.

    The directory appears whole or not at all; an export from before is replaced.

    Raises:
        UserError: the experiment is incomplete, a file its config names is missing, or the place holds something else.
    """
    config_file, model_file = find_experiment(experiment)
    out = output_dir or config_file.parent / "export"
    _check_place(out)
    config, state = plain_student(config_file, load_state(model_file))
    # What only training needed, and what must not be looked for where the model is used.
    config.update(output_dir=str(out), init_param=[], resume=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*"):  # of one that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    os.chmod(part, 0o755)
    try:
        # GlobalMVN opens its statistics when it is built, although they are in the model as well.
        stats = (config.get("normalize_conf") or {}).get("stats_file")
        if stats:
            config["normalize_conf"]["stats_file"] = _bring(stats, part, "feats_stats.npz", out)
        if config.get("bpemodel"):
            config["bpemodel"] = _bring(config["bpemodel"], part, "bpe.model", out)
        torch.save(state, part / "model.pth")
        (part / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        _replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    load_model(out / "config.yaml", out / "model.pth")
    return out


def plain_student(config_file: Path, state: Dict[str, torch.Tensor]) -> Tuple[Dict[str, Any], Dict[str, torch.Tensor]]:
    """Configuration and parameters without what distillation added, as the KD stage's objectives have it.

    Raises:
        UserError: a damaged record of the KD stage, or an objective of it that cannot be imported.
    """
    config = {k: v for k, v in read_config(config_file).items() if k not in KD_OPTIONS}
    record = config_file.parent / RECORD
    if record.is_file():
        try:
            objectives = json.loads(record.read_text(encoding="utf-8"))["objectives"]
            named = [(o.pop("objective"), {k: v for k, v in o.items() if k != "weight"}) for o in objectives]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{record} is damaged: {e}") from e
        for name, options in named:
            config, state = objective_class(name, str(record)).export(name.rsplit(".", 1)[-1], options, config, state)
    elif len(student_only(state)) < len(state):
        raise UserError(f"{record} is missing, which says what the heads in this model are for; put it back")
    return config, student_only(state)


def _check_place(out: Path) -> None:
    """Refuse a file, or a directory with anything but an export, which would be lost (:class:`UserError`)."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory")
    others = sorted(p.name for p in out.iterdir() if p.name not in FILES) if out.exists() else []
    if others:
        raise UserError(f"{out} holds {others[0]}, which is no part of an export; give another --output_dir")


def _bring(source: str, part: Path, name: str, out: Path) -> str:
    """Copy a file the config names into the export; return the path it will have."""
    if not Path(source).is_file():
        raise UserError(f"{source}, named in config.yaml, is missing; run from the directory that its paths start at")
    shutil.copyfile(source, part / name)
    return str(out / name)


def _replace(part: Path, out: Path) -> None:
    """Put ``part`` in the place of ``out``; a directory cannot be renamed over another."""
    old = part.with_name(part.name + ".old")
    if out.exists():
        os.rename(out, old)
    os.rename(part, out)
    shutil.rmtree(old, ignore_errors=True)
