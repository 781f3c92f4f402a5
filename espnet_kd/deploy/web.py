"""The web page of ``--format web``: its own files, and onnxruntime-web from a directory or from npm."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Optional

from espnet_kd.cli import UserError

PAGE = Path(__file__).with_name("page")
PAGE_FILES = ("index.html", "app.js", "recognise.js", "recorder.js")
ORT = "ort"
#: The files of onnxruntime-web that the page loads.
ORT_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PACKAGE = "onnxruntime-web@^1.20"


def write_page(folder: Path, ort_web: Optional[Path]) -> None:
    """Write the page into ``folder``, with onnxruntime-web from ``ort_web`` (its dist/) or from npm.

    Raises:
        UserError: ``ort_web`` lacks a file, or npm cannot fetch the package.
    """
    (folder / ORT).mkdir()
    for name in PAGE_FILES:
        shutil.copyfile(PAGE / name, folder / name)
    if ort_web is not None:
        _copy(ort_web, folder / ORT)
        return
    with tempfile.TemporaryDirectory() as scratch:
        _copy(fetch(Path(scratch)), folder / ORT)


def _copy(source: Path, target: Path) -> None:
    for name in ORT_FILES:
        if not (source / name).is_file():
            raise UserError(f"--ort_web: {source} has no {name}; give dist/ of onnxruntime-web")
        shutil.copyfile(source / name, target / name)


def fetch(scratch: Path) -> Path:
    """Fetch onnxruntime-web into ``scratch`` with npm; return its dist/.

    Raises:
        UserError: npm is not installed, or fails.
    """
    advice = "give --ort_web, the directory dist of onnxruntime-web"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"--format web takes onnxruntime-web from npm, which is not installed; {advice}")
    try:
        done = subprocess.run(
            [npm, "pack", "--silent", PACKAGE], cwd=scratch, capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise UserError(f"npm does not answer; {advice}") from e
    archives = sorted(scratch.glob("*.tgz"))
    if done.returncode != 0 or not archives:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[0]
        raise UserError(f"npm cannot fetch {PACKAGE}: {reason}; {advice}")
    with tarfile.open(archives[0]) as archive:
        for name in ORT_FILES:
            member = archive.extractfile(f"package/dist/{name}")
            if member is None:
                raise UserError(f"{PACKAGE} of npm has no {name}; {advice}")
            (scratch / name).write_bytes(member.read())
    return scratch
