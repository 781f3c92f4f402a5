"""Models packed by ``espnet2.bin.pack``: zip files, which are unpacked to an experiment's directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Dict, Union

from espnet_kd.cli import UserError
from espnet_kd.safe_yaml import parse_yaml

#: An archive may unpack to at most EXPANSION times its size plus ALLOWANCE bytes. Parameters hardly compress; a file
#: that is made to fill a disk or the memory compresses a thousandfold.
EXPANSION, ALLOWANCE = 20, 64 * 2**20
MAX_MEMBERS = 10_000
MAX_META = 2**20  # bytes


def is_packed(path: Path) -> bool:
    """Whether this is the name of a packed model."""
    return path.suffix == ".zip"


def check_expansion(archive: Union[str, Path]) -> None:
    """Refuse a zip file, also one of torch.save, that unpacks to many times its size (:class:`UserError`)."""
    size = Path(archive).stat().st_size
    with zipfile.ZipFile(archive) as packed:
        members = packed.infolist()
    # zipfile never reads more of a member than the size in its entry.
    total = sum(member.file_size for member in members)
    if total > EXPANSION * size + ALLOWANCE or len(members) > MAX_MEMBERS:
        raise UserError(
            f"{archive} has {size / 1e6:.1f} MB and unpacks to {total / 1e6:.0f} MB in {len(members)} files, which no "
            "model does; it is not unpacked"
        )


def unpack_model(archive: Path) -> Path:
    """Directory with the config.yaml, model.pth and further files of a packed ASR model, beside each other.

    It is kept in the user's cache (``$XDG_CACHE_HOME/espnet_kd``, by default ``~/.cache/espnet_kd``), so that an
    archive is unpacked once; nothing is written outside of it, whatever the archive's names are.

    Raises:
        UserError: no such archive, it is damaged, it is no packed ASR model, it unpacks to far more than a model has,
            or the cache cannot be written.
    """
    try:
        facts = archive.stat()
    except OSError as e:
        raise UserError(f"cannot read {archive}: {e.strerror}") from e
    key = hashlib.sha256(f"{archive.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espnet_kd"
    place = cache / f"{archive.stem}_{key}"
    if place.is_dir():
        return place
    try:
        with zipfile.ZipFile(archive) as packed:
            names = _members(packed, archive)
            check_expansion(archive)
            cache.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=cache))
            try:
                for name, target in names.items():
                    with packed.open(name) as source, (part / target).open("wb") as f:
                        shutil.copyfileobj(source, f)  # this also compares the checksum
                with contextlib.suppress(FileExistsError):
                    part.rename(place)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    # zipfile raises NotImplementedError for an unknown compression, and RuntimeError for an archive with a password.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as e:
        raise UserError(f"{archive} is damaged, or no zip file: {e}") from e
    except OSError as e:
        raise UserError(
            f"cannot unpack {archive} into {cache}: {e.strerror}; set XDG_CACHE_HOME to another place"
        ) from e
    return place


def _members(packed: zipfile.ZipFile, archive: Path) -> Dict[str, str]:
    """{name in the archive: name of the file that it becomes}."""
    try:
        if packed.getinfo("meta.yaml").file_size > MAX_META:
            raise ValueError("meta.yaml is too long")
        meta = parse_yaml(packed.read("meta.yaml").decode(), f"{archive}: meta.yaml")
        known = {meta["yaml_files"]["asr_train_config"]: "config.yaml", meta["files"]["asr_model_file"]: "model.pth"}
        if not known.keys() <= set(packed.namelist()):
            raise KeyError
    except (KeyError, TypeError, ValueError, UserError) as e:
        raise UserError(f"{archive} is no ASR model packed by espnet2.bin.pack") from e
    others = [n for n in packed.namelist() if n not in known and n != "meta.yaml" and not n.endswith("/")]
    return {**{n: Path(n).name for n in others}, **known}
