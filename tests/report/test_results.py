"""The report of fabricated experiments, whole and with parts missing."""

import json
import math
from datetime import timedelta

import numpy as np
import pytest
import torch

from espnet_kd.bin import asr_kd_report
from espnet_kd.cli import UserError
from espnet_kd.report.history import read_history, read_stages, seconds

ISSUE_KEYS = {
    "role", "method", "kd_stages", "params", "epochs", "seed", "testset", "cer", "wer", "wer_low", "wer_high", "rtf",
    "train_seconds",
}  # fmt: skip


def train(run_dir, epochs, names, log_only=False):
    """Leave what an ESPnet run of so many epochs leaves: 61.5 s of training and 3 s of validation in each."""
    from espnet2.train.reporter import Reporter

    run_dir.mkdir(parents=True, exist_ok=True)
    reporter, log = Reporter(), []
    for epoch in range(1, epochs + 1):
        reporter.set_epoch(epoch)
        for phase, duration in (("train", 61.5), ("valid", 3.0)):
            with reporter.observe(phase) as sub:
                sub.register({n: torch.tensor(10.0 * math.exp(-epoch) + i) for i, n in enumerate(names)})
                sub.next()
            reporter.stats[epoch][phase]["time"] = timedelta(seconds=duration)
        log.append(f"[host] 2025-01-01 (trainer:1) INFO: {reporter.log_message()}\n")
    (run_dir / "train.log").write_text("".join(log))
    if not log_only:
        torch.save({"model": {"w": torch.zeros(9)}, "reporter": reporter.state_dict()}, run_dir / "checkpoint.pth")


def describe(expdir, role, method=None, kd_stages=None, seed=0):
    expdir.mkdir(parents=True, exist_ok=True)
    facts = {"role": role, "method": method, "kd_stages": kd_stages, "seed": seed}
    (expdir / "experiment.json").write_text(json.dumps(facts))


def score(expdir, wer, testset="test", params=1234567):
    out = expdir / f"decode_{testset}"
    out.mkdir(parents=True, exist_ok=True)
    rates = {k: {"err": e, "low": e - 1, "high": e + 1} for k, e in (("cer", wer / 2), ("wer", wer))}
    (out / "score.json").write_text(json.dumps({"testset": testset, **rates, "utterances": 7}))
    (out / "decode.json").write_text(json.dumps({"params": params, "rtf": 0.01}))


def experiment(expdir, role, errors, *, method=None, seed=0, params=1000, testset="test", kd_stages=None, prefix="u"):
    """A finished experiment that made so many word errors in each utterance of ten words (and five characters each)."""
    describe(expdir, role, method, kd_stages or ([1] if role == "student" else None), seed)
    score(expdir, 100.0 * sum(errors) / (10 * len(errors)), testset, params)
    lines = ["\t".join(["utt_id", *(f"{u}_{k}" for u in ("cer", "wer") for k in ("corr", "sub", "del", "ins"))])]
    for i, e in enumerate(errors):
        lines.append("\t".join(map(str, [f"{prefix}{i}", 50 - e, e, 0, 0, 10 - e, e, 0, 0])))
    (expdir / f"decode_{testset}" / "per_utt.tsv").write_text("\n".join(lines) + "\n")


def comparison(page):
    """{label: cells} of the comparison of methods, in its order."""
    table = page.split("## Comparison of methods")[1].split("## Error rates")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {cells[0]: dict(zip(["", *lines[0][1:8], "wer_p", lines[0][9], "cer_p", lines[0][11]], cells))
            for cells in lines[2:]}  # fmt: skip


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
        train(student, 3, ["loss", "loss_ctc", "loss_kd"])
        score(student, 18.0 + seed)
    return exp


def report(exp, *options):
    asr_kd_report.main(["--expdir", str(exp), *map(str, options)])
    return json.loads((exp / "results.json").read_text()), (exp / "RESULTS.md").read_text()


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
    line = "|fkl0|student|progressive_fkl|1+2+3|0|test|1,234,567|9.00 [8.00, 10.00]|18.00 [17.00, 19.00]|0.0100|5|"
    assert line + "5 min 22 s|-1.00|-2.00|" in page
    assert "|progressive_fkl, KD stages 1+2+3|test|0 1|1,234,567|5|9.25|18.50|no per_utt.tsv: score again|" in page
    assert "## Environments" in page and "torch version" in page and "](curves.png)" in page
    assert "## Missing" not in page
    assert (exp / "curves.png").read_bytes().startswith(b"\x89PNG")


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
    (tmp_path / "curves.png").write_text("of another time")
    _, page = report(tmp_path)
    assert "curves.png" not in page and not (tmp_path / "curves.png").exists()


def test_several_test_sets_are_several_rows(tmp_path):
    describe(tmp_path / "a", "plain")
    score(tmp_path / "a", 5.0, "clean")
    score(tmp_path / "a", 9.0, "other")
    rows, _ = report(tmp_path)
    assert [(r["testset"], r["wer"]) for r in rows] == [("clean", 5.0), ("other", 9.0)]


