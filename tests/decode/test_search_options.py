"""Options of asr_kd_inference beyond greedy decoding: beam, N-best, n-gram model, ESPnet's own search."""

import json

import numpy as np
import pytest
import tiny_asr

from espnet_kd.bin import asr_kd_inference
from espnet_kd.cli import UserError
from espnet_kd.decode.beam_recognise import BeamRecogniser
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.recognise import Recogniser

FILES = ("text", "token", "token_int", "score")
SECONDS = {"a": 1.1, "b": 0.55, "c": 0.8}


@pytest.fixture(scope="module")
def expdir(tmp_path_factory):
    conf = tiny_asr.config()
    return tiny_asr.save(tiny_asr.build(conf, sharpen=20.0), conf, tmp_path_factory.mktemp("exp"))


@pytest.fixture(scope="module")
def waves():
    return {**{u: tiny_asr.audio(s, i) for i, (u, s) in enumerate(SECONDS.items())}, "short": np.zeros(9, np.float32)}


@pytest.fixture(scope="module")
def data(tmp_path_factory, waves):
    return tiny_asr.data_dir(tmp_path_factory.mktemp("data") / "test", waves)


def decode(expdir, data, out, *more):
    """Run the command; return its text by utterance id."""
    asr_kd_inference.main(["--expdir", str(expdir), "--data_dir", str(data), "--output_dir", str(out), *map(str, more)])
    return read(out / "1best_recog" / "text")


def read(path):
    return dict(line.rstrip("\n").split(" ", 1) for line in path.open())


def test_nbest_is_written_in_the_layout_of_espnet(tmp_path, expdir, data, waves):
    out = tmp_path / "out"
    decode(expdir, data, out, "--beam_size", 10, "--nbest", 3, "--batch_seconds", 1, "--nj", 2)
    model, args = load_model(*find_experiment(expdir))
    recogniser = BeamRecogniser(model, args, expdir, nbest=3, beam_size=10, beam_size_token=20)
    expected = dict(zip(waves, recogniser(list(waves.values()))))
    assert [len(h) for h in expected.values()] == [3, 3, 3, 1]
    for n in range(3):
        place = out / f"{n + 1}best_recog"
        assert {p.name for p in place.iterdir()} == set(FILES)
        # As in ESPnet, an utterance with fewer hypotheses has no line here.
        ids = [u for u in waves if n < len(expected[u])]
        assert all(list(read(place / name)) == ids for name in FILES)
        for u in ids:
            h = expected[u][n]
            assert read(place / "text")[u] == h.text
            assert read(place / "token")[u].split() == h.tokens
            assert [int(i) for i in read(place / "token_int")[u].split()] == h.token_ids
            assert float(read(place / "score")[u]) == pytest.approx(h.score, abs=1e-3)
    facts = json.loads((out / "decode.json").read_text())
    assert (facts["beam_size"], facts["nbest"], facts["ctc_weight"]) == (10, 3, 1.0)
    assert (facts["data_dir"], facts["ngram_file"]) == (str(data), None)


def test_another_search_decodes_again_and_leaves_nothing_of_the_last(tmp_path, expdir, data):
    out = tmp_path / "out"

    def remade(*more):
        text = out / "1best_recog" / "text"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("touched\n")
        decode_again = ["--expdir", str(expdir), "--data_dir", str(data), "--output_dir", str(out), *map(str, more)]
        asr_kd_inference.main(decode_again)
        return text.read_text() != "touched\n"

    assert remade("--beam_size", 8, "--nbest", 3)
    assert not remade("--beam_size", 8, "--nbest", 3)
    assert remade("--beam_size", 9, "--nbest", 3)
    assert remade("--beam_size", 9, "--nbest", 3, "--beam_size_token", 3)
    (out / "3best_recog" / "mine").write_text("kept")
    assert remade()
    assert sorted(str(p.relative_to(out)) for p in out.glob("[2-9]best_recog/**")) == ["3best_recog"]
    assert (out / "3best_recog" / "mine").read_text() == "kept"


