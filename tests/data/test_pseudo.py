"""Transcripts of other recognisers: which are kept, and why the others are not."""

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny_asr

from espnet_kd.bin import asr_kd_pseudo
from espnet_kd.cli import UserError
from espnet_kd.data.pseudo import Label, Limits, distance, judge, most_repeats, read_labels
from espnet_kd.data.tokens import make_token_list
from espnet_kd.targets.nbest import read_nbest

FOUNDATION = Path(__file__).resolve().parents[2] / "egs2/foundation/asr_kd1"
TOKENS = ["<blank>", "<unk>", "<space>", *"ABCDE'", "<sos/eos>"]


@pytest.mark.parametrize(
    "text, repeats",
    [("", 0), ("a", 1), ("a b c", 1), ("a a a", 3), ("a b a b a b c", 3), ("x a b c a b c", 2), ("a b a c a", 1)],
)
def test_repetitions(text, repeats):
    assert most_repeats(text) == repeats


@pytest.mark.parametrize(
    "text, repeats",
    [
        ("谢谢大家", 2),
        ("我们谢谢谢谢谢谢谢谢", 8),  # written without blanks, so that it has one word
        ("请订阅我的频道" * 4, 4),
        ("请 订阅 我的频道" * 4, 4),
        ("สวัสดี" * 5, 5),
        ("他说 hello hello 8888", 2),
    ],
)
def test_repetitions_in_scripts_without_blanks(text, repeats):
    assert most_repeats(text) == repeats


@pytest.mark.parametrize("a, b, wanted", [("abc", "abc", 0), ("abc", "abd", 1 / 3), ("ab", "abcd", 0.5), ("", "a", 1)])
def test_distance(a, b, wanted):
    assert distance(a, b) == distance(b, a) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "label, limits, reason",
    [
        (Label("a bad cab"), Limits(), ""),
        (Label(" ... "), Limits(), "empty"),
        (Label("a 5"), Limits(), "character 5"),
        (Label("a bad %"), Limits(), "character %"),
        (Label("[Bad] cab"), Limits(), "character ["),
        (Label("a <unk> cab"), Limits(), "character <"),
        (Label("a bad", 0.4), Limits(min_confidence=0.5), "confidence"),
        (Label("a bad"), Limits(min_confidence=0.5), "confidence"),  # an unknown confidence is not enough
        (Label("a bad", 0.6), Limits(min_confidence=0.5), ""),
        (Label("a bad a bad a bad a bad"), Limits(), "repetition"),
        (Label("a bad a bad a bad a bad"), Limits(max_repeats=None), ""),
        (Label("a"), Limits(), "speaking rate"),
        (Label("abcde " * 20), Limits(max_repeats=None), "speaking rate"),
        (Label("a dad"), Limits(max_distance=0.3), "distance to the CTC teacher"),
        (Label("a bad cad"), Limits(max_distance=0.3), ""),
    ],
)
def test_verdicts(label, limits, reason):
    assert judge(label, 2.0, limits, TOKENS, "A BAD CAB").reason == reason


LOWER = [t.lower() for t in TOKENS if t != "'"]


@pytest.mark.parametrize(
    "text, tokens, other, characters, reason",
    [
        ("A bad, cab.", TOKENS, "a bad cab", LOWER, ""),  # the student's letters are in upper case
        ("a bad cab's", [*LOWER, "'", "s"], " A BAD  CAB'S ", [*TOKENS, "S"], ""),
        ("a bad cab'd", TOKENS, "a bad cabd", LOWER, ""),  # the teacher has no apostrophe
        ("A BAD!", (), "a bad", LOWER, ""),
        ("a dad", TOKENS, "a bad", LOWER, "distance to the CTC teacher"),
    ],
)
def test_case_and_punctuation_are_no_distance_to_a_ctc_teacher(text, tokens, other, characters, reason):
    verdict = judge(Label(text), 2.0, Limits(max_distance=0.0), tokens, other, characters)
    assert verdict.reason == reason and (verdict.distance == 0) == (not reason)


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"utt_id": "a"}', "text"),
        ('{"text": "a"}', "utt_id"),
        ('{"utt_id": "a", "text": 5}', "text"),
        ('{"utt_id": "a", "text": "b", "confidence": "high"}', "high"),
        ('{"utt_id": "a", "text": "b", "confidence": NaN}', "nan"),
        ('{"utt_id": ', "JSON"),
        ("u0 twice", "u0"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, named):
    (tmp_path / "labels").write_text(f"u0 some text\n{line}\n")
    with pytest.raises(UserError, match=f"labels:2: .*{named}"):
        read_labels(tmp_path / "labels")