def test_log_stands_in_for_a_missing_or_damaged_checkpoint(tmp_path):
    train(tmp_path, 3, ["loss", "loss_ctc"])
    whole = read_history(tmp_path)
    assert seconds(whole) == pytest.approx(3 * 64.5)
    data = (tmp_path / "checkpoint.pth").read_bytes()
    for damage in (lambda p: p.write_bytes(data[: len(data) // 2]), lambda p: p.unlink()):
        damage(tmp_path / "checkpoint.pth")
        parsed = read_history(tmp_path)
        assert seconds(parsed) == pytest.approx(3 * 64.5)
        assert parsed[2]["valid"]["loss_ctc"] == pytest.approx(whole[2]["valid"]["loss_ctc"], abs=1e-3)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"reporter": {"stats": {1: {"train": {"loss": Evil()}}}, "epoch": 1}}, tmp_path / "checkpoint.pth")
    Evil.ran = False
    assert read_history(tmp_path) is None
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return (_run, ())


def _run():
    Evil.ran = True


def test_numpy_numbers_in_a_checkpoint_are_read(tmp_path):
    stats = {1: {"train": {"loss": np.float64(2.5), "time": timedelta(seconds=4), "total_count": 3}}}
    torch.save({"reporter": {"stats": stats, "epoch": 1}}, tmp_path / "checkpoint.pth")
    assert read_history(tmp_path)[1]["train"] == {"loss": 2.5, "time": 4.0, "total_count": 3.0}


def test_stages_come_in_order(tmp_path):
    train(tmp_path, 3, ["loss"], log_only=True)
    train(tmp_path / "kd_stage2", 2, ["loss"], log_only=True)
    train(tmp_path / "kd_stage1", 1, ["loss"], log_only=True)
    assert [len(h) for h in read_stages(tmp_path)] == [1, 2, 3]


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
    experiment(tmp_path / "student_kl_seed2", "student", [0] * MANY, method="kl", seed=2)
    experiment(tmp_path / "teacher", "teacher", [1] * MANY, params=9000)
    _, page = report(tmp_path)
    table = comparison(page)
    # Teacher, plain students by size, students by what they gain, then those without anything to compare with.
    assert list(table) == ["teacher", "plain, 1,000 parameters", "plain, 5,000 parameters", "kl", "wide", "odd"]
    kl, wide = table["kl"], table["wide"]
    assert (kl["seeds"], kl["parameters"], kl["epochs"]) == ("0 1 2", "1,000", "2/4")
    assert kl["training"] == "3 min 14 s"  # mean of two and four epochs of 64.5 s
    assert kl["WER"].startswith("20.00 [")  # mean of 25, 35 and 0
    assert kl["WER to plain"].startswith("-5.00 [-6.") and kl["WER to plain"].endswith("] (seeds 0 1)")
    assert kl["CER to plain"].startswith("-1.00 [") and float(kl["wer_p"]) < 0.01
    assert wide["WER to plain"] == "+10.00 [+10.00, +10.00]"  # the small plain student would have made it -15
    assert table["odd"]["WER to plain"] == "no plain student of this size"
    assert table["teacher"]["WER to plain"] == table["plain, 1,000 parameters"]["WER to plain"] == "–"
    assert table["plain, 1,000 parameters"]["WER"] == "35.00 [35.00, 35.00]"
    # The same of each run.
    runs = {line.split("|")[1]: line for line in page.split("## Error rates")[1].splitlines()[4:] if "|" in line}
    assert runs["student_kl"].endswith("|-2.50|-5.00|") and runs["student_kl_seed1"].endswith("|-2.50|-5.00|")
    assert runs["student_wide"].endswith("|+5.00|+10.00|")
    assert runs["student_kl_seed2"].endswith("|–|–|") and runs["student_plain"].endswith("|–|–|")


def test_runs_that_cannot_be_paired_say_why(tmp_path):
    experiment(tmp_path / "plain", "plain", [1] * 5)
    experiment(tmp_path / "plain_sevens", "plain", [1] * 5, seed=7)
    experiment(tmp_path / "kl", "student", [1] * 5, method="kl", seed=3)
    experiment(tmp_path / "cr", "student", [1] * 5, method="cr", prefix="v")
    experiment(tmp_path / "mine", "student", [1] * 5, method="mine", seed=7)
    (tmp_path / "mine/decode_test/per_utt.tsv").unlink()
    experiment(tmp_path / "other", "student", [1] * 5, method="other", testset="dev")
    _, page = report(tmp_path)
    table = comparison(page)
    assert table["kl"]["WER to plain"] == "no plain student of this seed"
    assert table["cr"]["WER to plain"] == "scored on other utterances"
    assert table["mine"]["WER to plain"] == "no per_utt.tsv: score again"
    assert table["other"]["WER to plain"] == "no plain student of this size"
    assert list(table)[0] == "other" and table["other"]["test set"] == "dev"


def test_runs_of_one_seed_and_different_tags_are_not_averaged(tmp_path):
    experiment(tmp_path / "student_plain", "plain", [1] * 5)
    experiment(tmp_path / "student_kl", "student", [1] * 5, method="kl")
    experiment(tmp_path / "student_kl_again", "student", [3] * 5, method="kl")
    _, page = report(tmp_path)
    table = comparison(page)
    assert table["kl (student_kl)"]["WER to plain"].startswith("+0.00")
    assert table["kl (student_kl_again)"]["WER to plain"].startswith("+20.00")


def test_kd_stages_are_named_where_a_method_has_several(tmp_path):
    experiment(tmp_path / "a", "student", [1] * 5, method="kl", kd_stages=[1])
    experiment(tmp_path / "b", "student", [1] * 5, method="fkl", kd_stages=[1])
    experiment(tmp_path / "c", "student", [1] * 5, method="fkl", kd_stages=[1, 3])
    _, page = report(tmp_path)
    assert sorted(comparison(page)) == ["fkl, KD stages 1", "fkl, KD stages 1+3", "kl"]
