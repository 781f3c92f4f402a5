"""No objective makes the host wait for a GPU: on tensors without values, a step that reads a value fails.

Fake tensors have only shapes. Anything that depends on a value (a shape, an ``if``, a Python number) is an error.
Fake tensors allow copies between host and device, which ``NoCopies`` refuses.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from espnet_kd import frames as fr
from espnet_kd import losses
from espnet_kd.backend import using
from espnet_kd.distill.objectives import OBJECTIVES, Batch, lay_on
from espnet_kd.distill.schedule import Progress
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.topk import compress

UTTS, FRAMES, WIDTH, VOCABULARY, LABELS = 4, 12, 8, 9, 3
#: Objective → options to test in addition to the defaults.
OPTIONS = {
    "kl": [{"frames": {"rule": rule, **options}} for rule, options in (
        ("elimination", {}), ("symmetric", {"n": 2}), ("trim", {}), ("threshold", {"theta": 0.1}),
        ("random", {"ratio": 0.5}),
    )] + [{"temperature": 2.0, "tau_squared": True}],
    "factorized_kl": [{"nonblank_on_blank_weight": 0.5}, {"temperature": 2.0, "frames": {"rule": "trim"}}],
    "guided_ctc": [{"log": True}],
    "factorized_representation": [{"distance": "l2"}],
    "weighted_representation": [{"weights": "energy"}],
}  # fmt: skip
WITH_TEACHER = [
    (name, options, cached)
    for name in OBJECTIVES.classes
    for options in [{}, *OPTIONS.get(name, [])]
    for cached in ([False, True] if OBJECTIVES.get_class(name).needs_teacher else [False])
]


class NoCopies(TorchDispatchMode):
    """Refuses copies for which the host waits: from a device, and to it unless they are ``non_blocking``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ends = None
        if func is torch.ops.aten._to_copy.default:
            ends = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
        elif func is torch.ops.aten.copy_.default:
            ends = args[1].device.type, args[0].device.type
        if ends and ends[0] != ends[1] and (ends[1] == "cpu" or not (kwargs.get("non_blocking") or args[2:])):
            raise AssertionError(f"a copy from {ends[0]} to {ends[1]}, for which the host waits")
        return func(*args, **kwargs)


class TransformerEncoder(torch.nn.Module):
    """The part of ESPnet's encoder that objectives use."""

    def __init__(self):
        super().__init__()
        self.encoders = [None] * 4

    def output_size(self):
        return WIDTH


def models():
    """The parts of the student and the teacher that ``place`` and ``build`` use."""
    head = SimpleNamespace(ctc_lo=SimpleNamespace(out_features=VOCABULARY))
    student = SimpleNamespace(
        encoder=TransformerEncoder(), postencoder=None, ctc=head, token_list=["a"] * VOCABULARY
    )
    return student, SimpleNamespace(hidden_size=WIDTH, name="teacher")


def outputs(frames, shift, views=1):
    names = ("encoder", *(f"encoder.{n}" for n in (1, 2, 3, 4)))
    taps = {name: torch.randn(views * UTTS, frames, WIDTH) for name in names}
    logits = torch.randn(views * UTTS, frames, VOCABULARY)
    lengths = torch.full((views * UTTS,), frames)
    return EncoderOutputs(logits, lengths, shift, taps, torch.randn(UTTS, LABELS + 1, VOCABULARY))


def ctc(log_probs, lengths, text=None, text_lengths=None, weights=None):
    """A replacement for the model's CTC that uses all its arguments."""
    total = log_probs.sum() + lengths.sum()
    return total if text is None else total + text.sum() + text_lengths.sum() + weights.sum()


def step(name, options, cached):
    """Run one step of an objective; return the loss and the student's tensors. The teacher has another frame rate."""
    objective = OBJECTIVES.get_class(name)(**options)
    student_model, teacher_model = models()
    objective.place(student_model)
    heads = objective.build(student_model, teacher_model if objective.needs_teacher else None)
    student, target = outputs(FRAMES, 0.04, objective.views), outputs(2 * FRAMES, 0.02)
    leaves = [student.logits, student.decoder, *student.hidden.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    if cached:
        target.logits = compress(target.logits, 3, objective.temperatures)
    nbest = [[(-1.0, [1, 2]), (-2.0, [3])], [(-1.0, [1])], [(-0.5, [])], [(-0.1, [2, 1, 2])]]
    batch = Batch(
        [f"u{n}" for n in range(UTTS)], torch.ones(UTTS, LABELS, dtype=torch.long), torch.full((UTTS,), LABELS),
        nbest, objective.views, ctc, lambda hidden: hidden[..., :1].expand(-1, -1, VOCABULARY).log_softmax(-1),
    )  # fmt: skip
    target = lay_on(student, target, "least_blank", batch.utt_ids) if objective.needs_teacher else None
    loss, stats = objective(student, target, batch, Progress())
    assert loss.shape == () and all(x.shape == () for x in stats.values())
    return loss, leaves + (list(heads.parameters()) if heads is not None else [])


@pytest.mark.parametrize("name, options, cached", WITH_TEACHER)
def test_forward_and_backward_need_no_value(name, options, cached):
    with FakeTensorMode():
        loss, leaves = step(name, options, cached)
        loss.backward()
        assert any(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("name, options, cached", WITH_TEACHER)
def test_nothing_is_copied_between_host_and_device(name, options, cached):
    with FakeTensorMode(), torch.device("cuda"), NoCopies():
        loss, _ = step(name, options, cached)
    assert loss.device.type == "cuda"


@pytest.mark.parametrize("name", ["kl", "blank_kl", "factorized_kl"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kernels_are_launched_without_a_value(name, device, monkeypatch):
    """This covers the code around the kernels; the kernel launch itself is replaced."""
    fused = pytest.importorskip("espnet_kd.losses.fused", reason="needs Triton")
    launched = []
    monkeypatch.setattr(fused, "launch", lambda kernel, *args, **options: launched.append(kernel))
    monkeypatch.setattr(fused, "_on", lambda x: contextlib.nullcontext())
    with FakeTensorMode(), torch.device(device), NoCopies(), using("fused"):
        student, target = outputs(FRAMES, 0.04), outputs(FRAMES, 0.04)
        student.logits.requires_grad_()
        frames = fr.select(target.logits, target.lengths, "symmetric", n=1)
        loss = getattr(losses, name)(student.logits, target.logits, target.lengths, frames=frames)
        if device == "cpu":  # autograd needs a real device
            loss.backward()
            assert student.logits.grad.shape == student.logits.shape
    assert len(launched) == (3 if device == "cpu" else 2)


@pytest.mark.parametrize("shift", [0.02, 0.04, 0.06, 0.08])
@pytest.mark.parametrize("pool", ["least_blank", "mean"])
def test_alignment_needs_no_value(shift, pool):
    with FakeTensorMode(), torch.device("cuda"), NoCopies():
        student, target = outputs(FRAMES, shift), outputs(round(FRAMES * shift / 0.04), 0.04)
        assert lay_on(student, target, pool).logits.shape == student.logits.shape


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().item(),
        lambda x: 1 if (x > 0).any() else 0,
        lambda x: x[: x.sum().long()],
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=x.device) + x,
        lambda x: torch.zeros(3, device="cpu").to(x.device),
    ],
)
def test_a_wait_is_noticed(wait):
    refused = (DataDependentOutputException, DynamicOutputShapeException, AssertionError)
    with FakeTensorMode(), torch.device("cuda"), NoCopies(), pytest.raises(refused):
        wait(torch.zeros(3))
