"""Files that are whole or absent (written to a temporary file, then renamed), and locks on directories."""

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
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends without an exception.

    Text is UTF-8. A kill or an exception leaves the old file, or none, but never half of the new one. The same
    holds for a power cut unless ``sync`` is off, which saves milliseconds per file.
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
    """Yield an empty directory beside ``out``, and rename it to ``out`` when the block ends without an exception.

    Args:
        files: names of the files in a directory of this kind; a directory with other files is not replaced.
        what: the kind of directory, for the message.

    Raises:
        UserError: ``out`` is a file, or has other files, which would be lost.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory")
    others = sorted(p.name for p in out.iterdir() if p.name not in files) if out.exists() else []
    if others:
        raise UserError(f"{out} holds {others[0]}, which is no part of {what}; give another --output_dir")
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*"):  # of a killed run
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


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remove_leftovers(path: PathLike) -> None:
    """Remove the temporary files of a killed :func:`replacing` of ``path``. No other process may be writing it."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        leftover.unlink(missing_ok=True)


def check_writable(directory: PathLike) -> None:
    """Refuse a directory that cannot be written or created (:class:`UserError`), before the work for it begins."""
    place = next(p for p in (Path(directory).absolute(), *Path(directory).absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"cannot write into {directory}; choose another directory, or change its permissions")


@contextlib.contextmanager
def locked(
    directory: PathLike, option: str = "--output_dir", *, part: str = "", shared: bool = False
) -> Iterator[None]:
    """Lock ``directory``, which is created if it is missing, so that no two runs write into it at the same time.

    Args:
        option: the command line option of the directory, for the message.
        part: lock only the part of this name.
        shared: a shared lock, which several runs may have at the same time.

    Raises:
        UserError: another run has the lock, or the directory cannot be locked.
    """
    directory = Path(directory)
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            f = stack.enter_context(open(directory / (f".lock.{part}" if part else ".lock"), "a+"))
            # A data loader's worker outlives a killed run by some seconds, and would hold the lock until it ends.
            os.register_at_fork(after_in_child=f.close)
            # The lock ends with the process, also if it is killed; the file remains.
            fcntl.flock(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as e:
            what = f"part {part} of {directory}" if part else str(directory)
            raise UserError(f"{what} is in use by another run; wait, or choose another {option}") from e
        except OSError as e:
            raise UserError(f"cannot lock {directory}: {e.strerror}; choose another {option}") from e
        yield
