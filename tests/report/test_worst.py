"""The choice of utterances that the report shows."""

import pytest
from tiny_results import describe, score

from espnet_kd.report.compare import compare
from espnet_kd.report.results import gather
from espnet_kd.report.worst import choose_student

COLUMNS = [f"{unit}_{k}" for unit in ("cer", "wer") for k in ("corr", "sub", "del", "ins")]


def scored(expdir, role, rows, method=None):
    """Write a scored experiment from (characters, wrong characters, words, wrong words) of each utterance."""
    describe(expdir, role, method, [1] if method else None)
    score(expdir, 10.0)
    lines = ["\t".join(["utt_id", *COLUMNS])]
    for i, (chars, bad, words, wrong) in enumerate(rows):
        lines.append("\t".join(map(str, [f"u{i}", chars - bad, bad, 0, 0, words - wrong, wrong, 0, 0])))
    (expdir / "decode_test/per_utt.tsv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("words", "expected"), [(1, {"u0": 3, "u1": 5}), (2, {"u0": 1, "u1": 1})])
def test_errors_are_characters_where_texts_have_no_blanks(tmp_path, words, expected):
    rows = [(9, 3, words, 1), (9, 5, words, 1)]
    scored(tmp_path / "plain", "plain", [(9, 1, words, 1), (9, 7, words, 1)])
    scored(tmp_path / "kl", "student", rows, method="kl")
    gathered = gather(tmp_path)
    chosen = choose_student(gathered, compare(gathered), "test")
    assert chosen.student["method"] == "kl" and chosen.errors == expected
    assert chosen.change == ({"u0": 2, "u1": -2} if words == 1 else {"u0": 0, "u1": 0})