def test_forms_of_other_recognisers(tmp_path):
    lines = [
        {"id": "a", "text": " one  two "},
        {"audio_filepath": "/x/b.wav", "pred_text": "three"},
        {"utt_id": "c", "transcript": "", "confidence": 0.5},
        {"audio_filepath": "/x/d.wav", "text": "the reference", "pred_text": "four"},  # as NeMo writes both
    ]
    (tmp_path / "labels").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = read_labels(tmp_path / "labels")
    assert found == {"a": Label("one two"), "b": Label("three"), "c": Label("", 0.5), "d": Label("four")}
    for content in ("", None):
        path = tmp_path / ("none" if content is None else "empty")
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=path.name):
            read_labels(path)


@pytest.fixture
def data(tmp_path):
    directory = tiny_asr.data_dir(tmp_path / "audio", {f"u{i}": tiny_asr.audio(1.0, i) for i in range(4)})
    (directory / "utt2spk").write_text("".join(f"u{i} u{i}\n" for i in range(4)))
    (directory / "spk2utt").write_text("".join(f"u{i} u{i}\n" for i in range(4)))
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in TOKENS))
    return directory


def test_the_command_writes_what_is_kept_and_why_not(tmp_path, data, caplog):
    caplog.set_level("INFO")
    (tmp_path / "labels").write_text("u0 a bad cab\nu1 a 5\nu2 abe abe abe abe abe\n")
    out = tmp_path / "pseudo"
    asr_kd_pseudo.main(["--data_dir", str(data), "--labels", str(tmp_path / "labels"), "--out", str(out),
                        "--token_list", str(tmp_path / "tokens.txt")])  # fmt: skip
    assert (out / "text").read_text() == "u0 A BAD CAB\n"
    assert (out / "wav.scp").read_text().split()[0] == "u0"
    [(_, ids)] = read_nbest(out / "nbest", TOKENS)["u0"]
    assert "".join(TOKENS[i] for i in ids) == "A<space>BAD<space>CAB"
    record = json.loads((out / "pseudo.json").read_text())
    assert record["kept"] == 1 and record["utterances"] == 4
    assert record["left_out"] == {"a character that is no token": 1, "repetition": 1, "no transcript": 1}
    assert "1 of 4 utterances kept" in caplog.text
    rows = [line.split("\t") for line in (out / "pseudo.tsv").read_text().splitlines()]
    assert [r[:3] for r in rows[1:]] == [["u0", "1", ""], ["u1", "0", "character 5"], ["u2", "0", "repetition"]]


def test_the_characters_and_tokens_of_a_bpe_student(tmp_path, data):
    (tmp_path / "text").write_text("".join(f"u{i} {w}\n" for i, w in enumerate(("A BAD CAB", "DAD", "BAD DAD") * 5)))
    tokens = make_token_list([tmp_path / "text"], tmp_path / "bpe", "bpe", nbpe=9)
    (tmp_path / "labels").write_text("u0 a bad cab\nu1 a bed\n")
    command = ["--data_dir", str(data), "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--token_list.*--token_type bpe"):
        asr_kd_pseudo.main([*command, "--token_list", str(tokens)])
    asr_kd_pseudo.main([*command, "--token_list", str(tokens), "--token_type", "bpe"])
    assert (tmp_path / "out/text").read_text() == "u0 A BAD CAB\n"  # no piece has an E
    pieces = tokens.read_text(encoding="utf-8").splitlines()
    [(_, ids)] = read_nbest(tmp_path / "out/nbest", pieces)["u0"]
    assert "".join(pieces[i] for i in ids).replace("\u2581", " ").strip() == "A BAD CAB"


