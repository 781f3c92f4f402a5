"""Writing the export for one runtime: a folder with the model and its description, which is whole or absent."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

from espnet_kd.cli import UserError
from espnet_kd.deploy import sherpa, web
from espnet_kd.deploy.backends import ABOUT, MODEL
from espnet_kd.deploy.forms import Built, build_form
from espnet_kd.deploy.student import Student
from espnet_kd.distill.export import TOKEN_MODEL
from espnet_kd.files import replacing_directory, sha256_of

TOKENS, CARD = "tokens.txt", "README.md"
FORMS = ("onnx", "sherpa", "web", "stream")
_GRAPH = (MODEL, TOKENS, TOKEN_MODEL, ABOUT, CARD)
#: The files of each format's folder.
FILES = {
    "onnx": _GRAPH,
    "sherpa": _GRAPH,
    "stream": _GRAPH,
    "web": (MODEL, ABOUT, CARD, web.ORT, *web.PAGE_FILES),
}
OPSETS = range(14, 21)  #: opsets in which torch's tracing exporter can write all of a student's operations


@dataclass
class Options:
    """How a graph is written."""

    quantize: str = "none"  #: none, or int8: weights of matrix products
    max_seconds: float = 30.0  #: longest audio of one utterance
    opset: int = 17
    ort_web: Optional[Path] = None  #: dist/ of onnxruntime-web, for the form web

    def check(self) -> None:
        """Refuse values out of range (:class:`UserError`)."""
        if not 1 <= self.max_seconds <= 3600:
            raise UserError(f"--max_seconds is {self.max_seconds:g}; it must be between 1 and 3600")
        if self.opset not in OPSETS:
            raise UserError(f"--opset is {self.opset}; it must be between {OPSETS[0]} and {OPSETS[-1]}")


def write_form(student: Student, form: str, out: Path, options: Options) -> Path:
    """Build and check the graph of a form, then write it to the folder ``out``; an export there is replaced.

    Raises:
        UserError: the student cannot be exported exactly, or ``out`` holds something else.
    """
    options.check()
    built = build_form(
        student, form, max_seconds=options.max_seconds, opset=options.opset, quantize=options.quantize
    )
    with replacing_directory(out, FILES[form], f"an export for {form}") as part:
        (part / MODEL).write_bytes(built.content)
        if form == "web":
            web.write_page(part, options.ort_web)
        else:
            _write_tokens(part, student, form)
        about = describe_export(student, built, form, options)
        files = sorted(p for p in part.rglob("*") if p.is_file())
        about["files"] = {str(p.relative_to(part)): sha256_of(p) for p in files}
        text = json.dumps(about, indent=2, ensure_ascii=False)
        (part / ABOUT).write_text(text + "\n", encoding="utf-8")
    size = len(built.content) / 1e6
    logging.info("%s: %.2f MB, largest difference to ESPnet %.1e nats", out, size, built.difference)
    return out


def _write_tokens(part: Path, student: Student, form: str) -> None:
    lines = student.tokens
    if form == "sherpa":
        lines = sherpa.token_lines(lines, student.args.token_type, _space(student), student.no_text)
    (part / TOKENS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if student.token_model is not None:
        (part / TOKEN_MODEL).write_bytes(student.token_model)


def _space(student: Student) -> str:
    return getattr(student.args, "space_symbol", "<space>")


def describe_export(student: Student, built: Built, form: str, options: Options) -> Dict[str, Any]:
    """The contents of student.json, without the list of files."""
    versions = {}
    for package in ("torch", "espnet", "espnet_kd", "onnx", "onnxruntime"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "format": form,
        "name": student.name,
        "sampling_rate": student.rate,
        **built.facts,
        "opset": options.opset,
        "quantize": options.quantize,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "largest_difference": built.difference,
        "token_type": student.args.token_type,
        "space_symbol": _space(student),
        "blank": 0,
        "no_text": student.no_text,
        "tokens": student.tokens,
        "versions": versions,
    }
