"""A streaming student run by ESPnet: an encoder that works in blocks; memory does not grow with the audio.

The features of a stream equal those of the whole audio, and ESPnet's contextual-block encoders compute a block from
earlier blocks and a fixed look-ahead. The text of a stream therefore equals the text of the whole audio.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn

from espnet_kd.cli import UserError

if TYPE_CHECKING:
    from espnet.nets.pytorch_backend.transformer.embedding import StreamPositionalEncoding
    from espnet2.asr.espnet_model import ESPnetASRModel

ENCODERS = ("ContextualBlockConformerEncoder", "ContextualBlockTransformerEncoder")


class StreamingStudent:
    """A loaded streaming student, from which any number of streams may be opened, one at a time."""

    def __init__(self, model: ESPnetASRModel, args: argparse.Namespace, config_dir: Union[str, Path] = "."):
        """Take a loaded ESPnetASRModel in eval mode and its configuration; the model is changed.

        Raises:
            UserError: the encoder or an option needs all of the audio at once.
        """
        from espnet_kd.experiments.audio_options import volume
        from espnet_kd.inference.detokenise import build_detokeniser
        from espnet_kd.inference.encode import ctc_tokens, least_samples, measure_frame_shift
        from espnet_kd.inference.recognise import audio_rate

        check_streaming(model, volume(args))
        rate = audio_rate(args)
        if rate is None or getattr(model, "ctc", None) is None:
            raise UserError(f"the model of {config_dir} takes features, or has no CTC head: it cannot be streamed")
        self.rate: int = rate
        self.frame_shift = measure_frame_shift(model, rate)
        self.least_samples = least_samples(model, rate)
        self.tokens, self.to_text = ctc_tokens(model), build_detokeniser(args, config_dir)
        self.no_text = sorted({model.sos, model.eos})
        self.model = model
        encoder = model.encoder
        encoder.pos_enc = UnboundedPositions(encoder.pos_enc)

    def open(self) -> _Blocks:
        """Return the computation of a new stream."""
        return _Blocks(self)

    @property
    def look_ahead(self) -> float:
        """Longest time in seconds from a frame to the end of the block in which it is computed."""
        encoder = self.model.encoder
        return (encoder.hop_size + encoder.look_ahead) * self.frame_shift


def check_streaming(model: ESPnetASRModel, volume: Optional[float]) -> None:
    """Refuse a model that needs all of the audio at once (:class:`UserError`)."""
    name = type(model.encoder).__name__
    if name not in ENCODERS:
        raise UserError(f"encoder: {name} needs all of the audio at once; --streaming takes {', '.join(ENCODERS)}")
    if type(model.normalize).__name__ == "UtteranceMVN":
        raise UserError("normalize: utterance_mvn needs all of the audio at once; --streaming takes global_mvn or none")
    if volume is not None:
        raise UserError("speech_volume_normalize needs all of the audio at once, and cannot be streamed")
    if type(model.frontend).__name__ != "DefaultFrontend" or model.frontend.stft is None:
        raise UserError(f"frontend: {type(model.frontend).__name__} cannot be streamed, only ESPnet's default one")
    if not model.frontend.stft.center:
        raise UserError("frontend_conf: center: false cannot be streamed")
    for part in ("preencoder", "postencoder"):
        if getattr(model, part) is not None:
            raise UserError(f"{part}: {type(getattr(model, part)).__name__} cannot be streamed")


class UnboundedPositions(nn.Module):
    """ESPnet's StreamPositionalEncoding without its table, which grows with the audio."""

    rates: Tensor

    def __init__(self, table: StreamPositionalEncoding):
        super().__init__()
        self.width, self.xscale = table.d_model, table.xscale
        steps = torch.arange(0, self.width, 2, dtype=torch.float32)
        self.register_buffer("rates", torch.exp(steps * -(math.log(10000.0) / self.width)), persistent=False)

    def forward(self, x: Tensor, start_idx: Union[int, Tensor] = 0) -> Tensor:
        """Add the positions from ``start_idx`` on to (B, T, D)."""
        place = (torch.arange(x.size(1)) + start_idx).float()[:, None] * self.rates
        positions = torch.stack([place.sin(), place.cos()], dim=-1).flatten(1)
        return x * self.xscale + positions[:, : self.width]


class _Features:
    """Computes features of audio that arrives in pieces; the ends are padded by reflection, as in ESPnet."""

    def __init__(self, model: ESPnetASRModel):
        self.stft, self.logmel, self.normalize = copy.copy(model.frontend.stft), model.frontend.logmel, model.normalize
        self.stft.center = False  # this class pads by reflection itself
        self.reach = self.stft.n_fft // 2
        self.held = torch.zeros(0)  # samples that the next frames need
        self.tail = torch.zeros(0)  # the last samples, which are reflected at the end
        self.begun = False

    def push(self, samples: Tensor, final: bool) -> Tensor:
        """Take (n,) samples and give the (1, T, D) features that are complete now."""
        self.held = torch.cat([self.held, samples])
        self.tail = torch.cat([self.tail, samples])[-(self.reach + 1) :]
        if not self.begun and len(self.held) > self.reach:
            self.held = torch.cat([self.held[1 : self.reach + 1].flip(0), self.held])
            self.begun = True
        if final and self.begun:
            self.held = torch.cat([self.held, self.tail[:-1].flip(0)])
        frames = (len(self.held) - self.stft.n_fft) // self.stft.hop_length + 1 if self.begun else 0
        if frames < 1:
            return torch.zeros(1, 0, self.logmel.melmat.size(1))
        used = (frames - 1) * self.stft.hop_length + self.stft.n_fft
        spectrum, _ = self.stft(self.held[None, :used])
        self.held = self.held[frames * self.stft.hop_length :].clone()
        feats, _ = self.logmel(spectrum[..., 0].square() + spectrum[..., 1].square())
        if self.normalize is not None:
            feats, _ = self.normalize(feats, torch.tensor([frames]))
        return feats


class _Blocks:
    """Computes log-probabilities of audio that arrives in pieces."""

    def __init__(self, student: StreamingStudent):
        self._student, self._features = student, _Features(student.model)
        self._state: Any = None
        self._waiting = torch.zeros(1, 0, student.model.frontend.logmel.melmat.size(1))
        self._samples = 0

    @torch.inference_mode()
    def push(self, samples: np.ndarray, final: bool) -> np.ndarray:
        """Take (n,) samples and give the (T, V) log-probabilities of the frames that are known now."""
        student, none = self._student, np.zeros((0, len(self._student.tokens)), dtype=np.float32)
        self._samples += len(samples)
        piece = torch.from_numpy(np.array(samples, dtype=np.float32))
        feats = torch.cat([self._waiting, self._features.push(piece, final)], dim=1)
        if self._samples < student.least_samples:  # too few samples for a frame
            self._waiting = feats
            return none
        self._waiting = feats[:, feats.size(1) :]
        if not (feats.size(1) or final):
            return none
        out, _, self._state = student.model.encoder(
            feats, torch.tensor([feats.size(1)]), self._state, is_final=final, infer_mode=True
        )
        return student.model.ctc.ctc_lo(out).log_softmax(dim=-1)[0].numpy()
