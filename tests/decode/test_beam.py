"""N-best lists of CTC equal an enumeration of all alignments, from log-probabilities and from audio to a file."""

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import tiny_asr
import torch

from espnet_kd.bin import asr_kd_nbest
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_map
from espnet_kd.data.tokens import make_token_list
from espnet_kd.decode import nbest_list
from espnet_kd.decode.beam import BeamSearch
from espnet_kd.decode.beam_recognise import NbestRecogniser
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.greedy import ctc_greedy
from espnet_kd.inference.recognise import Recogniser
from espnet_kd.targets.nbest import read_nbest


def ctc_nbest(log_probs, lengths, **options):
    return BeamSearch([str(v) for v in range(log_probs.size(-1))], **options)(log_probs, lengths)


def enumerate_texts(log_probs, blank_id=0, drop=()):
    """Log-probability of every text of (T, V), by an enumeration of all V^T alignments; likeliest first."""
    probs = log_probs.double().exp().tolist()
    total = defaultdict(float)
    for path in itertools.product(range(len(probs[0])), repeat=len(probs)):
        text = tuple(k for k, _ in itertools.groupby(path) if k != blank_id)
        if not set(path) & set(drop):
            total[text] += math.prod(row[k] for row, k in zip(probs, path))
    return sorted(((math.log(p), list(t)) for t, p in total.items() if p > 0), key=lambda h: -h[0])


def posteriors(*shape, seed=0, scale=2.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).log_softmax(-1)


def assert_same(found, expected):
    assert [ids for _, ids in found] == [ids for _, ids in expected]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-5)


@pytest.mark.parametrize("frames, vocabulary", [(1, 4), (2, 3), (4, 3), (5, 4)])
@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_wide_beam_finds_every_text_with_its_probability(frames, vocabulary, blank, seed):
    log_probs = posteriors(1, frames, vocabulary, seed=seed)
    every = 4 * vocabulary**frames
    found = ctc_nbest(log_probs, torch.tensor([frames]), nbest=every, beam_size=every, blank_id=blank)[0]
    assert_same(found, enumerate_texts(log_probs[0], blank))
    assert math.fsum(math.exp(s) for s, _ in found) == pytest.approx(1, abs=1e-5)


def test_tokens_tried_are_the_likeliest_of_each_frame():
    log_probs = posteriors(1, 4, 5, seed=3)
    kept = torch.full_like(log_probs, -math.inf)
    kept.scatter_(2, log_probs.topk(3).indices, log_probs.topk(3).values)
    found = ctc_nbest(log_probs, torch.tensor([4]), nbest=999, beam_size=999, beam_size_token=3)[0]
    assert_same(found, enumerate_texts(kept[0]))
    assert_same(ctc_nbest(kept, torch.tensor([4]), nbest=999, beam_size=999)[0], found)


@pytest.mark.parametrize("likely", [1, 3])
def test_dropped_tokens_never_appear_and_leave_the_others_alone(likely):
    log_probs = posteriors(1, 4, 4)
    log_probs[..., likely] += 8
    log_probs = log_probs.log_softmax(-1)
    found = ctc_nbest(log_probs, torch.tensor([4]), nbest=999, beam_size=999, drop=[likely])[0]
    assert_same(found, enumerate_texts(log_probs[0], drop=[likely]))


def test_padding_is_not_searched():
    log_probs, lengths = posteriors(4, 6, 4), torch.tensor([6, 0, 3, 1])
    padded = log_probs.clone()
    for row, n in zip(padded, lengths):
        row[n:] = math.nan
    found = ctc_nbest(padded, lengths, nbest=3, beam_size=999)
    assert found[1] == [(0.0, [])]
    for b in (0, 2, 3):
        assert_same(found[b], enumerate_texts(log_probs[b, : lengths[b]])[:3])
    assert ctc_nbest(log_probs[:, :0], torch.zeros(4, dtype=torch.long), nbest=3, beam_size=3) == [[(0.0, [])]] * 4
    assert ctc_nbest(log_probs[:0], lengths[:0], nbest=3, beam_size=3) == []


