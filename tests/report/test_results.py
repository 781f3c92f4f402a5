"""The report of fabricated experiments, complete and with parts missing."""

import json
import os
import shutil

import pytest
from tiny_results import comparison, describe, experiment, record, report, score, table, train

from espnet_kd.bin import asr_kd_report
from espnet_kd.cli import UserError
from espnet_kd.report.results import gather

ISSUE_KEYS = {
    "role", "method", "kd_stages", "params", "epochs", "seed", "testset", "cer", "wer", "wer_low", "wer_high", "rtf",
    "train_seconds",
}  # fmt: skip


@pytest.fixture
def exp(tmp_path):
    exp = tmp_path / "exp"
    for seed in (0, 1):
        plain, student = exp / f"plain{seed}", exp / f"fkl{seed}"
        describe(plain, "plain", seed=seed)
        train(plain, 5, ["loss", "loss_ctc"])
        score(plain, 20.0 + seed)
        describe(student, "student", "progressive_fkl", [1, 2, 3], seed)
        train(student / "kd_stage1", 1, ["loss", "loss_kd"])
        train(student / "kd_stage2", 1, ["loss", "loss_kd"])
        score(student / "kd_stage2", 90.0)
        train(student, 3, ["loss", "loss_ctc", "loss_kd"])
        score(student, 18.0 + seed)
    return exp


def test_rows_table_and_picture(exp, tmp_path):
    score(tmp_path / "elsewhere" / "big", 9.0)
    rows, page = report(exp, "--teacher", tmp_path / "elsewhere" / "big")
    assert [(r["role"], r["experiment"]) for r in rows] == [
        ("teacher", "big"), ("plain", "plain0"), ("plain", "plain1"), ("student", "fkl0"), ("student", "fkl1"),
    ]  # fmt: skip
    assert all(row.keys() >= ISSUE_KEYS for row in rows)
    teacher, student = rows[0], rows[3]
    assert (teacher["epochs"], teacher["train_seconds"], teacher["wer"]) == (None, None, 9.0)
    assert (student["method"], student["kd_stages"], student["seed"]) == ("progressive_fkl", [1, 2, 3], 0)
    assert (student["epochs"], student["params"], student["rtf"]) == (5, 1234567, 0.01)
    assert student["train_seconds"] == pytest.approx(5 * 64.5)  # all three KD stages
    assert (student["wer"], student["wer_low"], student["wer_high"], student["cer"]) == (18.0, 17.0, 19.0, 9.0)
    line = "|fkl0|progressive_fkl, KD stages 1+2+3|0|test|9.00 [8.00, 10.00]|18.00 [17.00, 19.00]|-1.00|-2.00|0.0100|5|"
    assert line + "5 min 22 s|" in page
    line = "|progressive_fkl, KD stages 1+2+3|test|0 1|1,234,567|5|9.25|18.50|no per_utt.tsv: score again|"
    assert line + "–|–|–|0.0100|5 min 22 s" in page
    assert "## Environments" in page and "torch version" in page and "](report/curves_1.png)" in page
    assert "## Missing" not in page
    assert (exp / "report/curves_1.png").read_bytes().startswith(b"\x89PNG")
    stages = [line for line in page.split("### KD stages")[1].split("###")[0].splitlines() if line.startswith("|fkl0|")]
    assert [line.split("|")[2:5] + line.split("|")[6:-1] for line in stages] == [
        ["1", "1", "1 min 04 s", "–", "–", "–"],
        ["2", "1", "1 min 04 s", "test", "45.00", "90.00"],
        ["3", "3", "3 min 14 s", "test", "9.00", "18.00"],
    ]


def test_kd_stages_of_one_training(exp):
    """The table has the epochs and final error rates of each KD stage, also if each was a training of its own."""
    student = exp / "fkl1"
    for k in (1, 2):
        shutil.rmtree(student / f"kd_stage{k}")
    train(student, 5, ["loss", "loss_ctc", "loss_kd"])
    record(student, (1, 1), (1, 2), (3, 5))
    score(student / "kd_stage1", 95.0)
    score(student / "kd_stage2", 90.0)
    rows, page = report(exp)
    row = next(r for r in rows if r["experiment"] == "fkl1")
    assert (row["epochs"], row["train_seconds"]) == (5, pytest.approx(5 * 64.5))
    table = page.split("### KD stages")[1].split("###")[0].splitlines()
    assert [line.split("|")[2:5] + line.split("|")[6:-1] for line in table if line.startswith("|fkl1|")] == [
        ["1", "1", "1 min 04 s", "test", "47.50", "95.00"],
        ["2", "1–2", "2 min 09 s", "test", "45.00", "90.00"],
        ["3", "3–5", "3 min 14 s", "test", "9.50", "19.00"],
    ]
    assert len([line for line in table if line.startswith("|fkl0|")]) == 3
    curve = next(c for c in gather(exp).curves if c.experiment == "fkl1")
    assert curve.changes == [1.0, 2.5] and len(curve.stages) == 1


