"""What is compared with a directory's record beside options: the teacher's content, and the epochs that are trained."""

import shutil

import pytest
import torch
from test_record import PARSER

from espnet_kd.cli import UserError
from espnet_kd.distill.page import load_page
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.record import claim, make_record, write_record


@pytest.fixture
def started(corpus, teacher_dir, tmp_path):
    """A directory with a checkpoint that cannot be read, and the options of a training with a copy of the teacher."""
    shutil.copytree(teacher_dir, tmp_path / "teacher")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint.pth").touch()
    return tmp_path / "out", PARSER.parse_args(
        corpus.options(tmp_path / "out", "--teacher", str(tmp_path / "teacher"))
    )


def test_a_teacher_of_other_content(started, tmp_path):
    """The teacher was trained on, so that its directory has another model."""
    out, args = started
    plan = make_plan(load_page("progressive_fkl"), 3)
    write_record(out, make_record(args, PARSER, plan), 1, False)
    assert claim(out, make_record(args, PARSER, plan), plan) == 1
    (tmp_path / "teacher/valid.loss.ave.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="settings ./.*teacher: valid.loss.ave.pth has changed"):
        claim(out, make_record(args, PARSER, plan), plan)
    # The record of an earlier version does not have the teacher's content, which is then not compared.
    earlier = {k: v for k, v in make_record(args, PARSER, plan).items() if k != "teacher_files"}
    write_record(out, earlier, 1, False)
    assert claim(out, make_record(args, PARSER, plan), plan) == 1


def test_more_epochs_after_an_early_end(started, write_page):
    """With ``patience`` fewer epochs may be trained than planned; KD stage 1 must not be trained a second time."""
    out, args = started
    page = load_page(str(write_page({"stages": [{"share": 0.5}, {"share": 0.5}]})))
    plan = make_plan(page, 20)
    write_record(out, make_record(args, PARSER, plan), 2, True)
    torch.save({"model": {}, "reporter": {"epoch": 12}}, out / "checkpoint.pth")
    assert claim(out, make_record(args, PARSER, plan), plan) == 2
    longer = make_plan(page, 22)  # KD stage 2 begins with epoch 12
    assert claim(out, make_record(args, PARSER, longer), longer) == 1
    longer = make_plan(page, 24)  # KD stage 2 begins with epoch 13, which is not trained yet
    with pytest.raises(UserError, match="epochs: 20 → 24"):
        claim(out, make_record(args, PARSER, longer), longer)
