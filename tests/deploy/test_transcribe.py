"""asr_kd_transcribe and espnet_kd.transcribe: files of many kinds, times, subtitles, long audio, mistakes."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import tiny_asr
import tiny_students

from espnet_kd.bin import asr_kd_export, asr_kd_transcribe
from espnet_kd.cli import UserError
from espnet_kd.data import audio
from espnet_kd.deploy import backends, reading
from espnet_kd.deploy.student import load_student
from espnet_kd.deploy.transcript import Segment, Token, Transcript, read_tokens, render, subtitles, words_of
from espnet_kd.inference.recognise import Recogniser
from espnet_kd.transcribe import Transcriber

pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")
WAVE = tiny_asr.audio(3.0, 4)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folders of one tiny student: experiment, export for ESPnet, ONNX, sherpa-onnx."""
    place = tmp_path_factory.mktemp("exports")
    experiment = tiny_students.experiment(place / "exp", sharpen=20.0)
    asr_kd_export.main(["--expdir", str(experiment), "--format", "espnet", "onnx", "sherpa"])
    names = {"espnet": "export", "onnx": "export_onnx", "sherpa": "export_sherpa", "experiment": "."}
    return {kind: experiment / name for kind, name in names.items()}


@pytest.fixture(scope="module")
def expected():
    """The hypothesis of decoding, which every form must give."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        student = load_student(tiny_students.experiment(f"{scratch}/exp", sharpen=20.0))
    ((hypothesis,),) = Recogniser(student.model, student.args)([WAVE])
    assert len(hypothesis.tokens) > 5
    return hypothesis


def saved(path, samples=WAVE, rate=16000, **options):
    soundfile.write(path, samples, rate, **options)
    return str(path)


@pytest.mark.parametrize("kind", ["experiment", "espnet", "onnx", "sherpa"])
def test_every_form_gives_the_text_of_decoding(exports, expected, tmp_path, kind, capsys):
    file = saved(tmp_path / "a.wav", subtype="PCM_16")
    asr_kd_transcribe.main(["--model", str(exports[kind]), file])
    assert capsys.readouterr().out == f"{expected.text}\n"
    transcript = Transcriber(exports[kind])(file)
    assert [t.token for t in transcript.tokens] == expected.tokens and transcript.seconds == 3.0
    assert all(0 <= t.start < t.end <= 3.0 and 0 < t.confidence <= 1 for t in transcript.tokens)
    assert Transcriber(exports[kind])(WAVE).text == expected.text


def test_onnx_needs_neither_torch_nor_espnet(exports, expected, tmp_path):
    file = saved(tmp_path / "a.wav", subtype="PCM_16")
    code = (
        "import sys\n"
        "for name in ('torch', 'espnet2', 'espnet', 'scipy'): sys.modules[name] = None\n"
        "from espnet_kd.transcribe import Transcriber\n"
        f"student = Transcriber({str(exports['onnx'])!r})\n"
        f"print(student({file!r}).text)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{expected.text}\n", done.stderr


KINDS = [("a.flac", {}), ("a.ogg", {"subtype": "OPUS"}), ("a.mp3", {}), ("a.wav", {"subtype": "FLOAT"})]


@pytest.mark.parametrize("name, options", KINDS, ids=[name for name, _ in KINDS])
def test_kinds_of_files(exports, tmp_path, name, options):
    transcript = Transcriber(exports["onnx"])(saved(tmp_path / name, **options))
    assert abs(transcript.seconds - 3.0) < 0.15 and transcript.tokens


def test_other_rates_and_channels(tmp_path):
    t = np.arange(3 * 44100) / 44100
    tone = 0.3 * np.sin(2 * np.pi * 440 * t)
    stereo = np.stack([2 * tone, 0 * tone], axis=1)
    for rate in (8000, 16000, 44100, 48000):
        file = saved(tmp_path / f"{rate}.wav", stereo[: 2 * rate], rate, subtype="FLOAT")
        got = np.concatenate(list(reading.read_blocks(file, 16000)))
        assert abs(len(got) - 32000) <= 2
        wanted = 0.3 * np.sin(2 * np.pi * 440 * (rate / 44100) * np.arange(32000) / 16000)
        assert np.abs(got[2000:30000] - wanted[2000:30000]).max() < 2e-3


def test_standard_input(exports, expected, monkeypatch, capsys):
    content = io.BytesIO()
    soundfile.write(content, WAVE, 16000, format="FLAC")
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(content.getvalue())}))
    asr_kd_transcribe.main(["--model", str(exports["onnx"]), "-"])
    assert capsys.readouterr().out == f"{expected.text}\n"


def test_several_files_and_output_dir(exports, expected, tmp_path, capsys):
    files = [saved(tmp_path / name, subtype="PCM_16") for name in ("a.wav", "b.flac")]
    asr_kd_transcribe.main(["--model", str(exports["onnx"]), *files])
    assert capsys.readouterr().out.splitlines() == [f"{f}\t{expected.text}" for f in files]
    for form, suffix in asr_kd_transcribe.FORMATS.items():
        out = tmp_path / form
        command = ["--model", str(exports["onnx"]), *files, "--output_dir", str(out), "--output_format", form]
        asr_kd_transcribe.main(command)
        assert {p.name for p in out.iterdir()} == {f"a.{suffix}", f"b.{suffix}"}
    content = json.loads((tmp_path / "json/a.json").read_text())
    assert content["text"] == expected.text and content["segments"][0]["tokens"][0]["start"] >= 0
    assert (tmp_path / "vtt/b.vtt").read_text().startswith("WEBVTT\n\n1\n00:00:0")


def test_a_file_that_cannot_be_read_does_not_stop_the_others(exports, expected, tmp_path, capsys):
    (tmp_path / "no.wav").write_text("no audio")
    good = saved(tmp_path / "a.wav", subtype="PCM_16")
    with pytest.raises(UserError, match="1 of 2 files"):
        asr_kd_transcribe.main(["--model", str(exports["onnx"]), str(tmp_path / "no.wav"), good])
    out, err = capsys.readouterr()
    assert out == f"{good}\t{expected.text}\n" and "no.wav" in err and "Traceback" not in err
    with pytest.raises(UserError, match="missing.wav"):
        asr_kd_transcribe.main(["--model", str(exports["onnx"]), str(tmp_path / "missing.wav")])


def test_a_name_that_is_not_utf_8(exports, expected, tmp_path, capsys):
    """It does not stop the others."""
    good = saved(tmp_path / "a.wav", subtype="PCM_16")
    latin = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    os.rename(saved(tmp_path / "b.wav", subtype="PCM_16"), latin)
    with pytest.raises(UserError, match="1 of 2 files"):
        asr_kd_transcribe.main(["--model", str(exports["onnx"]), latin, good])
    out, err = capsys.readouterr()
    assert out == f"{good}\t{expected.text}\n" and r"caf\udce9.wav" in err


def test_a_file_that_may_not_be_read_does_not_stop_the_others(exports, expected, tmp_path, capsys, monkeypatch):
    (tmp_path / "secret.wav").write_text("libsndfile fails on it, as on a file of another user")

    def refuse(path, mode):
        if "secret" in path:
            raise PermissionError(13, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr(audio, "open", refuse, raising=False)
    good = saved(tmp_path / "a.flac", subtype="PCM_16")
    with pytest.raises(UserError, match="1 of 2 files"):
        asr_kd_transcribe.main(["--model", str(exports["onnx"]), str(tmp_path / "secret.wav"), good])
    out, err = capsys.readouterr()
    assert out == f"{good}\t{expected.text}\n" and "secret.wav: Permission denied" in err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--threads", "0"], "--threads"),
        (["--longest_seconds", "0.1"], "--longest_seconds"),
        (["--longest_seconds", "99"], "takes 30"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--streaming"], "is a graph for whole utterances"),
    ],
)
def test_mistakes_in_options(exports, options, message):
    with pytest.raises(UserError, match=message):
        asr_kd_transcribe.main(["--model", str(exports["onnx"]), "a.wav", *options])


def test_two_files_of_one_name(exports, tmp_path):
    with pytest.raises(UserError, match="x/a.wav and y/a.flac"):
        asr_kd_transcribe.main(
            ["--model", str(exports["onnx"]), "x/a.wav", "y/a.flac", "--output_dir", str(tmp_path / "o")]
        )


def damage_model(folder):
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_model, "model.onnx is not the file"),
        (lambda f: (f / "model.onnx").unlink(), "cannot read .*model.onnx"),
        (lambda f: (f / "student.json").write_text("{"), "student.json is damaged"),
        (lambda f: (f / "student.json").write_text("[]"), "student.json is damaged"),
        (lambda f: (f / "student.json").write_text("{}"), "student.json: format"),
    ],
)
def test_a_damaged_export(exports, tmp_path, damage, message):
    import shutil

    folder = shutil.copytree(exports["onnx"], tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError, match=message):
        Transcriber(folder)


def test_long_audio_is_cut_at_pauses(exports):
    pauses = [2.7, 5.1, 8.0]
    wave = tiny_asr.audio(10.0, 9)
    for at in pauses:
        wave[int((at - 0.15) * 16000) : int((at + 0.15) * 16000)] *= 1e-3
    pieces = list(reading.cut_at_pauses(np.array_split(wave, 7), 16000, 4.0))
    assert np.array_equal(np.concatenate([p for _, p in pieces]), wave)
    starts = [start for start, _ in pieces]
    assert np.allclose(starts, [0, *pauses], atol=0.06) and max(len(p) for _, p in pieces) <= 4 * 16000
    transcript = Transcriber(exports["onnx"], longest=4.0)(wave)
    assert [s.start for s in transcript.segments] == [round(s, 3) for s in starts]
    times = [t.start for t in transcript.tokens]
    assert times == sorted(times) and transcript.seconds == 10.0 and times[-1] > 8.0


def test_short_audio_has_an_empty_text(exports, tmp_path):
    for kind in ("onnx", "sherpa", "espnet"):
        for samples in (WAVE[:0], WAVE[:10], np.zeros(16000, np.float32)[:300]):
            transcript = Transcriber(exports[kind])(samples)
            assert transcript.text == "" and not transcript.tokens


def test_times_and_confidences_of_the_best_path():
    best = [0, 1, 1, 2, 0, 2, 3, 3, 0]  # token 3 has no text
    probabilities = np.full((9, 4), 0.1)
    probabilities[np.arange(9), best] = 0.7
    probabilities[2] = (0.05, 0.9, 0.025, 0.025)
    tokens = read_tokens(np.log(probabilities), ["-", "a", "b", "<sos/eos>"], 0.04, no_text=[3], offset=1.0)
    assert tokens == [Token("a", 1.04, 1.12, 0.8), Token("b", 1.12, 1.16, 0.7), Token("b", 1.2, 1.24, 0.7)]
    assert read_tokens(np.zeros((0, 4)), ["-", "a", "b", "c"], 0.04) == []


def spoken(*tokens):
    return [Token(t, i / 2, i / 2 + 0.4, 1.0) for i, t in enumerate(tokens)]


@pytest.mark.parametrize(
    "tokens, to_text",
    [
        (spoken("o", "n", "<space>", "a"), lambda ts: "".join(" " if t == "<space>" else t for t in ts)),
        (spoken("▁o", "n", "▁a"), lambda ts: "".join(ts).replace("▁", " ").strip()),
        (spoken("on", "a"), " ".join),
    ],
    ids=["characters", "pieces", "words"],
)
def test_words(tokens, to_text):
    words = words_of(tokens, to_text)
    assert [w.text for w in words] == ["on", "a"]
    assert words[1].start == tokens[-1].start and words[0].end in (0.4, 0.9)


def test_words_of_a_long_stream_take_time_in_proportion():
    given = []

    def to_text(tokens):
        given.append(len(tokens))
        return "".join(" " if t == "<space>" else t for t in tokens)

    words = words_of(spoken(*["o", "n", "<space>"] * 500), to_text)
    assert [w.text for w in words] == ["on"] * 500 and max(given) <= 4
    assert words[3].end == words[3].start + 0.9  # the word ends with its last letter, not with the blank after it


def test_a_writing_without_blanks_is_cut_into_subtitles():
    spoken_for_ten_seconds = spoken(*"我想知道今天天气怎么样テスト", "ok", "<space>", "go")
    words = words_of(spoken_for_ten_seconds, lambda ts: "".join(" " if t == "<space>" else t for t in ts))
    assert [w.text for w in words] == [*"我想知道今天天气怎么样テス", "トok", "go"]
    cues = subtitles(words)
    assert [c.text for c in cues] == ["我想知道今天天气怎么样テ", "ストok go"]
    assert all(c.end - c.start <= 6.0 for c in cues)


def test_subtitles():
    words = [Segment(i * 0.5, i * 0.5 + 0.4, "word") for i in range(20)]
    words.append(Segment(20.0, 20.4, "late"))
    cues = subtitles(words)
    assert [len(c.text.split()) for c in cues] == [12, 8, 1] and cues[-1].start == 20.0
    transcript = Transcript("a", 3700.0, [Segment(0, 1, "", [Token("a<b", 3661.0015, 3662.5, 1.0)])])
    assert render(transcript, "srt", " ".join) == "1\n01:01:01,002 --> 01:01:02,500\na<b\n"
    assert render(transcript, "vtt", " ".join) == "WEBVTT\n\n1\n01:01:01.002 --> 01:01:02.500\na&lt;b\n"


def test_pieces_of_words(tmp_path):
    """The text is the same with the SentencePiece model of an export and without it, as in the page for the browser."""
    import sentencepiece

    (tmp_path / "text").write_text("one two three four five six seven eight\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "bpe"), vocab_size=22, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size()) if model.id_to_piece(i)[0] != "<"]
    tokens = ["<blank>", "<unk>", *pieces, "<sos/eos>"]
    about = {"token_type": "bpe", "tokens": tokens, "space_symbol": "<space>"}
    spoken = model.encode("four eight two", out_type=str)
    with_model = backends.text_of(about, tmp_path)(spoken)
    (tmp_path / "bpe.model").rename(tmp_path / "gone")
    assert with_model == backends.text_of(about, tmp_path)(spoken) == "four eight two"

    (tmp_path / "gone").rename(tmp_path / "bpe.model")
    changes = {"token_list": tokens, "token_type": "bpe", "bpemodel": str(tmp_path / "bpe.model")}
    experiment = tiny_students.experiment(tmp_path / "exp", sharpen=20.0, **changes)
    asr_kd_export.main(["--expdir", str(experiment), "--format", "onnx"])
    assert (experiment / "export_onnx/bpe.model").read_bytes() == (tmp_path / "bpe.model").read_bytes()
    found = Transcriber(experiment / "export_onnx")(WAVE)
    assert found.text == Transcriber(experiment)(WAVE).text != ""
    words = words_of(found.tokens, Transcriber(experiment).backend.to_text)
    assert " ".join(w.text for w in words).split() == found.text.split()


def test_pieces_of_a_writing_without_blanks_are_joined_without_them():
    pieces = [Segment(float(i), i + 1.0, text) for i, text in enumerate(("今天", "", " 天气 ", "ok", "很好"))]
    assert Transcript("a.wav", 5.0, pieces).text == "今天天气 ok 很好"
    assert Transcript("a.wav", 5.0, []).text == Transcript("a.wav", 5.0, pieces[1:2]).text == ""


@pytest.mark.parametrize("samples", [np.stack([WAVE, WAVE], axis=1), (WAVE * 32768).astype(np.int16)])
def test_samples_of_another_shape_or_type_are_refused(exports, samples):
    """Integers would be taken for very loud audio, and their text would be wrong."""
    with pytest.raises(UserError, match=f"shape .*{len(WAVE)}.*{samples.dtype}"):
        Transcriber(exports["onnx"])(samples)
