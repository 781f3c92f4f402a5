"""In a training step only ESPnet and torch's CTC make the host wait for a GPU, never this package."""

import contextlib
import copy

import far_device
import pytest
import tiny_kd
import torch
from far_device import Far, FarDevice, send
from test_model import PLAIN, adopt, in_stage
from tiny_student import HYBRID, deeper, page_of

from espnet_kd.backend import backend_of, may_look
from espnet_kd.distill.page import list_pages, load_page
from espnet_kd.targets.loading import BROUGHT, to_plain
from espnet_kd.targets.online import OnlineTeacher
from espnet_kd.targets.teacher import SeveralTeachers


def step(model, batch, count=1):
    """Move ``model`` to the far device and run steps; return the waits and the loss of the last one."""
    far_device.move(model)
    far = FarDevice()
    with far:
        for _ in range(count):
            far.waits.clear()
            torch.manual_seed(0)
            loss = model(**send(batch))[0]
    return far.waits, loss.inner


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Disable autocast on the simulated device, which does not have it."""
    autocast = torch.autocast
    here = lambda device, **more: contextlib.nullcontext() if device == "meta" else autocast(device, **more)  # noqa: E731
    monkeypatch.setattr(torch, "autocast", here)


def batch_with_lengths(**more):
    batch = tiny_kd.batch()
    return {**batch, BROUGHT: {"text_lengths": batch["text_lengths"].tolist(), **more}}


def owners(waits):
    return {wait.owner for wait in waits}


def test_what_waits_is_seen():
    far = FarDevice()
    x = Far(torch.tensor([1.0, 0.0, 2.0]))
    with far:
        assert not may_look(x) and backend_of(x) == "masked"
        assert (x + 1).sum(0, keepdim=True).inner.tolist() == [6.0] and far.waits == []
        for n, wait in enumerate((
            lambda: x[x > 0], lambda: x.nonzero(), lambda: x.sum().item(), lambda: bool((x > 0).any()),
            lambda: x.tolist(), lambda: x.cpu(), lambda: torch.zeros(3).to(x.device), lambda: int(x.argmax()),
            lambda: torch.zeros(3).copy_(x),
        ), 1):  # fmt: skip
            wait()
            assert len(far.waits) == n
        torch.zeros(3).to(x.device, non_blocking=True)
        x[x > 0] = 0.0
        torch.where(x > 0, x, 0.0)
        assert len(far.waits) == 9


@pytest.mark.parametrize("model_conf", [{}, HYBRID], ids=["ctc", "hybrid"])
def test_of_a_plain_step_ours_are_none_and_fewer_than_espnets(write_page, model_conf):
    plain, model = adopt(tiny_kd.student_config(**model_conf), write_page(PLAIN))
    expected = copy.deepcopy(model).train()(**copy.deepcopy(tiny_kd.batch()))[0]
    theirs, _ = step(plain.train(), tiny_kd.batch())
    torch.manual_seed(0)
    ours, loss = step(model.train(), batch_with_lengths())
    assert loss.shape == expected.shape and loss.isfinite().all()
    assert owners(theirs) <= {"espnet", "ctc"} and "espnet_kd" not in owners(ours)
    # ESPnet selects the labels of every utterance, and copies both kinds of lengths to the host for torch's CTC.
    assert len(ours) < len(theirs)
    assert sum(w.owner == "ctc" for w in ours) == 1 < sum(w.owner == "ctc" for w in theirs) == 2


@pytest.mark.parametrize("cached", [False, True], ids=["online", "cached"])
@pytest.mark.parametrize("name", list_pages())
def test_no_page_makes_the_host_wait(name, cached, teacher_dir, tmp_path):
    """Tested in every KD stage, with the teacher running and with cached targets from the data loader."""
    page = load_page(name)
    if cached and (page.teacher == "none" or not any(
        o.make().uses_teacher for s in page.stages for o in s.objectives
    )):  # fmt: skip
        pytest.skip("the page reads no targets")
    directory = teacher_dir
    if name in ("layer_pruning", "self_kd"):  # the student starts from the teacher's layers
        directory = tiny_kd.save_teacher(tmp_path / "teacher", output_size=16, num_blocks=6)
    hypotheses = [(-1.0, (2, 3)), (-2.0, (2, 4, 3))]
    nbest = {utt_id: hypotheses for utt_id in tiny_kd.batch()["utt_id"]}
    for stage in page.stages:
        teacher = OnlineTeacher(directory, 1e9) if page.teacher == "required" else None
        model = in_stage(page, stage.number, teacher, conf=deeper(), nbest=nbest)
        batch = batch_with_lengths()
        if cached:
            batch[BROUGHT]["targets"] = to_plain(compressed(teacher, tiny_kd.batch(), model))
            model.teacher = copy.copy(teacher)
            model.teacher.targets = None  # must not be called
        # The second step counts, because in the first the teacher's targets are not yet in memory.
        waits, loss = step(model, batch, count=2)
        assert loss.isfinite().all() and "espnet_kd" not in owners(waits), [w for w in waits if w.owner == "espnet_kd"]


def compressed(teacher, batch, model):
    from dataclasses import replace

    from espnet_kd.topk import compress

    taps = sorted({t for _, _, reads in model.parts(True) if reads for t in reads})
    targets = teacher.targets(batch["utt_id"], batch["speech"], batch["speech_lengths"], taps)
    temperatures = sorted({tau for terms in model.terms for _, o, _ in terms for tau in o.temperatures})
    return replace(targets, logits=compress(targets.logits, 6, temperatures), hidden=dict(targets.hidden))


def test_a_hybrid_student_with_utterances_that_are_not_transcribed(write_page):
    batch = batch_with_lengths()
    batch["text_lengths"][1] = 0
    batch["text"][1] = -1
    batch[BROUGHT]["text_lengths"][1] = 0
    model = adopt(tiny_kd.student_config(**HYBRID), write_page(PLAIN))[1].train()
    waits, loss = step(model, batch)
    assert loss.isfinite().all() and "espnet_kd" not in owners(waits)


def test_several_teachers(write_page, teacher_dir, tmp_path):
    other = tiny_kd.save_teacher(tmp_path / "other", seed=5)
    teacher = SeveralTeachers([OnlineTeacher(teacher_dir), OnlineTeacher(other)])
    model = in_stage(page_of(write_page, {"objective": "factorized_kl"}), 1, teacher)
    waits, loss = step(model, batch_with_lengths(), count=2)
    assert loss.isfinite().all() and "espnet_kd" not in owners(waits)


def test_lengths_that_are_not_at_hand_are_waits(write_page):
    """A batch that `espnet_kd.targets.loading` did not load has the same loss, but more waits."""
    model = adopt(tiny_kd.student_config(**HYBRID), write_page(PLAIN))[1].train()
    with_lengths, loss = step(copy.deepcopy(model), batch_with_lengths())
    without, same = step(model, tiny_kd.batch())
    torch.testing.assert_close(loss, same)
    assert len(without) > len(with_lengths) and "espnet_kd" in owners(without)
