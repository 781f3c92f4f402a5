"""Every form of export, encoder and normalisation is exact, or refused by name; a broken graph is refused."""

import hashlib
import json
import logging

import numpy as np
import pytest
import tiny_asr
import tiny_students
import torch

from espnet_kd.cli import UserError
from espnet_kd.deploy import block_stream, check, forms, session, sherpa, write
from espnet_kd.deploy.graph import StudentGraph, example_batch, write_graph
from espnet_kd.distill.export import export
from espnet_kd.experiments.models import find_experiment, load_model

pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")

#: The messages for encoders that graphs for whole utterances do not support.
REFUSED = {
    "contextual_block_conformer": "encoder: ContextualBlockConformerEncoder",
    "contextual_block_conformer, 60 ms": "encoder: ContextualBlockConformerEncoder",
    "contextual_block_transformer": "encoder: ContextualBlockTransformerEncoder",
    "rnn": "encoder: RNNEncoder",
    "vgg_rnn": "encoder: VGGRNNEncoder",
    "conformer, older positions": "encoder_conf: rel_pos_type: legacy",
}
TABLE = [(e, n) for e in tiny_students.ENCODERS for n in tiny_students.NORMALISATIONS]


def refusal_of(form, encoder, normalize):
    """The message of a refusal; None if the export is exact."""
    if form == "stream":
        if not encoder.startswith("contextual_block"):
            return f"encoder: {type(tiny_students.student(encoder, normalize).model.encoder).__name__}"
        return "normalize: utterance_mvn" if normalize == "utterance_mvn" else None
    if encoder in REFUSED:
        return REFUSED[encoder]
    return f"normalize: {normalize or 'none'}" if form == "sherpa" and normalize != "utterance_mvn" else None


@pytest.mark.trains
@pytest.mark.parametrize("form", ["onnx", "sherpa", "stream"])
@pytest.mark.parametrize("encoder, normalize", TABLE, ids=[f"{e}-{n}" for e, n in TABLE])
def test_exact_or_refused(tmp_path, form, encoder, normalize):
    """A refusal is one line, and leaves no files."""
    student = tiny_students.student(encoder, normalize)
    refusal = refusal_of(form, encoder, normalize)
    out = tmp_path / "out"
    if refusal:
        with pytest.raises(UserError, match=refusal) as caught:
            write.write_form(student, form, out, write.Options())
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
        return
    write.write_form(student, form, out, write.Options(max_seconds=12))
    about = json.loads((out / "student.json").read_text())
    assert about["largest_difference"] <= check.TOLERANCE
    loaded = session.onnx_session(str(out / "model.onnx"))
    if form == "stream":
        windows = block_stream.OnnxStreamingStudent(out).open()
        wave = tiny_asr.audio(6.3, 3)
        found = np.concatenate([windows.push(wave[:50000], False), windows.push(wave[50000:], True)])
        assert check.difference(found, check.reference_of(student.model)([wave])[0]) <= check.TOLERANCE
    elif form == "onnx":
        # lengths and batches that the export's own check did not try, and padding that is not silent
        waves = [tiny_asr.audio(s, i) for i, s in enumerate((1.7, 0.35, 11.9, 4.0))]
        padded = session.pad_waves(waves)
        lengths = np.array([len(w) for w in waves])
        padded[np.arange(padded.shape[1])[None] >= lengths[:, None]] = 0.3
        log_probs, frames = loaded.run(None, {"speech": padded, "speech_lengths": lengths})
        for row, n, expected in zip(log_probs, frames, check.reference_of(student.model)(waves)):
            assert n == len(expected) and check.difference(row[:n], expected) <= check.TOLERANCE
    else:
        wave = session.standardise(tiny_asr.audio(3.1, 3))
        (log_probs,) = loaded.run(None, {"x": wave[None]})
        (expected,) = check.reference_of(student.model)([wave])
        repeats = round(about["frame_shift"] / 0.02)
        assert len(log_probs[0]) == repeats * len(expected)
        assert np.array_equal(log_probs[0, ::repeats], log_probs[0, repeats - 1 :: repeats])
        assert check.difference(log_probs[0, ::repeats, 1:-1], expected[:, 1:-1]) <= check.TOLERANCE


def test_the_page_has_the_graph_of_onnx():
    """The results above therefore hold for the page as well."""
    assert forms._BUILDERS["web"] is forms._BUILDERS["onnx"]


@pytest.mark.parametrize("encoder, normalize", TABLE, ids=[f"{e}-{n}" for e, n in TABLE])
def test_for_espnet_every_student_is_exact(tmp_path, encoder, normalize):
    experiment = tiny_students.experiment(tmp_path / "exp", encoder, normalize)
    models = [load_model(*find_experiment(place))[0] for place in (experiment, export(experiment))]
    one, other = (check.reference_of(model)([tiny_asr.audio(1.3, 3)])[0] for model in models)
    assert np.array_equal(one, other)


