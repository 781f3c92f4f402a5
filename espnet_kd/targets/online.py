"""A teacher that runs beside the student: any finished ESPnet ASR experiment, frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict, Optional, Sequence, Union

import torch
from espnet.nets.pytorch_backend.transformer.add_sos_eos import add_sos_eos
from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.experiments.audio_options import sampling_rate, to_volume, volume
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.encode import (
    EncoderOutputs,
    check_taps,
    ctc_tokens,
    encode,
    half_on_gpu,
    input_width,
    least_samples,
    measure_frame_shift,
)
from espnet_kd.inference.padding import OneByOne
from espnet_kd.losses.common import full_precision
from espnet_kd.targets.memory import Memory, fingerprints
from espnet_kd.targets.teacher import Needs

__all__ = ["OnlineTeacher", "sampling_rate"]


class OnlineTeacher:
    """Targets from a teacher that runs during the training.

    This is deliberately not a ``torch.nn.Module``: an unregistered teacher is in no checkpoint, optimizer or DDP
    bucket, and ``model.train()`` cannot switch on its dropout and batch normalisation. It is given the batch's
    ``speech`` without SpecAugment, which acts inside the student.
    """

    def __init__(self, experiment: Union[str, Path], memory: float = 0.0):
        """Load ``EXP[/FILE.pth]``.

        Args:
            memory: bytes of targets to keep, by utterance id, so that on a small corpus the teacher runs in the first
                epoch only. It must be 0 if the audio of an utterance may change from epoch to epoch.

        Raises:
            UserError: the experiment is missing or unreadable, or has no CTC head.
        """
        config, model_file = find_experiment(experiment)
        self.name = str(model_file)
        self._model, args = load_model(config, model_file)
        if self._model.ctc is None:
            raise UserError(f"the teacher {model_file} has no CTC head (ctc_weight: 0.0): nothing to distil from")
        if broken := [k for k, v in self._model.state_dict().items() if v.is_floating_point() and v.isnan().any()]:
            raise UserError(
                f"the teacher {model_file} gives NaN ({broken[0]} has it); it has diverged, or its file is damaged"
            )
        for p in self._model.parameters():
            p.requires_grad_(False)
        if type(self._model.frontend).__name__ == "FusedFrontends":
            self._model.frontend = OneByOne(self._model.frontend)  # in a batch it returns the longest length for all
        self.token_list = ctc_tokens(self._model)
        self.sampling_rate = sampling_rate(args)
        self._volume = volume(args)
        self._input_width = input_width(self._model)
        self.frame_shift = measure_frame_shift(self._model, self.sampling_rate)
        self._least = least_samples(self._model, self.sampling_rate)
        self._memory = Memory(memory)

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return self._model.encoder.output_size()

    def check(self, needed: Needs) -> None:
        """Refuse taps that this teacher lacks (:class:`UserError`)."""
        check_taps(self._model, needed.taps, "teacher")

    def probe(self, speech: Tensor, speech_lengths: Tensor) -> EncoderOutputs:
        """Its outputs for a test signal (:class:`UserError`: it needs audio and gets features, or the reverse)."""
        given, wanted = (f"features of width {w[0]}" if w else "audio" for w in (speech.shape[2:], self._input_width))
        if given != wanted:
            raise UserError(f"the student gets {given}, the teacher {self.name} {wanted}; both need the same input")
        return self.targets((), speech, speech_lengths)

    def state_dict(self) -> Dict[str, Tensor]:
        """Its parameters and buffers by name."""
        return self._model.state_dict()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the student to another device or type (``torch.nn.Module._apply``)."""
        self._model._apply(fn)
        self._memory.clear()

    # no_grad, not inference_mode, whose tensors cannot be saved for backward.
    @torch.no_grad()
    def targets(
        self,
        utt_ids: Sequence[str],
        speech: Tensor,
        speech_lengths: Tensor,
        taps: Sequence[str] = (),
        text: Optional[Tensor] = None,
        text_lengths: Optional[Tensor] = None,
    ) -> EncoderOutputs:
        """The teacher's outputs for a batch: its encoder in bf16 on a GPU that has it, its CTC head in float32.

        Args:
            utt_ids: B utterance ids.
            speech: (B, samples) · speech_lengths: (B,)
            taps: where hidden states are wanted; ``decoder`` for the attention decoder's outputs
            text: (B, L) · text_lengths: (B,); the labels that the decoder gets as its input
        """
        prints = None
        if utt_ids and self._memory.size:
            prints = fingerprints(speech, speech_lengths)
            try:
                known = self._memory.recall(utt_ids, taps, prints)
            except ValueError as e:
                raise UserError(str(e)) from e
            if known is not None:
                return known
        model = self._model.eval()
        decoded = None
        if self._volume is not None and not self._input_width:
            speech = to_volume(speech, self._volume)
        too_short = speech_lengths < self._least
        # Utterances that are too short are padded with silence, so that the model runs; they get 0 frames below.
        if (missing := self._least - speech.size(1)) > 0:
            speech = torch.nn.functional.pad(speech, (0, 0) * (speech.dim() - 2) + (0, missing))
        speech_lengths = speech_lengths.clamp(min=self._least)
        with half_on_gpu(speech.device):
            out, lengths, _, hidden = encode(model, speech, speech_lengths, taps)
            if "decoder" in taps:
                assert text_lengths is not None  # check_data has refused data without transcripts
                labels, _ = add_sos_eos(text, model.sos, model.eos, model.ignore_id)
                decoded = model.decoder(out, lengths, labels, text_lengths + 1)[0]
        lengths = lengths.masked_fill(too_short, 0)
        head = model.ctc.ctc_lo
        with torch.autocast(speech.device.type, enabled=False):  # not in the student's AMP
            logits = head(out.to(head.weight.dtype))
        hidden = {tap: full_precision(h) for tap, h in hidden.items()}
        outputs = EncoderOutputs(logits, lengths, self.frame_shift, hidden, decoded)
        if prints is not None:
            self._memory.remember(utt_ids, taps, prints, outputs)
        return outputs
