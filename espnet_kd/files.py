"""Files that are whole or absent: write beside, then rename into place. Directories held by one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any, Iterator, Union

from espnet_kd.cli import UserError


@contextlib.contextmanager
def replacing(path: Union[str, Path], mode: str = "w", sync: bool = True) -> Iterator[IO]:
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends well.

    Text is UTF-8. A kill or an exception leaves the old file, or none, never half of the new one; nor does a power cut,
    unless ``sync`` is off, which saves milliseconds a file where there are very many.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        # mkstemp makes 0600; the file is to have what the user's umask says, as open() would give.
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(fd, 0o666 & ~umask)
        with open(fd, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise


def read_settings(path: Path) -> Any:
    """What a JSON file of settings says; an empty dict, which equals no settings, where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def remove_leftovers(path: Union[str, Path]) -> None:
    """Remove what a killed :func:`replacing` left beside ``path``; nobody may be writing it now."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        leftover.unlink(missing_ok=True)


def check_writable(directory: Union[str, Path]) -> None:
    """Refuse a directory, there or yet to be made, that cannot be written (:class:`UserError`); before work for it."""
    place = next(p for p in (Path(directory).absolute(), *Path(directory).absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"cannot write into {directory}; choose another directory, or change its permissions")


@contextlib.contextmanager
def locked(
    directory: Union[str, Path], option: str = "--output_dir", *, part: str = "", shared: bool = False
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
