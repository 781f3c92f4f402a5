"""A student as one graph: waveform in, log-probabilities out, with dynamic batch and time."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from espnet_kd.cli import UserError
from espnet_kd.deploy.features import LogMel, Normalisation, padding
from espnet_kd.inference.encode import least_samples, measure_frame_shift
from espnet_kd.inference.padding import EXACT_ENCODERS, is_exact, make_encoder_exact

if TYPE_CHECKING:
    from espnet2.asr.encoder.abs_encoder import AbsEncoder
    from espnet2.asr.espnet_model import ESPnetASRModel

#: Why these encoders cannot be exported; any other encoder outside ``EXACT_ENCODERS`` is not known to be exact.
REASONS = {
    "ContextualBlockConformerEncoder": "its blocks are counted in Python, so that a graph is right at one length "
    "alone; export it with --format stream",
    "ContextualBlockTransformerEncoder": "its blocks are counted in Python, so that a graph is right at one length "
    "alone; export it with --format stream",
    "RNNEncoder": "its packed sequences have no ONNX operator; export it with --format espnet",
    "VGGRNNEncoder": "its packed sequences have no ONNX operator; export it with --format espnet",
}
INPUTS, OUTPUTS = ("speech", "speech_lengths"), ("log_probs", "log_prob_lengths")
#: ESPnet's positional encodings whose tables may be cut; the older encodings index their table from its end.
_TABLES = ("PositionalEncoding", "ScaledPositionalEncoding", "RelPositionalEncoding")


class StudentGraph(nn.Module):
    """Maps (B, N) samples in [-1, 1] and (B,) lengths to (B, T, V) CTC log-probabilities and (B,) frames.

    Each utterance gets the outputs that ESPnet gives it alone; an utterance shorter than ``least_samples`` has no
    frame. N is 1 or more; the values in the padding do not matter.
    """

    def __init__(self, model: ESPnetASRModel, *, max_seconds: float, rate: float, volume: Optional[float] = None):
        """Take an ESPnetASRModel, which is left as it is.

        Args:
            model: in eval mode on the CPU.
            max_seconds: longest utterance that the graph accepts; the table of positions has this length.
            rate: sampling rate in Hz.
            volume: peak to which each utterance is scaled (``speech_volume_normalize``), or None.

        Raises:
            UserError: the model has a part that cannot be exported exactly; the message has its name and the reason.
        """
        super().__init__()
        check_exportable(model)
        model = copy.deepcopy(model).float()
        self.volume = volume
        self.least_samples = least_samples(model, rate)
        self.features = LogMel(model.frontend, self.least_samples)
        self.normalise = Normalisation(model.normalize) if model.normalize is not None else None
        self.encoder, self.ctc = model.encoder, model.ctc
        self.ctc.dropout_rate = 0.0  # ESPnet applies this dropout in eval mode, too
        self.frame_shift = measure_frame_shift(model, rate)
        bound_positions(self.encoder, int(max_seconds / self.frame_shift) + 2)
        make_encoder_exact(self.encoder)
        self._takes_masks = "masks" in inspect.signature(self.encoder.forward).parameters
        self._conditioned = getattr(self.encoder, "interctc_use_conditioning", False)

    def forward(self, speech: Tensor, lengths: Tensor) -> Tuple[Tensor, Tensor]:
        """See the class."""
        if self.volume is not None:
            inside = speech.masked_fill(padding(lengths, speech), 0.0)
            peak = inside.abs().amax(dim=1, keepdim=True)
            speech = speech * torch.where(peak > 0, self.volume / peak.clamp(min=1e-30), torch.ones_like(peak))
        feats, frames = self.features(speech, lengths)
        if self.normalise is not None:
            feats = self.normalise(feats, frames)
        options = {"ctc": self.ctc} if self._conditioned else {}
        if self._takes_masks:
            options["masks"] = padding(frames, feats)
        encoded, counted, *_ = self.encoder(feats, frames, **options)
        if isinstance(encoded, tuple):  # (output, outputs of InterCTC layers)
            encoded = encoded[0]
        return self.ctc.ctc_lo(encoded).log_softmax(dim=-1), counted.masked_fill(lengths < self.least_samples, 0)


def check_exportable(model: ESPnetASRModel) -> None:
    """Refuse a model whose graph would not have the outputs of ESPnet (:class:`UserError`)."""
    if getattr(model, "ctc", None) is None:
        raise UserError("the model has no CTC head, which an export needs")
    encoder = type(model.encoder).__name__
    if encoder not in EXACT_ENCODERS:
        reason = REASONS.get(encoder, f"it is not known to be exact; known: {', '.join(EXACT_ENCODERS)}")
        raise UserError(f"encoder: {encoder} cannot be exported as a graph: {reason}")
    if not is_exact(model.encoder):
        raise UserError("encoder_conf: rel_pos_type: legacy cannot be exported: its output depends on the padding")
    if getattr(model.encoder, "ctc_trim", False):
        raise UserError("encoder_conf: ctc_trim cannot be exported: it leaves out frames depending on their content")
    for part in ("preencoder", "postencoder"):
        if getattr(model, part) is not None:
            raise UserError(f"{part}: {type(getattr(model, part)).__name__} cannot be exported")
    if model.frontend is None:
        raise UserError("a model without frontend, which takes features, cannot be exported: an export takes audio")


def bound_positions(encoder: AbsEncoder, frames: int) -> None:
    """Cut the tables of positions in an encoder, 5,000 frames by default, to ``frames``."""
    for module in encoder.modules():
        if type(module).__name__ in _TABLES and not getattr(module, "reverse", False):
            module.pe = None
            module.extend_pe(torch.zeros(1, frames))


def write_graph(
    graph: nn.Module,
    example: Sequence[Tensor],
    *,
    opset: int,
    inputs: Sequence[str] = INPUTS,
    outputs: Sequence[str] = OUTPUTS,
    axes: Optional[Dict[str, Dict[int, str]]] = None,
) -> bytes:
    """The ONNX file of a graph, made by tracing it with ``example``.

    Raises:
        UserError: the opset lacks an operation of the graph.
    """
    axes = axes or {
        "speech": {0: "batch", 1: "samples"},
        "speech_lengths": {0: "batch"},
        "log_probs": {0: "batch", 1: "frames"},
        "log_prob_lengths": {0: "batch"},
    }
    options: Dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    content = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns about each branch that it takes for a constant; check.py tests the outputs instead.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                graph.eval(),
                tuple(example),
                content,  # type: ignore[arg-type]  # its stubs accept only file names
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=axes,
                **options,
            )
        except (torch.onnx.errors.OnnxExporterError, ValueError) as e:
            reason = next(iter(str(e).splitlines()), type(e).__name__)
            raise UserError(f"--opset {opset}: the graph cannot be written: {reason}") from e
    return content.getvalue()


def example_batch(rate: float, seconds: Sequence[float], seed: int = 0) -> Tuple[Tensor, Tensor, List[Tensor]]:
    """Make audio to check a graph: padded (B, N), (B,) lengths, and the utterances; noise of varying level."""
    generator = torch.Generator().manual_seed(seed)
    waves = []
    for duration in seconds:
        n = int(duration * rate)
        level = torch.rand(1 + n // 800, generator=generator).repeat_interleave(800)[:n]
        waves.append(0.3 * level * torch.randn(n, generator=generator))
    return nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(w) for w in waves]), waves
