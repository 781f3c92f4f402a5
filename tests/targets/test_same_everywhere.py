"""For any configuration of a supported kind, posteriors are the same online, from the cache and at inference."""

import math
import os
import shutil
from typing import Any, Dict

import numpy as np
import pytest
import soundfile
import tiny_asr
import torch
from fuzzing import examples
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from espnet_kd.bin import asr_kd_cache
from espnet_kd.experiments.audio_options import sampling_rate
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.recognise import Recogniser, read_audio, read_utterances
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.nucleus import LEVELS, SPAN
from espnet_kd.targets.online import OnlineTeacher

#: The number of configurations, which ESPNET_KD_TEST_CONFIGURATIONS=N can raise.
EXAMPLES = int(os.environ.get("ESPNET_KD_TEST_CONFIGURATIONS", "12"))
NUMBERS = 2e-4  #: allowed difference in nats between two ways to compute the same
BLANK = 1e-3  #: allowed difference of p(blank) in the cache, in nats of log-odds (espnet_kd.targets.nucleus)
KINDS = ["conformer", "transformer", "e_branchformer", "branchformer", "contextual_block_conformer"]
KINDS += ["contextual_block_transformer", "rnn", "vgg_rnn"]
DROPOUT = st.sampled_from([0.0, 0.2])
SUBSAMPLING = st.sampled_from(["conv2d", "conv2d2", "conv2d6", "conv2d8"])


def some(draw, **choices: Any) -> Dict[str, Any]:
    """Each option is left out or gets one of its values."""
    return {k: draw(st.sampled_from(v), label=k) for k, v in choices.items() if draw(st.booleans())}


@st.composite
def encoders(draw):
    """(encoder, encoder_conf) of small models, with options that change lengths, normalisation or the output's form."""
    kind = draw(st.sampled_from(KINDS))
    event(kind)
    if kind == "vgg_rnn":
        return kind, {"num_layers": 1, "hidden_size": 8, "output_size": 12, "dropout": draw(DROPOUT),
                      **some(draw, rnn_type=["gru", "lstm"], bidirectional=[False])}  # fmt: skip
    if kind == "rnn":
        conf = some(draw, rnn_type=["gru", "lstm"], bidirectional=[False], use_projection=[False])
        return kind, {"num_layers": 2, "hidden_size": 8, "output_size": 12, "dropout": draw(DROPOUT),
                      "subsample": draw(st.sampled_from([[1, 1], [2, 1], [2, 2], [3, 2]])), **conf}  # fmt: skip
    conf = {"output_size": 16, "attention_heads": 2, "num_blocks": 2, "dropout_rate": draw(DROPOUT)}
    conf.update(positional_dropout_rate=draw(DROPOUT), attention_dropout_rate=draw(DROPOUT))
    if "block" in kind:
        conf.update(linear_units=16, input_layer=draw(st.sampled_from(["conv2d", "conv2d6", "conv2d8"])))
        block, hop, ahead = draw(st.sampled_from([(40, 16, 16), (24, 8, 8), (40, 20, 8)]))
        return kind, {**conf, "block_size": block, "hop_size": hop, "look_ahead": ahead}
    conf["input_layer"] = draw(SUBSAMPLING)
    if kind == "branchformer":
        return kind, {**conf, "cgmlp_linear_units": 32, "cgmlp_conv_kernel": 7,
                      **some(draw, merge_method=["concat", "learned_ave"], use_attn=[True])}  # fmt: skip
    conf["linear_units"] = 32
    if kind == "conformer":
        conf.update(rel_pos_type="latest", cnn_module_kernel=7)
        conf.update(some(draw, macaron_style=[True], normalize_before=[False], use_cnn_module=[False]))
    if kind == "e_branchformer":
        conf.update(cgmlp_linear_units=32, cgmlp_conv_kernel=7, merge_conv_kernel=3, rel_pos_type="latest")
        conf.update(some(draw, use_ffn=[True], macaron_ffn=[True]))
    if kind != "branchformer" and draw(st.booleans(), label="InterCTC"):  # then its output is a pair
        conf.update(interctc_layer_idx=[1], interctc_use_conditioning=draw(st.booleans()))
    return kind, conf


