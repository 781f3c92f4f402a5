"""Streams equal the whole audio, in any pieces and with bounded memory; other students are refused by name."""

import copy
import io
import itertools
import logging
import sys

import numpy as np
import pytest
import soundfile
import tiny_asr
import tiny_students
import torch

from espnet_kd.bin import asr_kd_export, asr_kd_transcribe
from espnet_kd.cli import UserError
from espnet_kd.deploy import reading
from espnet_kd.deploy.block_stream import OnnxStreamingStudent
from espnet_kd.deploy.check import TOLERANCE, difference
from espnet_kd.deploy.espnet_stream import StreamingStudent
from espnet_kd.deploy.live import LiveTranscriber
from espnet_kd.deploy.stream import Stream
from espnet_kd.experiments.models import find_experiment, load_model

ENCODERS = ["contextual_block_conformer", "contextual_block_transformer", "contextual_block_conformer, 60 ms"]


PARAMS = list(itertools.product(ENCODERS, ["global_mvn", None], ["espnet", "onnx"]))


@pytest.fixture(scope="module", params=PARAMS, ids=str)
def pair(request, tmp_path_factory):
    """A student, the same student on streams (run by ESPnet or by onnxruntime), and the directory of the latter."""
    encoder, normalize, runtime = request.param
    experiment = tiny_students.experiment(tmp_path_factory.mktemp("exp"), encoder, normalize)
    model, args = load_model(*find_experiment(experiment))
    if runtime == "espnet":
        return copy.deepcopy(model), StreamingStudent(model, args), experiment
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")
    asr_kd_export.main(["--expdir", str(experiment), "--format", "stream"])
    return model, OnnxStreamingStudent(experiment / "export_stream"), experiment / "export_stream"


@torch.no_grad()
def whole(model, wave):
    encoded, _ = model.encode(torch.from_numpy(wave)[None].clone(), torch.tensor([len(wave)]))
    return model.ctc.ctc_lo(encoded).log_softmax(dim=-1)[0].numpy()


def streamed(student, pieces):
    stream = Stream(student)
    found = [stream.accept(piece) for piece in pieces]
    return np.concatenate([*found, stream.accept(np.zeros(0, np.float32), final=True)]), stream


@pytest.mark.parametrize("piece", [137, 1600, 9000, 10**7])
def test_a_stream_is_the_whole_audio(pair, piece):
    model, student, _ = pair
    # around one block (0.8 s) and two blocks, where ESPnet's code takes other branches, and longer
    for seconds in (0.1, 0.5, 0.84, 0.85, 0.9, 1.14, 1.16, 2.41, 7.9):
        wave = tiny_asr.audio(seconds, 3)
        found, stream = streamed(student, [wave[i : i + piece] for i in range(0, len(wave), piece)])
        expected = whole(model, wave)
        assert found.shape == expected.shape and difference(found, expected) <= TOLERANCE, seconds
        from espnet_kd.inference.greedy import ctc_greedy

        ((ids, _),) = ctc_greedy(
            torch.from_numpy(expected)[None], torch.tensor([len(expected)]), drop=student.no_text
        )
        assert [t.token for t in stream.tokens] == [student.tokens[i] for i in ids]


def test_the_first_frames_are_known_before_the_audio_ends(pair):
    _, student, _ = pair
    wave, stream, known = tiny_asr.audio(4.0, 3), Stream(student), []
    for start in range(0, len(wave), 1600):
        stream.accept(wave[start : start + 1600])
        known.append(stream.frames)
    assert known[int(24 * student.frame_shift / 0.1)] > 0 and known == sorted(known)  # a block has 20 frames
    # a frame is known when its block ends, which is at most a hop, the look-ahead and the subsampling later
    late = [(i + 1) * 0.1 - frames * student.frame_shift for i, frames in enumerate(known) if frames]
    assert max(late) <= (8 + 8 + 4 + 2) * student.frame_shift


def test_silence_and_too_little_audio(pair):
    _, student, _ = pair
    for samples in (0, 1, 300, 700):
        found, stream = streamed(student, [np.zeros(samples, np.float32)])
        assert found.shape == (0, len(student.tokens)) and stream.text == ""
    with pytest.raises(ValueError, match="ended"):
        stream.accept(np.zeros(5, np.float32))


def bytes_in(x):
    """Bytes of the arrays in an object, without its model."""
    if isinstance(x, torch.Tensor):
        return x.untyped_storage().nbytes()
    if isinstance(x, np.ndarray):
        return x.nbytes if x.base is None else bytes_in(x.base)
    if isinstance(x, dict):
        return sum(map(bytes_in, x.values()))
    if isinstance(x, (list, tuple)):
        return sum(map(bytes_in, x))
    models = (torch.nn.Module, StreamingStudent, OnnxStreamingStudent)
    return bytes_in(vars(x)) if hasattr(x, "__dict__") and not isinstance(x, models) else 0