def test_transcripts_are_rewritten_by_rules_first(tmp_path, data):
    (tmp_path / "labels").write_text('{"utt_id": "u0", "text": "A-B5"}\n')
    (tmp_path / "rules.tsv").write_text("5\tbed\n")
    files = ["--labels", str(tmp_path / "labels"), "--rewrite", str(tmp_path / "rules.tsv")]
    asr_kd_pseudo.main(["--data_dir", str(data), *files, "--out", str(tmp_path / "out"),
                        "--token_list", str(tmp_path / "tokens.txt")])  # fmt: skip
    assert (tmp_path / "out/text").read_text() == "u0 A B BED\n"


def test_a_teacher_makes_and_checks_transcripts(tmp_path, data):
    conf = tiny_asr.config()
    exp = tiny_asr.save(tiny_asr.build(conf), conf, tmp_path / "exp")
    command = ["--data_dir", str(data), "--teacher", str(exp), "--ctc_teacher", str(exp), "--max_rate", "-1"]
    asr_kd_pseudo.main([*command, "--max_repeats", "-1", "--out", str(tmp_path / "out")])
    rows = [line.split("\t") for line in (tmp_path / "out/pseudo.tsv").read_text().splitlines()[1:]]
    assert {r[5] for r in rows if r[1] == "1"} == {"0.000"}  # the teacher agrees with itself
    texts = {r[0]: r[6] for r in rows if r[1] == "1"}
    (tmp_path / "labels").write_text("".join(f"{u} {t.upper()}.\n" for u, t in texts.items()))
    labels = ["--labels", str(tmp_path / "labels"), "--max_repeats", "-1", "--max_distance", "0"]
    asr_kd_pseudo.main([*command[:2], *labels, *command[4:], "--out", str(tmp_path / "upper")])
    assert len((tmp_path / "upper/text").read_text().splitlines()) == len(texts)  # in other characters, too


def test_mistakes_of_a_user(tmp_path, data):
    (tmp_path / "labels").write_text("x1 a bad cab\n")
    command = ["--data_dir", str(data), "--labels", str(tmp_path / "labels"), "--out"]
    with pytest.raises(UserError, match="labels has none of the utterances .* u0"):
        asr_kd_pseudo.main([*command, str(tmp_path / "out")])
    with pytest.raises(UserError, match="--out"):
        asr_kd_pseudo.main([*command, str(data)])
    (tmp_path / "labels").write_text("u1 ...\nu2 12345\n")
    with pytest.raises(UserError, match="none of 2 transcripts is kept"):
        asr_kd_pseudo.main([*command, str(tmp_path / "out"), "--token_list", str(tmp_path / "tokens.txt")])
    assert not (tmp_path / "out").exists()


def test_no_teacher_runs_for_a_place_that_cannot_be_written(tmp_path, data, monkeypatch):
    monkeypatch.setattr(asr_kd_pseudo, "_texts", lambda *args: pytest.fail("a teacher ran"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into .*file"):
        asr_kd_pseudo.main(["--data_dir", str(data), "--teacher", "exp/t", "--out", str(tmp_path / "file")])


def test_no_teacher_runs_for_tokens_without_unk(tmp_path, data, monkeypatch):
    """The tokens of the transcripts are looked up at the end, when a teacher has decoded everything."""
    monkeypatch.setattr(asr_kd_pseudo, "_texts", lambda *args: pytest.fail("a teacher ran"))
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in TOKENS if t != "<unk>"))
    command = ["--data_dir", str(data), "--teacher", "exp/t", "--out", str(tmp_path / "out"), "--token_list"]
    with pytest.raises(UserError, match="--token_list: .*tokens.txt has no <unk>"):
        asr_kd_pseudo.main([*command, str(tmp_path / "tokens.txt")])


