"""KD stages as parts of one training: where each begins and ends, and which objectives count at a step."""

import math

import pytest

from espnet_kd.cli import UserError
from espnet_kd.distill.page import load_page
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.schedule import Progress, Ramp

KL = {"objective": "kl", "weight": 2.0}


@pytest.fixture
def page(write_page):
    """Function that makes a page from the shares of its KD stages and the other entries of each."""

    def make(shares, *more):
        stages = [{"share": share, **extra} for share, extra in zip(shares, [*more, *[{}] * len(shares)])]
        return load_page(str(write_page({"stages": stages})))

    return make


def restarts(number):
    return [{}, *[{"restart": True}] * (number - 1)]


@pytest.mark.parametrize("shares", [(1.0,), (0.02, 0.03, 0.95), (0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3), (0.5, 0.5)])
@pytest.mark.parametrize("restart", [False, True])
def test_they_follow_each_other_from_0_to_1(page, shares, restart):
    """This includes shares whose floating-point sum is not exact: 0.1 + 0.2 + 0.7 < 1 and 0.1 + 0.2 > 0.3."""
    plan = make_plan(page(shares, *(restarts(len(shares)) if restart else [])), 100)
    ends = [phase.end for phase in plan.phases]
    assert [phase.begin for phase in plan.phases] == [0.0, *ends[:-1]]
    assert ends[-1] == 1.0 and ends[:-1] == pytest.approx(
        [sum(shares[: n + 1]) for n in range(len(shares) - 1)], abs=0.01 if restart else 1e-9
    )


