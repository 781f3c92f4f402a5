"""Date, versions and hardware, for the records of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
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
    facts["CPU"] = _processor()
    return facts


def _processor() -> str:
    """Name of the processor, which Linux has only in this file."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