@st.composite
def configurations(draw):
    """A config.yaml without the path of the feature statistics."""
    kind, encoder_conf = draw(encoders())
    n_fft = draw(st.sampled_from([256, 400, 512]))
    fs = draw(st.sampled_from([8000, 16000, "16k", 22050]))
    frontend = {"fs": fs, "n_fft": n_fft, "hop_length": draw(st.sampled_from([80, 128, 160])), "n_mels": 40}
    frontend.update(some(draw, win_length=[200, 256], window=["hamming", None], center=[False], n_mels=[23, 80]))
    frontend.update(some(draw, fmin=[50], fmax=[3500], htk=[True], normalized=[True]))
    conf = tiny_asr.config()
    conf.update(encoder=kind, encoder_conf=encoder_conf, frontend_conf=frontend)
    normalize = draw(st.sampled_from(["utterance_mvn", "global_mvn", None]))
    conf.update(normalize=normalize)
    conf["normalize_conf"] = some(draw, norm_vars=[True, False], norm_means=[True]) if normalize else {}
    if draw(st.booleans(), label="preencoder"):
        conf.update(preencoder="linear", preencoder_conf={"input_size": frontend["n_mels"], "output_size": 24})
    if draw(st.booleans(), label="specaug"):
        conf.update(specaug="specaug", specaug_conf={"apply_time_warp": False, "apply_freq_mask": True,
                                                     "freq_mask_width_range": [0, 8], "num_freq_mask": 1,
                                                     "apply_time_mask": False})  # fmt: skip
    interctc = "interctc_layer_idx" in encoder_conf
    conf["model_conf"] = {"ctc_weight": draw(st.sampled_from([1.0, 0.3])), "interctc_weight": 0.3 * interctc}
    conf["ctc_conf"] = some(draw, reduce=[True], ignore_nan_grad=[True])
    conf["speech_volume_normalize"] = draw(st.sampled_from([None, None, 0.3, 1.0]))
    return conf


@pytest.mark.trains
def test_posteriors_are_the_same_online_cached_and_at_inference(tmp_path):
    """Each utterance is alone in its batch; one is shorter than any window and one is silent."""
    numbers = np.random.default_rng(0)

    @settings(examples(EXAMPLES), phases=[Phase.generate])  # shrinking a failure takes too long
    @given(configurations(), st.lists(st.integers(3000, 30000), min_size=1, max_size=2), st.integers(0, 99))
    def check(conf, sizes, seed):
        shutil.rmtree(tmp_path / "exp", ignore_errors=True)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        if conf["normalize"] == "global_mvn":
            mean, n = numbers.standard_normal((2, conf["frontend_conf"]["n_mels"])), 50
            squares = n * (mean[0] ** 2 + mean[1] ** 2 + 0.1)
            np.savez(tmp_path / "stats.npz", count=n, sum=n * mean[0], sum_square=squares)
            conf["normalize_conf"]["stats_file"] = str(tmp_path / "stats.npz")
        model = tiny_asr.build(conf, seed=seed, sharpen=5.0)
        exp = tiny_asr.save(model, conf, tmp_path / "exp")
        rate = int(sampling_rate(load_model(*find_experiment(exp))[1]))
        waves = {f"u{i}": tiny_asr.audio(2.0, seed + i)[:n] for i, n in enumerate([*sizes, 90])}
        waves["u_silent"] = np.zeros(4000, np.float32)
        data = tmp_path / "data"
        shutil.rmtree(data, ignore_errors=True)
        tiny_asr.data_dir(data, waves)
        for utt_id, samples in waves.items():
            soundfile.write(data / f"{utt_id}.wav", samples, rate, subtype="PCM_16")

        asr_kd_cache.main(["--teacher", str(exp), "--kd_config", "kl", "--data_dir", str(data), "--output",
                           str(tmp_path / "cache"), "--batch_seconds", "0.1"])  # fmt: skip
        online, cached = OnlineTeacher(exp), CachedTeacher(tmp_path / "cache")
        recogniser = Recogniser(*load_model(*find_experiment(exp)), exp)
        assert online.frame_shift == cached.frame_shift and online.token_list == cached.token_list
        for utterance in read_utterances(data, recogniser.rate):
            samples = read_audio(utterance)
            batch = ([utterance.utt_id], torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
            now, kept = online.targets(*batch), cached.targets(*batch)
            logits, frames = recogniser.logits([samples])
            assert now.lengths.tolist() == kept.lengths.tolist() == frames.tolist(), utterance
            count = int(frames[0])
            assert count > 0 or len(samples) < 4001
            expected = logits[0, :count].float().log_softmax(-1)
            assert expected.isfinite().all()
            found = now.logits[0, :count].log_softmax(-1)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=NUMBERS)  # <sos/eos> has −10,000
            kept = kept.logits[0]
            torch.testing.assert_close(kept.log_blank[:count], expected[:, 0], rtol=0, atol=BLANK + NUMBERS)
            there = kept.log_probs[:count] > -math.inf
            below = expected[:, 1:].amax(1, keepdim=True) - expected  # nats below the frame's most likely token
            off = (SPAN * below.clamp(0, SPAN)).sqrt() / LEVELS  # error of a token's code
            # After reading, probabilities are scaled to sum to 1 again, which adds the errors of the other tokens.
            off = off + (off * expected.exp())[:, 1:].sum(1, keepdim=True) / (1 - expected[:, :1].exp()).clamp(min=1e-9)
            same, bound = (x.gather(1, kept.tokens[:count])[there] for x in (expected, off))
            assert ((kept.log_probs[:count][there] - same).abs() <= bound + 2 * (BLANK + NUMBERS)).all()

    check()
