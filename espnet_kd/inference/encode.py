"""Outputs of an ESPnet encoder and its CTC head for a batch: logits, hidden states at taps, lengths, frame shift."""

from __future__ import annotations

import bisect
import contextlib
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    ContextManager,
    Dict,
    Generic,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

import torch
from torch import Tensor

from espnet_kd.backend import without_gradient
from espnet_kd.cli import UserError
from espnet_kd.frames import nearest_multiple
from espnet_kd.topk import Posterior

if TYPE_CHECKING:
    from espnet2.asr.encoder.abs_encoder import AbsEncoder
    from espnet2.asr.espnet_model import ESPnetASRModel

#: Encoders whose layers can be tapped one by one: the layers return ((x, pos_emb), mask) or (x, mask).
LAYERED = (
    *("TransformerEncoder", "ConformerEncoder", "BranchformerEncoder", "EBranchformerEncoder"),
    "HuggingFaceCTCEncoder",
)
#: Encoders with the tap ``encoder`` only.
WHOLE = (
    "RNNEncoder",
    "VGGRNNEncoder",
    "ContextualBlockTransformerEncoder",
    "ContextualBlockConformerEncoder",
)
#: Encoders that need batches sorted by length.
SORTED = ("RNNEncoder", "VGGRNNEncoder")
#: Hz; the frame rate of a model whose input is features.
FEATURE_RATE = 100.0


P = TypeVar("P", bound=Posterior)


@dataclass
class EncoderOutputs(Generic[P]):
    """The outputs of an encoder and its CTC head for one batch."""

    logits: P  #: (B, T, V) logits or log-probabilities, or the compressed form of cached targets
    lengths: Tensor  #: (B,) frames
    frame_shift: float  #: seconds
    hidden: Dict[str, Tensor] = field(default_factory=dict)  #: tap → (B, T, D)
    decoder: Optional[Tensor] = None  #: (B, L + 1, V) logits of the attention decoder, for each label and <sos/eos>


#: A student's outputs are tensors; a teacher's may be the compressed posteriors of a target cache.
StudentOutputs = EncoderOutputs[Tensor]
TeacherOutputs = EncoderOutputs[Posterior]


def taps_of(encoder: AbsEncoder) -> List[str]:
    """The names of an ESPnet encoder's taps.

    Raises:
        UserError: the encoder is not in the lists above.
    """
    name = type(encoder).__name__
    if name in LAYERED:
        return ["encoder"] + [f"encoder.{n}" for n in range(1, len(encoder.encoders) + 1)]
    if name in WHOLE:
        return ["encoder"]
    raise UserError(f"cannot take hidden states from a {name}; known: {', '.join(LAYERED + WHOLE)}")


def depth_of(encoder: AbsEncoder) -> int:
    """The number of layers of an ESPnet encoder that can be tapped; 0 if only its output can."""
    return len(encoder.encoders) if type(encoder).__name__ in LAYERED else 0


def check_taps(model: ESPnetASRModel, wanted: Sequence[str], whose: str) -> None:
    """Refuse taps that an ESPnetASRModel lacks. ``decoder`` stands for the outputs of its attention decoder.

    Raises:
        UserError: the model lacks a tap; the message has the taps that it has.
    """
    other = type(model.decoder).__name__ == "MLMDecoder"  # Mask-CTC's decoder
    if "decoder" in wanted and (model.decoder is None or model.use_transducer_decoder or other):
        raise UserError(f"the {whose} has no attention decoder: attention_kl needs one in student and teacher")
    wanted = [tap for tap in wanted if tap != "decoder"]
    if not wanted:
        return
    there = taps_of(model.encoder)
    for tap in wanted:
        if tap not in there:
            name = type(model.encoder).__name__
            raise UserError(f"the {whose} ({name}) has no tap {tap!r}; it has: {', '.join(there)}")
    if whose == "student" and any("." in tap for tap in wanted):
        for option, value in (
            ("layer_drop_rate", getattr(model.encoder.encoders, "layer_drop_rate", 0.0)),
            ("layer_drop_rate", getattr(model.encoder, "layer_drop_rate", 0.0)),
            ("gradient_checkpoint_layers", getattr(model.encoder, "gradient_checkpoint_layers", ())),
        ):
            if value:
                raise UserError(f"the student's encoder has {option}: {value}, so that its layers cannot be tapped")


