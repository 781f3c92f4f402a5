"""Valid and non-blank frames, and the alignment of a teacher's frames with a student's."""

import math
from fractions import Fraction

import pytest
import torch

from espnet_kd import frames as fr

WIDTH = 4


def test_valid():
    assert fr.valid(torch.tensor([3, 0, 1]), 3).int().tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("blank_id", [0, 2])
def test_nonblank(blank_id):
    best = torch.tensor([[0, 1, 2, 0], [2, 2, 3, 1]])
    logits = torch.nn.functional.one_hot(best, WIDTH).float()
    frames = fr.valid(torch.tensor([4, 2]), 4)
    expected = [[b != blank_id and t < n for t, b in enumerate(row)] for row, n in zip(best.tolist(), (4, 2))]
    assert fr.nonblank(logits, frames, blank_id).tolist() == expected


@pytest.mark.parametrize(
    "shift, other, ratio",
    [(0.04, 0.04, 1), (0.08, 0.04, 2), (0.06, 0.04, 1.5), (0.04, 0.08, 0.5), (0.0401, 0.02, 2), (0.05, 0.04, 1.25)],
)
def test_nearest_multiple(shift, other, ratio):
    assert fr.nearest_multiple(shift, other) == pytest.approx(ratio, abs=1e-12)


def teacher(lengths, spikes=(), padding=math.nan, seed=0):
    """Logits sure of blank but at ``spikes`` {(utterance, frame): token}, and hidden states, both with ``padding``."""
    g = torch.Generator().manual_seed(seed)
    num = max(lengths) + 2
    logits = torch.rand(len(lengths), num, WIDTH, generator=g)
    logits[..., 0] += 8.0
    for (b, t), token in dict(spikes).items():
        logits[b, t, token] += 20.0
    hidden = torch.randn(len(lengths), num, 3, generator=g)
    for x in (logits, hidden):
        x[~fr.valid(torch.tensor(lengths), num)] = padding
    return logits, hidden


def covered_frames(i, ratio, length):
    """The definition: the teacher frames in [i·r, (i+1)·r); for r < 1, the frame that holds the middle."""
    if ratio < 1:
        return [t for t in [int((i + 0.5) * ratio)] if t < length]
    return [t for t in range(length) if i * ratio <= t < (i + 1) * ratio]


def lay(logits, hidden, lengths, ratio, student_lengths, **options):
    student_lengths = torch.tensor(student_lengths)
    return fr.align(
        logits, {"encoder": hidden}, torch.tensor(lengths), 0.04, int(student_lengths.max()), student_lengths,
        0.04 * ratio, **options,
    )  # fmt: skip


RATIOS = [1, 2, 3, 1.5, 2.5, 0.5, 2 / 3]
each_ratio = pytest.mark.parametrize("ratio", RATIOS)


@each_ratio
@pytest.mark.parametrize("short", [0, 1])
def test_align_by_its_definition(ratio, short):
    """Each student frame gets the covered frame with the least blank, and the mean hidden state; lengths from 1."""
    lengths = list(range(1, 14))
    logits, hidden = teacher(lengths)
    student_lengths = [max(1, math.ceil(n / ratio) - short) for n in lengths]
    got, got_hidden, both = lay(logits, hidden, lengths, ratio, student_lengths)
    p_blank = logits.softmax(-1)[..., 0]
    assert got.shape == (len(lengths), max(student_lengths), WIDTH)
    for b, (n, m) in enumerate(zip(lengths, student_lengths)):
        filled = 0
        for i in range(m):
            frames = covered_frames(i, ratio, n)
            if not frames:
                break
            filled += 1
            least = min(frames, key=lambda t: p_blank[b, t])
            assert torch.equal(got[b, i], logits[b, least]), (b, i)
            torch.testing.assert_close(got_hidden["encoder"][b, i], hidden[b, frames].mean(0))
        # ``both`` counts the student frames that cover a teacher frame, so that padding (NaN here) is never chosen.
        assert both[b] == filled
        assert filled >= m - 1
    inside = fr.valid(both, got.size(1))
    assert got[inside].isfinite().all() and got_hidden["encoder"][inside].isfinite().all()


