"""A plain student, and a KD model of a copy for a page of one KD stage, for the tests of objectives."""

import copy

import tiny_asr
import tiny_kd
import torch

from espnet_kd.distill.model import ESPnetASRKDModel
from espnet_kd.distill.page import load_page
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.schedule import Progress

#: The model_conf of a student with an attention decoder.
HYBRID = dict(ctc_weight=0.3)


def page_of(write_page, *objectives, teacher="required", **stage):
    return load_page(
        str(write_page({"teacher": teacher, "stages": [{"share": 1.0, "objectives": list(objectives), **stage}]}))
    )


def adopt(page, teacher=None, conf=None, progress=None, **more):
    """The plain student and a KD model of a copy, both in eval mode."""
    plain = tiny_asr.build(conf or tiny_kd.student_config(), sharpen=1.0)
    with torch.no_grad():
        plain.ctc.ctc_lo.bias[-1] = 0.0
    plan = make_plan(page, 1, [1])
    model = ESPnetASRKDModel.adopt(copy.deepcopy(plain), plan, teacher, progress or Progress(), 16000.0, **more)
    return plain, model.eval()


def deeper(**more):
    conf = tiny_kd.student_config(**more)
    conf["encoder_conf"]["num_blocks"] = 4
    return conf


def run(model, batch):
    loss, stats, _ = model(**copy.deepcopy(batch))
    return loss.squeeze(), stats
