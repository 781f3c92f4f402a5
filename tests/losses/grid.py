"""One grid of cases for every backend of the losses, compared with the slow reference and with float64.

    TRITON_INTERPRET=1 python tests/losses/grid.py

checks the Triton kernels on a CPU, in Triton's interpreter. The variable must be set before Triton is imported.

    python tests/losses/grid.py cuda

checks all losses on a device, with the backend chosen for it and in plain torch. Both commands need only torch.
"""

import functools
import math
import sys
from dataclasses import dataclass, field
from unittest.mock import patch

import reference
import torch

from espnet_kd import frames as fr
from espnet_kd import losses
from espnet_kd.backend import backend_of, using
from espnet_kd.topk import compress

LOSSES = {
    "kl": losses.kl,
    "blank_kl": losses.blank_kl,
    "factorized_kl": losses.factorized_kl,
    "factorized_kl_all": functools.partial(losses.factorized_kl, **reference.ALL_WEIGHTS),
    "factorized_kl_tokens": functools.partial(losses.factorized_kl, blank_weight=0.0, nonblank_weight=0.5),
    "softmax_l2": losses.softmax_l2,
    "guided_ctc": losses.guided_ctc,
    "guided_ctc_log": functools.partial(losses.guided_ctc, log=True),
    "delayed_kl": functools.partial(losses.delayed_kl, max_delay=2),
    "consistency": losses.consistency,
}
#: The losses that have Triton kernels.
FUSED = [name for name in LOSSES if "kl" in name.split("_") and name != "delayed_kl"]
REFERENCES = {
    "factorized_kl_all": functools.partial(reference.factorized_kl, weights=(1.0, 1.0, 1.0)),
    "factorized_kl_tokens": functools.partial(reference.factorized_kl, weights=(0.0, 0.5, 0.0)),
}
INFINITY = math.inf
#: Allowed relative errors: of the value, and of the gradient relative to its largest element.
VALUE = 1e-5
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """A batch and the options of the loss."""

    lengths: tuple = (5, 3, 1)
    width: int = 6
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    change: object = None  #: function that changes student, teacher (B, T, V) and lengths in place
    #: Functions that give student and teacher another memory layout, with the same numbers.
    storage: tuple = (lambda x: x, lambda x: x)
    frames: object = None  #: (teacher, lengths) → (B, T) bool
    options: dict = field(default_factory=dict)
    exact: bool = True  #: whether the slow reference can compute it (it divides by 1 − b)

    def make(self, device="cpu"):
        """Return student, teacher, lengths, frames or None, and a mask of the frames that count."""
        student, teacher, lengths, mask = reference.batch(self.lengths, self.width, self.scale)
        blank_id = self.options.get("blank_id", 0)
        teacher[..., [0, blank_id]] = teacher[..., [blank_id, 0]]
        if self.change:
            self.change(student, teacher, lengths)
            mask = fr.valid(lengths, student.size(1))
        student, teacher = student.to(self.dtype), teacher.to(self.dtype)
        frames = None if self.frames is None else self.frames(teacher, lengths)
        counted = mask if frames is None else mask & frames
        student, teacher = (x.to(device) for x in (student, teacher))
        student, teacher = (layout(x) for layout, x in zip(self.storage, (student, teacher)))
        moved = None if frames is None else frames.to(device)
        return student, teacher, lengths.to(device), moved, counted


def _set(whose, value, tokens=slice(None), frames=slice(None)):
    def change(student, teacher, lengths):
        for x in {"student": [student], "teacher": [teacher], "both": [student, teacher]}[whose]:
            x[:, frames, tokens] = value

    return change


def _pad(value):
    def change(student, teacher, lengths):
        for x in (student, teacher):
            x[~fr.valid(lengths, x.size(1))] = value

    return change


def _certain(whose, token):
    def change(student, teacher, lengths):
        for x in {"student": [student], "teacher": [teacher], "both": [student, teacher]}[whose]:
            x[:, 1::2] = -INFINITY
            x[:, 1::2, token] = 0.0

    return change


def _wrong(student, teacher, lengths):
    """Give the student a blank logit of 20 and the teacher a certain token: the loss is 16.6, the gradient 1."""
    student.zero_()
    teacher.zero_()
    student[..., 0] = 20.0
    teacher[..., 3] = 60.0


def _log_probs(student, teacher, lengths):
    for x in (student, teacher):
        x.copy_(x.log_softmax(-1))


def _empty(student, teacher, lengths):
    lengths[1] = 0


def _selection(rule, **options):
    return lambda teacher, lengths: fr.select(teacher, lengths, rule, **options)


