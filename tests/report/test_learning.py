"""Learning curves of all methods, and which method is ahead at each time."""

import math
from pathlib import Path

import numpy as np
import pytest
from test_pictures import check
from tiny_results import describe, report, score, train

from espnet_kd.report.curves import Curve
from espnet_kd.report.learning import collect_learning, draw_learning, rank_by_epoch, rank_by_time
from espnet_kd.report.results import Gathered


def history(cers, seconds=10.0):
    return {
        e + 1: {"train": {"time": seconds - 1}, "valid": {"cer_ctc": cer, "loss_ctc": 10 * cer, "time": 1.0}}
        for e, cer in enumerate(cers)
    }


def gathered(*experiments, alone=True):
    """Gather experiments (name, role, seed, label, histories of KD stages), trained one by one or at the same time."""
    rows = [{"experiment": name, "role": role, "seed": seed, "params": 1000} for name, role, seed, *_ in experiments]
    curves = [Curve(label, stages, name) for name, _, _, label, stages in experiments]
    spans = {row["experiment"]: (10.0 * i, 10.0 * i + (9 if alone else 11)) for i, row in enumerate(rows)}
    return Gathered(Path(), rows, curves, spans=spans)


@pytest.fixture
def found():
    return gathered(
        ("p0", "plain", 0, "plain", [history([0.8, 0.6, 0.4, 0.2])]),
        ("p1", "plain", 1, "plain", [history([0.9, 0.7, 0.5, 0.3])]),
        ("k", "student", 0, "kl", [history([0.7, 0.5], 20.0), history([0.4, 0.35], 20.0)]),
        ("t", "teacher", 0, "teacher", [history([0.5, 0.1])]),
    )


def test_means_over_seeds_and_epochs_that_count_on(found):
    plain, kl = collect_learning(found)
    assert (plain.label, plain.seeds, kl.seeds, plain.alone) == ("plain", 2, 1, True)
    assert plain.mean("cer_ctc") == pytest.approx([85, 65, 45, 25])
    assert plain.mean("loss_ctc") == pytest.approx([8.5, 6.5, 4.5, 2.5])
    assert [*kl.epochs] == [1, 2, 3, 4] and [*kl.seconds] == [20, 40, 60, 80]


def test_who_is_ahead_by_epochs_and_by_time(found):
    learned = collect_learning(found)
    head, body = rank_by_epoch(learned)
    assert head == ["", "25 % (epoch 1)", "50 % (epoch 2)", "75 % (epoch 3)", "100 % (epoch 4)"]
    assert body == [
        ["plain", "85.0", "65.0", "45.0", "25.0"], ["kl", "70.0", "50.0", "40.0", "35.0"],
        ["ahead", "kl", "kl", "kl", "plain"],
    ]  # fmt: skip
    head, body = rank_by_time(learned)  # an epoch of the plain student takes half as long
    assert head[1] == "25 % (0.2 min)"
    assert body == [
        ["plain", "85.0", "65.0", "45.0", "25.0"], ["kl", "–", "70.0", "60.0", "50.0"],
        ["ahead", "plain", "plain", "plain", "plain"],
    ]  # fmt: skip


def test_only_students_of_one_size_can_be_ahead(found):
    """A plain student of another size is shown, but cannot be ahead, and its training time does not count."""
    found.rows.insert(0, {"experiment": "big", "role": "plain", "seed": 0, "params": 5000})
    found.curves.insert(0, Curve("plain, 5,000 parameters", [history([0.1, 0.1, 0.1, 0.1], 1.0)], "big"))
    found.spans["big"] = (-9.0, -1.0)
    for rank in (rank_by_epoch, rank_by_time):
        head, body = rank(collect_learning(found))
        assert body[0][-1] == "10.0" or rank is rank_by_time
        assert body[-1][0] == "ahead of those of 1,000 parameters" and body[-1][-1] == "plain"
    assert head[-1] == "100 % (0.7 min)"


def test_seeds_of_other_lengths_and_epochs_without_ctc(tmp_path):
    found = gathered(
        ("a", "plain", 0, "plain", [history([0.8, 0.6, 0.4])]), ("b", "plain", 1, "plain", [history([0.6, 0.4])]),
        ("k", "student", 0, "kl", [{1: {"train": {"time": 1.0}}}, history([0.4, 0.3])]),
    )  # fmt: skip
    plain, kl = collect_learning(found)
    assert [*plain.epochs] == [1, 2] and plain.mean("cer_ctc") == pytest.approx([70, 50])
    assert math.isnan(kl.mean("cer_ctc")[0]) and rank_by_epoch([plain, kl])[1][1][1:] == ["–", "40.0", "30.0"]
    assert rank_by_epoch([plain, kl])[1][-1] == ["ahead", "plain", "kl", "kl"]
    assert draw_learning([plain, kl], ["plain", "kl"], tmp_path / "a.png") == ["loss_ctc", "cer_ctc"]


def test_runs_of_one_seed_and_different_tags_are_not_averaged():
    found = gathered(*((n, "student", 0, "kl", [history([0.5, 0.4])]) for n in ("student_kl", "student_kl_again")))
    assert [one.label for one in collect_learning(found)] == ["kl (student_kl)", "kl (student_kl_again)"]


def test_picture(found, tmp_path):
    labels = ["teacher", "plain", "kl"]
    learned = collect_learning(found)
    assert draw_learning(learned, labels, tmp_path / "a.png", 10.0) == ["loss_ctc", "cer_ctc"]
    check(tmp_path / "a.png")
    one = collect_learning(gathered(("a", "plain", 0, "plain", [history([0.8])])))
    assert draw_learning(one, labels, tmp_path / "b.png") == [] and not (tmp_path / "b.png").exists()


def test_times_of_runs_that_shared_cores_are_not_compared(tmp_path):
    pairs = [(n, r, 0, n, [history([0.8, 0.5])]) for n, r in (("plain", "plain"), ("kl", "student"))]
    learned = collect_learning(gathered(*pairs, alone=False))
    assert not learned[0].alone and rank_by_time(learned) == ([], []) and rank_by_epoch(learned)[1]
    marked, plain = tmp_path / "a.png", tmp_path / "b.png"
    draw_learning(learned, ["plain", "kl"], marked)
    draw_learning(collect_learning(gathered(*pairs)), ["plain", "kl"], plain)
    assert marked.read_bytes() != plain.read_bytes()


def test_in_the_report(tmp_path):
    for name, role in (("plain", "plain"), ("kl", "student")):
        describe(tmp_path / name, role, name if role == "student" else None, [1])
        train(tmp_path / name, 4, ["loss", "loss_ctc", "cer_ctc"])
        score(tmp_path / name, 20.0)
    _, page = report(tmp_path)
    section = page.split("## Learning curves")[1].split("\n## ")[0]
    assert "](report/learning_1.png)" in section and "|ahead|" in section.split("by epochs")[1]
    assert np.isfinite(float(section.split("\n|kl|")[1].split("|")[0]))