def test_missing_parts_are_named_and_the_rest_shown(exp):
    describe(exp / "unfinished", "student", "kl")
    (exp / "fkl0" / "decode_test" / "decode.json").unlink()
    (exp / "fkl1" / "decode_test" / "score.json").write_text("{broken")
    (exp / "plain0" / "checkpoint.pth").unlink()
    (exp / "plain0" / "train.log").unlink()
    (exp / "plain1" / "experiment.json").unlink()
    (exp / "asr_stats").mkdir()
    rows, page = report(exp)
    found = {r["experiment"]: r for r in rows}
    assert set(found) == {"unfinished", "fkl0", "fkl1", "plain0", "plain1"}
    assert found["unfinished"]["wer"] is None and found["fkl1"]["wer"] is None
    assert (found["fkl0"]["params"], found["fkl0"]["wer"]) == (None, 18.0)
    assert (found["plain0"]["train_seconds"], found["plain0"]["wer"]) == (None, 20.0)
    assert (found["plain1"]["role"], found["plain1"]["epochs"]) == (None, 5)
    missing = page.split("## Missing")[1]
    for words in ("unfinished: not scored", "fkl0/decode_test: no decode.json", "decode_test/score.json cannot be read",
                  "plain0: no training statistics", "plain1: no experiment.json"):  # fmt: skip
        assert words in missing


def test_no_statistics_at_all_leave_no_picture(tmp_path):
    score(tmp_path / "a", 5.0)
    describe(tmp_path / "a", "teacher")
    (tmp_path / "report").mkdir()
    (tmp_path / "report/curves_1.png").write_text("of another time")
    _, page = report(tmp_path)
    assert "curves_1.png" not in page and not (tmp_path / "report/curves_1.png").exists()
    assert "No training statistics of two epochs" in page


