"""One block of a streaming student (ESPnet's contextual-block encoders) as a graph with the state as input and output.

The audio is cut into overlapping windows, one for each block; a window begins every hop. It contains all samples that
the frames of its block depend on, so that features and subsampling need no state. The state between blocks is one
context vector per layer and the mean of the previous block.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Optional, Tuple

import torch
from torch import Tensor, nn

from espnet_kd.cli import UserError
from espnet_kd.deploy.block_stream import Geometry
from espnet_kd.deploy.espnet_stream import UnboundedPositions, check_streaming
from espnet_kd.deploy.features import LogMel, Normalisation

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

INPUTS = ("window", "frames", "step", "short", "mean", "context")
OUTPUTS = ("log_probs", "next_mean", "next_context")


class BlockGraph(nn.Module):
    """Maps a window of audio and the state to log-probabilities of the block's frames, and the next state.

    Inputs: ``window`` (1, W) samples; ``frames`` (1,) number of frames in the window, at most a block; ``step`` (1,)
    number of the block; ``short`` (1,) 1 if this window is the whole audio; ``mean`` (1, 1, D); ``context``
    (1, layers, D).
    """

    def __init__(self, model: ESPnetASRModel, volume: Optional[float] = None):
        """Take an ESPnetASRModel in eval mode on the CPU, which is left as it is, and its ``speech_volume_normalize``.

        Raises:
            UserError: the model needs all of the audio at once, or has an option that is not computed here.
        """
        super().__init__()
        check_streaming(model, volume)
        model = copy.deepcopy(model).float()
        encoder = model.encoder
        layer = encoder.embed
        if type(layer).__name__ != "Conv2dSubsamplingWOPosEnc":
            raise UserError(f"encoder_conf: input_layer: {type(layer).__name__} cannot be exported as a stream")
        if not encoder.init_average:
            raise UserError("encoder_conf: init_average: false cannot be exported as a stream")
        self.features = LogMel(model.frontend)
        self.features.reach = 0  # the caller pads the ends of the audio by reflection
        self.features.least_samples = self.features.n_fft
        self.normalise = Normalisation(model.normalize) if model.normalize is not None else None
        self.embed, self.layers = layer, encoder.encoders
        self.positions = UnboundedPositions(encoder.pos_enc)
        self.positions_of_mean = encoder.ctx_pos_enc
        self.after_norm = encoder.after_norm if encoder.normalize_before else nn.Identity()
        self.ctc_lo = model.ctc.ctc_lo
        features = 1  # feature frames that one encoder frame is computed from
        for conv in reversed([m for m in layer.modules() if isinstance(m, nn.Conv2d)]):
            features = (features - 1) * conv.stride[0] + conv.kernel_size[0]
        n_fft, hop = self.features.n_fft, self.features.hop
        self.geometry = Geometry(
            encoder.block_size, encoder.hop_size, encoder.look_ahead, encoder.subsample * hop,
            (features - 1) * hop + n_fft, n_fft // 2, encoder.output_size(), len(encoder.encoders),
        )  # fmt: skip
        self._inside = torch.ones(1)
        for module in self.layers.modules():
            if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
                # In audio of one block, ESPnet's convolution reads neither context vectors nor frames after the end.
                module.register_forward_pre_hook(lambda _, args: (args[0] * self._inside, *args[1:]))

    def example(self) -> Tuple[Tensor, ...]:
        """Example inputs for tracing the graph."""
        g = self.geometry
        numbers = [torch.tensor([n]) for n in (g.block, 0, 0)]
        return torch.randn(1, g.window), *numbers, torch.zeros(1, 1, g.width), torch.zeros(1, g.layers, g.width)

    def forward(
        self, window: Tensor, frames: Tensor, step: Tensor, short: Tensor, mean: Tensor, context: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        block = self.geometry.block
        feats, lengths = self.features(window, torch.full_like(frames, self.geometry.window))
        if self.normalise is not None:
            feats = self.normalise(feats, lengths)
        x, _ = self.embed(feats, None)  # (1, block, D)
        valid = (torch.arange(block)[None] < frames[:, None])[..., None].to(x.dtype)
        own = (x * valid).sum(dim=1, keepdim=True) / frames.to(x.dtype)
        if self.positions_of_mean:
            own = self.positions(own, step)
        first, is_short = (step == 0).view(1, 1, 1), (short > 0).view(1, 1, 1)
        before = torch.where(first, own, mean)
        x = self.positions(x, step * self.geometry.hop) * valid
        x = torch.cat([before, x, own], dim=1)[:, None]  # (1, 1, block + 2, D)
        slots = torch.cat([torch.zeros(1, 1, 1), valid, torch.zeros(1, 1, 1)], dim=1)
        self._inside = torch.where(is_short, slots, torch.ones_like(slots)).transpose(1, 2)
        online = torch.zeros(block + 2, block + 2)
        online[1:, : block + 1] = 1
        mask = torch.where(is_short, slots.transpose(1, 2).expand(1, block + 2, block + 2), online[None])[:, None]
        contexts = []
        for number, layer in enumerate(self.layers):
            x = layer(x, mask, True)[0]  # called as for the first block: its context vectors are inserted below
            last = x[:, :, -1:]
            kept = torch.where(first[None], last, context[:, None, number : number + 1])
            x = torch.cat([kept, x[:, :, 1:]], dim=2)
            contexts.append(last[:, 0])
        out = self.ctc_lo(self.after_norm(x[:, 0, 1 : block + 1])).log_softmax(dim=-1)
        return out, own, torch.cat(contexts, dim=1)

