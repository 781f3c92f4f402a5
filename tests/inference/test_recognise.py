"""Batched recognition equals recognition one by one and stock ESPnet, and refuses inputs that do not fit."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_asr
import torch

from espnet_kd.bin import asr_kd_inference, asr_kd_score
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_map
from espnet_kd.decode.decodings import decode_dir, describe_inputs, list_decodings
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.recognise import (
    AudioFile,
    Recogniser,
    build_detokeniser,
    make_batches,
    normalise,
    read_audio,
    read_utterances,
)

SECONDS = (2.17, 1.503, 1.0, 0.9, 0.31)


@pytest.fixture(scope="module")
def waves():
    return [tiny_asr.audio(s, seed) for seed, s in enumerate(SECONDS)]


@pytest.fixture(scope="module")
def expdir(tmp_path_factory):
    conf = tiny_asr.config()
    return tiny_asr.save(tiny_asr.build(conf, sharpen=100.0), conf, tmp_path_factory.mktemp("exp"))


@pytest.fixture
def recogniser(expdir):
    return Recogniser(*load_model(*find_experiment(expdir)), expdir)


def test_a_model_that_has_diverged_is_refused(recogniser, waves):
    recogniser.model.ctc.ctc_lo.bias.data[2] = float("nan")
    with pytest.raises(UserError, match="gives NaN; it has diverged"):
        recogniser(waves[:1])


@pytest.mark.parametrize(
    "encoder, options",
    [
        ("conformer", {}),
        ("conformer", {"input_layer": "conv2d6", "positionwise_layer_type": "conv1d"}),
        ("conformer", {"input_layer": "linear"}),
        ("conformer", {"interctc_layer_idx": [1], "interctc_use_conditioning": True}),
        ("transformer", {"input_layer": "conv2d2"}),
        ("e_branchformer", {}),
    ],
)
def test_batched_equals_stock_encoder_alone(encoder, options, waves):
    conf = tiny_asr.config(encoder, **options)
    model = tiny_asr.build(conf, sharpen=1.0)
    alone = []
    with torch.inference_mode():
        for wave in waves:
            encoded, length = model.encode(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
            encoded = encoded[0] if isinstance(encoded, tuple) else encoded
            alone.append(model.ctc.ctc_lo(encoded)[0, :length])
    logits, frames = Recogniser(model, argparse.Namespace(**conf)).logits(waves)
    assert frames.tolist() == [len(a) for a in alone]
    for got, n, expected in zip(logits, frames, alone):
        torch.testing.assert_close(got[:n], expected, rtol=0, atol=1e-5)


def test_same_text_as_stock_asr_inference(expdir, recogniser, waves):
    from espnet2.bin.asr_inference import Speech2Text

    stock = Speech2Text(expdir / "config.yaml", expdir / "valid.loss.ave.pth", ctc_weight=1.0, beam_size=1)
    # ESPnet's beam search adds a spurious end symbol to a hypothesis as long as its frames.
    expected = [stock(wave)[0][0].replace("<sos/eos>", "") for wave in waves]
    assert [h[0].text for h in recogniser(waves)] == expected
    assert all(expected)


def test_audio_too_short_gives_an_empty_hypothesis_and_leaves_others_alone(recogniser, waves):
    short = [np.zeros(0, np.float32), waves[0][:50], waves[0][:700]]
    found = recogniser([*waves, *short])
    assert [h[0].text for h in found[: len(waves)]] == [h[0].text for h in recogniser(waves)]
    for (h,) in found[len(waves) :] + recogniser(short):
        assert (h.token_ids, h.tokens, h.text, h.score) == ([], [], "", 0.0)


def test_heads_trained_beside_a_student_are_dropped(tmp_path, expdir, recogniser, waves):
    state = torch.load(expdir / "valid.loss.ave.pth", weights_only=True)
    model = torch.nn.Module()
    model.state_dict = lambda: {**state, "kd_heads.0.weight": torch.zeros(3, 3)}
    tiny_asr.save(model, tiny_asr.config(), tmp_path)
    other = Recogniser(*load_model(*find_experiment(tmp_path)))
    assert other.num_parameters == recogniser.num_parameters
    assert [h[0].text for h in other(waves)] == [h[0].text for h in recogniser(waves)]


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_wrong_keys_are_refused_by_name(tmp_path, expdir, change):
    state = torch.load(expdir / "valid.loss.ave.pth", weights_only=True)
    if change == "missing":
        del state["ctc.ctc_lo.bias"]
    else:
        state["ctc.ctc_lo.bias2"] = torch.zeros(1)
    model = torch.nn.Module()
    model.state_dict = lambda: state
    tiny_asr.save(model, tiny_asr.config(), tmp_path)
    with pytest.raises(UserError, match="ctc.ctc_lo.bias"):
        load_model(*find_experiment(tmp_path))


def test_batches_are_bounded_sorted_and_complete():
    lengths = [3, 50, 7, 7, 1, 20, 19]
    utterances = [AudioFile(f"u{i}", "", n * 16000, 16000) for i, n in enumerate(lengths)]
    batches = make_batches(utterances, 40.0)
    assert sorted(u.utt_id for b in batches for u in b) == sorted(u.utt_id for u in utterances)
    flat = [u.samples for b in batches for u in b]
    assert flat == sorted(flat, reverse=True)
    assert [len(b) * b[0].samples / 16000 for b in batches] == [50, 40, 28]  # a single utterance may exceed the limit


def test_volume_normalisation_is_that_of_the_preprocessor():
    assert normalise(np.array([0.1, -0.2], np.float32), 0.5) == pytest.approx([0.25, -0.5])
    assert normalise(np.array([0.1, -0.2], np.float32), None) == pytest.approx([0.1, -0.2])
    assert normalise(np.zeros(2, np.float32), 0.5).tolist() == [0, 0]


def test_detokenise(tmp_path):
    args = argparse.Namespace(token_type="char", bpemodel=None)
    assert build_detokeniser(args, ".")(["a", "<space>", "<unk>", "b"]) == "a <unk>b"
    args.token_type = "word"
    assert build_detokeniser(args, ".")(["on", "off"]) == "on off"
    args.token_type, args.bpemodel = "bpe", "elsewhere/bpe.model"
    with pytest.raises(UserError, match="elsewhere/bpe.model"):
        build_detokeniser(args, tmp_path)
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("one two three\ntwo three four\n" * 20)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(tmp_path / "bpe"), vocab_size=14, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model")).EncodeAsPieces("two four")
    assert build_detokeniser(args, tmp_path)(pieces) == "two four"  # found in the directory of the configuration
    assert build_detokeniser(args, tmp_path)([]) == ""


@pytest.mark.parametrize(
    "line, message",
    [
        ("u1 nowhere.wav", "u1.*nowhere.wav"),
        ("u1 sph2pipe x.sph |", "utterance u1: .*is a shell pipe"),
        (f"u1 {__file__}", "utterance u1: unreadable audio"),
        ("u1", "utterance u1: no such audio file"),
        ("", "wav.scp is empty"),
    ],
)
def test_bad_data_dirs_are_refused(tmp_path, line, message):
    (tmp_path / "wav.scp").write_text(line + "\n" if line else "")
    with pytest.raises(UserError, match=message):
        read_utterances(tmp_path)


def test_audio_without_a_header_is_refused(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(640))
    (tmp_path / "wav.scp").write_text(f"u1 {tmp_path}/a.raw\n")
    with pytest.raises(UserError, match="utterance u1: .*a.raw has no header"):
        read_utterances(tmp_path)


def test_another_sampling_rate_is_refused(tmp_path):
    tiny_asr.data_dir(tmp_path, {"u1": tiny_asr.audio(0.1, 0)})
    with pytest.raises(UserError, match="u1 has 16000 Hz and the model needs 8000"):
        read_utterances(tmp_path, 8000)


def test_command(tmp_path, expdir, recogniser, waves, caplog):
    data = tiny_asr.data_dir(tmp_path / "test", {**{f"u{i}": w for i, w in enumerate(waves)}, "e": waves[0][:0]})
    out = tmp_path / "decode_test"
    argv = ["--expdir", str(expdir), "--data_dir", str(data), "--output_dir", str(out), "--batch_seconds", "3"]
    asr_kd_inference.main(argv)

    expected = [h for (h,) in recogniser(waves)]
    read = {n: (out / "1best_recog" / n).read_text().split("\n") for n in ("text", "token", "token_int", "score")}
    assert read["text"] == [*(f"u{i} {h.text}" for i, h in enumerate(expected)), "e ", ""]
    assert read["token"][0] == f"u0 {' '.join(expected[0].tokens)}"
    assert read["token_int"][0] == f"u0 {' '.join(map(str, expected[0].token_ids))}"
    assert float(read["score"][0].split()[1]) == pytest.approx(expected[0].score, abs=1e-4)

    facts = json.loads((out / "decode.json").read_text())
    assert facts["params"] == recogniser.num_parameters
    assert facts["utterances"] == len(waves) + 1
    assert facts["audio_seconds"] == pytest.approx(sum(map(len, waves)) / 16000, abs=1e-3)
    assert facts["rtf"] == pytest.approx(facts["decode_seconds"] / facts["audio_seconds"], rel=0.05)

    before = (out / "decode.json").stat().st_mtime_ns
    asr_kd_inference.main(argv)  # finished, so it is kept
    assert (out / "decode.json").stat().st_mtime_ns == before
    asr_kd_inference.main([*argv, "--force", "--nj", "2"])  # it is decoded again, and threads change nothing
    assert (out / "decode.json").stat().st_mtime_ns > before
    assert (out / "1best_recog" / "text").read_text().split("\n") == read["text"]
    (data / "wav.scp").write_text((data / "wav.scp").read_text().replace("u0 ", "v0 ", 1))
    asr_kd_inference.main(argv)  # other data, so it is decoded again
    assert (out / "1best_recog" / "text").read_text().startswith("v0 ")


def test_audio_that_was_made_again_under_its_names_is_decoded_again(tmp_path, expdir, waves):
    data = tiny_asr.data_dir(tmp_path / "test", {"u0": waves[0], "u1": waves[1]})
    argv = ["--expdir", str(expdir), "--data_dir", str(data), "--output_dir", str(tmp_path / "out")]
    asr_kd_inference.main(argv)
    result, file = tmp_path / "out/decode.json", Path(read_map(data / "wav.scp")["u0"])
    first, content = result.read_bytes(), file.read_bytes()
    file.write_bytes(content)  # the same content with another date
    asr_kd_inference.main(argv)
    assert result.read_bytes() == first
    soundfile.write(file, 0.5 * waves[0], 16000)
    asr_kd_inference.main(argv)
    second = result.read_bytes()
    assert second != first
    # Decodings of earlier versions have no hash, and audio may be removed once it is decoded: both are kept.
    facts = json.loads(second)
    assert facts.pop("audio_sha256")
    result.write_text(json.dumps(facts))
    file.write_bytes(content)
    asr_kd_inference.main(argv)
    assert json.loads(result.read_text()) == facts
    result.write_bytes(second)
    file.unlink()
    asr_kd_inference.main(argv)
    assert result.read_bytes() == second


def test_scores_of_an_earlier_decoding_are_removed(tmp_path, expdir, waves):
    """Otherwise the report would show greedy error rates as those of the beam search."""
    data = tiny_asr.data_dir(tmp_path / "test", {"u0": waves[0], "u1": waves[1]})
    (data / "text").write_text("u0 a\nu1 b\n")
    exp = tmp_path / "exp"
    shutil.copytree(expdir, exp)
    argv = ["--expdir", str(exp), "--data_dir", str(data)]
    out = decode_dir(exp, data)
    asr_kd_inference.main(argv)
    decoded = {path.name for path in out.iterdir()}
    asr_kd_score.main(argv)
    assert {path.name for path in out.iterdir()} - decoded == {"score.json", "score.txt", "per_utt.tsv"}
    asr_kd_inference.main(argv)  # finished, so nothing changes
    assert (out / "score.json").exists()
    asr_kd_inference.main([*argv, "--beam_size", "2"])
    assert {path.name for path in out.iterdir()} == decoded


def test_command_refuses_what_it_cannot_do(tmp_path, expdir):
    base = ["--expdir", str(expdir), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="wav.scp"):
        asr_kd_inference.main([*base, "--data_dir", str(tmp_path)])
    with pytest.raises(UserError, match="--nj"):
        asr_kd_inference.main([*base, "--data_dir", str(tmp_path), "--nj", "0"])
    assert not (tmp_path / "out").exists()


def test_several_experiments_decode_several_data_dirs(tmp_path, expdir, waves, recogniser):
    """One process loads each model once, and loads nothing for finished decodings."""
    one, two = tmp_path / "exp/one", tmp_path / "exp/two"
    shutil.copytree(expdir, one)
    conf = tiny_asr.config()
    tiny_asr.save(tiny_asr.build(conf, seed=1, sharpen=100.0), conf, two / "export", "model.pth")
    data = [tiny_asr.data_dir(tmp_path / "raw" / name, {"u": w}) for name, w in zip(("clean", "other"), waves)]
    argv = ["--expdir", str(one), str(two / "export"), "--data_dir", *map(str, data)]
    asr_kd_inference.main(argv)
    text = {p.parent.parent.relative_to(tmp_path / "exp"): p.read_text() for p in tmp_path.glob("exp/**/text")}
    assert sorted(map(str, text)) == ["one/decode_clean", "one/decode_other", "two/decode_clean", "two/decode_other"]
    for place, wave in (("decode_clean", waves[0]), ("decode_other", waves[1])):
        assert text[Path("one") / place] == f"u {recogniser([wave])[0][0].text}\n"
        assert text[Path("two") / place] != text[Path("one") / place]
    assert json.loads((two / "decode_other/decode.json").read_text())["model"] == str(two / "export/model.pth")

    # An export that is written again is the same model; another process finds all finished, without torch.
    (two / "export/model.pth").touch()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("exp/**/decode.json")}
    code = "import sys, espnet_kd.bin.asr_kd_inference as i; i.main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("exp/**/decode.json")}

    # With another model under the same name, only that experiment is decoded again.
    tiny_asr.save(tiny_asr.build(conf, seed=2, sharpen=100.0), conf, two / "export", "model.pth")
    asr_kd_inference.main(argv)
    again = {p.parent.parent.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert again == {"two"}


def test_places_of_several_decodings(tmp_path):
    here = tmp_path / "raw" / "test"
    for exp in ("exp/a", "exp/a/export", "exp/a/valid.loss.ave.pth", "exp/a/export/model.pth"):
        assert decode_dir(exp, here) == Path("exp/a/decode_test")
    with pytest.raises(UserError, match="--output_dir goes with one"):
        asr_kd_inference.main(["--expdir", "a", "b", "--data_dir", str(here), "--output_dir", "x"])
    with pytest.raises(UserError, match="a on .*test and a/export on .*test would both be in a/decode_test"):
        asr_kd_inference.main(["--expdir", "a", "a/export", "--data_dir", str(here)])
    with pytest.raises(UserError, match="would both be in"):
        asr_kd_inference.main(["--expdir", "a", "--data_dir", str(here), str(tmp_path / "other" / "test")])
    # The same experiment twice, as in --experiments exp/* of run.sh, which adds the teacher, is one decoding.
    assert list_decodings(["a", "b", "a/"], ["raw/x", "raw/x/"]) == [
        ("a", Path("raw/x"), Path("a/decode_x")), ("b", Path("raw/x"), Path("b/decode_x")),
    ]  # fmt: skip


def test_an_experiment_that_is_not_there_is_refused_before_any_is_decoded(tmp_path, expdir, waves):
    data = tiny_asr.data_dir(tmp_path / "test", {"u": waves[0]})
    shutil.copytree(expdir, tmp_path / "a")
    with pytest.raises(UserError, match="no experiment at .*nowhere"):
        asr_kd_inference.main(["--expdir", str(tmp_path / "a"), str(tmp_path / "nowhere"), "--data_dir", str(data)])
    assert not (tmp_path / "a/decode_test").exists()


def test_what_a_kd_stage_ended_with_is_decoded_again_when_it_changes(tmp_path, expdir):
    """The stage's directory has no other model that could identify a decoding, so student.pth must do it."""
    config, model = find_experiment(expdir)
    stage = tmp_path / "kd_stage1"
    stage.mkdir()
    shutil.copy(config, stage / "config.yaml")
    shutil.copy(model, stage / "student.pth")
    assert find_experiment(stage) == (stage / "config.yaml", stage / "student.pth")
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    before = describe_inputs(stage, tmp_path)
    assert describe_inputs(stage, tmp_path) == before
    (stage / "student.pth").write_bytes(b"another")
    assert describe_inputs(stage, tmp_path) != before


@pytest.mark.parametrize("kind, message", [("flac", "is damaged"), ("wav", "is cut"), ("nan", "is no number")])
def test_damaged_audio_is_named(tmp_path, kind, message):
    """The message names the utterance, as in data preparation."""
    samples, path = tiny_asr.audio(4.0, 3), tmp_path / f"a.{'flac' if kind == 'flac' else 'wav'}"
    if kind == "nan":
        samples[100] = np.nan
    soundfile.write(path, samples, 16000, subtype="FLOAT" if kind == "nan" else "PCM_16")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if kind == "flac":
        content[middle : middle + 400] = bytes(400)
    path.write_bytes(content[:middle] if kind == "wav" else content)
    with pytest.raises(UserError, match=f"utterance u1: .*{path.name}.* {message}"):
        read_audio(AudioFile("u1", str(path), len(samples), 16000))