def test_peaky_posteriors_give_the_greedy_text_first():
    # One token in all frames, one at the start and the end, repeats with and without a blank between them.
    labels = torch.tensor([[3, 3, 3, 3, 3, 3, 3], [1, 0, 1, 1, 2, 2, 1], [4, 0, 0, 2, 0, 2, 4], [0, 0, 0, 0, 0, 0, 0]])
    log_probs = (torch.nn.functional.one_hot(labels, 5) * 12.0 + posteriors(4, 7, 5)).log_softmax(-1)
    lengths = torch.tensor([7, 7, 6, 7])
    greedy = ctc_greedy(log_probs, lengths)
    found = ctc_nbest(log_probs, lengths, nbest=5, beam_size=10)
    assert [h[0][1] for h in found] == [ids for ids, _ in greedy] == [[3], [1, 1, 2, 1], [4, 2, 2], []]
    for hypotheses, (_, best_path) in zip(found, greedy):
        scores = [s for s, _ in hypotheses]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        assert best_path <= scores[0] <= 0  # a text also has the probability of other alignments
        assert scores[1] < scores[0] - 3


@pytest.mark.parametrize(
    "shape, lengths, options, message",
    [
        ((2, 3), [3, 3], {}, "want"),
        ((2, 3, 4), [3], {}, "want"),
        ((2, 3, 4), [3, 4], {}, "lengths"),
        ((2, 3, 4), [3, -1], {}, "lengths"),
        ((2, 3, 4), [3, 3], {"nbest": 0}, "nbest"),
        ((2, 3, 4), [3, 3], {"nbest": 6}, "nbest"),
        ((2, 3, 4), [3, 3], {"beam_size_token": 0}, "beam_size_token"),
    ],
)
def test_arguments_that_do_not_fit(shape, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        ctc_nbest(posteriors(*shape), torch.tensor(lengths), **{"nbest": 5, "beam_size": 5, **options})


def test_nan_is_refused():
    log_probs = posteriors(2, 3, 4)
    log_probs[1, 2, 1] = math.nan
    with pytest.raises(FloatingPointError):
        ctc_nbest(log_probs, torch.tensor([3, 3]), nbest=2, beam_size=2)
    assert len(ctc_nbest(log_probs, torch.tensor([3, 2]), nbest=2, beam_size=2)) == 2


SECONDS = {"a": 1.1, "b": 0.55, "sp0.9-a": 1.3, "short": 0.002}


@pytest.fixture(scope="module")
def expdir(tmp_path_factory):
    conf = tiny_asr.config()
    model = tiny_asr.build(conf, sharpen=20.0)
    with torch.no_grad():
        model.ctc.ctc_lo.bias[-1] = 12.0  # <sos/eos> is likely here, and must be dropped
    return tiny_asr.save(model, conf, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def waves():
    return {u: tiny_asr.audio(s, i) for i, (u, s) in enumerate(SECONDS.items())}


@pytest.fixture(scope="module")
def dirs(tmp_path_factory, waves):
    root = tmp_path_factory.mktemp("data")
    first, second = ["b", "a"], ["short", "sp0.9-a"]
    return [str(tiny_asr.data_dir(root / str(i), {u: waves[u] for u in ids})) for i, ids in enumerate((first, second))]


def options(expdir, dirs, output, *more):
    return ["--teacher", str(expdir), "--data_dir", *dirs, "--output", str(output), "--nbest", "4", *more]


def test_command_writes_the_nbest_of_all_data_dirs(tmp_path, expdir, dirs, waves):
    output = tmp_path / "new" / "nbest"
    # Small batches in two processes; an option given twice counts like one option with two values.
    more = ["--beam_size", "50", "--batch_seconds", "1.5", "--nj", "2", "--data_dir", dirs[1]]
    asr_kd_nbest.main(options(expdir, dirs[:1], output, *more))
    found = read_nbest(output, tiny_asr.TOKENS)
    assert list(found) == ["b", "a", "short", "sp0.9-a"]
    assert [(s, list(ids)) for s, ids in found["short"]] == [(0.0, [])]
    assert [line for line in output.read_text().splitlines() if line.startswith("short")] == ["short 1 0.000000"]
    teacher = Recogniser(*load_model(*find_experiment(expdir)), expdir)
    posteriors = [teacher.logits([waves[u]])[0][0].softmax(-1) for u in ("a", "b", "sp0.9-a")]
    prior = torch.cat(posteriors).mean(0).clamp(min=1e-10).log()
    np.testing.assert_allclose(np.load(f"{output}.log_prior.npy"), prior, atol=1e-3)
    for utt_id in ("a", "b", "sp0.9-a"):
        logits, frames = teacher.logits([waves[utt_id]])
        assert (logits.argmax(-1) == len(tiny_asr.TOKENS) - 1).any()
        expected = ctc_nbest(
            logits.log_softmax(-1), frames, nbest=4, beam_size=50, beam_size_token=20, drop=[len(tiny_asr.TOKENS) - 1]
        )[0]
        assert [list(ids) for _, ids in found[utt_id]] == [ids for _, ids in expected]
        assert [s for s, _ in found[utt_id]] == pytest.approx([s for s, _ in expected], abs=1e-3)
        assert len(expected) == 4 and expected[0][1]


def test_finished_file_is_kept_until_something_changes(tmp_path, expdir, dirs):
    output = tmp_path / "nbest"
    asr_kd_nbest.main(options(expdir, dirs, output))
    whole = output.read_bytes()
    facts = json.loads((tmp_path / "nbest.json").read_text())
    assert facts["utterances"] == 4 and facts["hypotheses"] == 13 and facts["data_dirs"] == dirs

    def remade(*more, expdir=expdir, dirs=dirs):
        output.write_text("touched\n")
        asr_kd_nbest.main(options(expdir, dirs, output, *more))
        return output.read_text() != "touched\n"

    assert not remade()
    assert not remade("--batch_seconds", "1", "--nj", "2")  # the result doesn't depend on these
    assert remade("--force")
    assert output.read_bytes() == whole
    assert remade("--beam_size", "11")
    assert remade("--beam_size", "11", dirs=dirs[:1])
    (tmp_path / "nbest.json").write_text("{")
    assert remade("--beam_size", "11", dirs=dirs[:1])
    (tmp_path / "nbest.log_prior.npy").unlink()
    assert remade("--beam_size", "11", dirs=dirs[:1]) and (tmp_path / "nbest.log_prior.npy").is_file()
    for _ in range(2):
        output.unlink()
        asr_kd_nbest.main(options(expdir, dirs, output))
        assert output.read_bytes() == whole


def test_audio_that_was_made_again_under_its_names_is_searched_again(tmp_path, expdir, waves):
    data, output = str(tiny_asr.data_dir(tmp_path / "data", {"a": waves["a"], "b": waves["b"]})), tmp_path / "nbest"
    asr_kd_nbest.main(options(expdir, [data], output))
    first, file = output.read_bytes(), Path(read_map(f"{data}/wav.scp")["b"])
    file.write_bytes(file.read_bytes())
    output.write_text("kept")
    asr_kd_nbest.main(options(expdir, [data], output))
    assert output.read_text() == "kept"  # the audio has another date only
    soundfile.write(file, waves["short"], 16000)
    asr_kd_nbest.main(options(expdir, [data], output))
    assert output.read_bytes() not in (b"kept", first)


def test_nbest_in_the_tokens_of_a_student_with_another_list(tmp_path, expdir, dirs, caplog):
    """The teacher has characters and the student has pieces, so the N-best texts are tokenized again."""
    caplog.set_level("INFO")
    asr_kd_nbest.main(options(expdir, dirs, tmp_path / "theirs"))
    theirs = read_nbest(tmp_path / "theirs", tiny_asr.TOKENS)
    words = ("abc def", "ab gh ij", "ab abc ghij") * 9
    (tmp_path / "text").write_text("".join(f"u{i} {w}\n" for i, w in enumerate(words)))
    tokens = make_token_list([tmp_path / "text"], tmp_path / "bpe", "bpe", nbpe=16)
    more = ["--token_list", str(tokens), "--token_type", "bpe"]
    asr_kd_nbest.main(options(expdir, dirs, tmp_path / "mine", *more))
    assert "by their text" in caplog.text and str(tokens) in caplog.text
    pieces = tokens.read_text(encoding="utf-8").splitlines()
    assert any(len(p) > 2 for p in pieces[2:-1])
    mine = read_nbest(tmp_path / "mine", pieces)
    text = {u: "".join(tiny_asr.TOKENS[i] for i in h[0][1]).replace("<space>", " ") for u, h in theirs.items()}
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe/bpe.model"))
    assert list(mine) == list(theirs)
    for utt_id, hypotheses in mine.items():
        best = " ".join(text[utt_id].replace("<unk>", "").split())
        assert model.decode_pieces([pieces[i] for i in hypotheses[0][1]]) == best
    assert not (tmp_path / "mine.log_prior.npy").exists()  # a prior of the teacher's tokens would not fit
    before = (tmp_path / "mine").stat().st_mtime_ns
    asr_kd_nbest.main(options(expdir, dirs, tmp_path / "mine", *more))
    assert (tmp_path / "mine").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--token_list and --token_type"):
        asr_kd_nbest.main(options(expdir, dirs, tmp_path / "mine", *more[:2]))
    with pytest.raises(UserError, match=r"mine:1: token .*asr_kd_nbest --token_list"):
        read_nbest(tmp_path / "mine", tiny_asr.TOKENS)


def test_tokens_without_unk_are_refused_before_the_search(tmp_path, dirs):
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in tiny_asr.TOKENS if t != "<unk>"))
    more = ["--token_list", str(tmp_path / "tokens.txt"), "--token_type", "char"]
    with pytest.raises(UserError, match="--token_list: .*tokens.txt has no <unk>"):
        asr_kd_nbest.main(options(tmp_path / "no_such_teacher", dirs, tmp_path / "nbest", *more))


