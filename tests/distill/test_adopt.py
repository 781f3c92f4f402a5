"""The KD stages of a page become the parts of one KD model."""

import contextlib

import pytest
import tiny_kd
from test_model import HYBRID, adopt, in_stage

from espnet_kd.cli import UserError
from espnet_kd.distill.page import load_page


def test_an_objective_is_one_object_in_all_kd_stages(write_page, teacher):
    """A page may write equal options differently. Of two objects, only one would have its head in the model."""
    entry = {"objective": "inter_kd", "layers": [0.5]}
    stages = [{"share": 0.5, "objectives": [{**entry, "l2_weight": weight}]} for weight in (4, 4.0)]
    model = in_stage(load_page(str(write_page({"stages": stages}))), 1, teacher)
    (first,), (second,) = ([objective for _, objective, _ in terms] for terms in model.terms)
    assert first is second and first.heads is model.kd_heads["inter_kd"]


@pytest.mark.parametrize(
    "stage, conf, trains",
    [
        ({"ctc": {"weight": 0.0}}, {}, False),
        ({"ctc": {"weight": 0.0}, "attention": {"weight": 1.0}}, {}, False),  # no such branch
        ({"ctc": {"weight": 0.0}, "attention": {"weight": 1.0}}, HYBRID, True),
        ({"ctc": {"weight": {"start": 0.0, "end": 1.0}}}, {}, True),
        ({"ctc": {"weight": 0.0}, "keep": "all"}, {}, True),
    ],
)
def test_a_kd_stage_that_trains_nothing(write_page, teacher, stage, conf, trains):
    first = {"share": 0.5, "objectives": [{"objective": "kl"}]}
    page = write_page({"stages": [first, {"share": 0.5, **stage}]})
    message = r"page.yaml: KD stage 2 \(stage2\) trains nothing: the weight of CTC is 0"
    with contextlib.nullcontext() if trains else pytest.raises(UserError, match=message):
        adopt(tiny_kd.student_config(**conf), page, teacher=teacher)


@pytest.mark.parametrize(
    "warped, objective",
    [(True, "kl"), (False, "kl"), (True, "consistency"), (False, "consistency"), (True, "inter_ctc")],
)
def test_time_warping_moves_frames_against_teacher_or_other_view(write_page, teacher, caplog, warped, objective):
    conf = tiny_kd.student_config()
    conf["specaug_conf"].update(apply_time_warp=warped, time_warp_window=5)
    page = write_page({"stages": [{"objectives": [{"objective": objective}]}]})
    adopt(conf, page, teacher=teacher)
    assert ("specaug_conf" in caplog.text and "5 frames" in caplog.text) == (warped and objective != "inter_ctc")
