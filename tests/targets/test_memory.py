"""Targets are kept by utterance id and found again in any batch, and the host never waits for a device."""

import pytest
import tiny_kd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.targets.memory import Memory, fingerprints
from espnet_kd.targets.online import OnlineTeacher

TAPS = ["encoder", "encoder.2"]


def counted(teacher):
    """A list that gets an entry each time the model itself runs."""
    runs = []
    teacher._model.encoder.register_forward_hook(lambda m, i, o: runs.append(1))
    return runs


def part(batch, rows):
    """Some utterances of a batch as a batch of their own, without superfluous padding."""
    lengths = batch["speech_lengths"][rows]
    return [batch["utt_id"][i] for i in rows], batch["speech"][rows][:, : lengths.max()], lengths


def assert_like(found, fresh, tolerance=0.0):
    """Assert equal frames, bit for bit unless a tolerance is given."""
    assert torch.equal(found.lengths, fresh.lengths) and found.frame_shift == fresh.frame_shift
    for mine, theirs in ((found.logits, fresh.logits), *((found.hidden[t], fresh.hidden[t]) for t in fresh.hidden)):
        for a, b, n in zip(mine, theirs, fresh.lengths):
            torch.testing.assert_close(a[:n], b[:n], rtol=0, atol=tolerance)


def test_a_batch_comes_back_as_it_was(teacher_dir):
    teacher = OnlineTeacher(teacher_dir, memory=1e8)
    runs = counted(teacher)
    everything = part(tiny_kd.batch(), [0, 1, 2])
    fresh = OnlineTeacher(teacher_dir).targets(*everything, TAPS)
    for _ in range(3):
        assert_like(teacher.targets(*everything, TAPS), fresh)
    assert len(runs) == 1


@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [2, 1], [0, 2]])
def test_utterances_come_back_in_any_batch(teacher_dir, rows):
    teacher = OnlineTeacher(teacher_dir, memory=1e8)
    runs = counted(teacher)
    everything, some = part(tiny_kd.batch(), [0, 1, 2]), part(tiny_kd.batch(), rows)
    first = teacher.targets(*everything, TAPS)
    found = teacher.targets(*some, TAPS)
    assert len(runs) == 1 and found.logits.size(0) == len(rows)
    for i, row in enumerate(rows):
        n = found.lengths[i]
        assert n == first.lengths[row] and torch.equal(found.logits[i, :n], first.logits[row, :n])
    # A teacher that runs on that batch gets other padding after each utterance, and here up to two more frames.
    fresh = OnlineTeacher(teacher_dir).targets(*some, TAPS)
    assert (found.lengths - fresh.lengths).abs().max() <= 2
    for a, b, n in zip(found.logits, fresh.logits, fresh.lengths):
        torch.testing.assert_close(a[: n - 8], b[: n - 8], rtol=0, atol=0.5)  # for logits between -20 and 20


def test_utterances_of_several_batches_come_together(teacher_dir):
    teacher = OnlineTeacher(teacher_dir, memory=1e8)
    runs = counted(teacher)
    batch = tiny_kd.batch()
    each = [teacher.targets(*part(batch, [i])) for i in range(3)]
    together = teacher.targets(*part(batch, [0, 1, 2]))
    assert len(runs) == 3 and together.lengths.tolist() == [int(x.lengths[0]) for x in each]
    for row, alone in zip(together.logits, each):
        assert torch.equal(row[: alone.logits.size(1)], alone.logits[0])
        assert not row[alone.logits.size(1) :].any()


def test_what_is_not_known_is_asked_of_the_teacher(teacher_dir):
    teacher = OnlineTeacher(teacher_dir, memory=1e8)
    runs = counted(teacher)
    batch = tiny_kd.batch()
    teacher.targets(*part(batch, [0, 1]))
    teacher.targets(*part(batch, [1, 2]))
    assert len(runs) == 2
    teacher.targets(*part(batch, [2, 0]))
    assert len(runs) == 2
    ids, speech, lengths = part(batch, [0, 1])
    perturbed = [f"sp0.9-{i}" for i in ids]
    for other in ((perturbed, speech, lengths), (ids, speech * 0.5, lengths), (ids, speech, lengths - 9)):
        fresh = OnlineTeacher(teacher_dir).targets(*other)
        assert_like(teacher.targets(*other), fresh)
    assert len(runs) == 5


def test_fingerprints_do_not_see_padding():
    speech, lengths = torch.randn(3, 50), torch.tensor([50, 30, 7])
    for row, n in zip(speech, lengths):
        row[n:] = 0
    prints = fingerprints(speech, lengths)
    assert torch.equal(prints[1:], fingerprints(speech[1:, :30], lengths[1:]))
    assert len(set(map(tuple, prints.tolist()))) == 3
    for kind in (torch.float64, torch.float16):
        assert fingerprints(speech.to(kind), lengths).shape == (3, 2)


def test_nothing_is_copied_to_the_host():
    """Fake tensors have no values, so that any operation that would wait for a GPU is an error."""
    with FakeTensorMode():
        memory, taps = Memory(1e9), ("encoder",)
        speech, lengths, ids = torch.randn(4, 100), torch.full((4,), 90), ["a", "b", "c", "d"]
        said = EncoderOutputs(torch.randn(4, 9, 5), torch.full((4,), 8), 0.04, {"encoder": torch.randn(4, 9, 3)})
        prints = fingerprints(speech, lengths)
        assert memory.recall(ids, taps, prints) is None
        memory.remember(ids, taps, prints, said)
        assert memory.recall(ids, taps, prints) is said
        some = memory.recall(["d", "b"], taps, fingerprints(speech[:2], lengths[:2]))
        assert some.logits.shape == (2, 9, 5) and some.hidden["encoder"].shape == (2, 9, 3)


def test_other_audio_under_the_same_id_is_told_of(monkeypatch):
    """On a GPU it is found too late to run the teacher instead, so that it must be an error."""
    monkeypatch.setattr("espnet_kd.targets.memory.may_look", lambda x: False)
    memory, speech, lengths = Memory(1e9), torch.randn(2, 10), torch.tensor([10, 10])
    said = EncoderOutputs(torch.randn(2, 3, 4), torch.tensor([3, 3]), 0.04)
    memory.remember(["a", "b"], (), fingerprints(speech, lengths), said)
    changed = speech.clone()
    changed[1] *= 2
    with pytest.raises(ValueError, match="^b: .*--teacher_memory 0"):
        memory.recall(["a", "b"], (), fingerprints(changed, lengths))
