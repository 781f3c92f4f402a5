"""Several teachers that are used as one."""

import pytest
import tiny_kd
import torch

from espnet_kd.cli import UserError
from espnet_kd.targets.online import OnlineTeacher
from espnet_kd.targets.teacher import SeveralTeachers


def test_several_teachers_average_probabilities(teacher, tmp_path):
    other = OnlineTeacher(tiny_kd.save_teacher(tmp_path / "other", seed=3))
    both = SeveralTeachers([teacher, other], [3.0, 1.0])
    batch = tiny_kd.batch()
    said = both.targets((), batch["speech"], batch["speech_lengths"], ["encoder"])
    a, b = (t.targets((), batch["speech"], batch["speech_lengths"], ["encoder"]) for t in (teacher, other))
    expected = 0.75 * a.logits.softmax(-1) + 0.25 * b.logits.softmax(-1)
    torch.testing.assert_close(said.logits.exp(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(said.hidden["encoder"], a.hidden["encoder"])  # hidden states of the first
    assert both.frame_shift == teacher.frame_shift and both.hidden_size == teacher.hidden_size


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(token_list=["<blank>", "x"]), "different token lists"),
        (dict(frame_shift=0.06), "different frame shifts: .* 40 ms, .* 60 ms"),
        (dict(sampling_rate=8000.0), "different sampling rates: .* 16000 Hz, .* 8000 Hz"),
    ],
)
def test_teachers_that_do_not_go_together(teacher, teacher_dir, change, message):
    other = OnlineTeacher(teacher_dir)
    vars(other).update(change)
    with pytest.raises(UserError, match=message):
        SeveralTeachers([teacher, other])


def test_weights_of_teachers(teacher):
    assert SeveralTeachers([teacher, teacher]).weights == [0.5, 0.5]
    with pytest.raises(UserError, match="2 numbers for 1 teachers"):
        SeveralTeachers([teacher], [0.5, 0.5])
