"""A student for unmodified sherpa-onnx, which loads it with ``OfflineRecognizer.from_omnilingual_asr_ctc``.

That recogniser runs a graph on one utterance (1, N) of zero mean and unit variance, assumes that frames are 20 ms long
and that the first token is the blank, and reads ``▁`` in tokens.txt as a space.
"""

from __future__ import annotations

from typing import Dict, List, Sequence

import torch
from torch import Tensor, nn

from espnet_kd.cli import UserError
from espnet_kd.deploy.graph import StudentGraph
from espnet_kd.deploy.session import SHERPA_FRAME

SPACE = "▁"
INPUTS, OUTPUTS = ("x",), ("log_probs",)
AXES: Dict[str, Dict[int, str]] = {"x": {1: "samples"}, "log_probs": {1: "frames"}}


class SherpaGraph(nn.Module):
    """Maps (1, N) samples to (1, T, V) log-probabilities of 20 ms frames."""

    def __init__(self, graph: StudentGraph, no_text: Sequence[int]):
        """Take a `StudentGraph`, and the tokens that are not text, which are replaced by the blank.

        Raises:
            UserError: see :func:`check_student`.
        """
        super().__init__()
        check_student(graph)
        self.graph, self.repeats = graph, round(graph.frame_shift / SHERPA_FRAME)
        self.no_text = list(no_text)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        log_probs, _ = self.graph(x, torch.as_tensor(x.size(1)).reshape(1).to(torch.int64))
        return self.expand(log_probs)

    def expand(self, log_probs: Tensor) -> Tensor:
        """(B, T, V) → (B, T · repeats, V), blank for tokens that are not text; the best path keeps its text."""
        best = log_probs[..., [0, *self.no_text]].amax(dim=-1, keepdim=True)
        rest = [
            torch.full_like(best, -1e4) if v in self.no_text else log_probs[..., v : v + 1]
            for v in range(1, log_probs.size(-1))
        ]
        log_probs = torch.cat([best, *rest], dim=-1)
        return log_probs[:, :, None].expand(-1, -1, self.repeats, -1).flatten(1, 2)


def check_student(graph: StudentGraph) -> None:
    """Refuse a `StudentGraph` that would not recognise the same in sherpa-onnx.

    Raises:
        UserError: the student depends on the level of the audio, or its frame shift is not a multiple of 20 ms.
    """
    blind = graph.normalise is not None and not graph.normalise.is_global and graph.normalise.means
    if not blind and graph.volume is None:
        kind = "none" if graph.normalise is None else "global_mvn" if graph.normalise.is_global else "utterance_mvn"
        raise UserError(
            f"normalize: {kind}: sherpa-onnx brings audio to zero mean and unit variance, which changes the output "
            "of this student; train one with --feats_normalize utterance_mvn, or use --format onnx"
        )
    repeats = graph.frame_shift / SHERPA_FRAME
    if abs(repeats - round(repeats)) > 1e-6 or repeats < 1:
        raise UserError(
            f"frames of {graph.frame_shift * 1000:g} ms: sherpa-onnx assumes 20 ms, and its times would be wrong; "
            "train a student with frames of a multiple of that (input_layer), or use --format onnx"
        )


def token_lines(tokens: Sequence[str], kind: str, space: str, no_text: Sequence[int]) -> List[str]:
    """Return the lines of tokens.txt, each a token and its number, for ESPnet's ``token_type`` and space symbol."""

    def written(number: int, token: str) -> str:
        if kind == "word" and number and number not in no_text:
            return SPACE + token
        return SPACE if kind == "char" and token == space else token

    return [f"{written(number, token)} {number}" for number, token in enumerate(tokens)]
