"""A graph computes ESPnet's features and normalisation with all supported options; others are refused by name."""

import copy

import numpy as np
import pytest
import tiny_asr
import torch
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.layers.global_mvn import GlobalMVN
from espnet2.layers.utterance_mvn import UtteranceMVN

from espnet_kd.cli import UserError
from espnet_kd.deploy.features import LogMel, Normalisation

OPTIONS = [
    {},
    {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 40},
    {"n_fft": 512, "win_length": 401, "hop_length": 128},
    {"n_fft": 256, "hop_length": 320, "n_mels": 32, "window": "hamming"},
    {"n_fft": 400, "hop_length": 100, "window": None},
    {"n_fft": 512, "hop_length": 128, "center": False},
    {"fs": 8000, "n_fft": 256, "fmin": 80, "fmax": 3800, "htk": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_log_mel(options):
    frontend = DefaultFrontend(**options).eval()
    waves = [torch.from_numpy(tiny_asr.audio(s, i)) for i, s in enumerate((1.1, 0.4, 0.73))]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=0.7)  # must be in no frame
    feats, frames = LogMel(frontend)(padded, torch.tensor([len(w) for w in waves]))
    for row, n, wave in zip(feats, frames, waves):
        expected, length = frontend(wave[None], torch.tensor([len(wave)]))
        assert n == length[0] and not row[n:].any()
        torch.testing.assert_close(row[:n], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("variances", [True, False])
@pytest.mark.parametrize("kind", ["global_mvn", "utterance_mvn"])
def test_normalisation(tmp_path, kind, means, variances):
    rng = np.random.default_rng(0)
    if kind == "global_mvn":
        spread = rng.uniform(1, 3, 6)
        mean = rng.normal(-5, 2, 6)
        np.savez(tmp_path / "s.npz", count=1, sum=mean, sum_square=spread**2 + mean**2)  # float64
        layer = GlobalMVN(tmp_path / "s.npz", norm_means=means, norm_vars=variances)
        assert layer.mean.dtype == torch.float64
    else:
        layer = UtteranceMVN(norm_means=means, norm_vars=variances)
    feats, lengths = torch.from_numpy(rng.normal(-4, 3, (2, 9, 6))).float(), torch.tensor([9, 5])
    feats[1, 5:] = 0.0
    found = Normalisation(copy.deepcopy(layer))(feats, lengths)
    assert found.dtype == torch.float32 and not found[1, 5:].any()
    for row, one, n in zip(found, feats, lengths.tolist()):  # ESPnet's own layer differs in a batch
        expected, _ = layer(one[None, :n].clone(), torch.tensor([n]))
        torch.testing.assert_close(row[:n], expected[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option, value", [("normalized", True), ("onesided", False)])
def test_options_that_are_not_computed(option, value):
    with pytest.raises(UserError, match=f"frontend_conf: {option}: {value}"):
        LogMel(DefaultFrontend(**{option: value}))


def test_other_layers():
    with pytest.raises(UserError, match="frontend: Linear"):
        LogMel(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="normalize: BatchNorm1d"):
        Normalisation(torch.nn.BatchNorm1d(3))
    with pytest.raises(UserError, match="frontend: DefaultFrontend"):
        LogMel(DefaultFrontend(apply_stft=False))
