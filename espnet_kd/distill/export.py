"""Export of a student's experiment as a plain ESPnet experiment."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch
import yaml

from espnet_kd.cli import UserError
from espnet_kd.distill.options import KD_OPTIONS
from espnet_kd.distill.page import objective_class
from espnet_kd.distill.record import RECORD
from espnet_kd.experiments.audio_options import sampling_rate
from espnet_kd.experiments.models import (
    find_experiment,
    load_model,
    load_state,
    read_config,
    student_only,
    write_statistics,
)
from espnet_kd.experiments.named_files import find_token_model
from espnet_kd.experiments.portable import PORTABLE, can_fold, fold, unfold_config, unfold_state
from espnet_kd.experiments.trust import FOREIGN
from espnet_kd.files import replacing, replacing_directory

MODEL, CONFIG, STATISTICS, TOKEN_MODEL = "model.pth", "config.yaml", "feats_stats.npz", "bpe.model"
DECODE, README = "decode.yaml", "README.md"
#: The files of an export.
FILES = (CONFIG, MODEL, STATISTICS, TOKEN_MODEL, DECODE, README)


def export(experiment: Union[str, Path], output_dir: Optional[Path] = None) -> Path:
    """Write ``EXP/export`` and ``EXP/export.zip``, and check that the model loads.

    The directory has config.yaml and model.pth, which stock ESPnet loads from any working directory; feats_stats.npz
    and bpe.model where the model has them; decode.yaml, the options that a CTC model is decoded with; and a README.md.
    The zip is that of ``espnet2.bin.pack``. Both are whole or absent; an earlier export is replaced.

    Raises:
        UserError: the experiment is incomplete or an imported model, a file that its config names is missing or of
            another kind, or the output directory has other files.
    """
    config_file, model_file = find_experiment(experiment)
    out = output_dir or config_file.parent / "export"
    config, state = without_distillation(config_file, load_state(model_file))
    if str(config.get("encoder")).lower() in FOREIGN:
        raise UserError(
            f"{config_file}: its encoder, {config['encoder']}, runs a model of another toolkit, which ESPnet alone "
            f"cannot load; distil it (run.sh --teacher {config_file.parent}), and export the student"
        )
    # Reset options that only training needs, and files that the user of the model does not have.
    config.update(output_dir=str(out), init_param=[], resume=False)
    with replacing_directory(out, FILES) as part:
        _write(part, config_file, config, state, out)
        # The zip is written before the directory, whose existence means that the export is complete.
        with replacing(out.with_name(f"{out.name}.zip"), "wb") as f:
            _write_zip(f, part, out)
    load_model(out / CONFIG, out / MODEL)
    return out


def _write(part: Path, config_file: Path, config: Dict[str, Any], state: Dict[str, torch.Tensor], out: Path) -> None:
    """Fill ``part``, which becomes ``out``."""
    mean, std = (state.get(f"normalize.{name}") for name in ("mean", "std"))
    if mean is not None and std is not None and (config.get("normalize_conf") or {}).get("stats_file"):
        # GlobalMVN opens its file of statistics when it is built, although the model's own state then replaces them.
        write_statistics(part / STATISTICS, mean, std)
        config["normalize_conf"]["stats_file"] = str(out / STATISTICS)
    options: Dict[str, Any] = {"ctc_weight": 1.0, "beam_size": min(10, len(config["token_list"])), "nbest": 1}
    if config.get("bpemodel"):
        source = config["bpemodel"]
        if config.get("token_type") == "bpe":
            source = find_token_model(argparse.Namespace(**config), config_file)
            shutil.copyfile(source, part / TOKEN_MODEL)
            config["bpemodel"] = str(out / TOKEN_MODEL)
            options["bpemodel"] = str((out / TOKEN_MODEL).absolute())
    if can_fold(config, state):
        config, state = fold(config, state)
    torch.save(state, part / MODEL)
    _dump(part / CONFIG, config)
    _dump(part / DECODE, options)
    usage = _usage(config, "bpemodel" in options)
    (part / README).write_text(f"# Use the student\n\n{usage}", encoding="utf-8")


def _dump(path: Path, content: Dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _needs_statistics(config: Dict[str, Any]) -> bool:
    return PORTABLE not in config and bool((config.get("normalize_conf") or {}).get("stats_file"))


def usage_of_export(folder: Path) -> str:
    """Instructions for the use of an export with ESPnet, in Markdown."""
    return _usage(read_config(folder / CONFIG), (folder / TOKEN_MODEL).exists())


def _usage(config: Dict[str, Any], has_token_model: bool) -> str:
    rate = sampling_rate(argparse.Namespace(**unfold_config(config, CONFIG)))
    more = '**{**options, "bpemodel": str(folder / "bpe.model")}' if has_token_model else "**options"
    place = ""
    if _needs_statistics(config):
        place = (
            "\nESPnet looks for `feats_stats.npz` of this model at the path in config.yaml, relative to the working\n"
            "directory: start in the recipe's directory, or use the zip.\n"
        )
    return f"""```python
import pathlib, soundfile, yaml
from espnet2.bin.asr_inference import Speech2Text
folder = pathlib.Path("export")  # where this file lies
options = yaml.safe_load((folder / "{DECODE}").read_text())
student = Speech2Text(folder / "{CONFIG}", folder / "{MODEL}", {more})
text, *_ = student(soundfile.read("speech.wav")[0])[0]  # {rate:g} Hz, one channel
```