@contextlib.contextmanager
def recording(encoder: AbsEncoder, taps: Sequence[str]) -> Iterator[Dict[str, Tensor]]:
    """Fill the yielded dict with the hidden states (B, T, D) at ``taps`` while the encoder runs.

    ``encoder.<n>`` is layer n's output after the encoder's ``after_norm``, as in ESPnet's InterCTC, so that an encoder
    cut after layer n computes the same. ``encoder`` is left to the caller, who has the encoder's output.
    """
    hidden: Dict[str, Tensor] = {}

    def keep(tap: str):
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            x = output[0]
            x = x[0] if isinstance(x, tuple) else x  # with relative positions: ((x, pos_emb), mask)
            # Branchformers do not have this option, and always normalise.
            hidden[tap] = encoder.after_norm(x) if getattr(encoder, "normalize_before", True) else x

        return hook

    layers = [(tap, encoder.encoders[int(tap.split(".")[1]) - 1]) for tap in set(taps) if "." in tap]
    handles = [layer.register_forward_hook(keep(tap)) for tap, layer in layers]
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()


def encode(
    model: ESPnetASRModel, speech: Tensor, speech_lengths: Tensor, taps: Sequence[str]
) -> Tuple[Tensor, Tensor, List[Tuple[int, Tensor]], Dict[str, Tensor]]:
    """Run an ESPnetASRModel's own ``encode``.

    Returns:
        encoder output (B, T, D), lengths (B,), InterCTC's intermediate outputs, hidden states by tap
    """
    order = falling_order(model.encoder, speech_lengths)
    if order is not None:
        speech, speech_lengths = speech[order], speech_lengths[order]
    with recording(model.encoder, taps) as hidden:
        # Without a frontend, normalisation and SpecAugment would change the caller's tensor in place.
        out, lengths = model.encode(speech if model.frontend is not None else speech.clone(), speech_lengths)
    out, intermediate = out if isinstance(out, tuple) else (out, [])
    if order is not None:  # these encoders have neither layer taps nor InterCTC, so nothing else is reordered
        back = order.argsort()
        out, lengths = out[back], lengths[back]
    if "encoder" in taps:
        hidden["encoder"] = out
    return out, lengths, intermediate, hidden


def falling_order(encoder: AbsEncoder, lengths: Tensor) -> Optional[Tensor]:
    """The order (B,) that sorts a batch by falling length, which ESPnet's RNN encoders need; None if it is sorted.

    These encoders pack the batch; ESPnet's iterators sort it only by default.
    """
    if type(encoder).__name__ not in SORTED or not (lengths[1:] > lengths[:-1]).any():
        return None
    return lengths.argsort(descending=True, stable=True)


@without_gradient
def least_samples(model: ESPnetASRModel, sampling_rate: float) -> int:
    """The fewest samples (or feature frames, if these are the model's input) that give an encoder frame.

    With fewer samples, frontend or subsampling raise an error. Signals of up to four seconds are tried, in eval mode.

    Raises:
        UserError: as :func:`input_width`; or four seconds are not enough.
    """
    from espnet2.asr.encoder.conformer_encoder import TooShortUttError

    longest = int(probe(model, sampling_rate, 1.0 if takes_samples(model) else 4.0)[1])

    def serves(n: int) -> bool:
        try:
            return probe(model, sampling_rate, n)[2] > 0
        except (RuntimeError, ValueError, AssertionError, IndexError, TooShortUttError):
            return False

    if not serves(longest):
        raise UserError("the model makes no frame of a test signal of four seconds")
    return bisect.bisect_left(range(1, longest), True, key=serves) + 1


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes natively in bf16, as GPUs since Ampere do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def half_on_gpu(device: torch.device) -> ContextManager:
    """Run a teacher's encoder in bf16 on a GPU that has it, elsewhere in its own type. Not yet run on a GPU."""
    return torch.autocast(device.type, torch.bfloat16) if has_bf16(device) else contextlib.nullcontext()


