"""The report of several decodings, with other searches or references, of one test set."""

import json
import shutil

import pytest
from tiny_results import comparison, experiment, report


def test_scores_against_other_references_are_not_compared(tmp_path):
    """The references have changed between two calls of asr_kd_score."""
    experiment(tmp_path / "plain", "plain", [1] * 5)
    experiment(tmp_path / "kl", "student", [1] * 5, method="kl")
    path = tmp_path / "kl/decode_test/per_utt.tsv"
    path.write_text(path.read_text().replace("\t9\t1\t0\t0\n", "\t7\t1\t0\t0\n", 1))  # a reference of 8 words, not 10
    assert comparison(report(tmp_path)[1])["kl"]["WER to plain"] == "scored against other references"


def test_a_beam_search_is_not_compared_with_greedy_decoding(tmp_path):
    searches = {"plain": {"beam_size": 1}, "student_kl": {"beam_size": 1}, "student_fkl": {"beam_size": 10}}
    searches["student_fkl"] |= {"ngram_file": "exp/4gram.arpa", "ngram_weight": 0.5}
    for name, search in searches.items():
        method = name.removeprefix("student_") if "student" in name else None
        experiment(tmp_path / name, "student" if method else "plain", [1] * 5, method=method)
        facts = tmp_path / name / "decode_test/decode.json"
        rtf = 0.01 * search["beam_size"]
        facts.write_text(json.dumps({"params": 1000, "rtf": rtf, "ctc_weight": 1.0, **search}))
    rows, page = report(tmp_path)
    rates = comparison(page)
    assert {row["experiment"]: row["search"] for row in rows}["plain"] == "greedy"
    assert rates["kl"]["WER to plain"].startswith("+0.00") and rates["kl"]["real-time factor"] == "0.0100"
    other = rates["fkl, beam size 10, 4gram.arpa with weight 0.5"]
    assert other["WER to plain"] == "the plain student was decoded with another search"
    assert other["real-time factor"] == "0.1000"


def scored_again(expdir, decoding, errors, **facts):
    """A further decoding of the test set by an experiment, as ``asr_kd_score --hyp`` scores it."""
    first, out = expdir / "decode_test", expdir / decoding
    (first / "decode.json").write_text(json.dumps({"params": 1000, "rtf": 0.01, "beam_size": 1, "ctc_weight": 1.0}))
    shutil.copytree(first, expdir / "kept")
    experiment(expdir, "student", errors, method="kl")
    first.rename(out)
    (expdir / "kept").rename(first)
    (out / "decode.json").write_text(json.dumps({"params": 1000, "rtf": 0.1, "ctc_weight": 1.0, **facts}))


@pytest.mark.parametrize("beam_size, names", [
    (10, ["kl", "kl, beam size 10"]),
    (1, ["kl (student_kl/decode_test)", "kl (student_kl/decode_test_again)"]),
])  # fmt: skip
def test_each_decoding_of_a_test_set_has_its_own_counts(tmp_path, beam_size, names):
    """An experiment decoded one test set into two directories; both are named after the directory of the reference."""
    experiment(tmp_path / "student_plain", "plain", [4] * 5)
    facts = {"params": 1000, "rtf": 0.01, "beam_size": 1, "ctc_weight": 1.0}
    (tmp_path / "student_plain/decode_test/decode.json").write_text(json.dumps(facts))
    experiment(tmp_path / "student_kl", "student", [3] * 5, method="kl")
    scored_again(tmp_path / "student_kl", "decode_test_again", [1] * 5, beam_size=beam_size)
    rows, page = report(tmp_path)
    lines = [comparison(page)[name] for name in names]
    assert [line["WER"].split()[0] for line in lines] == ["30.00", "10.00"]
    assert [line["Sub/Del/Ins"] for line in lines] == ["30.0/0.0/0.0", "10.0/0.0/0.0"]
    assert lines[0]["WER to plain"].startswith("-10.00 [")
    assert lines[1]["WER to plain"].startswith("-30.00 [" if beam_size == 1 else "the plain student was decoded with")
    assert {row["decoding"]: row["wer"] for row in rows if row["role"] == "student"} == {
        "decode_test": 30.0, "decode_test_again": 10.0,
    }  # fmt: skip
