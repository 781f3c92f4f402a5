"""asr_kd_score: its error counts equal counts made by hand; its options and files."""

import json

import pytest

from espnet_kd.bin import asr_kd_score
from espnet_kd.cli import UserError
from espnet_kd.decode.score import count_errors, pair_texts, summarise

PAIRS = {  # hypothesis, reference
    "same": ("a b c", "a b c"),
    "one_of_each": ("a x c d", "a b c"),
    "deleted": ("a", "a b"),
    "empty_hyp": ("", "a b c"),
    "empty_ref": ("uh oh", ""),
    "both_empty": ("", ""),
}


def test_word_counts():
    counts = count_errors(PAIRS, "word")
    assert counts.table.tolist() == [[3, 0, 0, 0], [2, 1, 0, 1], [1, 0, 1, 0], [0, 0, 3, 0], [0, 0, 0, 2], [0, 0, 0, 0]]
    summary = summarise(counts)
    assert summary["n"] == 11
    assert summary["err"] == pytest.approx(100 * 8 / 11)
    percent = [summary[k] for k in ("corr", "sub", "del", "ins")]
    assert percent == pytest.approx([600 / 11, 100 / 11, 400 / 11, 300 / 11])
    assert summary["s_err"] == pytest.approx(100 * 4 / 6)
    assert summary["low"] <= summary["err"] <= summary["high"]


def test_character_counts_count_blanks():
    counts = count_errors({"u": ("kitten s", "sitting"), "v": ("uh oh", "")}, "char")
    assert counts.errors.tolist() == [4, 5]
    assert counts.lengths.tolist() == [7, 0]


def test_nothing_but_empty_references():
    summary = summarise(count_errors({"u": ("a", "")}, "word"))
    assert (summary["err"], summary["low"], summary["n"]) == (None, None, 0)


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{k} {v}\n" for k, v in texts.items()))
    return str(path)


def test_missing_and_extra_utterances_are_named(tmp_path):
    ref = write(tmp_path / "ref", {"u1": "a", "u2": "b"})
    with pytest.raises(UserError, match="lacks utterances.*u2"):
        pair_texts(write(tmp_path / "hyp", {"u1": "a"}), ref)
    with pytest.raises(UserError, match="u3"):
        pair_texts(write(tmp_path / "hyp", {"u1": "a", "u2": "b", "u3": "c"}), ref)
    with pytest.raises(UserError, match="hyp:2: utterance 'u1' stands twice"):
        (tmp_path / "hyp").write_text("u1 a\nu1 b\n")
        pair_texts(tmp_path / "hyp", ref)
    with pytest.raises(UserError, match="no such file"):
        pair_texts(tmp_path / "nowhere", ref)


def test_command(tmp_path):
    hyp = write(tmp_path / "decode_x" / "text", {u: h for u, (h, _) in reversed(PAIRS.items())})
    ref = write(tmp_path / "test_clean" / "text", {u: r for u, (_, r) in PAIRS.items()})
    argv = ["--hyp", hyp, "--ref", ref, "--output_dir", str(tmp_path / "decode_x")]
    asr_kd_score.main(argv)
    score = json.loads((tmp_path / "decode_x" / "score.json").read_text())
    assert (score["testset"], score["utterances"]) == ("test_clean", 6)
    assert score["wer"]["err"] == pytest.approx(100 * 8 / 11)
    assert {"err", "corr", "sub", "del", "ins", "n", "low", "high"} <= score["cer"].keys()
    table = (tmp_path / "decode_x" / "score.txt").read_text()
    assert "|test_clean|6|11|54.5|9.1|36.4|27.3|72.7|66.7|" in table
    lines = (tmp_path / "decode_x" / "per_utt.tsv").read_text().splitlines()
    assert lines[0].split("\t")[5:] == ["wer_corr", "wer_sub", "wer_del", "wer_ins"]
    assert lines[2].split("\t")[0] == "one_of_each" and lines[2].split("\t")[5:] == ["2", "1", "0", "1"]
    with pytest.raises(UserError, match="1000"):
        asr_kd_score.main([*argv, "--resamples", "10"])


def test_command_scores_what_several_experiments_decoded(tmp_path):
    refs = {u: r for u, (_, r) in PAIRS.items()}
    data = [tmp_path / "raw" / name for name in ("clean", "other")]
    for d in data:
        write(d / "text", refs)
    a, b = tmp_path / "a", tmp_path / "b"
    for place, texts in (
        (a / "decode_clean", refs),
        (a / "decode_other", {u: h for u, (h, _) in PAIRS.items()}),
        (b / "decode_clean", {u: "" for u in refs}),
    ):
        write(place / "1best_recog" / "text", texts)
    argv = ["--expdir", str(a), str(b / "export"), "--data_dir", *map(str, data)]
    with pytest.raises(UserError, match="b/decode_other/1best_recog/text is missing; decode first.*b/export"):
        asr_kd_score.main(argv)
    assert not list(tmp_path.glob("*/decode_*/score.json"))
    write(b / "decode_other" / "1best_recog" / "text", refs)
    asr_kd_score.main(argv)
    scores = {p.parent: json.loads(p.read_text()) for p in tmp_path.glob("*/decode_*/score.json")}
    errors = {f"{p.parent.name}/{s['testset']}": s["wer"]["err"] for p, s in scores.items()}
    expected = {"a/clean": 0, "a/other": 100 * 8 / 11, "b/clean": 100, "b/other": 0}
    assert errors == pytest.approx(expected)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--expdir", "a"],
        ["--hyp", "h", "--ref", "r"],
        ["--hyp", "h", "--ref", "r", "--output_dir", "o", "--expdir", "a", "--data_dir", "d"],
        ["--expdir", "a", "--data_dir", "d", "--testset", "t"],
    ],
)
def test_command_takes_one_of_two_forms(argv, capsys):
    with pytest.raises(SystemExit) as e:
        asr_kd_score.main(argv)
    assert e.value.code == 2 and "either --expdir and --data_dir, or --hyp" in capsys.readouterr().err


def test_without_transcripts_the_reference_is_what_an_experiment_recognised(tmp_path):
    data = tmp_path / "data/test"
    data.mkdir(parents=True)
    (data / "wav.scp").write_text("u1 u1.wav\nu2 u2.wav\n")
    for name, text in (("teacher", "u1 a b\nu2 c d\n"), ("student", "u1 a b\nu2 c x\n")):
        decoded = tmp_path / name / "decode_test/1best_recog"
        decoded.mkdir(parents=True)
        (decoded / "text").write_text(text)
        (tmp_path / name / "config.yaml").write_text("a: 1\n")
    both = [str(tmp_path / "teacher"), str(tmp_path / "student")]
    command = ["--expdir", *both, "--data_dir", str(data)]
    asr_kd_score.main([*command, "--reference_exp", both[0]])
    found = json.loads((tmp_path / "student/decode_test/score.json").read_text())
    assert found["wer"]["err"] == 25.0 and found["testset"] == "test (reference: teacher)"
    # The report has its size and speed, too.
    itself = json.loads((tmp_path / "teacher/decode_test/score.json").read_text())
    assert itself["wer"]["err"] == 0.0 and itself["testset"] == "test (reference: teacher)"
    (data / "text").write_text("u1 a b\nu2 c x\n")  # a text of the data dir is preferred
    asr_kd_score.main([*command, "--reference_exp", both[0]])
    found = json.loads((tmp_path / "student/decode_test/score.json").read_text())
    assert found["wer"]["err"] == 0.0 and found["testset"] == "test"