def test_sidecar_never_vouches_for_another_file(tmp_path, expdir, dirs, monkeypatch):
    output = tmp_path / "nbest"
    asr_kd_nbest.main(options(expdir, dirs, output))
    whole = output.read_bytes()
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(nbest_list, "replacing", lambda path, mode="w": (_ for _ in ()).throw(KeyboardInterrupt))
        asr_kd_nbest.main([*options(expdir, dirs, output), "--nbest", "1"])
    assert output.read_bytes() != whole
    asr_kd_nbest.main(options(expdir, dirs, output))
    assert output.read_bytes() == whole


def test_utterance_in_two_data_dirs(tmp_path, expdir, dirs, waves):
    third = tiny_asr.data_dir(tmp_path / "third", {"a": waves["a"]})
    with pytest.raises(UserError, match=r"third/wav.scp: a stands in .*0/wav.scp too"):
        asr_kd_nbest.main(options(expdir, [*dirs, str(third)], tmp_path / "nbest"))
    with pytest.raises(UserError, match="stands in"):
        asr_kd_nbest.main(options(expdir, [dirs[0], dirs[0]], tmp_path / "nbest"))
    assert not (tmp_path / "nbest").exists()


def test_diverged_teacher(tmp_path, waves):
    conf = tiny_asr.config()
    model = tiny_asr.build(conf)
    model.ctc.ctc_lo.bias.data[:] = math.nan
    recogniser = NbestRecogniser(
        *load_model(*find_experiment(tiny_asr.save(model, conf, tmp_path))), tmp_path, nbest=2, beam_size=2
    )
    with pytest.raises(UserError, match="NaN"):
        recogniser([waves["a"]])
    assert recogniser([np.zeros(3, np.float32)]) == [[(0.0, recogniser([waves["short"]])[0][0][1])]]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--nbest", "0"], "--nbest is 0"),
        (["--beam_size", "3"], "--beam_size is 3"),
        (["--beam_size_token", "0"], "--beam_size_token is 0"),
        (["--nj", "0"], "--nj is 0"),
        (["--batch_seconds", "nan"], "--batch_seconds is nan"),
        (["--data_dir", "no/such"], "no/such/wav.scp"),
        (["--teacher", "no/such"], "no experiment at no/such"),
        (["--output", "."], "is a directory"),
    ],
)
def test_mistakes_in_the_command_line(tmp_path, expdir, dirs, more, message):
    with pytest.raises(UserError, match=message):
        asr_kd_nbest.main(options(expdir, dirs, tmp_path / "nbest", *more))
    assert not (tmp_path / "nbest").exists()