def test_what_is_in_it(tmp_path):
    out = write.write_form(tiny_students.student(), "onnx", tmp_path / "out", write.Options())
    about = json.loads((out / "student.json").read_text())
    assert about["files"] == {
        n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in ("model.onnx", "tokens.txt")
    }
    assert about["tokens"] == tiny_asr.TOKENS == (out / "tokens.txt").read_text().split("\n")[:-1]
    assert (about["sampling_rate"], about["frame_shift"], about["format"]) == (16000, 0.04, "onnx")
    assert {"torch", "espnet", "onnxruntime"} <= set(about["versions"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_short_and_empty_audio_has_no_frames():
    student = tiny_students.student()
    graph = StudentGraph(student.model, max_seconds=4, rate=16000)
    run = session.run_of(session.onnx_session(write_graph(graph, example_batch(16000, [1.0, 0.7])[:2], opset=17)))
    least = graph.least_samples
    waves = [tiny_asr.audio(1.0, 1)[:n] for n in (least, least - 1, 1, 0)]
    assert [len(x) for x in run(waves)] == [1, 0, 0, 0]
    assert [len(x) for x in run(waves[2:])] == [0, 0]
    expected = check.reference_of(student.model)(waves[:1])
    assert check.difference(run(waves)[0], expected[0]) <= check.TOLERANCE


def test_the_peak_is_set_in_the_graph():
    student = tiny_students.student(normalize=None)
    graph = StudentGraph(student.model, max_seconds=4, rate=16000, volume=0.5)
    run = session.run_of(session.onnx_session(write_graph(graph, example_batch(16000, [1.0, 0.7])[:2], opset=17)))
    waves = [0.1 * tiny_asr.audio(1.0, 1), tiny_asr.audio(2.0, 2), np.zeros(16000, np.float32)]
    for one, other in zip(run(waves), check.reference_of(student.model, 0.5)(waves)):
        assert check.difference(one, other) <= check.TOLERANCE
    assert check.difference(run(waves)[0], check.reference_of(student.model)(waves[:1])[0]) > 0.01


class Broken(StudentGraph):
    """A graph whose output for an utterance depends on longer utterances in the batch."""

    def forward(self, speech, lengths):
        log_probs, frames = super().forward(speech, lengths)
        return log_probs + 1e-3 * (lengths.max() - lengths)[:, None, None].sign(), frames


class OneLength(StudentGraph):
    """A graph that contains the length of the audio with which it was traced."""

    def forward(self, speech, lengths):
        log_probs, frames = super().forward(speech, lengths)
        return log_probs + torch.zeros(int(frames.max()), 1), frames


@pytest.mark.parametrize("form", ["onnx", "web"])
@pytest.mark.parametrize("kind, where", [(Broken, "3 in a batch"), (OneLength, "the graph fails at 0.5 s")])
def test_a_broken_graph_is_refused_before_anything_is_written(tmp_path, monkeypatch, form, kind, where):
    out = write.write_form(tiny_students.student(), "onnx", tmp_path / "out", write.Options())
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(forms, "StudentGraph", kind)
    with pytest.raises(UserError, match=where) as caught:
        write.write_form(tiny_students.student(), form, out, write.Options())
    assert "nothing was written" in str(caught.value)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_beyond_max_seconds_it_fails_and_the_table_is_cut(tmp_path):
    student = tiny_students.student()
    short, long = (
        write_graph(
            StudentGraph(student.model, max_seconds=s, rate=16000), example_batch(16000, [1.0, 0.7])[:2], opset=17
        )
        for s in (5, 200)
    )
    assert len(long) - len(short) >= 0.9 * (195 / 0.04) * 2 * 16 * 4
    wave = tiny_asr.audio(5.0, 1)
    run = session.run_of(session.onnx_session(short))
    assert len(run([wave])[0]) == 124
    with pytest.raises(Exception, match="(?i)broadcast|dimension|shape"):
        run([tiny_asr.audio(9.0, 1)])


@pytest.mark.parametrize(
    "options, option", [({"max_seconds": 0.0}, "--max_seconds"), ({"opset": 5}, "--opset"), ({"opset": 99}, "--opset")]
)
def test_options_out_of_range(tmp_path, options, option):
    with pytest.raises(UserError, match=option):
        write.write_form(tiny_students.student(), "onnx", tmp_path / "out", write.Options(**options))


@pytest.mark.parametrize("opset", [write.OPSETS[0], write.OPSETS[-1]])
def test_opsets(tmp_path, opset):
    out = write.write_form(tiny_students.student(), "onnx", tmp_path / "out", write.Options(opset=opset))
    assert json.loads((out / "student.json").read_text())["opset"] == opset


def test_int8_recognises_and_says_where_it_saves_little(tmp_path, caplog):
    pytest.importorskip("onnx", reason="onnx is in the extra 'onnx'")
    student = tiny_students.student()
    caplog.set_level(logging.INFO)
    outs = [
        write.write_form(student, "onnx", tmp_path / q, write.Options(quantize=q, max_seconds=10))
        for q in ("none", "int8")
    ]
    assert "--quantize int8: " in caplog.text  # a small student saves little
    assert not [r for r in caplog.records if "onnxruntime" in r.pathname]  # it logs a line for every product
    sizes = [(o / "model.onnx").stat().st_size for o in outs]
    waves = [tiny_asr.audio(4.0, 7)]
    one, other = (session.run_of(session.onnx_session(str(o / "model.onnx")))(waves)[0] for o in outs)
    assert one.shape == other.shape and 0 < np.abs(one - other).mean() < 1.0
    assert json.loads((outs[1] / "student.json").read_text())["quantize"] == "int8" and sizes[0] != sizes[1]


def test_the_text_is_that_of_decoding(tmp_path):
    """Tokens without text may be in the best path; sherpa-onnx gets the blank in their place."""
    student = tiny_students.student()
    graph = sherpa.SherpaGraph(StudentGraph(student.model, max_seconds=9, rate=16000), student.no_text)
    generator = torch.Generator().manual_seed(0)
    log_probs = (3 * torch.randn(1, 200, len(student.tokens), generator=generator)).log_softmax(-1)
    assert (log_probs.argmax(-1) == len(student.tokens) - 1).any()
    from espnet_kd.inference.greedy import ctc_collapse, ctc_greedy

    ((expected, _),) = ctc_greedy(log_probs, torch.tensor([200]), drop=student.no_text)
    assert ctc_collapse(graph.expand(log_probs)[0].argmax(-1)) == expected
    assert student.tokens == tiny_asr.TOKENS
