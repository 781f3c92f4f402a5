"""Each objective declares which teacher outputs it uses; a target cache keeps these and no more."""

import numpy as np
import pytest

from espnet_kd.distill.objectives import OBJECTIVES, Objective
from espnet_kd.targets.teacher import Needs

ALL, NONBLANK = "all", "nonblank"


@pytest.mark.parametrize(
    "name, options, needs",
    [
        ("kl", {}, Needs(ALL)),
        ("kl", {"temperature": 2.0}, Needs(ALL, (2.0,))),
        ("kl", {"frames": {"rule": "elimination"}}, Needs(NONBLANK)),
        ("kl", {"frames": {"rule": "symmetric", "n": 1}}, Needs(ALL)),
        ("blank_kl", {"temperature": 2.0}, Needs(NONBLANK, (2.0,))),
        ("factorized_kl", {}, Needs(NONBLANK)),
        ("factorized_kl", {"nonblank_on_blank_weight": 0.5}, Needs(ALL)),
        # guided_ctc uses only the teacher's argmax, at temperature 1.
        ("guided_ctc", {"temperature": 2.0}, Needs(NONBLANK)),
        ("factorized_representation", {"taps": [["encoder", "encoder.2"]]}, Needs(NONBLANK, (), ("encoder.2",))),
        ("weighted_representation", {}, Needs(NONBLANK, (), ("encoder",))),
        ("inter_kd", {"temperature": 4.0}, Needs(ALL, (4.0,))),
        ("attention_kl", {}, Needs(NONBLANK, (), ("decoder",))),
        # These use no teacher outputs at all.
        ("inter_ctc", {}, Needs()),
        ("self_kd", {"temperature": 2.0}, Needs()),
        ("layer_pruning", {}, Needs()),
    ],
)
def test_needs(name, options, needs):
    assert OBJECTIVES.get_class(name)(**options).needs() == needs


@pytest.mark.parametrize("name", ["kl", "factorized_kl", "guided_ctc"])
def test_a_prior_may_favour_a_token_on_a_blank_frame(name, tmp_path):
    np.save(tmp_path / "prior.npy", np.log(np.full(5, 0.2)))
    frames = {"rule": "elimination", "log_prior": str(tmp_path / "prior.npy")}
    assert OBJECTIVES.get_class(name)(frames=frames).needs() == Needs(ALL)


def test_an_objective_from_outside_that_does_not_say_gets_everything():
    assert Objective().needs() == Needs(ALL)
