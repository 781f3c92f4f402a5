"""Writing a student in a form for one runtime: a folder with the model and a description, whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch

from espnet_kd.cli import UserError
from espnet_kd.deploy import check, session, sherpa, web
from espnet_kd.deploy.backends import ABOUT, MODEL
from espnet_kd.deploy.graph import StudentGraph, example_batch, write_graph
from espnet_kd.distill.export import export
from espnet_kd.files import replacing_directory, sha256_of
from espnet_kd.targets.audio_options import sampling_rate, volume
from espnet_kd.targets.encode import ctc_tokens
from espnet_kd.targets.experiment import find_experiment, load_model

TOKENS, TOKEN_MODEL, CARD = "tokens.txt", "bpe.model", "README.md"
FORMS = ("onnx", "sherpa", "web")
#: What a folder of each form consists of.
FILES = {
    "onnx": (MODEL, TOKENS, TOKEN_MODEL, ABOUT, CARD),
    "sherpa": (MODEL, TOKENS, TOKEN_MODEL, ABOUT, CARD),
    "web": (MODEL, ABOUT, CARD, web.ORT, *web.PAGE_FILES),
}
OPSETS = range(14, 21)  #: those that torch's tracing exporter writes with every operation that a student needs


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


@dataclass
class Student:
    """A loaded student and what is known of it."""

    model: torch.nn.Module
    args: Any
    rate: int
    volume: Optional[float]
    tokens: List[str]
    token_model: Optional[bytes]
    name: str
    no_text: List[int] = field(default_factory=list)


def load_student(experiment: Union[str, Path]) -> Student:
    """Load the student of an experiment as it is exported for ESPnet, without what distillation added.

    Raises:
        UserError: as :func:`espnet_kd.distill.export.export`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(experiment, Path(scratch) / "export")
        model, args = load_model(*find_experiment(folder))
        token_model = (folder / TOKEN_MODEL).read_bytes() if (folder / TOKEN_MODEL).exists() else None
    no_text = sorted({model.sos, model.eos})
    name = find_experiment(experiment)[0].parent.resolve().name
    return Student(
        model, args, int(sampling_rate(args)), volume(args), ctc_tokens(model), token_model, name, no_text
    )


def write_form(student: Student, form: str, out: Path, options: Options) -> Path:
    """Write the folder ``out`` of a form; what was there before is replaced. The graph is tried before.

    Raises:
        UserError: the student cannot be exported exactly, or ``out`` holds something else.
    """
    options.check()
    graph = StudentGraph(student.model, max_seconds=options.max_seconds, rate=student.rate, volume=student.volume)
    checked = {"rate": student.rate, "max_seconds": options.max_seconds}
    reference = check.reference_of(student.model, student.volume)
    if form == "sherpa":
        wrapped = sherpa.SherpaGraph(graph, student.no_text)
        example = example_batch(student.rate, [1.0])[0]
        content = write_graph(
            wrapped, (example,), opset=options.opset, inputs=sherpa.INPUTS, outputs=sherpa.OUTPUTS, axes=sherpa.AXES
        )

        def expanded(waves: session.Waves) -> List[Any]:
            given = [torch.from_numpy(x)[None] for x in reference([session.standardise(w) for w in waves])]
            return [wrapped.expand(x)[0, :: wrapped.repeats].numpy() for x in given]

        run = session.run_of_sherpa(session.onnx_session(content), wrapped.repeats)
        off = check.check_graph(run, expanded, batches=(1,), **checked)
    else:
        content = write_graph(graph, example_batch(student.rate, [1.0, 0.7])[:2], opset=options.opset)
        off = check.check_graph(session.run_of(session.onnx_session(content)), reference, **checked)
    if options.quantize == "int8":
        content = to_int8(content)
        session.onnx_session(content)  # that it loads
    with replacing_directory(out, FILES[form], f"an export for {form}") as part:
        (part / MODEL).write_bytes(content)
        _write_tokens(part, student, form)
        about = describe(student, graph, form, options, off)
        if form == "web":
            web.write_page(part, options.ort_web)
        files = sorted(p for p in part.rglob("*") if p.is_file())
        about["files"] = {str(p.relative_to(part)): sha256_of(p) for p in files}
        text = json.dumps(about, indent=2, ensure_ascii=False)
        (part / ABOUT).write_text(text + "\n", encoding="utf-8")
    logging.info("%s: %.2f MB, largest difference to ESPnet %.1e nats", out, len(content) / 1e6, off)
    return out


def _write_tokens(part: Path, student: Student, form: str) -> None:
    space = getattr(student.args, "space_symbol", "<space>")
    if form == "sherpa":
        lines = sherpa.token_lines(student.tokens, student.args.token_type, space, student.no_text)
    else:
        lines = student.tokens
    if form != "web":
        (part / TOKENS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if student.token_model is not None:
            (part / TOKEN_MODEL).write_bytes(student.token_model)


def describe(student: Student, graph: StudentGraph, form: str, options: Options, off: float) -> Dict[str, Any]:
    """What stands in student.json, without the files."""
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
        "frame_shift": graph.frame_shift,
        "least_samples": graph.least_samples,
        "max_seconds": options.max_seconds,
        "opset": options.opset,
        "quantize": options.quantize,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "largest_difference": off,
        "token_type": student.args.token_type,
        "space_symbol": getattr(student.args, "space_symbol", "<space>"),
        "blank": 0,
        "no_text": student.no_text,
        "tokens": student.tokens,
        "versions": versions,
    }


def to_int8(content: bytes) -> bytes:
    """A graph whose matrix products have weights of 8 bits and quantise their inputs when they are run.

    The mel filters stay as they are: powers reach over more orders of magnitude than 8 bits have.

    Raises:
        UserError: the package onnx is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as e:
        raise UserError(f"--quantize int8 needs onnx ({e}): pip install 'espnet_kd[onnx]'") from e
    graph = onnx.load_from_string(content)
    mel = [n.name for n in graph.graph.node if n.op_type == "MatMul" and any(i.endswith("melmat") for i in n.input)]
    if len(mel) != 1:
        raise UserError("--quantize int8: the mel filters are not found in the graph; use --quantize none")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / MODEL
        quantize_dynamic(
            graph, out, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"],
            nodes_to_exclude=mel,
        )  # fmt: skip
        return out.read_bytes()