def _beyond(teacher, lengths):
    """Select every second frame, also in the padding, which must not count even when selected."""
    return (torch.arange(teacher.size(1)) % 2 == 0).expand(teacher.shape[:2]).clone()


def _vocabulary_first(x):
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def _every_second(x):
    wide = x.new_full((*x.shape[:2], 2 * x.size(2)), math.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def _time_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _part(x):
    larger = x.new_full((x.size(0) + 1, x.size(1) + 2, x.size(2) + 3), math.nan)
    larger[1:, 1:-1, 2:-1] = x
    return larger[1:, 1:-1, 2:-1]


HALVES = (torch.float16, torch.bfloat16)
CASES = {
    **{f"{str(t)[6:]}_{v}": Case(width=v, dtype=t) for t in (torch.float32, *HALVES) for v in (6, 30, 33)},
    **{f"width_{v}": Case((3, 2), width=v) for v in (2, 3, 64, 130, 257)},
    **{f"one_frame_{v}": Case((1,), width=v) for v in (5, 32)},
    **{f"blank_{k}": Case(options={"blank_id": k}) for k in (2, 5)},
    **{f"temperature_{t:g}": Case(options={"temperature": t}) for t in (0.5, 4.0)},
    **{f"padding_{v}": Case(change=_pad(v)) for v in (0.0, 1e4, INFINITY, -INFINITY, math.nan)},
    "float64": Case(dtype=torch.float64),
    "peaky": Case(scale=12.0),
    "log_probabilities": Case(change=_log_probs),
    "all_blank": Case(change=_set("teacher", 30.0, 0)),
    "no_blank": Case(change=_set("teacher", 30.0, 3)),
    "ties": Case(change=_set("teacher", 1.0), options={"blank_id": 2}),
    "empty_utterance": Case(change=_empty),
    "impossible_token": Case(change=_set("both", -INFINITY, 4)),
    "impossible_token_of_the_teacher": Case(change=_set("teacher", -INFINITY, 4)),
    "certain_teacher_token": Case(change=_certain("teacher", 2), exact=False),
    "certain_teacher_blank": Case(change=_certain("teacher", 0), exact=False),
    "certain_both_token": Case(change=_certain("both", 2), exact=False),
    "certain_both_blank": Case(change=_certain("both", 0), exact=False),
    "student_most_wrong": Case(change=_wrong, width=31, exact=False),
    **{f"big_{str(t)[6:]}": Case(dtype=t, change=_set("both", -1e4, 5), exact=False) for t in HALVES},
    "vocabulary_first": Case(storage=(_vocabulary_first, torch.clone)),
    "every_second": Case(storage=(torch.clone, _every_second)),
    "time_first": Case(storage=(_time_first, torch.clone), width=8),
    "part_of_a_larger": Case(storage=(_part, _time_first), width=33),
    "nothing": Case(frames=lambda teacher, lengths: torch.zeros(teacher.shape[:2], dtype=torch.bool)),
    "beyond": Case(frames=_beyond, change=_pad(math.nan)),
    "beyond_everywhere": Case(frames=lambda t, lengths: torch.ones(t.shape[:2], dtype=torch.bool), change=_pad(5.0)),
    "symmetric": Case((9, 5, 1), scale=1.0, frames=_selection("symmetric", n=1)),
    "threshold": Case((9, 5, 1), scale=1.0, frames=_selection("threshold", theta=0.3)),
    "elimination": Case((9, 5, 1), scale=1.0, frames=_selection("elimination")),
    "trim": Case((9, 5, 1), scale=1.0, frames=_selection("trim")),
}


def with_gradient(name, student, teacher, lengths, frames, options):
    """The loss and its gradient with respect to the student."""
    student = student.detach().requires_grad_()
    loss = LOSSES[name](student, teacher, lengths, frames=frames, **options)
    loss.backward()
    return loss.detach().cpu(), student.grad.cpu()


def check(name, case, backend, device="cpu", kept=None):
    """Compare value and gradient of one loss in one case with float64, and the value with the slow reference.

    With ``backend`` None, the library chooses for the device. ``kept`` is the number of teacher tokens per frame that
    are kept, as in a cache.
    """
    student, teacher, lengths, frames, counted = case.make(device)
    exact = [x.cpu().double().contiguous() for x in (student, teacher)]
    if kept is not None:
        exact[1] = compress(exact[1], kept, (case.options.get("temperature", 1.0),))
        full = torch.promote_types(case.dtype, torch.float32)
        teacher = exact[1].map(lambda x: (x.to(full) if x.is_floating_point() else x).to(device))
    if backend is None:
        got, grad = with_gradient(name, student, teacher, lengths, frames, case.options)
    else:
        with using(backend):
            got, grad = with_gradient(name, student, teacher, lengths, frames, case.options)
    assert got.dtype == torch.promote_types(case.dtype, torch.float32) and grad.dtype == case.dtype
    # float64 holds the inputs exactly, whatever their type, so that any difference is an error of the arithmetic.
    with using("rows"):
        moved = None if frames is None else frames.cpu()
        expected, expected_grad = with_gradient(name, *exact, lengths.cpu(), moved, case.options)
    assert expected.isfinite() and got.isfinite()
    tolerance = 1e-11 if case.dtype == torch.float64 else VALUE
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=1e-7 * (case.dtype != torch.float64))
    if case.exact and kept is None and counted.any():
        more = {"max_delay": 2, "lengths": lengths.cpu()} if name == "delayed_kl" else {}
        slow = REFERENCES.get(name) or getattr(reference, name)
        slow = slow(*exact, counted, **{"blank_id": 0, "temperature": 1.0, **case.options}, **more)
        torch.testing.assert_close(got.double(), torch.tensor(slow, dtype=torch.float64), rtol=tolerance, atol=1e-7)
    assert grad.isfinite().all()
    assert (grad[~fr.valid(lengths.cpu(), grad.size(1))] == 0).all()
    # A gradient is a difference of numbers of about 1 / frames. Where they cancel, their rounding error remains, so
    # that the largest element is taken as 1e-2 at least.
    largest = expected_grad.abs().max().clamp(min=1e-2)
    error = ((grad.double() - expected_grad).abs().max() / largest).item()
    assert error <= GRADIENT[case.dtype], f"relative error of the gradient {error:.1e}"


