"""Builds the graph of each form, and compares it with ESPnet."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch

from espnet_kd.cli import UserError
from espnet_kd.deploy import block_graph, check, session, sherpa
from espnet_kd.deploy.block_stream import Windows
from espnet_kd.deploy.graph import StudentGraph, example_batch, write_graph
from espnet_kd.deploy.student import Student
from espnet_kd.inference.encode import least_samples, measure_frame_shift

#: Seconds of audio that a streaming graph gets at a time when it is checked.
PIECE = 0.37
#: int8 is worth its loss of accuracy only if the graph shrinks to this share of its size.
WORTHWHILE = 0.9


@dataclass
class Built:
    """A graph that was checked against ESPnet."""

    content: bytes
    difference: float  #: largest of log-probabilities, nats
    facts: Dict[str, Any] = field(default_factory=dict)  #: entries of student.json


def build_form(
    student: Student, form: str, *, max_seconds: float = 30.0, opset: int = 17, quantize: str = "none"
) -> Built:
    """Build the graph of a form.

    Raises:
        UserError: the student cannot be exported exactly; or the graph differs from ESPnet.
    """
    facts = {
        "frame_shift": measure_frame_shift(student.model, student.rate),
        "least_samples": least_samples(student.model, student.rate),
        "max_seconds": None if form == "stream" else max_seconds,
    }
    content, run, expected, options = _BUILDERS[form](student, max_seconds, opset, facts)
    options = {"rate": student.rate, "max_seconds": max_seconds, **options}
    off = check.check_graph(run(content), expected, **options)
    if quantize == "int8":
        size, content = len(content), to_int8(content)
        if len(content) > WORTHWHILE * size:
            logging.warning(
                "--quantize int8: %.2f MB in place of %.2f: it saves little", len(content) / 1e6, size / 1e6
            )
        # This tolerance accepts any finite values, so that only failures, other shapes and NaN are refused.
        off = check.check_graph(run(content), expected, tolerance=-check.FLOOR, **options)
    return Built(content, off, facts)


#: The graph's content, a function that loads it for running, the reference, options of `check.check_graph`.
_Parts = Tuple[bytes, Callable[[bytes], session.Run], session.Run, Dict[str, Any]]


def _whole(student: Student, max_seconds: float, opset: int, facts: Dict[str, Any]) -> _Parts:
    graph = StudentGraph(student.model, max_seconds=max_seconds, rate=student.rate, volume=student.volume)
    content = write_graph(graph, example_batch(student.rate, [1.0, 0.7])[:2], opset=opset)
    expected = check.reference_of(student.model, student.volume)
    return content, lambda c: session.run_of(session.onnx_session(c)), expected, {}


def _sherpa(student: Student, max_seconds: float, opset: int, facts: Dict[str, Any]) -> _Parts:
    graph = StudentGraph(student.model, max_seconds=max_seconds, rate=student.rate, volume=student.volume)
    wrapped = sherpa.SherpaGraph(graph, student.no_text)
    example = example_batch(student.rate, [1.0])[0]
    content = write_graph(
        wrapped, (example,), opset=opset, inputs=sherpa.INPUTS, outputs=sherpa.OUTPUTS, axes=sherpa.AXES
    )
    reference = check.reference_of(student.model, student.volume)

    def expected(waves: session.Waves) -> List[np.ndarray]:
        given = [torch.from_numpy(x)[None] for x in reference([session.standardise(w) for w in waves])]
        return [wrapped.expand(x)[0, :: wrapped.repeats].numpy() for x in given]

    return (
        content,
        lambda c: session.run_of_sherpa(session.onnx_session(c), wrapped.repeats),
        expected,
        {"batches": (1,)},
    )


def _stream(student: Student, max_seconds: float, opset: int, facts: Dict[str, Any]) -> _Parts:
    graph = block_graph.BlockGraph(student.model, student.volume)
    content = write_graph(
        graph, graph.example(), opset=opset, inputs=block_graph.INPUTS, outputs=block_graph.OUTPUTS, axes={"window": {}}
    )
    facts["geometry"] = asdict(graph.geometry)
    piece = int(PIECE * student.rate)

    def runner(content: bytes) -> session.Run:
        loaded = session.onnx_session(content)

        def run(waves: session.Waves) -> List[np.ndarray]:
            found = []
            for wave in waves:
                windows = Windows(loaded, graph.geometry, len(student.tokens))
                parts = [windows.push(wave[i : i + piece], False) for i in range(0, len(wave), piece)]
                found.append(np.concatenate([*parts, windows.push(wave[:0], True)]))
            return found

        return run

    # Edge cases: exactly one block, one frame more than a block, and one frame more than two blocks.
    g = graph.geometry
    samples = [n * g.stride + g.receptive - 2 * g.reach + 0.5 for n in (g.block - 1, g.block, g.block + g.hop)]
    edges = [n / student.rate for n in samples]
    reference = check.reference_of(student.model)
    return content, runner, reference, {"batches": (1,), "lengths": (*check.LENGTHS, *edges)}


_BUILDERS = {"onnx": _whole, "web": _whole, "sherpa": _sherpa, "stream": _stream}


def to_int8(content: bytes) -> bytes:
    """Return the graph with 8-bit weights in its matrix products, which quantise their inputs when they are run.

    The mel filters are not quantised: power spectra have more orders of magnitude than 8 bits can represent.

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
        out = Path(scratch) / "model.onnx"
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # onnxruntime warns about each product that it does not quantise
        try:
            quantize_dynamic(
                graph, out, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"],
                nodes_to_exclude=mel,
            )  # fmt: skip
        finally:
            logging.disable(before)
        return out.read_bytes()
