"""Transcripts are rewritten with a teacher's characters."""

import contextlib
import os
from pathlib import Path

import pytest

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.text_fit import fit_text, read_rules, rewrite

CONF = Path(__file__).resolve().parents[2] / "egs2/foundation/asr_kd1/conf"
UPPER = ["<blank>", "<unk>", "<space>", *"ABCDEÉ'", "<sos/eos>"]


@pytest.mark.parametrize(
    "text, tokens, fitted",
    [
        ("a bad cab", UPPER, "A BAD CAB"),
        ("A BAD CAB", [t.lower() for t in UPPER], "a bad cab"),
        ("A bad cab", [*UPPER, "a"], "A bad cab"),  # with tokens of both cases, the text's case stays
        ("abe\u2019s dad", UPPER, "ABE'S DAD"),
        ("a, b; (c).", UPPER, "A B C"),
        ("a-b\u2014c", UPPER, "A B C"),
        ("a.b", [*UPPER, "."], "A.B"),  # punctuation that is a token stays
        ("b\u00e9b\u00e9", UPPER, "BÉBÉ"),
        ("be\u0301be\u0301 5", UPPER, "B\u00c9B\u00c9 5"),  # decomposed letters, as macOS writes them
        ("b\u00e9 \u1ec7", ["b", "e", "\u0301", "\u0302", "\u0323"], "be\u0301 e\u0323\u0302"),
        ("\u5317\u4eac", ["<blank>", "<unk>", "\u5317", "\u4eac", "<sos/eos>"], "\u5317\u4eac"),  # letters without case
        ("", UPPER, ""),
        ("a 5", UPPER, "A 5"),  # a character that does not fit stays, and is refused below
        ("a 5%, $b & c", UPPER, "A 5% $B & C"),  # so do symbols that are spoken
        ("a <unk> b [bad]", UPPER, "A <UNK> B [BAD]"),  # and annotations, which would become words
        ("a [b]", [*UPPER, "[", "]"], "A [B]"),
    ],
)
def test_rule(text, tokens, fitted):
    assert fit_text(text, tokens) == fitted
    assert fit_text(fitted, tokens) == fitted


def command(tmp_path, text, tokens=UPPER, rewrite=None):
    (tmp_path / "text").write_text(text, encoding="utf-8")
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")
    more = ["--rewrite", str(rewrite)] if rewrite else []
    asr_kd_data.main(["fit_text", str(tmp_path), "--token_list", str(tmp_path / "tokens.txt"), *more])
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


@pytest.mark.parametrize("more", [["--token_list", "tokens.txt"], ["--undo"]])
def test_a_data_dir_that_is_not_there_is_named(tmp_path, more):
    """It was taken for one without text, so that the texts of a mistyped data dir stayed as they were."""
    with pytest.raises(UserError, match="nowhere: no such data directory"):
        asr_kd_data.main(["fit_text", str(tmp_path / "nowhere"), *more])


RULES = "# a comment\n\n([A-Z])(?=[A-Z0-9])\t\\1\n\\b3rd\\b\tthird\n5\tfive\nmuh\t\n"


def test_rules_rewrite_a_text_in_turn(tmp_path):
    (tmp_path / "rules.tsv").write_text(RULES)
    rules = read_rules(tmp_path / "rules.tsv")
    assert rewrite("A-B5, the 3rd OJT55.", rules) == "A- B five , the third O J T five five ."
    assert rewrite("a muhb 33rd", rules) == "a b 33rd"  # an empty replacement adds no blanks
    assert rewrite("a  b", ()) == "a  b"


@pytest.mark.parametrize(
    "line, named", [("five", "a tab"), ("(\tx", "no rule"), ("a\t\\1", "no rule"), ("\tx", "a tab")]
)
def test_a_rule_that_is_none_is_named_by_its_line(tmp_path, line, named):
    (tmp_path / "rules.tsv").write_text(f"5\tfive\n{line}\n")
    with pytest.raises(UserError, match=rf"rules\.tsv:2: .*{named}"):
        read_rules(tmp_path / "rules.tsv")


def test_a_file_of_rules_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.tsv"):
        read_rules(tmp_path / "nowhere.tsv")


def test_a_data_dir_is_rewritten_by_rules(tmp_path):
    (tmp_path / "rules.tsv").write_text("5\tbed\n")
    assert command(tmp_path, "u1 a 5\n", rewrite=tmp_path / "rules.tsv") == "u1 A BED\n"


