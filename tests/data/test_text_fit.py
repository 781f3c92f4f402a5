"""Transcripts in a teacher's characters."""

import pytest

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.text_fit import fit_text

UPPER = ["<blank>", "<unk>", "<space>", *"ABCDEÉ'", "<sos/eos>"]


@pytest.mark.parametrize(
    "text, tokens, fitted",
    [
        ("a bad cab", UPPER, "A BAD CAB"),
        ("A BAD CAB", [t.lower() for t in UPPER], "a bad cab"),
        ("A bad cab", [*UPPER, "a"], "A bad cab"),  # tokens of both cases: the text's own
        ("abe\u2019s dad", UPPER, "ABE'S DAD"),
        ("a, b; (c).", UPPER, "A B C"),
        ("a-b\u2014c", UPPER, "A B C"),
        ("a.b", [*UPPER, "."], "A.B"),  # punctuation that is a token stays
        ("b\u00e9b\u00e9", UPPER, "BÉBÉ"),
        ("\u5317\u4eac", ["<blank>", "<unk>", "\u5317", "\u4eac", "<sos/eos>"], "\u5317\u4eac"),  # letters without case
        ("", UPPER, ""),
        ("a 5", UPPER, "A 5"),  # what cannot be fitted stays, and is refused below
    ],
)
def test_rule(text, tokens, fitted):
    assert fit_text(text, tokens) == fitted
    assert fit_text(fitted, tokens) == fitted


def command(tmp_path, text, tokens=UPPER):
    (tmp_path / "text").write_text(text, encoding="utf-8")
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")
    asr_kd_data.main(["fit_text", str(tmp_path), "--token_list", str(tmp_path / "tokens.txt")])
    return (tmp_path / "text").read_text(encoding="utf-8")


def test_a_data_dir_is_rewritten_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    assert command(tmp_path, "u1 A BAD\nu2 a cab!\nu3\n") == "u1 A BAD\nu2 A CAB\nu3\n"
    assert "1 of 3 texts" in caplog.text and "u2" in caplog.text


def test_a_digit_is_refused_by_utterance_and_nothing_is_changed(tmp_path):
    before = "u1 a bad\nu2 a 5\n"
    with pytest.raises(UserError, match=r"text: utterance u2 has '5'.*1 of 2"):
        command(tmp_path, before)
    assert (tmp_path / "text").read_text() == before


def test_a_data_dir_without_text_is_left_alone(tmp_path):
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in UPPER))
    asr_kd_data.main(["fit_text", str(tmp_path), "--token_list", str(tmp_path / "tokens.txt")])
    assert not (tmp_path / "text").exists()
