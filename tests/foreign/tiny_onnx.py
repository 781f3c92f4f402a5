"""A tiny random ONNX file that maps audio to CTC scores, with its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence, Tuple

import numpy as np

TOKENS = ["a", "b", "c", "d", "|", "<unk>", "<blank>"]


def save(
    directory: Path, tokens: Sequence[str] = TOKENS, last: str = "LogSoftmax", batch="batch", rank: int = 2
) -> Tuple[Path, Path]:
    """Write model.onnx (frames of 20 ms) and tokens.txt; ``last`` is its last operation."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "kernel": rng.standard_normal((8, 1, 400)) * 0.2,
        "matrix": rng.standard_normal((8, len(tokens))),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["audio", "axis"], ["x"]),
        helper.make_node("Conv", ["x", "kernel"], ["y"], strides=[320]),
        helper.make_node("Tanh", ["y"], ["t"]),
        helper.make_node("Transpose", ["t"], ["z"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["z", "matrix"], ["scores"]),
        helper.make_node(last, ["scores"], ["out"], axis=-1),
    ]
    shape = [batch, "samples"] if rank == 2 else [batch, 80, "frames"]
    graph = helper.make_graph(
        nodes if rank == 2 else [helper.make_node("Identity", ["audio"], ["out"])], "tiny",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
        + [numpy_helper.from_array(np.array([1]), "axis")],
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")
    (directory / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(tokens)), encoding="utf-8")
    return directory / "model.onnx", directory / "tokens.txt"