@pytest.mark.parametrize(
    "chosen, shares",
    [
        ([1, 2, 3], {1: 0.1, 2: 0.1, 3: 0.8}),
        ([1, 3], {1: 0.1, 3: 0.9}),
        ([2, 3], {2: 0.1, 3: 0.9}),
        ([3], {3: 1.0}),
        ([1, 2], {1: 0.1, 2: 0.9}),
        ([2, 1, 2], {1: 0.1, 2: 0.9}),
        (None, {1: 0.1, 2: 0.1, 3: 0.8}),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_the_last_kd_stage_has_the_share_of_those_left_out(page, chosen, shares, restart):
    """Every student therefore trains ``max_epoch`` epochs."""
    plan = make_plan(page((0.1, 0.1, 0.8), *(restarts(3) if restart else [])), 40, chosen)
    assert plan.numbers == sorted(shares)
    assert [phase.end - phase.begin for phase in plan.phases] == pytest.approx(list(shares.values()))
    assert plan.end_epoch(None) == plan.end_epoch(plan.numbers[-1]) == 40


@pytest.mark.parametrize("wanted", [[1, 4], [0], [-1, 2]])
def test_kd_stages_that_the_page_has_not(page, wanted):
    with pytest.raises(UserError, match=r"--kd_stages \[.*page.yaml has KD stages 1 to 3"):
        make_plan(page((0.1, 0.1, 0.8)), 10, wanted)


@pytest.mark.parametrize(
    "shares, max_epoch, epochs",
    [
        ((0.02, 0.03, 0.95), 25, [(1, 1), (1, 2), (2, 25)]),  # in the middle of epochs 1 and 2
        ((0.02, 0.03, 0.95), 100, [(1, 2), (3, 5), (6, 100)]),
        ((0.1, 0.2, 0.7), 10, [(1, 1), (2, 3), (4, 10)]),  # 0.1 + 0.2 = 0.30000000000000004
        ((0.1, 0.2, 0.7), 1, [(1, 1), (1, 1), (1, 1)]),
        ((1 / 3, 1 / 3, 1 / 3), 3, [(1, 1), (2, 2), (3, 3)]),
        ((0.7, 0.1, 0.2), 10, [(1, 7), (8, 8), (9, 10)]),  # 0.7 + 0.1 = 0.7999999999999999
    ],
)
def test_epochs_in_which_they_begin_and_end(page, shares, max_epoch, epochs):
    plan = make_plan(page(shares), max_epoch)
    assert [phase.epochs(max_epoch) for phase in plan.phases] == epochs
    assert [record["epochs"] for record in plan.as_record()] == [list(e) for e in epochs]


@pytest.mark.parametrize("max_epoch", [1, 3, 10, 30, 100])
@pytest.mark.parametrize("steps", [1, 7, 10])
@pytest.mark.parametrize("shares", [(0.1, 0.2, 0.7), (0.7, 0.1, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.02, 0.03, 0.95)])
def test_each_step_is_in_one_of_them(page, shares, steps, max_epoch):
    """The KD stage of a step follows from the number of steps before it, and its epochs include the step's epoch."""
    plan = make_plan(page(shares), max_epoch)
    seen = []
    for done in range(max_epoch * steps):
        epoch, step = divmod(done, steps)
        moment = plan.at(Progress(epoch + 1, max_epoch, step, steps))
        exact = sum(done >= round(sum(shares[:n]) * max_epoch * steps, 6) for n in (1, 2))
        assert moment.phase.index == exact
        first, last = moment.phase.epochs(max_epoch)
        assert first <= epoch + 1 <= last
        assert 0.0 <= moment.position.fraction < 1.0
        seen.append((exact, moment.position.fraction))
    assert seen == sorted(seen)


def test_parts_that_restarts_divide(page):
    """A part is KD stages with the same optimizer. A restart moves no boundary, also within an epoch."""
    shares = (0.13, 0.2, 0.67)
    for wanted, restarting, parts in [
        (None, (), [0, 0, 0]),
        (None, (3,), [0, 0, 1]),
        (None, (2,), [0, 1, 1]),
        (None, (2, 3), [0, 1, 2]),
        # Without KD stage 1, stage 2 has nothing to restart after.
        ([2, 3], (2,), [0, 0]),
        ([1, 3], (2,), [0, 0]),
        ([1, 3], (2, 3), [0, 1]),
    ]:
        plan = make_plan(page(shares, *({"restart": True} if n in restarting else {} for n in (1, 2, 3))), 10, wanted)
        assert [phase.part for phase in plan.phases] == parts
        if wanted is None:
            assert [phase.end for phase in plan.phases] == pytest.approx([0.13, 0.33, 1.0])
        for part in set(parts):
            assert plan.share(part) == pytest.approx(sum(p.end - p.begin for p in plan.phases if p.part == part))
        assert sum(map(plan.share, set(parts))) == pytest.approx(1)


@pytest.mark.parametrize("max_epoch", [1, 3, 10, 30, 100])
@pytest.mark.parametrize("shares", [(0.1, 0.2, 0.7), (0.7, 0.1, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.02, 0.03, 0.95)])
def test_the_phase_before_an_epoch_is_that_of_the_last_step(page, shares, max_epoch):
    plan, steps = make_plan(page(shares), max_epoch), 1000
    for epoch in range(2, max_epoch + 1):
        assert plan.before(epoch) is plan.at(Progress(epoch - 1, max_epoch, steps - 1, steps)).phase
    assert plan.before(1) is plan.phases[0]


@pytest.mark.parametrize("max_epoch", [1, 3, 7, 30])
@pytest.mark.parametrize("shares", [(0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3), (0.02, 0.03, 0.95)])
def test_moments_of_an_epoch(page, shares, max_epoch):
    """They are the first and the last of each phase that has steps in the epoch."""
    plan, steps = make_plan(page(shares), max_epoch), 100
    for epoch in range(1, max_epoch + 1):
        each = [plan.at(Progress(epoch, max_epoch, step, steps)) for step in range(steps)]
        moments = list(plan.in_epoch(epoch))
        assert [now.phase.index for now in moments[::2]] == sorted({now.phase.index for now in each})
        for first, last in zip(moments[::2], moments[1::2]):
            of_phase = [now.position for now in each if now.phase is first.phase]
            width = 1 / (steps * max_epoch * (first.phase.end - first.phase.begin)) + 1e-9
            assert of_phase[0].fraction - width <= first.position.fraction <= of_phase[0].fraction + 1e-9
            assert of_phase[-1].fraction - 1e-9 <= last.position.fraction <= of_phase[-1].fraction + width
            assert {p.epoch_fraction for p in of_phase} == {first.position.epoch_fraction, last.position.epoch_fraction}


def weights(plan, index):
    terms = [(spec.key, weight) for spec, weight in plan.phases[index].terms]
    assert len(dict(terms)) == len(terms)  # each objective occurs once
    return dict(terms)


def test_keep(page):
    ramp = {"objective": "blank_kl", "weight": {"start": 0.5, "end": 3.0}}
    stages = [{"objectives": [KL, ramp]}, {"keep": ["blank_kl"], "objectives": [{"objective": "softmax_l2"}]}]
    plan = make_plan(page((0.3, 0.3, 0.4), *stages, {"keep": "all", "objectives": [{**ramp, "weight": 0.25}]}), 10)
    assert weights(plan, 0) == {"kl": 2.0, "blank_kl": Ramp(0.5, 3.0)}
    assert weights(plan, 1) == {"blank_kl": 3.0, "softmax_l2": 1.0}  # kept at the last weight of its ramp
    assert weights(plan, 2) == {"softmax_l2": 1.0, "blank_kl": 0.25}  # the stage's own entry replaces the kept one
    # If KD stage 2 is left out, stage 3 keeps nothing of it; if stage 3 is alone, it keeps nothing.
    assert weights(make_plan(plan.page, 10, [1, 3]), 1) == {"kl": 2.0, "blank_kl": 0.25}
    assert weights(make_plan(plan.page, 10, [3]), 0) == {"blank_kl": 0.25}


def test_nothing_is_kept_unless_a_page_says_so(page):
    plan = make_plan(page((0.5, 0.5), {"objectives": [KL]}), 10)
    assert weights(plan, 0) == {"kl": 2.0} and weights(plan, 1) == {}


def test_weights_at_a_step(page):
    """The positions of a ramp are fractions of its KD stage."""
    ramp = {"objective": "kl", "weight": {"start": 0.0, "end": 4.0, "begin": 0.5}}
    plan = make_plan(page((0.25, 0.5, 0.25), {}, {"objectives": [ramp], "ctc": {"weight": {"start": 1, "end": 0}}}), 4)
    found = []
    for epoch, step in ((1, 9), (2, 0), (2, 5), (3, 0), (3, 5), (3, 9), (4, 0)):
        now = plan.at(Progress(epoch, 4, step, 10))
        found.append((now.phase.stage.number, now(now.phase.stage.ctc_weight), *(now(w) for _, w in now.phase.terms)))
    expected = [(1, 1), (2, 1, 0), (2, 0.75, 0), (2, 0.5, 0), (2, 0.25, 2), (2, 0.05, 3.6), (3, 1)]
    assert [pytest.approx(e) for e in expected] == found


def test_by_epoch_a_ramp_moves_once_an_epoch(page):
    ramp = {"objective": "kl", "weight": {"start": 0.0, "end": 4.0, "by": "epoch"}}
    plan = make_plan(page((0.5, 0.5), {}, {"objectives": [ramp]}), 4)
    (weight,) = weights(plan, 1).values()
    at = {(e, s): plan.at(Progress(e, 4, s, 10))(weight) for e in (3, 4) for s in (0, 9)}
    assert at == {(3, 0): 0.0, (3, 9): 0.0, (4, 0): 2.0, (4, 9): 2.0}


def test_last_is_the_end_of_the_training(page):
    ramp = {"objective": "kl", "weight": {"start": 0.0, "end": 4.0}}
    plan = make_plan(page((0.5, 0.5), {"objectives": [KL]}, {"objectives": [ramp]}), 4)
    now = plan.last
    assert now.phase is plan.phases[1] and [now(w) for _, w in now.phase.terms] == [4.0]
    assert plan.at(Progress(5, 4, 0, 10)).phase is plan.phases[1]  # a step past the end has the last KD stage


def test_before_the_length_of_an_epoch_is_known(page):
    """The whole first epoch belongs to the KD stage with which it begins."""
    plan = make_plan(page((0.02, 0.98)), 10)
    assert [plan.at(Progress(e, 10, s, None)).phase.index for e, s in ((1, 0), (1, 99), (2, 0))] == [0, 0, 1]


def test_the_record_is_json(page):
    import json

    ramp = {"objective": "kl", "weight": {"start": 0.0, "end": 4.0}, "temperature": 2.0}
    record = make_plan(page((0.5, 0.5), {"objectives": [KL]}, {"objectives": [ramp], "restart": True}), 4).as_record()
    assert json.loads(json.dumps(record)) == record
    assert [r["restart"] for r in record] == [False, True] and math.isclose(sum(r["share"] for r in record), 1)
    assert record[1]["objectives"] == [{"objective": "kl", "weight": {"start": 0.0, "end": 4.0, "begin": 0.0,
                                        "until": 1.0, "by": "step"}, "temperature": 2.0}]  # fmt: skip
