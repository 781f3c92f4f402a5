"""ESPnet's log-mel features and their normalisation, with operations that every ONNX runtime has.

The STFT is a convolution with the kernels of the discrete Fourier transform. The kernels are not stored: the graph
computes them from one period of a cosine when it is loaded. This saves 1 MB, twice the size of a small student.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Tuple

import torch
from torch import Tensor, nn

from espnet_kd.cli import UserError

if TYPE_CHECKING:
    from espnet2.asr.frontend.abs_frontend import AbsFrontend
    from espnet2.layers.abs_normalize import AbsNormalize


class LogMel(nn.Module):
    """Computes the features that ESPnet's default frontend gives each utterance alone, up to float rounding.

    Raises:
        UserError: another frontend, or an option that is not supported here.
    """

    window: Tensor
    cosine: Tensor
    sine: Tensor
    frequencies: Tensor
    times: Tensor
    melmat: Tensor

    def __init__(self, frontend: AbsFrontend, least_samples: int = 1):
        """Take the frontend, and the least number of samples: shorter utterances are padded with silence."""
        super().__init__()
        name = type(frontend).__name__
        if name != "DefaultFrontend" or frontend.stft is None:
            raise UserError(f"frontend: {name}: only ESPnet's default frontend, with its STFT, can be exported")
        stft, logmel = frontend.stft, frontend.logmel
        for option, value, wanted in (
            ("normalized", stft.normalized, False),
            ("onesided", stft.onesided, True),
            ("log_base", logmel.log_base, None),
        ):
            if value != wanted:
                raise UserError(f"frontend_conf: {option}: {value} cannot be exported, only {wanted}")
        self.n_fft, self.hop, self.reach = stft.n_fft, stft.hop_length, stft.n_fft // 2 if stft.center else 0
        self.least_samples = max(least_samples, self.reach + 1 if self.reach else self.n_fft)
        width = stft.win_length
        period = torch.arange(self.n_fft, dtype=torch.float64) * (2 * math.pi / self.n_fft)
        window = getattr(torch, f"{stft.window}_window")(width) if stft.window is not None else torch.ones(width)
        self.skip = (self.n_fft - width) // 2  # a shorter window is centred in the frame
        for buffer, value in (
            ("window", window.float()),
            ("cosine", period.cos().float()),
            ("sine", period.sin().float()),
            ("frequencies", torch.arange(self.n_fft // 2 + 1)),
            ("times", torch.arange(self.skip, self.skip + width)),
            ("melmat", logmel.melmat.float()),
        ):
            self.register_buffer(buffer, value.clone())

    def forward(self, speech: Tensor, lengths: Tensor) -> Tuple[Tensor, Tensor]:
        """Map (B, N) samples, N ≥ 1, and (B,) lengths to (B, T, D) features, 0 in the padding, and (B,) frames."""
        usable = lengths.clamp(min=self.least_samples)
        frames = torch.div(usable + 2 * self.reach - self.n_fft, self.hop, rounding_mode="floor") + 1
        # The remainder keeps torch's exporter, which cannot compute it, from storing the kernels as constants.
        times = torch.remainder(self.times, self.n_fft)
        phase = torch.remainder(self.frequencies[:, None] * times[None, :], self.n_fft)
        kernels = torch.cat([self.cosine[phase], self.sine[phase]]) * self.window
        wave = self._reflected(speech, lengths, usable)
        parts = nn.functional.conv1d(wave[:, None, self.skip :], kernels[:, None], stride=self.hop)  # (B, 2F, T)
        real, imaginary = parts.chunk(2, dim=1)
        power = (real * real + imaginary * imaginary).transpose(1, 2)
        feats = torch.matmul(power, self.melmat).clamp(min=1e-10).log()[:, : frames.max()]
        return feats.masked_fill(padding(frames, feats)[..., None], 0.0), frames

    def _reflected(self, speech: Tensor, lengths: Tensor, usable: Tensor) -> Tensor:
        """(B, N + 2 · reach): each utterance, with silence up to its usable length, reflected at its own ends."""
        samples = torch.as_tensor(speech.size(1))  # a tensor, so that the size is an input of the traced graph
        longest = torch.maximum(samples, torch.tensor(self.least_samples))
        # The argument is a tensor because a number would be a constant of the graph; torch's stubs lack this form.
        place = torch.arange(longest + 2 * self.reach)[None, :] - self.reach  # type: ignore[call-overload]
        last = usable[:, None] - 1
        source = last - (last - place.abs()).abs()
        silent = (source >= lengths[:, None]) | (place > last + self.reach)
        return speech.gather(1, source.clamp(min=0).minimum(samples - 1)).masked_fill(silent, 0.0)


def padding(lengths: Tensor, x: Tensor) -> Tensor:
    """Mask (B, T) of the padding of ``x`` (B, T, …): True after the end of each utterance."""
    return torch.arange(x.size(1))[None, :] >= lengths[:, None]


class Normalisation(nn.Module):
    """ESPnet's normalisation of features, its statistics cast from float64 to the features' float32.

    Raises:
        UserError: a normalisation other than ``global_mvn`` and ``utterance_mvn``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, normalize: AbsNormalize):
        super().__init__()
        name = type(normalize).__name__
        if name not in ("GlobalMVN", "UtteranceMVN"):
            raise UserError(f"normalize: {name}: only global_mvn, utterance_mvn and none can be exported")
        self.means, self.variances = normalize.norm_means, normalize.norm_vars
        self.is_global = name == "GlobalMVN"
        if self.is_global:
            self.register_buffer("mean", normalize.mean.float())
            self.register_buffer("std", normalize.std.float())
        else:
            self.eps = normalize.eps

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Normalise features (B, T, D) with lengths (B,); the padding must be 0, and stays 0."""
        padded = padding(lengths, x)[..., None]
        if self.is_global:
            mean, std = self.mean, self.std
        else:
            count = lengths[:, None, None].to(x.dtype)
            mean = x.sum(dim=1, keepdim=True) / count
            off = (x - mean).masked_fill(padded, 0.0)
            std = ((off * off).sum(dim=1, keepdim=True) / count).sqrt().clamp(min=self.eps)
        if self.means:
            x = x - mean
        x = x.masked_fill(padded, 0.0)
        return x / std if self.variances else x
