"""A teacher that runs beside the student: any finished ESPnet ASR experiment, frozen."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
from espnet.nets.pytorch_backend.transformer.add_sos_eos import add_sos_eos
from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.losses.common import full_precision
from espnet_kd.targets.encode import EncoderOutputs, check_taps, encode, half_on_gpu, input_width, measure_frame_shift
from espnet_kd.targets.experiment import find_experiment, load_model
from espnet_kd.targets.teacher import Needs


class OnlineTeacher:
    """Targets from a teacher run now.

    Deliberately no ``torch.nn.Module``: hidden from registration, the teacher is in no checkpoint, optimizer or DDP
    bucket, and ``model.train()`` cannot switch its dropout and batch normalisation on. It hears the batch's ``speech``
    as it is: SpecAugment acts inside the student.
    """

    def __init__(self, experiment: Union[str, Path], memory: float = 0.0):
        """Load ``EXP[/FILE.pth]``.

        Args:
            memory: bytes of targets to remember, by the utterance ids of the batch: ESPnet shuffles whole batches, so
                that on a small corpus the teacher runs in the first epoch only. 0 where the audio of an utterance may
                change from epoch to epoch.

        Raises:
            UserError: missing or unreadable, or without a CTC head.
        """
        config, model_file = find_experiment(experiment)
        self.name = str(model_file)
        self._model, args = load_model(config, model_file)
        if self._model.ctc is None:
            raise UserError(f"the teacher {model_file} has no CTC head (ctc_weight: 0.0): nothing to distil from")
        for p in self._model.parameters():
            p.requires_grad_(False)
        self.token_list = list(self._model.token_list)
        self.sampling_rate = sampling_rate(args)
        self._input_width = input_width(self._model)
        self.frame_shift = measure_frame_shift(self._model, self.sampling_rate)
        self._memory = self._room = memory
        self._said: Dict[Tuple[Any, ...], EncoderOutputs] = {}

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return self._model.encoder.output_size()

    def check(self, needed: Needs) -> None:
        """Refuse taps that this teacher lacks (:class:`UserError`)."""
        check_taps(self._model, needed.taps, "teacher")

    def probe(self, speech: Tensor, speech_lengths: Tensor) -> EncoderOutputs:
        """What it says of a test signal (:class:`UserError`: audio where it is fed with features, or the like)."""
        given, wanted = (f"features of width {w[0]}" if w else "audio" for w in (speech.shape[2:], self._input_width))
        if given != wanted:
            raise UserError(f"the student is fed with {given}, the teacher {self.name} with {wanted}")
        return self.targets((), speech, speech_lengths)

    def state_dict(self) -> Dict[str, Tensor]:
        """Its parameters and buffers by name."""
        return self._model.state_dict()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the student to another device or type (``torch.nn.Module._apply``)."""
        self._model._apply(fn)
        self._said.clear()
        self._room = self._memory

    # no_grad, not inference_mode: what that makes cannot be saved for backward.
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
        """What the teacher says of a batch: its encoder in bf16 on a GPU that has it, its CTC head in float32.

        Args:
            utt_ids: B names.
            speech: (B, samples) · speech_lengths: (B,)
            taps: where hidden states are wanted; ``decoder`` for the attention decoder's outputs
            text: (B, L) · text_lengths: (B,); what the decoder is led by
        """
        key: Tuple[Any, ...] = ()
        if utt_ids and self._memory:
            # Not the names alone: chunks of one utterance share them, and so may training and validation data.
            key = (*utt_ids, *taps, *speech.shape, *speech_lengths.tolist(), speech.sum().item())
            if key in self._said:
                return self._said[key]
        model = self._model.eval()
        said_by_decoder = None
        with half_on_gpu(speech.device):
            out, lengths, _, hidden = encode(model, speech, speech_lengths, taps)
            if "decoder" in taps:
                labels, _ = add_sos_eos(text, model.sos, model.eos, model.ignore_id)
                said_by_decoder = model.decoder(out, lengths, labels, text_lengths + 1)[0]
        head = model.ctc.ctc_lo
        with torch.autocast(speech.device.type, enabled=False):  # the student's AMP
            logits = head(out.to(head.weight.dtype))
        hidden = {tap: full_precision(h) for tap, h in hidden.items()}
        said = EncoderOutputs(logits, lengths, self.frame_shift, hidden, said_by_decoder)
        size = sum(x.nbytes for x in (said.logits, said.decoder, *hidden.values()) if x is not None)
        if key and size <= self._room:
            self._said[key] = said
            self._room -= size
        return said


def sampling_rate(args: argparse.Namespace) -> float:
    """Sampling rate in Hz that an ESPnet configuration's frontend expects (``16k`` and 16000 alike)."""
    import humanfriendly

    fs = (getattr(args, "frontend_conf", None) or {}).get("fs", 16000)
    return float(humanfriendly.parse_size(fs) if isinstance(fs, str) else fs)