@contextlib.contextmanager
def recording_decoder(model: ESPnetASRModel) -> Iterator[List[Tensor]]:
    """Fill the yielded list with the outputs of the attention decoder while it runs: logits (B, L + 1, V)."""
    outputs: List[Tensor] = []
    handle = model.decoder.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    try:
        yield outputs
    finally:
        handle.remove()


def input_width(model: ESPnetASRModel) -> Tuple[int, ...]:
    """The shape of one time step of a model's input: () for audio, (D,) for a model without frontend, whose input is
    features. An encoder whose input is audio has the ``input_size`` 1.

    Raises:
        UserError: a model without frontend whose input width is not known.
    """
    size = getattr(model, "input_size", None)
    if model.frontend is not None or size == 1:
        return ()
    if size is None:
        mean = getattr(model.normalize, "mean", None)
        if mean is None:
            raise UserError("the width of this model's input features is not known: give input_size")
        size = mean.numel()
    return (int(size),)


def takes_samples(model: ESPnetASRModel) -> bool:
    """Whether a model's encoder takes audio itself, as wav2vec 2.0's does."""
    return model.frontend is None and not input_width(model)


def ctc_tokens(model: ESPnetASRModel) -> List[str]:
    """The tokens that an ESPnetASRModel's CTC head has: not Mask-CTC's <mask>, which ends its token list."""
    return list(model.token_list)[: model.ctc.ctc_lo.out_features]


@without_gradient
def probe(model: ESPnetASRModel, sampling_rate: float, duration: Union[float, int]) -> Tuple[Tensor, Tensor, int]:
    """Encode one test signal in eval mode. A ``duration`` of type float is in seconds, one of type int in samples.

    Returns:
        speech (1, samples), or (1, frames, D) for a model without frontend, which gets feature frames of 10 ms;
        its length (1,); the encoder's number of frames

    Raises:
        UserError: as :func:`input_width`.
    """
    width = input_width(model)
    p = next(model.parameters())
    n = duration if isinstance(duration, int) else int(duration * (FEATURE_RATE if width else sampling_rate))
    # A sine, not silence, because utterance-wise normalisation divides by the deviation.
    speech = torch.sin(torch.arange(n, device=p.device, dtype=p.dtype)).view(1, n, *[1] * len(width))
    speech = speech.repeat(1, 1, *width)  # not expand, because normalisation works in place
    lengths = torch.tensor([n], device=p.device)
    was_training = model.training
    model.eval()
    try:
        return speech, lengths, model.encode(speech.clone(), lengths)[1].item()
    finally:
        model.train(was_training)


def measure_frame_shift(model: ESPnetASRModel, sampling_rate: float) -> float:
    """Seconds per encoder frame, measured from two input lengths, because ESPnet encoders do not report it.

    ``sampling_rate`` is in Hz. Raises UserError as :func:`input_width`.
    """
    # With ten and thirty seconds, edge effects of a few frames stay under 1 % of the difference. Encoders that take
    # samples get short signals, because ESPnet makes a mask of N × N samples for them; they have no edge effects.
    long = not takes_samples(model) or getattr(model.encoder, "long_probes", False)
    durations = (10.0, 30.0) if long else (0.5, 1.5)
    (_, short, few), (_, longer, many) = (probe(model, sampling_rate, s) for s in durations)
    rate = FEATURE_RATE if input_width(model) else sampling_rate
    shift = (longer - short).item() / rate / (many - few)
    # Round to quarters of a millisecond: hop lengths are multiples of them, and the rounding of lengths is removed.
    return nearest_multiple(shift, 0.0005) * 0.0005
