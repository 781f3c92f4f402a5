"""A student, teacher or page that do not fit together are refused before training starts."""

from contextlib import nullcontext

import numpy as np
import pytest
import tiny_asr
import tiny_kd
from test_model import PLAIN, adopt, one_stage

from espnet_kd.cli import UserError
from espnet_kd.distill.model import ESPnetASRKDModel
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.schedule import Progress
from espnet_kd.targets.online import OnlineTeacher
from espnet_kd.targets.teacher import SeveralTeachers


def changed_teacher(tmp_path, edit):
    conf = tiny_asr.config()
    edit(conf)
    return OnlineTeacher(tiny_asr.save(tiny_asr.build(conf), conf, tmp_path / "other"))


def set_tokens(tokens):
    return lambda conf: conf.update(token_list=tokens)


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            set_tokens(["<blank>", "<unk>", "<space>", *"abcdefghiX", "<sos/eos>"]),
            r"token lists differ: student 14 tokens.*only the student has \['j'\], only the teacher \['X'\]",
        ),
        (set_tokens(["<blank>", "<unk>", "<space>", *"bacdefghij", "<sos/eos>"]), "moved .*'a' is 3 / 4"),
        (set_tokens([*tiny_asr.TOKENS[:-1], "k", "<sos/eos>"]), "student 14 tokens.*15; .*only the teacher.*'k'"),
        (lambda conf: conf["frontend_conf"].update(fs=8000), "student takes audio of 16000 Hz, the teacher .* 8000 Hz"),
    ],
)
def test_a_teacher_that_does_not_fit(tmp_path, fkl, edit, message):
    with pytest.raises(UserError, match=message):
        adopt(tiny_kd.student_config(), fkl, teacher=changed_teacher(tmp_path, edit))


def fed_with_features(conf, directory, width):
    np.savez(directory / f"{width}.npz", count=1, sum=np.zeros(width), sum_square=np.ones(width))
    conf.update(input_size=width, frontend=None, frontend_conf={}, normalize="global_mvn")
    conf["normalize_conf"] = {"stats_file": str(directory / f"{width}.npz")}
    return conf


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (None, 40, "student gets audio, the teacher .* features of width 40"),
        (40, None, "student gets features of width 40, the teacher .* audio"),
        (40, 20, "student gets features of width 40, the teacher .* features of width 20"),
        (40, 40, None),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_teacher_with_other_input(tmp_path, fkl, student, teacher, message, several):
    conf = tiny_kd.student_config()
    if student:
        fed_with_features(conf, tmp_path, student)
    one = changed_teacher(tmp_path, lambda c: teacher and fed_with_features(c, tmp_path, teacher))
    one = SeveralTeachers([one, one]) if several else one
    with pytest.raises(UserError, match=message) if message else nullcontext():
        adopt(conf, fkl, teacher=one)


def test_no_teacher(fkl):
    with pytest.raises(UserError, match="progressive_fkl.yaml needs a teacher: give --teacher"):
        adopt(tiny_kd.student_config(), fkl)


def test_a_student_without_ctc(fkl, teacher):
    with pytest.raises(UserError, match="no CTC branch"):
        adopt_with_ctc_weight_0(fkl, teacher)


def adopt_with_ctc_weight_0(fkl, teacher):
    import argparse

    from espnet_kd.offline import ASRTask

    student = ASRTask.build_model(argparse.Namespace(**tiny_kd.student_config(ctc_weight=0.0)))
    return ESPnetASRKDModel.adopt(student, make_plan(fkl, 1), teacher, Progress(), 16000.0)


def test_a_kind_of_ctc_that_takes_other_arguments(fkl, teacher):
    """ESPnet's gtnctc and brctc take frames and labels in another shape."""
    student = tiny_asr.build(tiny_kd.student_config())
    student.ctc.ctc_type = "brctc"  # set afterwards, because the library of brctc is not installed
    with pytest.raises(UserError, match="ctc_type brctc is not supported here; use ctc_type: builtin"):
        ESPnetASRKDModel.adopt(student, make_plan(fkl, 1), teacher, Progress(), 16000.0)


def test_blank_must_be_token_0(write_page):
    conf = tiny_kd.student_config()
    conf["token_list"] = ["<unk>", "<blank>", *tiny_asr.TOKENS[2:]]
    with pytest.raises(UserError, match="<blank> must be .*it is token 1"):
        adopt(conf, write_page(PLAIN))


@pytest.mark.parametrize("taps, who", [(["encoder.7", "encoder"], "student"), (["encoder", "encoder.7"], "teacher")])
def test_taps_of_a_later_stage_are_checked_up_front(write_page, teacher, taps, who):
    page = one_stage({"objective": "blank_kl"})
    page["stages"][0]["share"] = 0.5
    page["stages"].append({"share": 0.5, "objectives": [{"objective": "factorized_representation", "taps": [taps]}]})
    with pytest.raises(UserError, match=f"the {who} .* has no tap 'encoder.7'; it has: encoder, encoder.1"):
        adopt(tiny_kd.student_config(), write_page(page), teacher=teacher)


def test_an_objective_that_needs_a_teacher_on_a_page_without_one(write_page):
    page = {"teacher": "none", **one_stage({"objective": "kl"})}
    with pytest.raises(UserError, match="page.yaml: KD stage 1: kl: needs a teacher, but the page has teacher: none"):
        adopt(tiny_kd.student_config(), write_page(page))


def test_frames_that_cannot_be_aligned_are_refused_before_training(fkl, teacher_dir, monkeypatch):
    teacher = OnlineTeacher(teacher_dir)
    monkeypatch.setattr(teacher, "frame_shift", 3 * teacher.frame_shift)  # its frames do not fit this shift
    with pytest.raises(UserError, match="differ by more than two frames"):
        adopt(tiny_kd.student_config(), fkl, teacher=teacher)
