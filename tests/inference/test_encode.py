"""Hidden states at taps, and the frame shift, of real ESPnet encoders."""

from types import SimpleNamespace

import pytest
import tiny_asr
import torch
from espnet2.asr.encoder.conformer_encoder import TooShortUttError

from espnet_kd.cli import UserError
from espnet_kd.inference.encode import check_taps, encode, least_samples, measure_frame_shift, taps_of

LAYERS = 3
ENCODERS = {
    "transformer": {},
    "transformer-post": {"normalize_before": False},
    "conformer": {},
    "conformer-legacy": {"rel_pos_type": "legacy"},
    "conformer-post": {"normalize_before": False},
    "branchformer": dict(cgmlp_linear_units=32, cgmlp_conv_kernel=7),
    "e_branchformer": {},
}
RNN = dict(num_layers=2, hidden_size=8, output_size=12)


def config(name, **more):
    encoder, _, variant = name.partition("-")
    conf = tiny_asr.config(encoder, **{**ENCODERS.get(name, {}), **more})
    if encoder in ("rnn", "vgg_rnn"):
        conf["encoder_conf"] = {**RNN, **more}
    if encoder.startswith("contextual"):
        conf["encoder_conf"].update(linear_units=32)
    return conf


def speech():
    x = torch.zeros(2, 16000)
    for row, n in zip(x, (16000, 11111)):
        row[:n] = torch.from_numpy(tiny_asr.audio(n / 16000, n)[:n])
    return x, torch.tensor([16000, 11111])


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_tap_is_what_the_encoder_cut_there_computes(name):
    """The tap after layer n equals the output of an encoder with n layers, so that such an export is exact."""
    whole = tiny_asr.build(config(name, num_blocks=LAYERS))
    for p in whole.encoder.parameters():  # LayerNorms start as identities, and after_norm must have an effect
        p.add_(0.1 * torch.randn_like(p))
    taps = ["encoder"] + [f"encoder.{n}" for n in range(1, LAYERS + 1)]
    assert taps_of(whole.encoder) == taps
    out, lengths, intermediate, hidden = encode(whole, *speech(), taps)
    assert set(hidden) == set(taps) and intermediate == []
    torch.testing.assert_close(hidden["encoder"], whole.encode(*speech())[0], rtol=0, atol=0)
    assert torch.equal(out, hidden["encoder"])
    assert not torch.allclose(hidden["encoder.1"], hidden["encoder.2"], atol=1e-2)
    for n in range(1, LAYERS + 1):
        cut = tiny_asr.build(config(name, num_blocks=n), seed=9)
        missing, _ = cut.load_state_dict(whole.state_dict(), strict=False)
        assert missing == []
        expected, expected_lengths = cut.encode(*speech())
        assert torch.equal(lengths, expected_lengths)
        torch.testing.assert_close(hidden[f"encoder.{n}"], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_taps_equal_interctc():
    model = tiny_asr.build(tiny_asr.config(num_blocks=3, interctc_layer_idx=[1, 2]))
    _, _, intermediate, hidden = encode(model, *speech(), ["encoder.1", "encoder.2"])
    assert [layer for layer, _ in intermediate] == [1, 2]
    for layer, x in intermediate:
        torch.testing.assert_close(hidden[f"encoder.{layer}"], x, rtol=0, atol=0)


def test_recording_leaves_no_hooks_and_gradients_flow():
    model = tiny_asr.build(tiny_asr.config())
    hidden = encode(model, *speech(), ["encoder.1"])[3]
    hidden["encoder.1"].sum().backward()
    grads = [any(p.grad is not None for p in layer.parameters()) for layer in model.encoder.encoders]
    assert grads == [True, False]
    assert not any(layer._forward_hooks for layer in model.encoder.encoders)


@pytest.mark.parametrize("name", ["rnn", "vgg_rnn", "contextual_block_transformer"])
def test_whole_encoders_have_one_tap(name):
    conf = config(name)
    if name.startswith("contextual"):
        conf["encoder_conf"] = {"output_size": 16, "attention_heads": 2, "num_blocks": 2, "linear_units": 32}
    model = tiny_asr.build(conf)
    assert taps_of(model.encoder) == ["encoder"]
    out, _, _, hidden = encode(model, *speech(), ["encoder"])
    assert hidden["encoder"] is out
    named = type(model.encoder).__name__
    for whose in ("teacher", "student"):
        check_taps(model, ["encoder"], whose)
        with pytest.raises(UserError, match=rf"{whose} \({named}\) has no tap 'encoder.1'; it has: encoder$"):
            check_taps(model, ["encoder.1"], whose)


def only(encoder):
    """A model with nothing but an encoder."""
    return SimpleNamespace(encoder=encoder, decoder=None)


def test_a_decoder_is_asked_for():
    with pytest.raises(UserError, match="student has no attention decoder"):
        check_taps(only(torch.nn.Identity()), ["decoder"], "student")


@pytest.mark.parametrize("tap", ["encoder.0", "encoder.3", "encoder.-1", "encoder.x", "encoders.1"])
def test_unknown_taps_are_refused_listing_what_there_is(tap):
    encoder = tiny_asr.build(tiny_asr.config()).encoder
    with pytest.raises(UserError, match=f"student.*'{tap}'; it has: encoder, encoder.1, encoder.2$"):
        check_taps(only(encoder), ["encoder", tap], "student")


def test_unknown_encoders_are_refused_by_name():
    class WhisperEncoder(torch.nn.Module):
        pass

    with pytest.raises(UserError, match="WhisperEncoder.*ConformerEncoder.*RNNEncoder"):
        check_taps(only(WhisperEncoder()), ["encoder"], "student")
    check_taps(only(WhisperEncoder()), [], "student")  # without taps, any encoder is allowed


@pytest.mark.parametrize(
    "encoder, conf, frontend, shift",
    [
        ("conformer", {"input_layer": "conv2d"}, {}, 0.04),
        ("conformer", {"input_layer": "conv2d2"}, {}, 0.02),
        ("transformer", {"input_layer": "conv2d6"}, {}, 0.06),
        ("conformer", {"input_layer": "conv2d8"}, {}, 0.08),
        ("conformer", {"input_layer": "linear"}, {}, 0.01),
        ("vgg_rnn", {}, {}, 0.04),
        ("rnn", {"subsample": [2, 1]}, {}, 0.02),
        ("rnn", {"subsample": [3, 2]}, {}, 0.06),
        ("conformer", {"input_layer": "conv2d"}, {"hop_length": 128}, 0.032),
        ("conformer", {"input_layer": "conv2d"}, {"fs": "8k", "hop_length": 80}, 0.04),
    ],
)
def test_measured_frame_shift(encoder, conf, frontend, shift):
    conf = config(encoder, **conf)
    conf["frontend_conf"].update(frontend)
    model = tiny_asr.build(conf).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rate = 8000 if "fs" in frontend else 16000
    assert measure_frame_shift(model, rate) == pytest.approx(shift, abs=1e-9)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_measured_frame_shift_without_frontend(corpus):
    """Features of 10 ms come from the data loader; only the normalisation, or input_size, gives their width."""
    conf = tiny_asr.config(input_layer="conv2d")
    conf.update(input_size=40, frontend=None, frontend_conf={}, normalize="global_mvn")
    conf["normalize_conf"] = {"stats_file": str(corpus.dir / "feats_stats.npz")}
    assert measure_frame_shift(tiny_asr.build(conf), 16000) == pytest.approx(0.04, abs=1e-9)
    conf.update(normalize=None, normalize_conf={})
    model = tiny_asr.build(conf)
    assert measure_frame_shift(model, 16000) == pytest.approx(0.04, abs=1e-9)
    del model.input_size  # as in a model that ESPnet's own task built
    with pytest.raises(UserError, match="width of .* features .* give input_size"):
        measure_frame_shift(model, 16000)


@pytest.mark.parametrize("name", ["rnn", "vgg_rnn", "conformer"])
@torch.no_grad()
def test_batches_in_any_order(name):
    """ESPnet's RNN encoders take a batch only in the order of falling length."""
    model = tiny_asr.build(config(name))
    x, lengths = speech()
    out, frames, _, hidden = encode(model, x, lengths, ["encoder"])
    turned = encode(model, x.flip(0), lengths.flip(0), ["encoder"])
    torch.testing.assert_close(turned[0].flip(0), out, rtol=0, atol=1e-6)
    torch.testing.assert_close(turned[3]["encoder"].flip(0), hidden["encoder"], rtol=0, atol=1e-6)
    assert torch.equal(turned[1].flip(0), frames)


@pytest.mark.parametrize("layer, least", [("conv2d", 960), ("conv2d8", 2240), ("linear", 129)])
def test_least_samples(layer, least):
    """Feature frames are 10 ms, and the subsampling needs 7 or 15 of them; the STFT reflects half a window."""
    model = tiny_asr.build(tiny_asr.config(input_layer=layer)).train()
    assert least_samples(model, 16000.0) == least and model.training
    with pytest.raises((RuntimeError, TooShortUttError)):
        model.eval().encode(torch.ones(1, least - 1), torch.tensor([least - 1]))
