"""The source files of a model of another toolkit, and the check whether an experiment was imported from them.

Nothing here imports torch, so that a stage with nothing to import ends at once.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

from espnet_kd.cli import UserError
from espnet_kd.files import sha256_of
from espnet_kd.safe_yaml import parse_yaml

#: Files that a directory of Hugging Face's must have, and other files in it that change what the model computes.
CONFIG, VOCABULARY = "config.json", ("vocab.json", "tokenizer.json")
FEATURES, PROCESSOR = "preprocessor_config.json", "processor_config.json"
BESIDE = (FEATURES, PROCESSOR, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "flax_model.msgpack", "tf_model.h5")
EXTRA = "pip install 'espnet_kd[foundation]'"
RECORD = "foreign"  #: the key of config.yaml with the source of an imported experiment




def find_source(source: str, tokens: str | None = None) -> Tuple[List[Path], Dict[str, Any]]:
    """The files of ``hf:DIR``, ``hf:OWNER/NAME[@REVISION]`` or ``onnx:FILE``, the main one first.

    Args:
        tokens: for an ONNX file, the file with its tokens.

    Returns:
        files; the record of the source: its name, revision, and each file's sha256

    Raises:
        UserError: the source is missing, incomplete, or of another kind.
    """
    kind, _, where = source.partition(":")
    record: Dict[str, Any] = {"source": source}
    if kind == "hf" and where:
        if tokens is not None:
            raise UserError("--tokens is for an ONNX file; a Hugging Face model has them in its own files")
        directory, found = locate(where)
        record.update(found)
        files = files_of(directory)
    elif kind == "onnx" and where:
        files = [Path(where)]
        if not files[0].is_file():
            raise UserError(f"{source}: there is no file {where}")
        if tokens is None:
            raise UserError(f"{source}: an ONNX file does not name its tokens; give --tokens FILE, one token a line")
        files.append(Path(tokens))
        if not files[1].is_file():
            raise UserError(f"--tokens: there is no file {tokens}")
    else:
        raise UserError(f"{source} is not a model that can be imported; give hf:DIRECTORY, hf:OWNER/NAME or onnx:FILE")
    return files, {**record, "files": {f.name: sha256_of(f) for f in files}}


def locate(where: str) -> Tuple[Path, Dict[str, Any]]:
    """A directory of Hugging Face's; that of a name on the hub is fetched, if the network is allowed.

    Raises:
        UserError: no such directory, or the hub cannot be reached or does not know the name.
    """
    if Path(where).is_dir():
        return Path(where), {}
    name, _, revision = where.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"hf:{where}: there is no directory {where}")
    hub = need("huggingface_hub")
    try:
        found = hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            ignore_patterns=["adapter.*"],  # of MMS, for more than a thousand languages
        )
    except Exception as e:  # the hub, its cache and the network each have errors of their own
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"hf:{where}: no such directory, and it cannot be fetched from the hub: {reason}") from e
    return Path(found), {"revision": Path(found).name}


def files_of(directory: Path) -> List[Path]:
    """The files of a directory of Hugging Face's that decide what its model computes.

    Raises:
        UserError: one of those that it must have is missing, or its weights are pickled only.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory} is no model of Hugging Face's: it has no {CONFIG}")
    if not any((directory / name).is_file() for name in VOCABULARY):
        raise UserError(f"{directory} has no {' or '.join(VOCABULARY)}: is it a CTC model that was fine-tuned?")
    weights = weights_of(directory)
    if not weights:
        pickled = [name for name in PICKLED if (directory / name).is_file()]
        what = f"its weights are in {pickled[0]}, which to read could run code" if pickled else "it has no weights"
        raise UserError(f"{directory}: {what}; needed is {WEIGHTS[0]} (convert it with transformers: save_pretrained)")
    beside = [directory / name for name in (CONFIG, *VOCABULARY, *BESIDE, WEIGHTS[1])]
    return [*(p for p in beside if p.is_file()), *weights]


def weights_of(directory: Path) -> List[Path]:
    """The files that hold a model's weights: the single file, or those in its index; none if it has neither.

    Other safetensors files are not read: MMS's adapters of other languages, for example, would replace its weights.

    Raises:
        UserError: the index is damaged, or names a file that is missing.
    """
    single, index = (directory / name for name in WEIGHTS)
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    places = read_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: it names no file for some of the weights (weight_map); download the model again")
    found = [directory / Path(name).name for name in sorted(set(places.values()))]
    for path in found:
        if not path.is_file():
            raise UserError(f"{index} names {path.name}, which is missing")
    return found


def is_imported(output_dir: Path, record: Mapping[str, Any]) -> bool:
    """Whether a directory holds this import already.

    Raises:
        UserError: it holds something else.
    """
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return False
    if not (output_dir / "config.yaml").is_file():
        if all(_is_unfinished(p.name) for p in output_dir.iterdir()):
            return False  # left by an import that was stopped
        raise UserError(f"--output_dir: {output_dir} holds other files; give another directory")
    config = output_dir / "config.yaml"
    content = parse_yaml(config.read_text(encoding="utf-8"), f"cannot read {config}")
    there = content.get(RECORD) if isinstance(content, dict) else None
    if not isinstance(there, dict):
        raise UserError(f"--output_dir: {output_dir} holds an experiment that was not imported; give another directory")
    for key in sorted({*there, *record}):
        if there.get(key) != record.get(key):
            old, new = there.get(key), record.get(key)
            if isinstance(old, dict) and isinstance(new, dict):
                changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
                raise UserError(
                    f"{output_dir} was imported from {there.get('source')}, where since then {', '.join(changed)} has "
                    "changed; its students were trained with the old one. Give another --output_dir, or remove this one"
                )
            raise UserError(
                f"{output_dir} was imported with {key}: {old!r}, and now it is {new!r}; give another --output_dir"
            )
    needed = ["model.pth", *(["bpe.model"] if content.get("token_type") == "bpe" else [])]
    return all((output_dir / name).is_file() for name in needed)


def _is_unfinished(name: str) -> bool:
    """Whether an import that was stopped before its end may have left a file of this name."""
    written = ("model.pth", "bpe.model", "config.yaml")
    return name in written[:2] or any(name.startswith(f".{other}.") for other in written)


def read_mapping(path: Path) -> Dict[str, Any]:
    """The mapping in a JSON file (:class:`UserError`: unreadable, or something else)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping of options")
    return content


def read_features(directory: Path) -> Dict[str, Any]:
    """The options of a model's feature extractor: its sampling rate, and whether audio is normalised.

    If a processor was saved, transformers 5 has them in the processor's file, and reads that file first.

    Raises:
        UserError: neither file has such options.
    """
    processor = read_mapping(directory / PROCESSOR) if (directory / PROCESSOR).is_file() else {}
    if isinstance(processor.get("feature_extractor"), dict):
        return processor["feature_extractor"]
    if not (directory / FEATURES).is_file():
        raise UserError(
            f"{directory} has no {FEATURES}, and no feature_extractor in a {PROCESSOR}: the sampling rate, and whether "
            "audio is normalised, are not known; take these files from where the model came from"
        )
    return read_mapping(directory / FEATURES)


def need(package: str) -> Any:
    """Import a package of the extra ``foundation``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise UserError(f"models of other makers need the package {package.partition('.')[0]}: {EXTRA}") from e
