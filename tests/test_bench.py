"""The benchmark command: the compared computations are equal, and figures are printed. The figures are not tested."""

import json
import os

import numpy as np
import pytest
import tiny_asr
import torch

from espnet_kd.bench import decoding, loss, steps, timing
from espnet_kd.bench.table import headline, table
from espnet_kd.bin import asr_kd_bench, asr_kd_inference
from espnet_kd.cli import UserError
from espnet_kd.decode.beam_recognise import BeamRecogniser
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.recognise import AudioFile
from espnet_kd.losses import factorized_kl

SMALL = (3, 20, 50, 5)


def gradient(function, step):
    student = torch.randn_like(step.teacher).requires_grad_()
    value = function(student, step.teacher, step.lengths)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("nonblank", [0.2, 0.5])
def test_both_ways_to_write_factorized_kl_are_equal(nonblank):
    """Values and gradients agree to 1e-5 relative in float32."""
    step = loss.LossStep("ctc", nonblank, SMALL)
    torch.manual_seed(1)
    ours = gradient(factorized_kl, step)
    torch.manual_seed(1)
    plain = gradient(loss.plain_factorized_kl, step)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-8)


@pytest.mark.trains
def test_loss_part(monkeypatch, capsys):
    monkeypatch.setattr(loss, "SHAPE", SMALL)
    monkeypatch.setattr(loss.measure, "__defaults__", (SMALL,))
    asr_kd_bench.main(["--only", "loss", "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fkl_time"] == found["measured"][0]["fkl_time"] and found["machine"]["torch"] == torch.__version__
    assert set(found["measured"][0]) >= {"fkl_memory", "ours_bytes", "plain_bytes"}
    assert 0 < found["fkl_bandwidth"] < 2


def test_steps_part(capsys):
    found = steps.measure(30, 1, student=(1, 16), teacher=(1, 24), utts=2, seconds=1.0)
    assert found["cached_step"] > 0 and found["online_step"] > 0 and found["cache_bytes"] > 0
    # A frame is 40 ms, and a second of audio loses one or two of 25 frames at its ends.
    assert found["cache_bytes_per_hour"] / found["cache_bytes"] in (23 * 3600, 24 * 3600)
    printed = table([{"vocabulary": 30, **found}])
    assert "KD step from the cache / plain step | vocabulary = 30 |" in printed
    assert f"cache, bytes per hour of audio | vocabulary = 30 | {found['cache_bytes_per_hour']:,.0f} |" in printed


@pytest.mark.parametrize("ours", [0.9, 1.0])
def test_what_noise_hides_is_no_ratio(ours, monkeypatch):
    """Noise can make the ratio negative or infinite, which would pass for a result."""
    monkeypatch.setattr(loss, "interleaved", lambda runs, rounds: {"ctc": [1.0], "ours": [ours], "plain": [1.5]})
    monkeypatch.setattr(loss, "peak_memory_of", lambda run: 2**20)
    monkeypatch.setattr(loss, "bandwidth_share", lambda step, rounds: 0.5)
    found = loss.measure(0.2, 1, SMALL)
    assert found["fkl_time"] is None and json.loads(json.dumps(headline([found])))["fkl_time"] is None
    assert "plainly written / ours |  | too noisy: give more --rounds |" in table([found])


def test_a_process_that_dies_is_told():
    """The parent raises an error, instead of waiting without end."""
    with pytest.raises(UserError, match="ended with exit code 3 "):
        timing.peak_memory_of(os._exit, 3)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="--expdir and --data_dir"):
        asr_kd_bench.main(["--only", "decoding"])
    with pytest.raises(UserError, match="--rounds"):
        asr_kd_bench.main(["--rounds", "0"])


def test_neighbours_are_joined():
    utterances = [AudioFile(f"u{i}", f"u{i}.wav", n, 10) for i, n in enumerate([10, 20, 5, 90, 1])]
    audio = {u.utt_id: np.full(u.samples, i, np.float32) for i, u in enumerate(utterances)}
    references = {u.utt_id: u.utt_id for u in utterances}
    joined = decoding.join(utterances, audio, references, 3.0)
    assert [(u.utt_id, u.samples, references[u.utt_id]) for u in joined] == [
        ("u0", 30, "u0 u1"), ("u2", 5, "u2"), ("u3", 90, "u3"), ("u4", 1, "u4"),
    ]  # fmt: skip
    assert audio.keys() == {"u0", "u2", "u3", "u4"} and audio["u0"].tolist() == [0.0] * 10 + [1.0] * 20


def test_decoding_part(tmp_path, capsys):
    """Each of four decoders decodes every utterance once; references are our greedy texts, so only others can err."""
    conf = tiny_asr.config()
    exp = tiny_asr.save(tiny_asr.build(conf, sharpen=20.0), conf, tmp_path / "exp")
    data = tiny_asr.data_dir(tmp_path / "test", {f"u{i}": tiny_asr.audio(0.5 + 0.1 * i, i) for i in range(5)})
    asr_kd_inference.main(["--expdir", str(exp), "--data_dir", str(data)])
    argv = ["--only", "decoding", "--expdir", str(exp), "--data_dir", str(data), "--rounds", "2", "--beam_size", "4"]
    with pytest.raises(UserError, match="text: no such file"):
        asr_kd_bench.main(argv)
    greedy = (exp / "decode_test/1best_recog/text").read_text().replace("<unk>", "")
    (data / "text").write_text(greedy)
    capsys.readouterr()  # drop what ESPnet has printed
    asr_kd_bench.main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    measured = found["measured"][0]
    assert found["greedy"] == measured["greedy"] > 0 and found["beam"] == measured["beam"] > 0
    assert measured["utterances"] == 5 and measured["beam_size"] == 4 and measured["beam_size_token"] == 20
    for name in ("greedy", "beam"):
        difference, low, high = measured[f"wer_{name}_difference"]
        assert difference == pytest.approx(measured[f"wer_{name}"] - measured[f"wer_stock_{name}"])
        assert low <= difference <= high
        assert 0 <= sum(measured[f"likelier_{name}"]) <= 5
    printed = table(found["measured"])
    assert "| likelier texts found, beam: by ours / by asr_inference |" in printed
    assert "| WER in percent, greedy: ours − asr_inference [95 % interval] | beam_size = 4, " in printed
    (data / "text").write_text("".join(greedy.splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="text lacks utterances of wav.scp: u0"):
        asr_kd_bench.main(argv)
    (data / "text").write_text("".join(f"u{i}\n" for i in range(5)))
    with pytest.raises(UserError, match="text has no words"):
        asr_kd_bench.main(argv)


def test_likelihoods_are_those_of_the_search(tmp_path):
    """With a beam that holds everything, the score of a hypothesis is log P(text | audio)."""
    conf = tiny_asr.config()
    exp = tiny_asr.save(tiny_asr.build(conf, sharpen=20.0), conf, tmp_path)
    recogniser = BeamRecogniser(*load_model(*find_experiment(exp)), exp, nbest=1, beam_size=2000)
    audio = {f"u{i}": tiny_asr.audio(0.2 + 0.1 * i, i) for i in range(2)} | {"short": tiny_asr.audio(0.001, 0)}
    best = {u: recogniser([x])[0][0] for u, x in audio.items()}
    batch = [AudioFile(u, "", len(x), 16000) for u, x in audio.items()]
    found = decoding.likelihoods(recogniser, [batch[:2], batch[2:]], audio, best)
    assert found == pytest.approx([h.score for h in best.values()], abs=1e-3)
