"""A tiny random ONNX file that maps audio to CTC scores, with its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Sequence, Tuple

import numpy as np

TOKENS = ["a", "b", "c", "d", "|", "<unk>", "<blank>"]


def save(
    directory: Path,
    tokens: Sequence[str] = TOKENS,
    last: str = "LogSoftmax",
    batch="batch",
    rank: int = 2,
    samples="samples",
    change: Optional[str] = None,
) -> Tuple[Path, Path]:
    """Write model.onnx (frames of 20 ms) and tokens.txt.

    ``last`` is its last operation but for a ``change``: ``cut`` keeps ten frames, ``mask`` makes the first score -inf.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    floats = {
        "kernel": rng.standard_normal((8, 1, 400)) * 0.2,
        "matrix": rng.standard_normal((8, len(tokens))),
        "mask": np.where(np.arange(len(tokens)) == 0, -np.inf, 0.0),
    }
    integers = {"axis": [1], "first": [0], "end": [10]}
    ends = {
        None: helper.make_node("Identity", ["scores2"], ["out"]),
        "cut": helper.make_node("Slice", ["scores2", "first", "end", "axis"], ["out"]),
        "mask": helper.make_node("Add", ["scores2", "mask"], ["out"]),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["audio", "axis"], ["x"]),
        helper.make_node("Conv", ["x", "kernel"], ["y"], strides=[320]),
        helper.make_node("Tanh", ["y"], ["t"]),
        helper.make_node("Transpose", ["t"], ["z"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["z", "matrix"], ["scores"]),
        helper.make_node(last, ["scores"], ["scores2"], axis=-1),
        ends[change],
    ]
    shape = [batch, samples] if rank == 2 else [batch, 80, "frames"]
    graph = helper.make_graph(
        nodes if rank == 2 else [helper.make_node("Identity", ["audio"], ["out"])], "tiny",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in floats.items()]
        + [numpy_helper.from_array(np.array(v), k) for k, v in integers.items()],
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")
    (directory / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(tokens)), encoding="utf-8")
    return directory / "model.onnx", directory / "tokens.txt"
