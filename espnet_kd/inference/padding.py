"""Make a batched ESPnet encoder give the same outputs that it gives for each utterance alone.

In ESPnet the padding changes the outputs of an utterance in four ways: the STFT reflects the signal at the end of the
batch instead of the end of the utterance; a subsampled mask can have up to two frames too many; convolutions over time
(Conformer, Branchformer, 1-D feed-forward) read the frames after the last one; and the deviation of an utterance
(``utterance_mvn`` with ``norm_vars``) includes these frames. This module corrects all four on a model that is used for
decoding only; training keeps ESPnet's behaviour.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Tuple

import torch
from torch import nn

if TYPE_CHECKING:
    from espnet2.asr.encoder.abs_encoder import AbsEncoder
    from espnet2.asr.espnet_model import ESPnetASRModel
    from espnet2.asr.frontend.abs_frontend import AbsFrontend

#: Encoders whose layers are a mask, attention and 1-D convolutions: exact after `make_batch_exact`.
EXACT_ENCODERS = ("ConformerEncoder", "TransformerEncoder", "BranchformerEncoder", "EBranchformerEncoder")


class OneByOne(nn.Module):
    """Runs a frontend, or a normalisation, on each utterance alone and pads its features with 0, which is slow."""

    def __init__(self, frontend: AbsFrontend):
        super().__init__()
        self.frontend = frontend

    def forward(self, speech: torch.Tensor, lengths: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, N) samples and (B,) lengths to (B, T, D) features and (B,) lengths."""
        pairs = [self.frontend(speech[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())]
        feats = nn.utils.rnn.pad_sequence([f[0] for f, _ in pairs], batch_first=True)
        return feats, torch.cat([n for _, n in pairs])


class ReflectedEach(nn.Module):
    """ESPnet's default frontend on a batch, each utterance reflected at its own end: equal to `OneByOne`, and faster.

    It uses ESPnet's STFT and mel filters, but not ESPnet's masks, which have the size of the spectrum.
    """

    def __init__(self, frontend: AbsFrontend):
        super().__init__()
        self.stft, self.logmel = copy.copy(frontend.stft), frontend.logmel
        self.stft.center = False  # this class pads by reflection itself

    def forward(self, speech: torch.Tensor, lengths: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, N) samples and (B,) lengths to (B, T, D) features and (B,) lengths."""
        reach = self.stft.n_fft // 2
        waves = [
            nn.functional.pad(speech[i : i + 1, :n], (reach, reach), mode="reflect")[0]
            for i, n in enumerate(lengths.tolist())
        ]
        spectrum, _ = self.stft(nn.utils.rnn.pad_sequence(waves, batch_first=True))  # (B, T, F, 2)
        feats, _ = self.logmel(spectrum[..., 0].square() + spectrum[..., 1].square())
        frames = (lengths + 2 * reach - self.stft.n_fft) // self.stft.hop_length + 1
        padding = torch.arange(feats.size(1), device=feats.device) >= frames[:, None]
        return feats.masked_fill(padding[..., None], 0.0), frames


def exact_frontend(frontend: AbsFrontend) -> nn.Module:
    """Return a frontend that gives each utterance of a batch the features that it has alone."""
    # The default frontend's speech enhancement can be left out: it does not change a single channel.
    plain = type(frontend).__name__ == "DefaultFrontend" and frontend.stft is not None and frontend.stft.center
    return ReflectedEach(frontend) if plain else OneByOne(frontend)


def subsampled(lengths: torch.Tensor, embed: nn.Module) -> torch.Tensor:
    """Frames (B,) that ``embed`` (an ESPnet input layer) makes of (B,) feature frames, each utterance alone."""
    for conv in embed.modules():
        if isinstance(conv, (nn.Conv1d, nn.Conv2d)):
            kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
            lengths = torch.div(lengths + 2 * padding - kernel, stride, rounding_mode="floor") + 1
    return lengths.clamp(min=0)


def make_batch_exact(model: ESPnetASRModel) -> bool:
    """Change an ESPnetASRModel, meant for decoding, so that batched equals one by one (up to float rounding).

    Safe for several threads. Returns False for an encoder that cannot be exact (`is_exact`), which is not changed: its
    last frames then depend a little on the batch.
    """
    if model.frontend is not None:
        model.frontend = exact_frontend(model.frontend)
    if type(model.normalize).__name__ == "UtteranceMVN" and model.normalize.norm_vars:
        model.normalize = OneByOne(model.normalize)  # ESPnet's deviation counts the padding
    return make_encoder_exact(model.encoder)


def is_exact(encoder: AbsEncoder) -> bool:
    """Whether an encoder is one of `EXACT_ENCODERS`, without ESPnet's older relative positions.

    The shift of those positions depends on the length of the batch.
    """
    older = any(type(module).__name__ == "LegacyRelPositionMultiHeadedAttention" for module in encoder.modules())
    return type(encoder).__name__ in EXACT_ENCODERS and not older


def make_encoder_exact(encoder: AbsEncoder) -> bool:
    """Do the part of `make_batch_exact` that concerns the encoder; return False, without a change, if it cannot be."""
    if getattr(encoder, "no_padding", False):
        return True  # a foreign encoder, whose batches have utterances of one length only
    if not is_exact(encoder):
        return False
    here = threading.local()

    def note_lengths(_, args):
        lengths = args[1]
        here.lengths = lengths if encoder.embed is None else subsampled(lengths, encoder.embed)

    def trim_mask(_, __, output):
        if not (isinstance(output, tuple) and len(output) == 2 and getattr(output[1], "dtype", None) == torch.bool):
            return None  # an input layer without subsampling gets no mask
        x, mask = output
        frames = torch.arange(mask.size(-1), device=mask.device)
        return x, mask & (frames < here.lengths.to(mask.device)[:, None, None])

    def zero_padding(_, args):
        x = args[0]  # (B, C, T)
        frames = torch.arange(x.size(-1), device=x.device)
        return (x.masked_fill(frames >= here.lengths.to(x.device)[:, None, None], 0.0), *args[1:])

    encoder.register_forward_pre_hook(note_lengths)
    if encoder.embed is not None:
        encoder.embed.register_forward_hook(trim_mask)
    for module in encoder.encoders.modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
            module.register_forward_pre_hook(zero_padding)
    return True