def test_the_shipped_rules_for_english_numbers():
    rules = read_rules(CONF / "english_numbers.tsv")
    tokens = ["<blank>", "<unk>", "<space>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'", "<sos/eos>"]
    written = {
        "March 3rd, 1928.": "MARCH THIRD NINETEEN TWENTY EIGHT",
        "U-M-N-Y-H-6.": "U M N Y H SIX",
        "Erase OJTKS35": "ERASE O J T K S THREE FIVE",
        "687-5808": "SIX EIGHT SEVEN FIVE EIGHT ZERO EIGHT",
        "June 11th, 1970": "JUNE ELEVENTH NINETEEN SEVENTY",
        "2, 15, 1962": "TWO ONE FIVE NINETEEN SIXTY TWO",
        "I'm 19": "I'M ONE NINE",
    }
    assert {t: fit_text(rewrite(t, rules), tokens) for t in written} == written


MIXED = ["<blank>", "<unk>", "<space>", *"abcdeABCDE,.", "<sos/eos>"]


def fit(tmp_path, tokens, *options):
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")
    asr_kd_data.main(["fit_text", str(tmp_path), "--token_list", str(tmp_path / "tokens.txt"), *options])
    return (tmp_path / "text").read_text(encoding="utf-8")


def test_a_second_teacher_gets_what_the_first_one_lacks(tmp_path):
    own = "u1 A bad, bad cab.\nu2\n"
    assert command(tmp_path, own) == "u1 A BAD BAD CAB\nu2\n"
    assert fit(tmp_path, UPPER) == "u1 A BAD BAD CAB\nu2\n"
    assert fit(tmp_path, MIXED) == own
    assert fit(tmp_path, [t.lower() for t in UPPER]) == "u1 a bad bad cab\nu2\n"
    asr_kd_data.main(["fit_text", "--undo", str(tmp_path)])
    assert (tmp_path / "text").read_text() == own
    assert fit(tmp_path, MIXED) == own
    (tmp_path / "text").write_text("u1 Dad.\n")  # made anew after a conversion that changed nothing
    assert fit(tmp_path, UPPER) == "u1 DAD\n" and fit(tmp_path, MIXED) == "u1 Dad.\n"


@pytest.mark.parametrize("first", [[], [MIXED], [[t.lower() for t in UPPER]]])
def test_a_kill_before_any_file_is_replaced_loses_no_text(tmp_path, monkeypatch, first):
    """The texts from before can be restored, whichever teachers they were converted for."""
    own, replace, left = "u1 A bad, bad cab.\n", os.replace, 0

    def killed_after(*names):
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemExit("killed")
        replace(*names)

    for step in range(9):
        (tmp_path / "text").write_text(own)
        for tokens in first:
            fit(tmp_path, tokens)
        left = step
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_after)
            with contextlib.suppress(SystemExit):
                fit(tmp_path, UPPER)
        if left >= 0:
            break
        assert fit(tmp_path, UPPER) == "u1 A BAD BAD CAB\n"
        asr_kd_data.main(["fit_text", "--undo", str(tmp_path)])
        assert (tmp_path / "text").read_text() == own, step
    assert 3 <= step < 8


def test_undo_restores_the_texts_but_keeps_what_was_written_since(tmp_path, caplog):
    caplog.set_level("INFO")
    undo = ["fit_text", "--undo", str(tmp_path)]
    own = "u1 A bad, bad cab.\n"
    command(tmp_path, own)
    asr_kd_data.main(undo)
    assert (tmp_path / "text").read_text() == own and str(tmp_path) in caplog.messages[-1]
    assert {p.name for p in tmp_path.iterdir()} == {"text", "tokens.txt"}
    fit(tmp_path, UPPER)
    (tmp_path / "text").write_text("u1 a dead cab.\n")  # a corrected transcript
    assert fit(tmp_path, UPPER) == "u1 A DEAD CAB\n"
    asr_kd_data.main(undo)
    assert (tmp_path / "text").read_text() == "u1 a dead cab.\n"
    asr_kd_data.main(undo)
    assert (tmp_path / "text").read_text() == "u1 a dead cab.\n"
    for wrong in (undo + ["--token_list", "x"], undo[:1] + undo[2:]):
        with pytest.raises(UserError, match="--token_list.* or --undo"):
            asr_kd_data.main(wrong)


def test_rules_stay_when_the_texts_are_fitted_again(tmp_path):
    (tmp_path / "rules.tsv").write_text("5\tdad\n")
    assert command(tmp_path, "u1 a 5, a cab\n", rewrite=tmp_path / "rules.tsv") == "u1 A DAD A CAB\n"
    assert fit(tmp_path, MIXED) == "u1 a dad , a cab\n"
