"""The verdict in plain words, which is first on the page and last on the console."""

import pytest
from tiny_results import experiment, record, report

from espnet_kd.bin import asr_kd_report


def students(exp, *found, seed=0):
    """Write a teacher (9,000,000 parameters) and students (1,000,000) with these word errors in each utterance."""
    experiment(exp / "teacher", "teacher", [0, 0, 1, 0], params=9_000_000)
    for name, role, errors in found:
        method = name if role == "student" else None
        experiment(exp / f"{name}_{seed}", role, errors, method=method, seed=seed, params=1_000_000)


@pytest.fixture
def exp(tmp_path):
    students(
        tmp_path / "exp", ("plain", "plain", [1, 2, 3, 2]), ("good", "student", [0, 1, 2, 1]),
        ("bad", "student", [2, 3, 4, 3]), ("like", "student", [2, 1, 3, 2]),
    )  # fmt: skip
    return tmp_path / "exp"


def test_a_paragraph_for_each_distilled_student_ends_the_console(exp, capsys):
    _, page = report(exp)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    good, like, bad, where = lines
    assert good.startswith("good: 50 % fewer word errors than the plain student on test: WER 10.00 against 20.00, ")
    assert "-10.00 points, 95 % interval -10.00 to -10.00 over 4 utterances, which excludes 0" in good
    assert "for this one seed" in good
    assert "Beside its teacher, WER 2.50, it is 9.0 times smaller (1.00 M parameters against 9.00 M) and as" in good
    assert like.startswith("like: as many word errors as the plain student") and "which includes 0" in like
    assert bad.startswith("bad: 50 % more word errors than the plain student") and "which excludes 0" in bad
    assert where == f"The whole report: {(exp / 'report.html').resolve()}"
    assert (exp / "report/verdict.txt").read_text().split() == " ".join(lines).split()
    first = page.split("## ")[1]
    assert first.startswith("Verdict\n") and all(f"- {line}\n" in first for line in (good, like, bad))
    assert (exp / "report.html").read_text().index(good[:40]) < (exp / "report.html").read_text().index("<table>")


def test_several_seeds_and_several_directories(exp, tmp_path, capsys):
    students(exp, ("plain", "plain", [1, 2, 3, 3]), ("good", "student", [0, 1, 2, 0]), seed=1)
    students(tmp_path / "other", ("plain", "plain", [1, 1]))
    asr_kd_report.main([str(exp), str(tmp_path / "other"), "--no_frames"])
    good = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("good"))
    assert good.startswith(f"good ({exp}): 59 % fewer") and "over 2 seeds and 4 utterances" in good
    assert "for this one seed" not in good


def one_word_each(experiment):
    """Make each reference one word, as in languages that are written without blanks."""
    path = experiment / "decode_test/per_utt.tsv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *(line.rsplit("\t", 4)[0] + "\t0\t1\t0\t0" for line in lines)]) + "\n")


def test_without_words_the_characters_count(tmp_path, capsys):
    for name, role, wrong in (("plain", "plain", 4), ("kl", "student", 2)):
        experiment(tmp_path / name, role, [wrong, wrong], method="kl" if role == "student" else None)
        one_word_each(tmp_path / name)
    report(tmp_path)
    assert "kl: 50 % fewer character errors than the plain student on test: CER 4.00" in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    experiment(tmp_path / "plain", "plain", [1] * 5, seed=1)
    report(tmp_path)
    assert "No distilled student is scored yet." in capsys.readouterr().out
    experiment(tmp_path / "kl", "student", [1] * 5, method="kl")
    report(tmp_path)
    assert "kl: WER 10.00 on test; not compared (no plain student of this seed)." in capsys.readouterr().out


def beside(capsys) -> dict:
    """{method: what its verdict says about the teacher}"""
    lines = [line for line in capsys.readouterr().out.splitlines() if ": " in line and not line.startswith("The whole")]
    return {line.split(":")[0]: line.partition("Beside its teacher, ")[2] for line in lines}


def test_each_student_is_set_beside_its_own_teacher(tmp_path, capsys):
    """The recipe's own teacher, and a given one, whose results lie in exp/teacher_given."""
    exp, big = tmp_path / "exp", tmp_path / "elsewhere/big"
    big.mkdir(parents=True)
    (big / "valid.loss_ctc.ave.pth").touch()
    experiment(exp / "teacher", "teacher", [1, 1])
    experiment(exp / "teacher_given", "teacher", [3, 3], seed=None)
    (exp / "teacher_given/export").symlink_to(big)
    experiment(exp / "plain", "plain", [4, 4], params=500)
    teachers = {"own": ["exp/teacher"], "given": [str(big)], "file": [str(big / "valid.loss_ctc.ave.pth")], "none": []}
    teachers |= {"gone": [str(tmp_path / "gone")]}
    for method, teacher in teachers.items():
        experiment(exp / f"student_{method}", "student", [2, 2], method=method, params=500)
        record(exp / f"student_{method}", (1, 1), method=method, teacher=teacher)
    report(exp)
    found = {method: text[:9].rstrip(",") for method, text in beside(capsys).items()}
    assert found == {"own": "WER 10.00", "given": "WER 30.00", "file": "WER 30.00", "none": "", "gone": ""}


def test_a_method_without_a_teacher_is_not_set_beside_one(tmp_path, capsys):
    students(tmp_path, ("plain", "plain", [1, 2]), ("cr_ctc", "student", [1, 1]), ("sequence_kd", "student", [1, 1]))
    record(tmp_path / "cr_ctc_0", (1, 1), method="cr_ctc", teacher=[])
    record(tmp_path / "sequence_kd_0", (1, 1), method="sequence_kd", teacher=[], nbest={"exp/nbest5": "0"})
    report(tmp_path)
    found = beside(capsys)
    assert not found["cr_ctc"] and found["sequence_kd"].startswith("WER 2.50")


def test_the_teachers_error_rate_has_its_test_set_if_there_are_several(tmp_path, capsys):
    for name, role, wrong in (("teacher", "teacher", 1), ("plain", "plain", 4), ("kl", "student", 2)):
        for testset in ("clean", "other"):
            method = "kl" if role == "student" else None
            experiment(tmp_path / name, role, [wrong, wrong], method=method, testset=testset)
    report(tmp_path)
    assert beside(capsys)["kl"].startswith("WER 10.00 on clean, ")


def test_characters_also_where_nothing_can_be_compared(tmp_path, capsys):
    experiment(tmp_path / "kl", "student", [2, 2], method="kl")
    one_word_each(tmp_path / "kl")
    report(tmp_path)
    assert "kl: CER 10.00 on test; not compared (no plain student of this size)." in capsys.readouterr().out