def test_no_nbest_of_an_earlier_run_stays(tmp_path, data):
    (tmp_path / "labels").write_text("u0 a bad cab\n")
    command = ["--data_dir", str(data), "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "out")]
    asr_kd_pseudo.main([*command, "--token_list", str(tmp_path / "tokens.txt")])
    assert (tmp_path / "out/nbest").exists()
    (tmp_path / "labels").write_text("u1 a dad\n")
    asr_kd_pseudo.main(command)
    assert not (tmp_path / "out/nbest").exists()  # it has the transcripts of the first run


def test_whispers_output_in_the_form_that_is_read(tmp_path, data, monkeypatch):
    """The script of egs2/foundation for faster-whisper runs with a stand-in for that package."""
    signs = {"no_speech_prob": 0.2, "compression_ratio": 1.0}
    segment = SimpleNamespace(text=" A bad", tokens=[1, 2, 3], avg_logprob=-0.1, **signs)
    other = SimpleNamespace(text=" cab.", tokens=[4], avg_logprob=-0.5, **signs)
    found = iter([[segment, other], [], [segment], [segment]])
    model = SimpleNamespace(transcribe=lambda audio, **options: (iter(next(found)), None))
    stand_in = SimpleNamespace(WhisperModel=lambda *args, **options: model)
    monkeypatch.setitem(sys.modules, "faster_whisper", stand_in)
    script = runpy.run_path(str(FOUNDATION / "local/whisper_labels.py"))
    script["main"](["--model", "tiny", "--data_dir", str(data), "--out", str(tmp_path / "labels")])
    labels = read_labels(tmp_path / "labels")
    assert labels["u0"] == Label("A bad cab.", pytest.approx(math.exp(-0.2)))
    assert labels["u1"] == Label("", 0.0) and len(labels) == 4

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    model.transcribe = interrupted
    with pytest.raises(KeyboardInterrupt):  # the earlier file stays
        script["main"](["--model", "tiny", "--data_dir", str(data), "--out", str(tmp_path / "labels")])
    assert read_labels(tmp_path / "labels") == labels
    for options, message in (
        (["--data_dir", str(tmp_path / "nowhere")], "nowhere/wav.scp"),
        (["--data_dir", str(data), "--threads", "0"], "--threads is 0"),
        (["--data_dir", str(data), "--out", str(tmp_path)], "--out .* is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            script["main"](["--model", "tiny", "--out", str(tmp_path / "other"), *options])
    assert not (tmp_path / "other").exists()


def test_whisper_gets_audio_at_its_own_rate(tmp_path, monkeypatch):
    """Whisper takes samples without their rate; audio of 8 kHz would be taken at double speed."""
    given = []
    model = SimpleNamespace(transcribe=lambda audio, **options: (given.append(audio) or iter([]), None))
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=lambda *args, **options: model))
    main = runpy.run_path(str(FOUNDATION / "local/whisper_labels.py"))["main"]
    for name, rate, channels in (("a", 8000, 1), ("b", 16000, 2)):
        soundfile.write(tmp_path / f"{name}.wav", np.full((2 * rate, channels), 0.25), rate)
    (tmp_path / "wav.scp").write_text(f"a {tmp_path / 'a.wav'}\n\nb {tmp_path / 'b.wav'}\n")
    command = ["--model", "tiny", "--out", str(tmp_path / "labels"), "--data_dir"]
    main([*command, str(tmp_path)])
    assert [(x.shape, str(x.dtype)) for x in given] == [((32000,), "float32")] * 2
    assert all(abs(x[16000] - 0.25) < 1e-3 for x in given)
    (tmp_path / "segments").touch()
    for directory, named in ((tmp_path, "segments"), (tmp_path / "nowhere", "wav.scp")):
        with pytest.raises(UserError, match=named):
            main([*command, str(directory)])
