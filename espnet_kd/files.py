"""Files that are whole or absent: write beside, then rename into place. Directories held by one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any, Collection, Iterator, Union

from espnet_kd.cli import UserError

#: The path of a file or directory, as all functions of this package take it.
PathLike = Union[str, Path]


@contextlib.contextmanager
def replacing(path: PathLike, mode: str = "w", sync: bool = True) -> Iterator[IO]:
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends well.

    Text is UTF-8. A kill or an exception leaves the old file, or none, never half of the new one; nor does a power cut,
    unless ``sync`` is off, which saves milliseconds a file where there are very many.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        # mkstemp makes 0600; the file gets the mode of the user's umask, as from open().
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(fd, 0o666 & ~umask)
        with open(fd, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise


@contextlib.contextmanager
def replacing_directory(out: PathLike, files: Collection[str], what: str = "an export") -> Iterator[Path]:
    """Give an empty directory beside ``out``, and put it in the place of ``out`` when the block ends well.

    Args:
        files: what a directory of this kind consists of; one that holds anything else is not replaced.
        what: the kind, for the message.

    Raises:
        UserError: ``out`` is a file, or holds something else, which would be lost.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory")
    others = sorted(p.name for p in out.iterdir() if p.name not in files) if out.exists() else []
    if others:
        raise UserError(f"{out} holds {others[0]}, which is no part of {what}; give another --output_dir")
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*"):  # of one that was killed
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    os.chmod(part, 0o755)
    try:
        yield part
        old = part.with_name(part.name + ".old")
        if out.exists():  # a directory cannot be renamed over another
            os.rename(out, old)
        os.rename(part, out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def sha256_of(path: PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_settings(path: Path) -> Any:
    """The content of a JSON file; an empty dict, which equals no settings, where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def remove_leftovers(path: PathLike) -> None:
    """Remove what a killed :func:`replacing` left beside ``path``; nobody may be writing it now."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        leftover.unlink(missing_ok=True)


def check_writable(directory: PathLike) -> None:
    """Refuse a directory, there or yet to be made, that cannot be written (:class:`UserError`); before work for it."""
    place = next(p for p in (Path(directory).absolute(), *Path(directory).absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"cannot write into {directory}; choose another directory, or change its permissions")


@contextlib.contextmanager
def locked(
    directory: PathLike, option: str = "--output_dir", *, part: str = "", shared: bool = False
) -> Iterator[None]:
    """Hold ``directory``, which is made where it is missing, for this run: two at once would overwrite each other.

    Args:
        option: what the user calls it, for the message.
        part: hold a part of it alone, of this name.
        shared: together with others who share it.

    Raises:
        UserError: another run holds it, or it cannot be locked.
    """
    directory = Path(directory)
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            f = stack.enter_context(open(directory / (f".lock.{part}" if part else ".lock"), "a+"))
            # A data loader's worker outlives a killed run by some seconds; without this it would hold the lock as long.
            os.register_at_fork(after_in_child=f.close)
            # The lock goes with the process, also after a kill; the file stays.
            fcntl.flock(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as e:
            what = f"part {part} of {directory}" if part else str(directory)
            raise UserError(f"{what} is in use by another run; wait, or choose another {option}") from e
        except OSError as e:
            raise UserError(f"cannot lock {directory}: {e.strerror}; choose another {option}") from e
        yield
