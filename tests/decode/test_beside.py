"""Beam search in processes beside the model gives the results of one process, while the model runs on."""

import argparse
import os
import signal
import time

import pytest
import tiny_asr
import torch

from espnet_kd.bin import asr_kd_inference, asr_kd_nbest
from espnet_kd.cli import UserError
from espnet_kd.decode.beam import BeamSearch
from espnet_kd.decode.beside import BesideSearch
from espnet_kd.inference import recognise as decoding
from espnet_kd.inference.recognise import choose_device, recognise

TOKENS = ["<blank>", "a", "b", "c", "d", "<sos/eos>"]
OPTIONS = {"nbest": 4, "beam_size": 6, "drop": [5]}


def posteriors(*shape, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2).log_softmax(-1)


@pytest.fixture(scope="module")
def beside():
    return BesideSearch(TOKENS, 2, beam_size_token=3, **OPTIONS)


@pytest.mark.parametrize("utterances", [1, 2, 5])
def test_equals_the_search_in_one_process(beside, utterances):
    log_probs = posteriors(utterances, 9, 6, seed=utterances)
    lengths = torch.tensor([9, 0, 4, 9, 1][:utterances])
    for row, n in zip(log_probs, lengths):
        row[n:] = torch.nan  # padding must not be read
    here = BeamSearch(TOKENS, beam_size_token=3, **OPTIONS)
    assert beside(log_probs, lengths) == here(log_probs, lengths)


def test_all_labels_and_an_n_gram_model(tmp_path):
    arpa = tiny_asr.write_arpa(tmp_path / "lm", {"a": -1.0, "b": -1.5, "c": -2.0}, {("a", "b"): -0.1})
    options = {**OPTIONS, "ngram_file": arpa, "ngram_weight": 0.7}
    log_probs, lengths = posteriors(3, 7, 6), torch.tensor([7, 7, 5])
    assert BesideSearch(TOKENS, 1, **options)(log_probs, lengths) == BeamSearch(TOKENS, **options)(log_probs, lengths)


def test_nothing_to_search(beside):
    assert beside(posteriors(0, 4, 6), torch.zeros(0, dtype=torch.long)) == []
    assert beside(posteriors(2, 4, 6)[:, :0], torch.zeros(2, dtype=torch.long)) == [[(0.0, [])]] * 2


def test_mistakes_are_told_here(beside):
    with pytest.raises(ValueError, match="nbest"):
        BesideSearch(TOKENS, 1, nbest=3, beam_size=2)
    with pytest.raises(ValueError, match="want"):
        beside.begin(posteriors(2, 3, 4), torch.tensor([3, 3]))
    with pytest.raises(FloatingPointError):
        beside.begin(posteriors(1, 3, 6) * torch.nan, torch.tensor([3]))


@pytest.mark.trains
def test_a_process_that_died_is_told_of():
    beside = BesideSearch(TOKENS, 1, **OPTIONS)
    beside(posteriors(1, 3, 6), torch.tensor([3]))
    (process,) = beside._pool._processes.values()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="--nj"):
        for _ in range(50):  # until the pool notices it
            beside(posteriors(1, 3, 6), torch.tensor([3]))
            time.sleep(0.1)


class Slow:
    """A stand-in that logs when a batch is begun and when its result is asked for."""

    def __init__(self, ahead):
        self.ahead, self.log = ahead, []

    def begin(self, speech):
        number = len([what for what, _ in self.log if what == "begin"])
        self.log.append(("begin", number))

        def finish():
            self.log.append(("end", number))
            return [number] * len(speech)

        return finish


@pytest.mark.parametrize("ahead, order", [(0, "begin end begin end begin end"), (1, "begin begin end begin end end")])
def test_next_batches_are_begun_before_the_first_is_ended(tmp_path, ahead, order):
    data = tiny_asr.data_dir(tmp_path, {str(i): tiny_asr.audio(0.3, i) for i in range(3)})
    utterances = decoding.read_utterances(data)
    slow = Slow(ahead)
    found, timing = recognise(slow, utterances, batch_seconds=0.3, progress=False)
    assert [what for what, _ in slow.log] == order.split() and found == {"0": 0, "1": 1, "2": 2}
    assert timing.audio_seconds == pytest.approx(0.9) and timing.decode_seconds >= 0 and timing.read_seconds > 0


def test_on_a_gpu_jobs_are_for_the_search(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = argparse.Namespace(ngpu=1, nj=3)
    assert choose_device(args) == "cuda" and (args.nj, args.search_jobs) == (1, 3)
    args = argparse.Namespace(ngpu=0, nj=1)
    assert choose_device(args) == "cpu" and (args.nj, args.search_jobs) == (1, 0)


@pytest.fixture
def stand_in(monkeypatch):
    """A CPU in place of a GPU. torchaudio's CUDA decoder must not be called, because it can end the process."""

    def choose(args):
        args.nj, args.search_jobs = 1, args.nj if args.ngpu else 0
        return "cpu"

    def never(*_, **__):
        raise AssertionError("torchaudio's CUDA decoder was called")

    monkeypatch.setattr(decoding, "choose_device", choose)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "stand-in")
    monkeypatch.setattr("torchaudio.models.decoder.cuda_ctc_decoder", never, raising=False)


def test_commands_find_the_same_on_a_gpu(tmp_path, stand_in):
    conf = tiny_asr.config()
    expdir = tiny_asr.save(tiny_asr.build(conf, sharpen=20.0), conf, tmp_path / "exp")
    waves = {f"u{i}": tiny_asr.audio(s, i) for i, s in enumerate((1.1, 0.5, 0.7, 0.001))}
    data = str(tiny_asr.data_dir(tmp_path / "data", waves))
    search = ["--beam_size", "4", "--nbest", "2", "--nj", "2", "--batch_seconds", "1"]
    texts, nbest = {}, {}
    for ngpu in ("0", "1"):
        out = tmp_path / ngpu
        asr_kd_inference.main(
            ["--expdir", str(expdir), "--data_dir", data, "--output_dir", str(out / "decode"), "--ngpu", ngpu, *search]
        )
        files = sorted((out / "decode").glob("*best_recog/*"))
        texts[ngpu] = {str(f.relative_to(out)): f.read_text() for f in files}
        asr_kd_nbest.main(
            ["--teacher", str(expdir), "--data_dir", data, "--output", str(out / "nbest"), "--ngpu", ngpu, *search]
        )
        nbest[ngpu] = (out / "nbest").read_text()
    assert texts["0"] == texts["1"] and len(texts["0"]) == 8 and nbest["0"] == nbest["1"]
    facts = (tmp_path / "1" / "decode" / "decode.json").read_text()
    assert '"search_processes": 2' in facts and '"device": "stand-in"' in facts