def test_memory_does_not_grow(pair):
    _, student, _ = pair
    stream, wave, sizes = Stream(student), tiny_asr.audio(2.0, 1), []
    for _ in range(120):
        for start in range(0, len(wave), 8000):
            stream.accept(wave[start : start + 8000])
        sizes.append(bytes_in(stream._blocks))
    assert max(sizes[100:]) <= max(sizes[5:25])
    if isinstance(student, OnnxStreamingStudent):
        return
    student.model.encoder.pos_enc(torch.zeros(1, 4, 16), 10**6)  # a position after many hours of audio
    assert sum(b.numel() for b in student.model.encoder.pos_enc.buffers()) <= 16


REFUSED = [
    ("conformer", "global_mvn", {}, "encoder: ConformerEncoder"),
    ("rnn", None, {}, "encoder: RNNEncoder"),
    ("contextual_block_conformer", "utterance_mvn", {}, "normalize: utterance_mvn"),
    ("contextual_block_conformer", None, {"speech_volume_normalize": 0.5}, "speech_volume_normalize"),
    ("contextual_block_conformer", None, {"frontend": "sliding_window", "frontend_conf": {}}, "SlidingWindow"),
]


@pytest.mark.parametrize("encoder, normalize, changes, message", REFUSED, ids=[r[3] for r in REFUSED])
def test_what_cannot_be_streamed(tmp_path, encoder, normalize, changes, message):
    if changes.get("frontend"):
        changes["frontend_conf"] = {"win_length": 400, "hop_length": 160, "channels": 1, "padding": 0}
    experiment = tiny_students.experiment(tmp_path / "exp", encoder, normalize, **changes)
    with pytest.raises(UserError, match=message) as caught:
        LiveTranscriber(experiment)
    assert "\n" not in str(caught.value)


def test_the_command(pair, tmp_path, monkeypatch, capsys, caplog):
    model, student, experiment = pair
    wave = tiny_asr.audio(3.0, 8)
    _, stream = streamed(student, [wave])
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="PCM_16")
    command = ["--streaming", "--model", str(experiment)]
    with caplog.at_level(logging.INFO):
        asr_kd_transcribe.main([*command, str(tmp_path / "a.wav")])
    assert capsys.readouterr().out == f"{stream.text.strip()}\n"
    assert "latency of the first token" in caplog.text and "real-time factor" in caplog.text
    terminal = io.StringIO()  # shows the text and the log
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(sys, "stdout", terminal)
        asr_kd_transcribe.main([*command, str(tmp_path / "a.wav")])
    logging.getLogger().removeHandler(handler)
    assert stream.text.strip() in terminal.getvalue().splitlines()  # no log message is in its line
    raw = (wave * 32768).astype("<i2").tobytes()
    for content in ((tmp_path / "a.wav").read_bytes(), raw):
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BufferedReader(io.BytesIO(content))}))
        asr_kd_transcribe.main([*command, "-", "--output_format", "vtt"])
        assert capsys.readouterr().out.startswith("WEBVTT")
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BufferedReader(io.BytesIO(content))}))
        assert np.array_equal(np.concatenate(list(reading.read_live(16000))), wave)


def test_a_graph_for_whole_utterances_takes_no_stream_and_the_other_way_round(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")
    streaming = tiny_students.experiment(tmp_path / "streaming", ENCODERS[0], None)
    asr_kd_export.main(["--expdir", str(streaming), "--format", "stream"])
    with pytest.raises(UserError, match="give --streaming"):
        asr_kd_transcribe.main(["--model", str(streaming / "export_stream"), "a.wav"])
    whole = tiny_students.experiment(tmp_path / "whole")
    asr_kd_export.main(["--expdir", str(whole), "--format", "onnx"])
    with pytest.raises(UserError, match="for whole utterances"):
        asr_kd_transcribe.main(["--model", str(whole / "export_onnx"), "--streaming", "a.wav"])


def test_a_stream_of_another_rate(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tiny_asr.audio(1.0, 8), 8000, subtype="PCM_16")
    content = (tmp_path / "a.wav").read_bytes()
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BufferedReader(io.BytesIO(content))}))
    with pytest.raises(UserError, match="standard input.*16000 Hz"):
        list(reading.read_live(16000))


def test_a_stream_with_a_chunk_of_odd_size(tmp_path, monkeypatch):
    """RIFF pads it with a byte, which its size does not count."""
    wave = tiny_asr.audio(0.5, 8)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="PCM_16")
    content = (tmp_path / "a.wav").read_bytes()
    content = content[:12] + b"note" + (3).to_bytes(4, "little") + b"abc\0" + content[12:]
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BufferedReader(io.BytesIO(content))}))
    assert np.array_equal(np.concatenate(list(reading.read_live(16000))), wave)