def ngram_score(ids, names, unigrams, bigrams):
    """log10 P of <s> ids </s> under the model of `tiny_asr.write_arpa`."""
    sentence = ["<s>", *(names[i] for i in ids), "</s>"]
    return sum(bigrams.get((a, b), tiny_asr.BACK_OFF + unigrams[b]) for a, b in zip(sentence, sentence[1:]))


@pytest.mark.parametrize("weight", [0.0, 0.7, 2.0])
def test_ngram_scores_are_added_to_those_of_ctc(tmp_path, weight):
    # The names are in no alphabetical or hashed order, so that a wrong mapping of tokens to scores is found.
    names, unigrams = ["<blank>", "q", "b", "x", "<sos/eos>"], {"x": -1.0, "q": -2.0, "b": -3.0, "</s>": -1.5}
    bigrams = {("<s>", "b"): -0.2, ("b", "b"): -3.0, ("x", "q"): -0.1, ("q", "</s>"): -0.4}
    log_probs = posteriors(2, 4, 5, seed=5)
    arpa = tiny_asr.write_arpa(tmp_path / "lm", unigrams, bigrams)
    search = BeamSearch(names, nbest=999, beam_size=999, drop=[4], ngram_file=arpa, ngram_weight=weight)
    for found, rows in zip(search(log_probs, torch.tensor([4, 4])), log_probs):
        expected = [
            (score + weight * ngram_score(ids, names, unigrams, bigrams), ids)
            for score, ids in enumerate_texts(rows, drop=[4])
        ]
        assert_same(found, sorted(expected, key=lambda h: -h[0]))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read the n-gram model .*No such file"),
        ("hello\n", "cannot read the n-gram model"),
        (["the", "cat"], "has 0 of the model's 11 tokens"),
        (["the", "cat", "a", "i"], r"has 2 of the model's 11 tokens \(not <space>, b, c, d, …\); is it a model of w"),
        (["the", "cat", *"abcdefghi"], r"has 9 of the model's 11 tokens \(not <space>, j"),
        (["<space>", "the", "cat", *"abc"], r"has 4 of the model's 11 tokens \(not d, e"),
    ],
)
def test_ngram_model_that_is_no_good(tmp_path, content, message):
    path = tmp_path / "lm.arpa"
    if isinstance(content, str):
        path.write_text(content)
    elif content:
        tiny_asr.write_arpa(path, dict.fromkeys(content, -1.0), {("the", "cat"): -0.1})
    with pytest.raises(UserError, match=message):
        BeamSearch(tiny_asr.TOKENS, nbest=1, beam_size=2, ngram_file=path)


def test_a_model_that_has_not_seen_every_token_is_taken(tmp_path):
    seen = dict.fromkeys(["<space>", *"abcde"], -1.0)
    arpa = tiny_asr.write_arpa(tmp_path / "lm", seen, {("a", "b"): -0.1})
    BeamSearch(tiny_asr.TOKENS, nbest=1, beam_size=2, ngram_file=arpa)