It needs ESPnet (`pip install espnet torchaudio`) and nothing else. `{DECODE}` has options for a CTC model: ESPnet's
defaults ask for an attention decoder too. Of the zip beside this folder:
`Speech2Text(**espnet2.main_funcs.pack_funcs.unpack("export.zip", "student"), ctc_weight=1.0)`.
{place}"""


def _write_zip(f: Any, part: Path, out: Path) -> None:
    """Write an export as ``espnet2.bin.pack`` does, with paths that are rewritten when it is unpacked."""
    config = read_config(part / CONFIG)
    if _needs_statistics(config):
        config["normalize_conf"]["stats_file"] = STATISTICS
    if config.get("bpemodel") == str(out / TOKEN_MODEL):
        config["bpemodel"] = TOKEN_MODEL
    meta = {"files": {"asr_model_file": MODEL}, "yaml_files": {"asr_train_config": CONFIG}}
    options = {k: v for k, v in read_config(part / DECODE).items() if k != "bpemodel"}
    text = {"meta.yaml": meta, CONFIG: config, DECODE: options}

    def add(name: str, content: bytes) -> None:
        info = zipfile.ZipInfo(name)  # has a constant date, so that the same student gives the same bytes
        info.external_attr = 0o644 << 16
        packed.writestr(info, content)

    with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as packed:
        for name, content in text.items():
            buffer = io.StringIO()
            yaml.safe_dump(content, buffer, sort_keys=False, allow_unicode=True)
            add(name, buffer.getvalue().encode())
        for path in sorted(part.iterdir()):
            if path.name not in text:
                add(path.name, path.read_bytes())


def without_distillation(
    config_file: Path, state: Dict[str, torch.Tensor]
) -> Tuple[Dict[str, Any], Dict[str, torch.Tensor]]:
    """Configuration and parameters of the plain student, as converted by the objectives of the KD stage.

    Raises:
        UserError: the record of the KD stage is damaged, or one of its objectives cannot be imported.
    """
    config = read_config(config_file)
    if PORTABLE in config:  # the experiment is an export itself
        config, state = unfold_config(config, str(config_file)), unfold_state(state)
    config = {k: v for k, v in config.items() if k not in KD_OPTIONS}
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
        raise UserError(f"{record} is missing; it describes the KD heads in this model, so put it back")
    return config, student_only(state)

