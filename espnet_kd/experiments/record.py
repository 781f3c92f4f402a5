"""The check for every result whether it exists, is complete, and was made from the present inputs.

The record of a result is a JSON file that is written last, with the inputs: settings, and hashes of files. A result
without its record is not finished. If stopped work can be resumed, a second file holds the inputs from the beginning,
and becomes the record at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.files import read_json, remove_leftovers, replacing, sha256_of


@dataclass(frozen=True)
class Record:
    """The record of one result.

    Attributes:
        path: the record, written last.
        begun: a file with the same inputs from the beginning of the work, if this can be resumed.
        key: the key of the inputs in a file that holds other facts too; None if the file holds only the inputs.
    """

    path: Path
    begun: Optional[Path] = None
    key: Optional[str] = None

    def inputs(self) -> Any:
        """The inputs of a finished result; None if there is no such result, or if its record is damaged."""
        return self._inputs(self.path)

    def inputs_of_begun(self) -> Any:
        """The inputs of a result that is not finished; None if none was begun, or if the file is damaged."""
        return self._inputs(self.begun) if self.begun else None

    def is_of(self, inputs: Any) -> bool:
        """Whether there is a finished result that was made from exactly these inputs."""
        return inputs is not None and self.inputs() == inputs

    def begin(self, inputs: Any = None) -> None:
        """Remove the record before any part of the result is replaced, and write the inputs to ``begun``."""
        self.path.unlink(missing_ok=True)
        for path in (self.path, self.begun):
            if path is not None:
                remove_leftovers(path)
        if self.begun is not None and self.inputs_of_begun() != inputs:
            self._write(self.begun, inputs, {})

    def finish(self, inputs: Any, **facts: Any) -> None:
        """Write the record, because the result is complete; with ``key``, ``facts`` are written beside the inputs."""
        if self.begun is not None and self.key is None and self.inputs_of_begun() == inputs:
            os.replace(self.begun, self.path)  # in one step: a kill leaves one of the two, never both
            return
        self._write(self.path, inputs, facts)
        if self.begun is not None:
            self.begun.unlink(missing_ok=True)

    def _inputs(self, path: Path) -> Any:
        content = read_json(path)
        if self.key is None:
            return content
        return content.get(self.key) if isinstance(content, dict) else None

    def _write(self, path: Path, inputs: Any, facts: Dict[str, Any]) -> None:
        with replacing(path) as f:
            json.dump(inputs if self.key is None else {**facts, self.key: inputs}, f, indent=2)
            f.write("\n")


def inputs_of(files: Iterable[str], values: Sequence[str], fixed: Iterable[str] = ()) -> Dict[str, Any]:
    """The inputs of a result of run.sh.

    Args:
        files: files that are hashed by content, so that a copy with another date is the same input.
        values: options and settings.
        fixed: files that cannot change once a training has begun.

    Raises:
        UserError: a file cannot be read.
    """
    return {"fixed": _hashes(fixed), "files": _hashes(files), "values": list(values)}


def is_trained(directory: Path, inputs: Dict[str, Any]) -> bool:
    """Whether a directory holds a finished model of these inputs (:func:`inputs_of`); if not, it is to be trained.

    The inputs of a new training are recorded. If options differ, the training command refuses those that change what
    is learnt.

    Raises:
        UserError: a training was begun there with other ``fixed`` files.
    """
    record = Record(directory / ".done", directory / ".begun")
    found = record.inputs() or record.inputs_of_begun()
    if found is None:
        found = inputs_of_earlier(directory, inputs)
    begun = (directory / "checkpoint.pth").is_file()
    fixed = found.get("fixed") if isinstance(found, dict) else None
    if begun and fixed != inputs["fixed"]:
        what = next((f"{k}: {v}" for k, v, _ in differences(fixed, inputs["fixed"]) if fixed), "nothing is recorded")
        raise UserError(
            f"{directory} holds a model of other tokens or audio than {' and '.join(inputs['fixed'])} ({what}); choose "
            "another --expdir, or remove it"
        )
    if record.path.is_file():
        # If options differ, the record stays until the training command has accepted them, because it may refuse them.
        return bool(found == inputs)
    record.begin(inputs)
    return False


def inputs_of_earlier(directory: Path, inputs: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The inputs that ``.settings`` records, as earlier versions of run.sh wrote it: POSIX checksums of the contents.

    Returns:
        ``inputs``, without the parts that the checksums do not confirm; None if there is no such file.
    """
    try:
        found = (directory / ".settings").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    data = _checksum(b"".join(Path(p).read_bytes() for p in inputs["fixed"]))
    options = "".join(f"{value}\n" for value in inputs["values"]).encode()
    whole = f"{data} {_checksum(b''.join(Path(p).read_bytes() for p in inputs['files']) + options)}"
    if found == whole:
        return inputs
    # A still earlier version wrote only two numbers, for data and options together. The data count as the same, and
    # the training command compares the options.
    same_data = found.startswith(f"{data} ") or len(found.split()) == 2
    return {**inputs, "values": None} if same_data else {"fixed": None}


def differences(old: Any, new: Any, where: str = "") -> Iterator[Tuple[str, Any, Any]]:
    """(place, old value, new value) of everything that differs between two values read from JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f"{where}[{i}]")
    elif old != new:
        yield where, old, new


def newer_than(path: Path, files: Iterable[str]) -> bool:
    """Whether ``path`` exists and no file is newer, by which earlier versions decided that a result is up to date."""
    try:
        return all(os.stat(f).st_mtime_ns <= path.stat().st_mtime_ns for f in files)
    except OSError:
        return False


def _hashes(files: Iterable[str]) -> Dict[str, str]:
    found = {}
    for file in files:
        try:
            found[file] = sha256_of(file)
        except OSError as e:
            raise UserError(f"cannot read {file}: {e.strerror}") from e
    return found


def _checksum(content: bytes) -> str:
    words: List[str] = subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout.decode().split()
    return " ".join(words[:2])
