"""After a kill in each KD stage and at each boundary, the same command gives the student of an unbroken training."""

import pytest
from tiny_phases import MID, MID_RESTART, RESTART, Killed, assert_same, train, write_page

pytestmark = pytest.mark.trains

#: (epoch, step) in each KD stage, at the first step of each, and at the last steps of epochs.
STEPS = [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (4, 0), (4, 2)]
FILES = [
    *[("before", "checkpoint", 2), ("while", "checkpoint", 1), ("while", "checkpoint", 2), ("while", "checkpoint", 3)],
    *[("while", "checkpoint", 4), ("after", "checkpoint", 2), ("after", "checkpoint", 4), ("while", "model", 2)],
    *[("after", "model", 2), ("after", "model", 3), ("after", "model", 4)],
    *[("after", "hand-over", 2), ("after", "hand-over", 3), ("before", "hand-over", 4), ("after", "hand-over", 4)],
    *[("before", "record", 3), ("after", "record", 3)],
]
#: For a KD stage that restarts in epoch 2: from the end of epoch 1 until the first epochs of the KD stage are saved.
ANEW = [
    *[("after", "model", 1), ("after", "restart", -1), ("before", "restart", 0), ("after", "restart", 0)],
    *[("step", 2, 0), ("step", 2, 2), ("while", "checkpoint", 1), ("while", "checkpoint", 2), ("step", 3, 2)],
]
PAGES = {"mid": MID, "restart": RESTART, "mid_restart": MID_RESTART}
MOMENTS = [
    *(("mid", ("step", *s)) for s in STEPS),
    *(("mid", f) for f in FILES),
    *((name, m) for name in ("restart", "mid_restart") for m in ANEW),
    *(("restart", (when, "hand-over", 1)) for when in ("before", "after")),
]


@pytest.fixture(scope="module")
def unbroken(corpus, teacher_dir, tmp_path_factory):
    """{name: (page, directory of a training without a kill)}."""
    runs = {}
    for name, page in PAGES.items():
        directory = tmp_path_factory.mktemp(name)
        page = write_page(directory, **page)
        train(corpus, directory / "student", page, "--teacher", teacher_dir)
        runs[name] = page, directory / "student"
    return runs


def test_the_boundaries_lie_where_the_moments_are(unbroken):
    from espnet_kd.distill.page import load_page
    from espnet_kd.distill.plan import make_plan
    from espnet_kd.distill.schedule import Progress

    found = {}
    for name, (page, _) in unbroken.items():
        plan = make_plan(load_page(str(page)), 4)
        found[name] = [[plan.at(Progress(e, 4, s, 3)).phase.stage.number for s in range(3)] for e in (1, 2, 3, 4)]
    assert found["mid"] == [[1, 1, 1], [1, 2, 2], [2, 3, 3], [3, 3, 3]]
    assert found["restart"] == [[1, 1, 1], [2, 2, 2], [2, 2, 3], [3, 3, 3]]
    assert found["mid_restart"] == [[1, 1, 1], [1, 2, 2], [2, 2, 3], [3, 3, 3]]


@pytest.mark.faults("a training killed in each KD stage and at each boundary")
@pytest.mark.parametrize("name, moment", MOMENTS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)))
def test_the_same_command_ends_as_if_nothing_had_happened(corpus, teacher_dir, unbroken, tmp_path, name, moment):
    page, whole = unbroken[name]
    out = tmp_path / "student"
    with pytest.raises(Killed):
        train(corpus, out, page, "--teacher", teacher_dir, kill_at=moment)
    train(corpus, out, page, "--teacher", teacher_dir)
    assert_same(whole, out)


@pytest.mark.faults("a training killed in each KD stage and at each boundary")
def test_killed_again_and_again(corpus, teacher_dir, unbroken, tmp_path, record_property):
    page, whole = unbroken["restart"]
    out = tmp_path / "student"
    moments = [("step", 1, 1), ("after", "hand-over", 1), ("step", 2, 1), ("while", "checkpoint", 2), ("step", 3, 0),
               ("after", "model", 3), ("before", "record", 3)]  # fmt: skip
    for moment in moments:
        with pytest.raises(Killed):
            train(corpus, out, page, "--teacher", teacher_dir, kill_at=moment)
    train(corpus, out, page, "--teacher", teacher_dir)
    assert_same(whole, out)
    record_property("faults", len(moments))


@pytest.mark.faults("a training killed in each KD stage and at each boundary")
@pytest.mark.parametrize("moment", [("step", 2, 1), ("step", 3, 0), ("after", "hand-over", 3), ("before", "record", 2)])
def test_killed_in_one_of_the_stages_of_run_sh(corpus, teacher_dir, unbroken, tmp_path, moment):
    page, whole = unbroken["mid"]
    out = tmp_path / "student"
    kills = 0
    for number in (1, 2, 3):
        command = (corpus, out, page, "--teacher", teacher_dir, "--kd_stage", number)
        try:
            train(*command, kill_at=moment)
        except Killed:
            kills += 1
            train(*command)
    assert kills  # two kills where one process ends and the next begins at the same moment
    assert_same(whole, out)