@pytest.mark.parametrize("teacher_ms, student_ms", [(10, 24), (10, 48), (12.5, 10), (12.5, 30), (40, 30), (20, 40)])
def test_rounding_moves_no_frame(teacher_ms, student_ms):
    """Ratios such as 2.4 have no exact binary form."""
    length, ratio = 480, Fraction(student_ms) / Fraction(teacher_ms)
    frames = int(length / ratio)
    hidden = {"encoder": torch.arange(length, dtype=torch.float64)[None, :, None]}
    _, found, _ = fr.align(
        torch.zeros(1, length, 2), hidden, torch.tensor([length]), teacher_ms / 1000, frames, torch.tensor([frames]),
        student_ms / 1000,
    )  # fmt: skip
    for i, mean in enumerate(found["encoder"][0, :, 0].tolist()):
        covered = range(math.ceil(i * ratio), math.ceil((i + 1) * ratio))
        if ratio < 1:
            covered = [math.floor((i + Fraction(1, 2)) * ratio)]
        assert mean == pytest.approx(sum(covered) / len(covered), rel=1e-6), i


@pytest.mark.parametrize("ratio", [1, 2, 3, 1.5])
@pytest.mark.parametrize("blank_id", [0, 3])
def test_every_spike_survives(ratio, blank_id):
    length = 24
    step = math.ceil(ratio)
    spikes = {(0, t): 1 + (t // step) % 2 for t in range(0, length, step)}
    logits, hidden = teacher([length], spikes)
    logits[..., [0, blank_id]] = logits[..., [blank_id, 0]]
    got, _, both = lay(logits, hidden, [length], ratio, [math.ceil(length / ratio)], blank_id=blank_id)
    best = got[0, : both[0]].argmax(-1)
    # Spikes are at least r frames apart, so no two of them share a student frame.
    assert best[best != blank_id].tolist() == list(spikes.values())


def test_mean_pooling_averages_probabilities():
    logits, hidden = teacher([6])
    got, _, both = lay(logits, hidden, [6], 2, [3], pool="mean")
    assert both.tolist() == [3]
    expected = logits[:, :6].softmax(-1).unflatten(1, (3, 2)).mean(2)
    torch.testing.assert_close(got.exp(), expected)


def test_mean_pooling_over_an_odd_end_and_an_impossible_token():
    logits, hidden = teacher([5, 3])
    logits[..., 3] = -math.inf
    got, _, both = lay(logits, hidden, [5, 3], 2, [3, 2], pool="mean")
    assert both.tolist() == [3, 2]
    torch.testing.assert_close(got[0, 2].exp(), logits[0, 4].softmax(-1))
    torch.testing.assert_close(got[1, 1].exp(), logits[1, 2].softmax(-1))
    assert not got[0, :3].isnan().any()


@pytest.mark.parametrize(
    "ratio, lengths, student_lengths",
    [(1, [70], [73]), (1, [73], [70]), (2, [45], [20]), (1.5, [30], [24]), (0.5, [20], [45]), (1, [9, 50], [9, 47])],
)
def test_lengths_too_far_apart_are_refused(ratio, lengths, student_lengths):
    logits, hidden = teacher(lengths)
    with pytest.raises(ValueError, match="more than two frames") as e:
        lay(logits, hidden, lengths, ratio, student_lengths)
    for part in (str(lengths), str(student_lengths), "40 ms", f"{40 * ratio:g} ms"):
        assert part in str(e.value)


@pytest.mark.parametrize(
    "ratio, lengths, student_lengths, both",
    [
        (1, [71], [73], [71]),
        (1, [73], [71], [71]),
        (2, [45], [21], [21]),
        (2, [40], [22], [20]),
        (1.5, [30], [22], [20]),
        (0.5, [20], [42], [40]),
        (0.5, [20], [38], [38]),
    ],
)
def test_small_leftovers_are_trimmed(ratio, lengths, student_lengths, both):
    logits, hidden = teacher(lengths)
    got, got_hidden, there = lay(logits, hidden, lengths, ratio, student_lengths)
    assert there.tolist() == both
    assert got.size(1) == got_hidden["encoder"].size(1) == student_lengths[0]
    assert got[0, : both[0]].isfinite().all()


@each_ratio
@pytest.mark.parametrize("pool", ["least_blank", "mean"])
def test_a_teacher_without_a_frame(ratio, pool):
    """All utterances of a batch are too short for the teacher, so that its cached targets have no frame at all."""
    nothing = torch.zeros(2, 0, WIDTH), torch.zeros(2, 0, 3)
    got, got_hidden, both = lay(*nothing, [0, 0], ratio, [1, 0], pool=pool)
    assert got.shape == (2, 1, WIDTH) and got_hidden["encoder"].shape == (2, 1, 3)
    assert both.tolist() == [0, 0]


def test_equal_rates_change_nothing():
    logits, hidden = teacher([5, 3], padding=0.0)
    got, got_hidden, both = lay(logits, hidden, [5, 3], 1, [5, 3])
    assert torch.equal(got, logits[:, :5]) and torch.equal(got_hidden["encoder"], hidden[:, :5])
    assert both.tolist() == [5, 3]


def test_a_shorter_padded_teacher_is_filled_up_outside_the_common_lengths():
    logits, hidden = teacher([5])
    got, got_hidden, both = lay(logits[:, :5], hidden[:, :5], [5], 1, [7])
    assert both.tolist() == [5]
    assert got.shape[1] == got_hidden["encoder"].shape[1] == 7


@pytest.mark.parametrize("ratio", [1, 2, 1.5, 0.5])
def test_rounding_of_the_shifts_does_not_matter(ratio):
    """Frame shifts are measured values: 39.9 and 80.1 ms must count as a ratio of 2."""
    lengths, student = [400], [math.ceil(400 / ratio)]
    logits, hidden = teacher(lengths)
    exact = lay(logits, hidden, lengths, ratio, student)
    args = (logits, {"encoder": hidden}, torch.tensor(lengths), 0.0399, student[0], torch.tensor(student))
    measured = fr.align(*args, 0.04 * ratio * 1.002)
    assert torch.equal(exact[2], measured[2])
    assert torch.equal(exact[0][0, : exact[2][0]], measured[0][0, : exact[2][0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_best(dtype):
    x = torch.randn(3, 5, 7, requires_grad=True).to(dtype)
    assert torch.equal(fr.best(x), x.argmax(-1))
    assert torch.equal(fr.best(x[0, 0]), x[0, 0].argmax(-1)) and fr.best(x[:0]).shape == (0, 5)
    assert fr.best(torch.zeros(2, 4)).tolist() == [0, 0]  # of equal values, the first is the best


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False")
@pytest.mark.parametrize("shift", [0.02, 0.04, 0.06, 0.08])
@pytest.mark.parametrize("pool", ["least_blank", "mean"])
def test_alignment_on_a_gpu_is_the_same_and_nothing_waits(shift, pool):
    generator = torch.Generator().manual_seed(0)
    logits, hidden = (torch.randn(2, 12, WIDTH, generator=generator) for _ in range(2))
    lengths = torch.tensor([12, 6])
    frames = math.ceil(12 * 0.04 / shift)
    given = logits, hidden, lengths, (lengths * 0.04 / shift).long()

    def laid(logits, hidden, lengths, student_lengths):
        return fr.align(logits, {"encoder": hidden}, lengths, 0.04, frames, student_lengths, shift, pool=pool)

    expected, there = laid(*given), [x.cuda() for x in given]
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            got = laid(*there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    inside = fr.valid(expected[2], frames)
    assert torch.equal(got[2].cpu(), expected[2])
    torch.testing.assert_close(got[0].cpu()[inside], expected[0][inside])
    torch.testing.assert_close(got[1]["encoder"].cpu()[inside], expected[1]["encoder"][inside])


def test_lengths_too_far_apart_name_the_utterances():
    logits, lengths = torch.zeros(2, 9, WIDTH), torch.tensor([9, 3])
    with pytest.raises(ValueError, match="teacher .*9, 3.*student .*9, 9.*, in the batch of a, b"):
        fr.align(logits, {}, lengths, 0.04, 9, torch.tensor([9, 9]), 0.04, utt_ids=("a", "b"))


def test_ends_of_80_ms_are_no_fault_whatever_the_frame_rate():
    """A convolution without padding loses 60 ms, which are three frames of 20 ms but only one and a half of 40 ms."""
    logits = torch.randn(1, 126, 5)
    out, _, both = fr.align(logits, {}, torch.tensor([126]), 0.02, 123, torch.tensor([123]), 0.02)
    assert out.shape == (1, 123, 5) and both.tolist() == [123]
    with pytest.raises(ValueError, match="teacher"):
        fr.align(logits, {}, torch.tensor([126]), 0.02, 121, torch.tensor([121]), 0.02)
