"""The verdict in plain words, which is first on the page and last on the console."""

import pytest
from tiny_results import experiment, report

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


def test_without_words_the_characters_count(tmp_path, capsys):
    """Each reference is one word, as in languages that are written without blanks."""
    for name, role, wrong in (("plain", "plain", 4), ("kl", "student", 2)):
        experiment(tmp_path / name, role, [wrong, wrong], method="kl" if role == "student" else None)
        path = tmp_path / name / "decode_test/per_utt.tsv"
        head, *lines = path.read_text().splitlines()
        path.write_text("\n".join([head, *(line.rsplit("\t", 4)[0] + "\t0\t1\t0\t0" for line in lines)]) + "\n")
    report(tmp_path)
    assert "kl: 50 % fewer character errors than the plain student on test: CER 4.00" in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    experiment(tmp_path / "plain", "plain", [1] * 5, seed=1)
    report(tmp_path)
    assert "No distilled student is scored yet." in capsys.readouterr().out
    experiment(tmp_path / "kl", "student", [1] * 5, method="kl")
    report(tmp_path)
    assert "kl: WER 10.00 on test; not compared (no plain student of this seed)." in capsys.readouterr().out
