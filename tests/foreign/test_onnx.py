"""ONNX files as teachers give the same posteriors as in onnxruntime, and other files are refused."""

import copy

import pytest
import tiny_asr
import torch

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'espnet_kd[foundation]'")
pytest.importorskip("onnx", reason="makes the file that is tried")

import tiny_onnx  # noqa: E402

from espnet_kd.bin import asr_kd_import  # noqa: E402
from espnet_kd.cli import UserError  # noqa: E402
from espnet_kd.experiments.models import find_experiment, load_model  # noqa: E402
from espnet_kd.inference.recognise import Recogniser  # noqa: E402
from espnet_kd.targets.online import OnlineTeacher  # noqa: E402


def run(tmp_path, model, tokens, *more):
    asr_kd_import.main([f"onnx:{model}", "--tokens", str(tokens), "--output_dir", str(tmp_path / "exp"), *more])
    return OnlineTeacher(tmp_path / "exp")


@pytest.mark.parametrize("last, batch", [("LogSoftmax", "batch"), ("Softmax", "batch"), ("LogSoftmax", 1)])
def test_posteriors_are_those_of_onnxruntime(tmp_path, last, batch):
    model, tokens = tiny_onnx.save(tmp_path / "in", last=last, batch=batch)
    teacher = run(tmp_path, model, tokens)
    assert teacher.token_list == ["<blank>", "<unk>", "a", "b", "c", "d", "<space>", "<sos/eos>"]
    assert teacher.frame_shift == 0.02 and teacher.sampling_rate == 16000
    waves = [torch.from_numpy(tiny_asr.audio(s, i)) for i, s in enumerate((1.3, 0.7, 1.3))]
    lengths = torch.tensor([len(w) for w in waves])
    out = teacher.targets(list("abc"), torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths)
    session = onnxruntime.InferenceSession(model)
    for i, wave in enumerate(waves):
        scores = torch.from_numpy(session.run(None, {"audio": wave[None].numpy()})[0][0])
        wanted = scores if last == "Softmax" else scores.exp()
        assert out.lengths[i] == len(wanted)
        mine = out.logits[i, : len(wanted)].softmax(-1)
        assert (mine[:, :-1] - wanted[:, [6, 5, 0, 1, 2, 3, 4]]).abs().max() <= 1e-6
        assert mine[:, -1].max() == 0 and mine.isfinite().all()


def test_the_number_of_parameters_is_not_known(tmp_path):
    """They are in the graph; the model's own, which order its tokens, would make the student look larger."""
    run(tmp_path, *tiny_onnx.save(tmp_path / "in"))
    model, args = load_model(*find_experiment(tmp_path / "exp"))
    assert Recogniser(model, args, tmp_path / "exp").num_parameters is None


def test_a_copy_of_the_model_runs_too(tmp_path):
    teacher = run(tmp_path, *tiny_onnx.save(tmp_path / "in"))
    speech, lengths = torch.randn(1, 16000), torch.tensor([16000])
    first = teacher._model.encode(speech, lengths)[0]
    assert torch.equal(copy.deepcopy(teacher._model).encode(speech, lengths)[0], first)


@pytest.mark.parametrize("tokens", [["x", "y"], [*tiny_onnx.TOKENS, "e"]])
def test_tokens_of_another_number_are_refused(tmp_path, tokens):
    model, _ = tiny_onnx.save(tmp_path / "in")
    (tmp_path / "other.txt").write_text("\n".join(tokens))
    with pytest.raises(UserError, match=f"{model}.*{len(tokens)} tokens of .*other.txt"):
        run(tmp_path, model, tmp_path / "other.txt")
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        (["--blank", "7"], "--blank 7: .*tokens.txt"),
        (["--blank", "-1"], "--blank -1"),
        (["--word_delimiter", "_"], "--word_delimiter"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, named):
    model, tokens = tiny_onnx.save(tmp_path / "in")
    with pytest.raises(UserError, match=named):
        run(tmp_path, model, tokens, *options)
    assert not (tmp_path / "exp").exists()


def test_files_that_are_no_such_model_are_refused(tmp_path):
    features, tokens = tiny_onnx.save(tmp_path / "features", rank=3)
    with pytest.raises(UserError, match=f"{features}: the input must be audio"):
        run(tmp_path, features, tokens)
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(b"no protobuf at all")
    with pytest.raises(UserError, match="noise.onnx: onnxruntime cannot run"):
        run(tmp_path, noise, tokens)
    with pytest.raises(UserError, match="--tokens"):
        asr_kd_import.main([f"onnx:{features}", "--output_dir", str(tmp_path / "exp")])
    with pytest.raises(UserError, match="--blank"):  # no token can be the blank
        run(tmp_path, *tiny_onnx.save(tmp_path / "none", [*tiny_onnx.TOKENS[:-1], "e"]))
    assert not (tmp_path / "exp").exists()


