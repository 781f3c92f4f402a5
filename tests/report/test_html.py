"""report.html needs no other file, every picture has content, and texts from users are escaped."""

import base64
import re
import shutil

import pytest
from tiny_results import experiment, report, texts, train
from webpage import Page, check_in_browser, check_static, needs_browser

from espnet_kd.report.audio import Audio
from espnet_kd.report.matching import mark

EVIL = '<script src="//evil.example/x.js"></script>'


@pytest.fixture
def exp(tmp_path):
    """A recipe whose utterances, texts and names contain HTML and Markdown."""
    exp = tmp_path / "exp"
    for name, role, errors in (("teacher", "teacher", [0, 1, 1]), ("plain", "plain", [1, 3, 1]),
                               ("kl", "student", [2, 1, 1])):  # fmt: skip
        experiment(exp / name, role, errors, method="<b>kl|*" if role == "student" else None)
        train(exp / name, 3, ["loss", "loss_ctc"], log_only=True)
        texts(exp / name, {"u0": f"A {name} C", "u1": "A B C", "u2": ""})
    data = tmp_path / "dump/raw/test"
    data.mkdir(parents=True)
    (data / "text").write_text(f"u0 A B C\nu1 A {EVIL} C\nu2 A *B* C\n")
    return exp


def test_page_is_whole_and_shows_everything(exp):
    (exp / "report").mkdir()
    for name in ("curves_9.png", "my_thesis.png"):
        (exp / "report" / name).write_text("")
    _, markdown = report(exp)
    assert not (exp / "report/curves_9.png").exists()  # a picture of an earlier report is removed
    assert (exp / "report/my_thesis.png").exists()
    source = (exp / "report.html").read_text()
    page = check_static(source)
    titles = ["Verdict", "Comparison of methods", "Learning curves", "Accuracy against size and speed"]
    titles += ["Training curves", "Worst utterances"]
    assert re.findall("<h2>(.*?)</h2>", source) == [*titles, "Environments"]
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == [*titles, "Environments"]
    assert len(page.all("img")) == 2 == markdown.count("](report/")  # none of sizes: all models are equal
    assert len(page.all("table")) == 2  # the comparison, and the folded table of runs
    assert len(page.all("details")) == 1 and "<details><summary>3 lines</summary>" in markdown
    assert re.findall("<h1>(.*?)</h1>", source) == re.findall("<title>(.*?)</title>", source)
    assert re.findall("^# Knowledge distillation: .*/exp$", markdown, re.MULTILINE)
    for words in ("@media print", "text-decoration: line-through", "prefers-color-scheme: dark", "max-width: 640px"):
        assert words in source


def test_foreign_texts_are_shown_as_they_are(exp):
    _, markdown = report(exp)
    source = (exp / "report.html").read_text()
    shown = "".join(Page(source).words)
    for words in (f"A {EVIL} C", "<b>kl|*", "A *B* C"):
        assert words in shown
    for text in (source, markdown):
        assert "<script" not in text and "<b>" not in text
    assert "kl\\|\\*" in markdown and "A \\*B\\* C" in markdown


def test_differences_are_marked(exp):
    _, markdown = report(exp)
    source = (exp / "report.html").read_text()
    assert re.search(r"<dd>A <del>B</del> <ins>plain</ins> C\s*</dd>", source)
    assert "  - plain: A <del>B</del> <ins>plain</ins> C\n" in markdown
    worst = markdown.split("## Worst utterances")[1].split("\n## ")[0]
    groups = dict(re.findall(r"### test: (.*?) in kl\n\n(.*?)(?=\n\n|\Z)", worst, re.DOTALL))
    assert {k: re.findall(r"^- (\w+) \((.*)\)$", v, re.MULTILINE) for k, v in groups.items()} == {
        "most errors": [
            ("u0", "errors: 2, against the plain student +1"), ("u1", "errors: 1, against the plain student -2"),
            ("u2", "errors: 1, against the plain student +0"),
        ],
        "most improved": [("u1", "errors: 1, against the plain student -2")],
        "most worsened": [("u0", "errors: 2, against the plain student +1")],
    }  # fmt: skip


def test_missing_texts_and_references_are_said(exp):
    (exp / "plain/decode_test/1best_recog/text").unlink()
    _, markdown = report(exp)
    assert "plain/decode_test/1best_recog/text" in markdown.split("## Worst")[1] and "  - teacher: " in markdown
    shutil.rmtree(exp.parent / "dump")
    _, markdown = report(exp)
    assert "test: its data dir is not there, and so no references" in markdown


@pytest.mark.parametrize(
    ("reference", "hypothesis", "unit", "pieces"),
    [
        ("a b c", "a x c d", "word", [("equal", "a"), ("del", "b"), ("ins", "x"), ("equal", "c"), ("ins", "d")]),
        ("", "a b", "word", [("ins", "a b")]),
        ("a b", "", "word", [("del", "a b")]),
        ("", "", "word", []),
        ("漢字", "漢 語", "char", [("equal", "漢"), ("del", "字"), ("ins", "語")]),
    ],
)
def test_mark(reference, hypothesis, unit, pieces):
    assert mark(reference, hypothesis, unit) == pieces


def test_audio_of_small_files_is_in_the_page_once(exp):
    data = exp.parent / "dump/raw/test"
    contents = {"u0.flac": b"fLaC" + b"0" * 40, "u1.wav": b"RIFF" + b"1" * 40, "u2.wav": b"secret"}
    for name, content in contents.items():
        (data / name).write_bytes(content)
    (data / "wav.scp").write_text("".join(f"{name[:2]} dump/raw/test/{name}\n" for name in contents))
    report(exp)
    shown = check_static((exp / "report.html").read_text()).all("audio")
    assert [base64.b64decode(a["src"].split(",")[1]) for a in shown] == [contents["u0.flac"], contents["u1.wav"]]
    assert [a["src"].split(";")[0] for a in shown] == ["data:audio/flac", "data:audio/wav"]


def test_audio_that_is_large_or_a_part_of_a_recording_is_left_out(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.wav").write_bytes(b"RIFF" + b"0" * (90_000 if name != "d" else 200_000))
    lines = "".join(f"{name} {tmp_path / name}.wav\n" for name in "abcd")
    (tmp_path / "wav.scp").write_text(f"{lines}e cat {tmp_path / 'a.wav'} |\nf {tmp_path / 'nowhere.wav'}\n")
    audio = Audio(200_000)
    assert [bool(audio.embed(tmp_path, ".", u)) for u in "abcdefga"] == [True, True, *[False] * 6]
    (tmp_path / "segments").write_text("a a 0 1\n")
    assert Audio().embed(tmp_path, ".", "a") is None


@needs_browser
def test_in_chromium_no_errors_and_no_requests(exp, tmp_path):
    report(exp)
    check_in_browser(exp / "report.html", tmp_path)