def pairs(names):
    """All (loss, case) pairs, except those in which ``consistency`` would be infinite."""
    wrong = {k for k in CASES if k.startswith("certain_teacher") or k.endswith("of_the_teacher")}
    return [(name, key) for name in names for key in CASES if name != "consistency" or key not in wrong]


def cached_pairs(names):
    """The ``pairs`` whose teacher can come from a cache, in which blank is token 0."""
    return [(n, key) for n, key in pairs(names) if n != "consistency" and not CASES[key].options.get("blank_id")]


def failures(names, backend=None, device="cpu", kept=None):
    """One line for each case that fails."""
    wrong = []
    for name, key in pairs(names) if kept is None else cached_pairs(names):
        try:
            check(name, CASES[key], backend, device, kept)
        except AssertionError as e:
            wrong.append(f"{name}, case {key}: {str(e).splitlines()[0] if str(e) else 'not finite'}")
    return wrong


def interpreted():
    """Run the cases through the kernels, with each row whole, in two parts or in blocks.

    Returns the number of checks and one line for each that fails. The interpreter is slow, so that each case runs only
    three checks: one with a fixed loss and two with a loss that changes from case to case.
    """
    from espnet_kd.losses import fused

    count, wrong = 0, []
    for whole in (8192, 16):
        sizes = {"_WHOLE": whole, "_BACKWARD": min(whole, 1024), "_SMALL": 1}
        with patch.multiple(fused, **sizes):
            for number, (key, case) in enumerate(CASES.items()):
                if whole == 16 and case.width <= 16 or case.dtype == torch.float64:
                    continue
                turn = FUSED[number % len(FUSED)]
                for name, kept in (("factorized_kl_all", None), (turn, None), (turn, 3)):
                    if kept and case.options.get("blank_id"):
                        continue
                    count += 1
                    try:
                        check(name, case, "fused", kept=kept)
                    except AssertionError as e:
                        wrong.append(f"{name}, case {key}, blocks of {whole}, kept {kept}: {e}")
    return count, wrong


def main(device=None):
    """Check in the interpreter without a device; else on the device, with the chosen backend and in plain torch."""
    torch.set_num_threads(1)
    if device is None:
        count, wrong = interpreted()
    else:
        x = torch.zeros(1, 1, 1, device=device)
        print(f"on {device} (torch {torch.__version__}) the kernels' losses are {backend_of(x, x)}")
        count = 2 * (len(pairs(LOSSES)) + len(cached_pairs(LOSSES)))
        wrong = [
            line for forced in (None, "masked") for kept in (None, 3) for line in failures(LOSSES, forced, device, kept)
        ]
    print(*wrong, f"{count - len(wrong)} cases agree, {len(wrong)} do not", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