def test_ngram_model_has_its_say(tmp_path, expdir, data):
    letters = "abcdefghij"
    plain = decode(expdir, data, tmp_path / "plain", "--beam_size", 10)
    present = next(c for c in plain["a"] if c in letters)

    def arpa(score):
        scores = {"</s>": -1.0, "<space>": -1.0, **{c: score(c) for c in letters}}
        return tiny_asr.write_arpa(tmp_path / "lm.arpa", scores, {("<s>", "<space>"): -1.0})

    forbidding = arpa(lambda c: -90 if c == present else -1)
    search = ["--beam_size", 10, "--ngram_file", forbidding]
    assert present not in decode(expdir, data, tmp_path / "lm", *search)["a"]  # with ESPnet's default weight
    assert decode(expdir, data, tmp_path / "zero", *search, "--ngram_weight", 0) == plain
    # With another model under the same name, the data dir is decoded again.
    before = read(tmp_path / "lm" / "1best_recog" / "score")
    arpa(lambda c: -1)
    decode(expdir, data, tmp_path / "lm", *search)
    assert read(tmp_path / "lm" / "1best_recog" / "score") != before


@pytest.mark.parametrize(
    "more, message",
    [
        (["--beam_size", "0"], "--beam_size is 0"),
        (["--nbest", "0"], "--nbest is 0"),
        (["--nbest", "2"], "--beam_size is 1; for --nbest 2"),
        (["--beam_size_token", "-1"], "--beam_size_token is -1"),
        (["--batch_seconds", "nan"], "--batch_seconds is nan"),
        (["--ctc_weight", "1.5"], "--ctc_weight is 1.5"),
        (["--ctc_weight", "nan"], "--ctc_weight is nan"),
        (["--beam_size", "2", "--ngram_weight", "inf"], "--ngram_weight is inf"),
        (["--ngram_file", "no/such"], "greedy"),
        (["--beam_size", "2", "--ngram_file", "no/such"], "no/such: No such file"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(tmp_path, data, monkeypatch, more, message):
    monkeypatch.setattr("espnet_kd.experiments.models.load_model", None)
    with pytest.raises(UserError, match=message):
        decode(tmp_path, data, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_attention_decoder_takes_part_through_stock_decoding(tmp_path, data, waves):
    from espnet2.bin.asr_inference import Speech2Text

    conf = {**tiny_asr.config(), "model_conf": {"ctc_weight": 0.3}}
    model = tiny_asr.build(conf, sharpen=20.0)
    expdir = tiny_asr.save(model, conf, tmp_path / "hybrid")
    search = ["--ctc_weight", 0.3, "--beam_size", 4, "--nbest", 2, "--nj", 2]
    decode(expdir, data, tmp_path / "out", *search)
    stock = Speech2Text(expdir / "config.yaml", expdir / "valid.loss.ave.pth", ctc_weight=0.3, beam_size=4, nbest=2)
    for u in SECONDS:
        found = stock(waves[u])
        for n, (text, token, token_int, h) in enumerate(found, 1):
            written = {name: read(tmp_path / f"out/{n}best_recog" / name)[u] for name in FILES}
            assert written["text"] == text and written["token"].split() == token
            assert written["token_int"].split() == [str(i) for i in token_int]
            assert float(written["score"]) == pytest.approx(float(h.score), abs=1e-3)
        assert len(found) == 2
    assert read(tmp_path / "out/1best_recog/text")["short"] == ""
    facts = json.loads((tmp_path / "out" / "decode.json").read_text())
    assert facts["ctc_weight"] == 0.3 and facts["params"] == sum(p.numel() for p in model.parameters())
    # With its CTC head alone, the same experiment is decoded by this package.
    greedy = Recogniser(*load_model(*find_experiment(expdir)), expdir)
    assert decode(expdir, data, tmp_path / "ctc")["a"] == greedy([waves["a"]])[0][0].text


def test_what_stock_decoding_cannot_do(tmp_path, expdir, data, monkeypatch):
    with pytest.raises(UserError, match="no attention decoder.*--ctc_weight 0.5"):
        decode(expdir, data, tmp_path / "out", "--ctc_weight", 0.5)
    conf = {**tiny_asr.config(), "model_conf": {"ctc_weight": 0.3}}
    hybrid = tiny_asr.save(tiny_asr.build(conf), conf, tmp_path / "hybrid")
    monkeypatch.setitem(__import__("sys").modules, "kenlm", None)  # ESPnet's n-gram scorer runs on Python's kenlm
    (tmp_path / "lm").write_text("")
    with pytest.raises(UserError, match="needs kenlm, which is not installed"):
        decode(hybrid, data, tmp_path / "out", "--ctc_weight", 0.5, "--beam_size", 2, "--ngram_file", tmp_path / "lm")
    assert not (tmp_path / "out").exists()