def test_several_test_sets_are_several_rows(tmp_path):
    describe(tmp_path / "a", "plain")
    score(tmp_path / "a", 5.0, "clean")
    score(tmp_path / "a", 9.0, "other")
    rows, _ = report(tmp_path)
    assert [(r["testset"], r["wer"]) for r in rows] == [("clean", 5.0), ("other", 9.0)]


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="no experiment in"):
        report(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--teacher .*nowhere"):
        report(tmp_path, "--teacher", tmp_path / "nowhere")


MANY = 40


def test_a_student_is_compared_with_the_plain_one_of_its_seed_and_size(tmp_path):
    plain = [3] * MANY
    for seed, tag in ((0, ""), (1, "_seed1")):
        experiment(tmp_path / f"student_plain{tag}", "plain", [e + seed for e in plain], seed=seed)
        experiment(tmp_path / f"student_plain_wide{tag}", "plain", [1] * MANY, seed=seed, params=5000)
        better = [2 + seed if i % 2 else 3 + seed for i in range(MANY)]
        experiment(tmp_path / f"student_kl{tag}", "student", better, method="kl", seed=seed)
        experiment(tmp_path / f"student_wide{tag}", "student", [2] * MANY, method="wide", seed=seed, params=5000)
        experiment(tmp_path / f"student_odd{tag}", "student", [2] * MANY, method="odd", seed=seed, params=77)
        train(tmp_path / f"student_kl{tag}", 2 + 2 * seed, ["loss"])
        if seed:
            train(tmp_path / f"student_plain{tag}", 2, ["loss"])
    experiment(tmp_path / "student_kl_seed2", "student", [0] * MANY, method="kl", seed=2)
    experiment(tmp_path / "teacher", "teacher", [1] * MANY, params=9000)
    _, page = report(tmp_path)
    rates = comparison(page)
    # The order: teacher, plain students by size, students by their gain, students without a plain one to compare with.
    assert list(rates) == ["teacher", "plain, 1,000 parameters", "plain, 5,000 parameters", "kl", "wide", "odd"]
    kl, wide = rates["kl"], rates["wide"]
    assert (kl["seeds"], kl["parameters"], kl["epochs"]) == ("0 1 2", "1,000", "2/4")
    # Mean of two and four epochs of 64.5 s. The factor uses seed 1 alone, as only there the plain one's time is known.
    assert kl["training"] == "3 min 14 s (2.00 ×)"
    assert kl["Sub/Del/Ins"] == "20.0/0.0/0.0"
    assert kl["WER"].startswith("20.00 [")  # mean of 25, 35 and 0
    assert kl["WER to plain"].startswith("-5.00 [-6.") and kl["WER to plain"].endswith("] (seeds 0 1)")
    assert kl["CER to plain"].startswith("-1.00 [") and float(kl["p"]) < 0.01
    assert wide["WER to plain"] == "+10.00 [+10.00, +10.00]"  # compared with the small plain student it would be -15
    assert rates["odd"]["WER to plain"] == "no plain student of this size"
    assert rates["teacher"]["WER to plain"] == rates["plain, 1,000 parameters"]["WER to plain"] == "–"
    assert rates["plain, 1,000 parameters"]["WER"] == "35.00 [30.00, 40.00]"  # the range over the seeds
    # The table of runs agrees with it.
    runs = {k: (run["CER to plain"], run["WER to plain"]) for k, run in table(page, "Every run").items()}
    assert runs["student_kl"] == runs["student_kl_seed1"] == ("-2.50", "-5.00")
    assert runs["student_wide"] == ("+5.00", "+10.00")
    assert runs["student_kl_seed2"] == runs["student_plain"] == ("–", "–")


def test_runs_that_cannot_be_paired_say_why(tmp_path):
    experiment(tmp_path / "plain", "plain", [1] * 5)
    experiment(tmp_path / "plain_sevens", "plain", [1] * 5, seed=7)
    experiment(tmp_path / "kl", "student", [1] * 5, method="kl", seed=3)
    experiment(tmp_path / "cr", "student", [1] * 5, method="cr", prefix="v")
    experiment(tmp_path / "mine", "student", [1] * 5, method="mine", seed=7)
    (tmp_path / "mine/decode_test/per_utt.tsv").unlink()
    experiment(tmp_path / "other", "student", [1] * 5, method="other", testset="dev")
    _, page = report(tmp_path)
    rates = comparison(page)
    assert rates["kl"]["WER to plain"] == "no plain student of this seed"
    assert rates["cr"]["WER to plain"] == "scored on other utterances"
    assert rates["mine"]["WER to plain"] == "no per_utt.tsv: score again"
    assert rates["other"]["WER to plain"] == "no plain student of this size"
    assert list(rates)[0] == "other" and rates["other"]["test set"] == "dev"


def test_ids_with_quotation_marks(tmp_path):
    experiment(tmp_path / "plain", "plain", [2] * 5, prefix='"u')
    experiment(tmp_path / "kl", "student", [1] * 5, method="kl", prefix='"u')
    assert comparison(report(tmp_path)[1])["kl"]["WER to plain"].startswith("-10.00 [")


def test_runs_of_one_seed_and_different_tags_are_not_averaged(tmp_path):
    experiment(tmp_path / "student_plain", "plain", [1] * 5)
    experiment(tmp_path / "student_kl", "student", [1] * 5, method="kl")
    experiment(tmp_path / "student_kl_again", "student", [3] * 5, method="kl")
    _, page = report(tmp_path)
    rates = comparison(page)
    assert rates["kl (student_kl)"]["WER to plain"].startswith("+0.00")
    assert rates["kl (student_kl_again)"]["WER to plain"].startswith("+20.00")


def test_seeds_are_averaged_within_a_tag_and_not_across_tags(tmp_path):
    errors = {"": 1, "_seed1": 3, "_lr2_seed1": 5, "_lr2_seed2": 7, "_x": 9}
    for tag, wrong in errors.items():
        seed = int(tag[-1]) if "seed" in tag else 3 if tag else 0
        experiment(tmp_path / f"student_kl{tag}", "student", [wrong] * 5, method="kl", seed=seed)
    rates = comparison(report(tmp_path)[1])
    assert {name: (line["seeds"], line["WER"].split()[0]) for name, line in rates.items()} == {
        "kl (student_kl)": ("0 1", "20.00"), "kl (student_kl_lr2)": ("1 2", "60.00"),
        "kl (student_kl_x)": ("3", "90.00"),
    }  # fmt: skip


NAMES = ["student_kl student_kl_s1", "student_kl_s0 student_kl_s1", "student_kl_run1 student_kl_run2"]


@pytest.mark.parametrize("names", NAMES)
def test_a_tag_may_name_the_seed(tmp_path, names):
    for name in names.split():
        seed = int(name[-1]) if name[-1].isdecimal() else 0
        experiment(tmp_path / name, "student", [1 + seed] * 5, method="kl", seed=seed)
    assert list(comparison(report(tmp_path)[1])) == ["kl"]


def test_another_tag_is_not_another_seed(tmp_path):
    experiment(tmp_path / "student_kl", "student", [1] * 5, method="kl", seed=0)
    experiment(tmp_path / "student_kl_other", "student", [3] * 5, method="kl", seed=1)
    assert sorted(comparison(report(tmp_path)[1])) == ["kl (student_kl)", "kl (student_kl_other)"]


def test_kd_stages_are_named_where_a_method_has_several(tmp_path):
    experiment(tmp_path / "a", "student", [1] * 5, method="kl", kd_stages=[1])
    experiment(tmp_path / "b", "student", [1] * 5, method="fkl", kd_stages=[1])
    experiment(tmp_path / "c", "student", [1] * 5, method="fkl", kd_stages=[1, 3])
    _, page = report(tmp_path)
    assert sorted(comparison(page)) == ["fkl, KD stages 1", "fkl, KD stages 1+3", "kl"]


def test_several_directories_are_compared_each_for_itself(tmp_path):
    for recipe, errors in (("an4", 1), ("mini", 5)):
        experiment(tmp_path / recipe / "exp/student_plain", "plain", [errors] * 5)
        experiment(tmp_path / recipe / "exp/student_kl", "student", [errors + 1] * 5, method="kl")
    first, second, out = tmp_path / "an4/exp", tmp_path / "mini/exp", tmp_path / "out"
    out.mkdir()
    asr_kd_report.main([str(first), str(second), "--no_frames", "--output_dir", str(out)])
    page = (out / "RESULTS.md").read_text()
    rows = json.loads((out / "results.json").read_text())
    assert [r["expdir"] for r in rows] == [str(first)] * 2 + [str(second)] * 2
    for expdir in (first, second):
        assert table(page, str(expdir))["kl"]["WER to plain"].startswith("+10.00")
    assert not (first / "results.json").exists()


def test_size_on_disk_is_that_of_the_model_decoded(tmp_path):
    experiment(tmp_path / "exp/a", "plain", [1] * 5)
    (tmp_path / "exp/a/model.pth").write_bytes(b"x" * 1230000)
    facts = tmp_path / "exp/a/decode_test/decode.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "model": "exp/a/model.pth"}))
    rows, page = report(tmp_path / "exp")
    assert rows[0]["model_bytes"] == 1230000 and comparison(page)["plain"]["parameters"] == "1,000 (1.23 MB)"


@pytest.mark.parametrize("facts", ["[]", "{", '{"role": ["x"], "method": {"a": 1}, "kd_stages": 3, "seed": "s"}'])
def test_damaged_facts_are_no_traceback(tmp_path, facts):
    experiment(tmp_path / "a", "student", [1] * 5, method="kl")
    (tmp_path / "a/experiment.json").write_text(facts)
    (tmp_path / "a/decode_test/decode.json").write_text('{"params": "many", "rtf": "fast", "model": 3}')
    (tmp_path / "a/decode_test/per_utt.tsv").write_text("utt_id\tcer_corr\n\tx\n")
    rows, _ = report(tmp_path)
    assert (rows[0]["role"] in (None, "student"), rows[0]["params"], rows[0]["rtf"]) == (True, None, None)


def test_numbers_on_the_command_line_are_checked(tmp_path, capsys):
    for options, name in ((["--frame_utts", "0"], "frame_utts"), (["--examples", "-1"], "examples")):
        with pytest.raises(UserError, match=f"--{name} is .*or more"):
            asr_kd_report.main([str(tmp_path), *options])
    with pytest.raises(SystemExit) as caught:
        asr_kd_report.main([str(tmp_path), "--once"])
    assert caught.value.code == 2 and "--once goes with --watch" in capsys.readouterr().err


def test_cost_is_told_where_nothing_else_was_trained_at_the_same_time(tmp_path):
    exp = tmp_path / "exp"
    for i, (name, role) in enumerate((("plain", "plain"), ("kl", "student"))):
        experiment(exp / name, role, [1, 2], method=name if role == "student" else None)
        train(exp / name, 2, ["loss"])
        for j, file in enumerate(("config.yaml", "checkpoint.pth")):
            (exp / name / file).touch()
            os.utime(exp / name / file, (1000 * (2 * i + j),) * 2)
    assert comparison(report(exp)[1])["kl"]["training"] == "2 min 09 s (1.00 ×)"
    os.utime(exp / "kl/config.yaml", (500, 500))
    page = report(exp)[1]
    assert comparison(page)["kl"]["training"] == comparison(page)["plain"]["training"] == "–"
    assert table(page, "Every run")["kl"]["training"] == "2 min 09 s, cores shared"


def test_speed_is_a_mean_over_models_of_one_size(tmp_path):
    """Students of one architecture do the same work, so that a difference in speed is noise of the machine."""
    for name, role, params, rtf in (("a", "plain", 1000, 0.01), ("b", "student", 1000, 0.03), ("t", "teacher", 9, 0.5)):
        experiment(tmp_path / name, role, [1, 2], method="kl" if role == "student" else None, params=params)
        facts = tmp_path / name / "decode_test/decode.json"
        facts.write_text(json.dumps({"params": params, "rtf": rtf}))
    rows, page = report(tmp_path)
    speeds = {k: line["real-time factor"] for k, line in comparison(page).items()}
    assert speeds == {"plain": "0.0200", "kl": "0.0200", "teacher": "0.5000"}
    assert {r["experiment"]: r["rtf"] for r in rows} == {"a": 0.01, "b": 0.03, "t": 0.5}


def test_of_several_plain_students_the_one_with_the_same_tag_is_compared(tmp_path):
    """run.sh adds the tag, or the seed, to the names of both; and _pseudo if there is such training data."""
    plain = {"": 1, "_lr2": 3, "_pseudo": 5, "_pseudo_lr2": 7, "_seed1": 9, "_pseudo_seed1": 8}
    for tag, errors in plain.items():
        experiment(tmp_path / f"student_plain{tag}", "plain", [errors] * 5, seed=int("seed1" in tag))
    students = {tag: plain[tag] for tag in plain} | {"_other": 1, "_untranscribed_lr2": 3, "_pseudo_untranscribed": 5}
    for tag in students:
        experiment(tmp_path / f"student_kl{tag}", "student", [0] * 5, method="kl", seed=int("seed1" in tag))
    runs = table(report(tmp_path)[1], "Every run")
    found = {tag: runs[f"student_kl{tag}"]["WER to plain"] for tag in students}
    assert found == {tag: f"-{10 * errors}.00" for tag, errors in students.items()}


def test_equal_epochs_count_more_than_an_equal_tag(tmp_path):
    for name, errors, epochs in (("student_plain_x", 1, 2), ("student_plain", 2, 4), ("student_kl_x", 0, 4)):
        role = "plain" if "plain" in name else "student"
        experiment(tmp_path / name, role, [errors] * 5, method="kl" if role == "student" else None)
        train(tmp_path / name, epochs, ["loss"])
    assert comparison(report(tmp_path)[1])["kl"]["WER to plain"].startswith("-20.00")


def test_a_given_teacher_is_not_averaged_with_the_recipes_own(tmp_path):
    """The seed of a given teacher is not known: it is another model, not another seed."""
    experiment(tmp_path / "teacher", "teacher", [1] * 5, seed=0)
    experiment(tmp_path / "teacher_given", "teacher", [3] * 5, seed=None)
    rates = comparison(report(tmp_path)[1])
    assert {name: line["WER"].split()[0] for name, line in rates.items()} == {
        "teacher (teacher)": "10.00", "teacher (teacher_given)": "30.00"
    }  # fmt: skip


def test_teachers_of_one_name_keep_their_own_counts(tmp_path):
    experiment(tmp_path / "exp/teacher", "teacher", [1] * 5, params=3000)
    experiment(tmp_path / "other/teacher", "teacher", [3] * 5, params=4000)
    rows, page = report(tmp_path / "exp", "--teacher", tmp_path / "other/teacher")
    found = {line["parameters"]: (line["WER"].split()[0], line["Sub/Del/Ins"]) for line in comparison(page).values()}
    assert found == {"3,000": ("10.00", "10.0/0.0/0.0"), "4,000": ("30.00", "30.0/0.0/0.0")}
    assert len({row["experiment"] for row in rows}) == 2
