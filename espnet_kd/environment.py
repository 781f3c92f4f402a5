"""Versions and hardware with which results are made, and the peak memory of this process."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import resource
import sys
from pathlib import Path
from typing import Dict


def environment() -> Dict[str, str]:
    """Date, versions and processor of this run."""
    facts = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python version": platform.python_version(),
    }
    for package in ("torch", "espnet", "espnet_kd"):
        try:
            facts[f"{package} version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[f"{package} version"] = "not installed"
    facts["CPU"] = processor()
    return facts


def processor() -> str:
    """Name of the processor, which Python's ``platform`` does not have on Linux."""
    found = _in_proc("cpuinfo", r"^model name\s*:\s*(.*\S)")
    return found or platform.processor() or platform.machine()


def peak_memory() -> int:
    """Peak memory of this process, in bytes."""
    peak = _in_proc("self/status", r"^VmHWM:\s*(\d+) kB")
    if peak:
        return 1024 * int(peak)
    # Only if /proc has no value: on Linux exec keeps this one, so that it may be the parent's.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _in_proc(name: str, pattern: str) -> str:
    """Text of a pattern's first group in a file of /proc; empty if there is no such file or line."""
    try:
        found = re.search(pattern, (Path("/proc") / name).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""
