"""ESPnet's options that change audio act alike in training, cache and inference, or are refused."""

import argparse

import pytest
import torch

from espnet_kd.cli import UserError
from espnet_kd.experiments import audio_options as audio

RATES = {
    "default frontend": (dict(frontend_conf={"fs": "8k"}), 8000),
    "sinc": (dict(frontend="sliding_window", frontend_conf={}, preencoder_conf={"fs": 8000}), 8000),
    "frontend before pre-encoder": (dict(frontend_conf={"fs": 8000}, preencoder_conf={"fs": 16000}), 8000),
    "none": (dict(frontend=None, frontend_conf=None), 16000),
    "a string": (dict(frontend_conf={"fs": "22050"}), 22050),
}


@pytest.mark.parametrize("options, rate", RATES.values(), ids=RATES)
def test_rate(options, rate):
    assert audio.sampling_rate(argparse.Namespace(**options)) == rate


@pytest.mark.parametrize("fs", ["fast", 0, -1, float("nan"), [16000], 1e9])
def test_rates_that_are_none(fs):
    with pytest.raises(UserError, match="frontend_conf.fs: expected a sampling rate in Hz"):
        audio.sampling_rate(argparse.Namespace(frontend_conf={"fs": fs}))


@pytest.mark.parametrize("size, takes", [(None, True), (1, True), (80, False)])
def test_what_takes_audio(size, takes):
    assert audio.takes_audio(argparse.Namespace(input_size=size)) is takes


def options(volume=None, **more):
    return argparse.Namespace(rir_scp=None, speech_volume_normalize=volume, **more)


def test_a_student_whose_loudness_the_teacher_does_not_know_is_refused():
    with pytest.raises(UserError, match="^speech_volume_normalize: 0.5 acts before .*exp/t.*--target_cache"):
        audio.check_teacher_audio(options(0.5), options(), "exp/t")
    for mine, theirs in ((None, None), (None, 0.5), (0.5, 0.9)):
        audio.check_teacher_audio(options(mine), options(theirs), "exp/t")


def test_espnet_reads_loudness_beside_rir_scp_alone():
    assert audio.volume(argparse.Namespace(speech_volume_normalize=0.5)) is None
    assert audio.volume(options(0.5)) == 0.5


@pytest.mark.parametrize("shape", [(3, 50), (3, 50, 2)])
def test_to_volume(shape):
    torch.manual_seed(0)
    speech = torch.randn(shape)
    speech[1] = 0
    speech[2, 20:] = 0
    out = audio.to_volume(speech, 0.5)
    assert out.abs().flatten(1).amax(1).tolist() == pytest.approx([0.5, 0.0, 0.5])
    torch.testing.assert_close(out[0] * (speech[0].abs().max() / 0.5), speech[0])
    assert audio.to_volume(out, 0.5).allclose(out)  # the volume is right already


def test_channels():
    with pytest.raises(UserError, match="^utt1 has 2 channels, .*force_single_channel=true"):
        audio.check_channels(2, options(), "utt1")
    audio.check_channels(1, options(), "utt1")
    audio.check_channels(2, options(preprocessor_conf={"force_single_channel": True}), "utt1")
