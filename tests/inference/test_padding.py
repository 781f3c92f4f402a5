"""Frontends that give each utterance of a batch the features that it has alone."""

import pytest
import tiny_asr
import torch
from espnet2.asr.frontend.default import DefaultFrontend

from espnet_kd.inference.padding import OneByOne, ReflectedEach, exact_frontend, make_batch_exact

LENGTHS = (16000, 15999, 8123, 512, 257)  # samples; half a window is 256


class Other(DefaultFrontend):
    """A frontend that the package does not know."""


def batch():
    waves = [torch.from_numpy(tiny_asr.audio(n / 16000, n))[:n] for n in LENGTHS]
    # The values in the padding must not matter.
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=0.7)
    return padded, torch.tensor([len(w) for w in waves])


@pytest.mark.parametrize("kind, expected", [(DefaultFrontend, ReflectedEach), (Other, OneByOne)])
@pytest.mark.parametrize("options", [{}, {"win_length": 400, "hop_length": 160, "n_mels": 40}, {"n_fft": 400}])
def test_batch_equals_each_alone(kind, expected, options):
    frontend = kind(fs=16000, **options).eval()
    speech, lengths = batch()
    alone = [frontend(speech[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())]
    changed = exact_frontend(frontend)
    assert type(changed) is expected
    feats, frames = changed(speech, lengths)
    assert frames.tolist() == [int(n) for _, n in alone]
    for got, n, (one, _) in zip(feats, frames, alone):
        torch.testing.assert_close(got[:n], one[0], rtol=0, atol=1e-4)
        assert not got[n:].any()


def test_the_frontend_itself_is_left_as_it_was():
    frontend = DefaultFrontend(fs=16000).eval()
    exact_frontend(frontend)
    assert frontend.stft.center


@pytest.mark.parametrize("options", [{"apply_stft": False}, {"center": False}])
def test_what_is_not_reflected_runs_one_by_one(options):
    assert type(exact_frontend(DefaultFrontend(fs=16000, **options))) is OneByOne


@torch.no_grad()
def test_the_deviation_of_an_utterance_is_its_own():
    """ESPnet's deviation includes the padding, which is no longer 0 after the mean is subtracted."""
    model = tiny_asr.build({**tiny_asr.config(), "normalize_conf": {"norm_vars": True}})
    speech, lengths = batch()
    speech, lengths = speech[:3], lengths[:3]
    alone = [model.encode(speech[i : i + 1, :n], lengths[i : i + 1])[0][0] for i, n in enumerate(lengths.tolist())]
    assert make_batch_exact(model)
    together, frames = model.encode(speech, lengths)
    for got, n, one in zip(together, frames, alone):
        assert n == len(one)
        torch.testing.assert_close(got[:n], one, rtol=1e-4, atol=1e-4)
