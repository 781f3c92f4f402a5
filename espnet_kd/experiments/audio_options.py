"""The ESPnet options that change the audio before the encoder, handled in one place for teachers and students.

| option | in training | at inference, in the cache, in bench | teacher and student |
|---|---|---|---|
| ``frontend_conf: fs`` | files of any rate are taken | – | files of another rate are refused everywhere |
| ``speech_volume_normalize`` | peak of each utterance | the same | a teacher brings audio to its own peak |
| channels | the frontend draws one | the first | several are refused where there is a teacher |
| ``force_single_channel`` | the first | the first | the same |
| ``rir_scp``, ``noise_scp``, ``data_aug_effects`` | drawn again | – | refused with an online teacher |
| ``specaug``, dropout | in the student | – | a teacher has none |
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Mapping, Optional, Union

import torch
from torch import Tensor

from espnet_kd.cli import UserError

DEFAULT_RATE = 16000.0


def sampling_rate(args: argparse.Namespace) -> float:
    """Sampling rate in Hz of the audio that an ESPnet configuration expects (``16k`` and 16000 alike).

    Raises:
        UserError: ``fs`` is no rate.
    """
    import humanfriendly

    fs: Any = None
    for option in ("frontend_conf", "preencoder_conf"):  # with sliding windows, the sinc layer has it
        conf = getattr(args, option, None)
        fs = conf.get("fs") if fs is None and isinstance(conf, Mapping) else fs
    if fs is None:
        return DEFAULT_RATE
    try:
        rate = float(humanfriendly.parse_size(fs) if isinstance(fs, str) else fs)
    except (TypeError, ValueError, humanfriendly.InvalidSize) as e:
        raise UserError(f"frontend_conf.fs: expected a sampling rate in Hz, found {fs!r}") from e
    if not 0 < rate < 1e6:
        raise UserError(f"frontend_conf.fs: expected a sampling rate in Hz, found {fs!r}")
    return rate


def takes_audio(args: argparse.Namespace) -> bool:
    """Whether the input of a model is audio: it has a frontend, or its encoder takes samples (``input_size: 1``)."""
    return getattr(args, "input_size", None) in (None, 1)


def volume(args: argparse.Namespace) -> Optional[float]:
    """The peak to which an ESPnet configuration normalises utterances; None if it does not normalise them."""
    # As in ESPnet, the option counts only beside rir_scp, which configurations of older versions do not have.
    return getattr(args, "speech_volume_normalize", None) if hasattr(args, "rir_scp") else None


def to_volume(speech: Tensor, peak: float) -> Tensor:
    """Normalise audio (B, N, …), padded with 0, to ``peak`` per utterance; silence is not changed."""
    highest = speech.abs().flatten(1).amax(1).view(-1, *[1] * (speech.dim() - 1))
    return torch.where(highest > 0, speech * (peak / highest.clamp(min=1e-30)), speech)


def check_teacher_audio(student: argparse.Namespace, teacher: argparse.Namespace, name: Union[str, Path]) -> None:
    """Refuse an online teacher that would get other audio than it has in its cache and at inference.

    Args:
        student: options of training.
        teacher: contents of the teacher's config.yaml.
        name: the teacher's name in messages.

    Raises:
        UserError: only the student normalises the volume; the message names the option.
    """
    mine, theirs = volume(student), volume(teacher)
    if mine is not None and theirs is None:
        raise UserError(
            f"speech_volume_normalize: {mine:g} acts before the model, so that the teacher {name}, which was trained "
            "without it, would get other audio than in training; leave it out, or write the teacher's outputs to disk "
            "(--target_cache)"
        )


def check_channels(channels: int, student: argparse.Namespace, where: str) -> None:
    """Refuse audio of several channels for distillation: the student would get a random one, the teacher the first.

    Raises:
        UserError: the audio of the utterance ``where`` has several channels.
    """
    conf = getattr(student, "preprocessor_conf", None) or {}
    if channels > 1 and not conf.get("force_single_channel"):
        raise UserError(
            f"{where} has {channels} channels, of which the student's frontend draws one at each step and a teacher "
            "takes the first; format the data to one channel, or give --preprocessor_conf force_single_channel=true"
        )