def test_marks_and_white_space_are_left_out(tmp_path):
    tokens = ["<pad>", "<s>", " ", "aɪ", "<unk>", "<wb>", "<blank>"]
    model, _ = tiny_onnx.save(tmp_path / "in", tokens)
    (tmp_path / "tokens").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    teacher = run(tmp_path, model, tmp_path / "tokens", "--word_delimiter", "<wb>")
    assert teacher.token_list == ["<blank>", "<unk>", "aɪ", "<space>", "<sos/eos>"]
    assert "token_type: word" in (tmp_path / "exp/config.yaml").read_text()


def test_options_of_onnx_are_refused_for_hugging_face(tmp_path):
    with pytest.raises(UserError, match="--blank"):
        asr_kd_import.main(["hf:x", "--blank", "1", "--output_dir", str(tmp_path / "exp")])


@pytest.mark.parametrize("delimiter", ["<space>", "▁", " "])
def test_the_usual_names_of_the_space_are_known(tmp_path, delimiter):
    """Without one of them, a model's words would run together."""
    tokens = ["<blk>", "a", delimiter, "b", "<sos/eos>"]
    teacher = run(tmp_path, *tiny_onnx.save(tmp_path / "in", tokens))  # with numbers, as in sherpa-onnx's tokens.txt
    assert teacher.token_list == ["<blank>", "<unk>", "a", "<space>", "b", "<sos/eos>"]
    assert "token_type: char" in (tmp_path / "exp/config.yaml").read_text()


@pytest.mark.parametrize(
    "content, tokens",
    [
        ("\ufeffa 0\r\n<blank> 1\r\nb 2\r\n", ["a", "b"]),  # as an editor on Windows writes it
        ("\ufeffa\n<blank>\nb\n", ["a", "b"]),
        ("a 0\n<blank> 1\n 2\n", ["a", "<space>"]),  # a number alone: sherpa-onnx takes the token for a blank
        ("a\n<blank>\n\x85\n", ["a"]),  # a white-space token at which only Python's splitlines() ends a line
        ("0\n<blank>\n1\n", ["0", "1"]),
    ],
)
def test_files_of_tokens(tmp_path, content, tokens):
    model, _ = tiny_onnx.save(tmp_path / "in", ["a", "<blank>", "b"])
    (tmp_path / "tokens").write_bytes(content.encode())
    assert run(tmp_path, model, tmp_path / "tokens").token_list == ["<blank>", "<unk>", *tokens, "<sos/eos>"]


@pytest.mark.parametrize("options, named", [({"samples": 16000}, "16000 samples"), ({"change": "cut"}, "10 frames")])
def test_a_graph_of_one_length_is_refused(tmp_path, options, named):
    """It runs on the second of audio that it was exported with, and on nothing else."""
    with pytest.raises(UserError, match=f"model.onnx: .*{named}"):
        run(tmp_path, *tiny_onnx.save(tmp_path / "in", **options))
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("error", [RuntimeError("too long"), UserError("the teacher gives NaN")])
def test_a_model_that_cannot_be_a_teacher_is_not_imported(tmp_path, monkeypatch, error):
    """The same command again must not take it for imported."""
    model, tokens = tiny_onnx.save(tmp_path / "in")

    def fails(path):
        raise error

    with monkeypatch.context() as changed:
        changed.setattr("espnet_kd.targets.online.OnlineTeacher", fails)
        for _ in range(2):
            with pytest.raises(UserError, match=str(error)):
                run(tmp_path, model, tokens)
    assert run(tmp_path, model, tokens).frame_shift == 0.02


@pytest.mark.parametrize("rate", ["0", "-16000"])
def test_a_rate_that_is_none_is_refused(tmp_path, rate):
    with pytest.raises(UserError, match=f"--fs {rate}"):
        run(tmp_path, *tiny_onnx.save(tmp_path / "in"), "--fs", rate)


def test_a_token_that_the_file_masks(tmp_path):
    teacher = run(tmp_path, *tiny_onnx.save(tmp_path / "in", change="mask"))
    out = teacher.targets(["a"], torch.from_numpy(tiny_asr.audio(1.0, 0))[None], torch.tensor([16000]))
    mine = out.logits.softmax(-1)
    assert mine.isfinite().all() and mine[..., teacher.token_list.index("a")].max() == 0
    assert (mine.sum(-1) - 1).abs().max() <= 1e-5


def test_the_usual_names_of_wav2vec2_tokens(tmp_path):
    """[UNK] is not a token of several characters, which would make the token type word and separate all letters."""
    teacher = run(tmp_path, *tiny_onnx.save(tmp_path / "in", ["[UNK]", "a", "|", "b", "[PAD]"]))
    assert teacher.token_list == ["<blank>", "<unk>", "a", "<space>", "b", "<sos/eos>"]
    assert "token_type: char" in (tmp_path / "exp/config.yaml").read_text()
