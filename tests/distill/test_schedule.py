"""The progress of a training, which the wrapper of the iterator factory counts."""

import pytest

from espnet_kd.distill.schedule import EpochHooks, Progress, Ramp


class Factory:
    """``loader`` makes an epoch's batches: an iterator, or as a data loader something that has a length."""

    def __init__(self, num, loader=iter):
        self.num, self.loader, self.asked = num, loader, []

    def build_iter(self, epoch, shuffle=None):
        self.asked.append((epoch, shuffle))
        return self.loader(range(self.num if isinstance(self.num, int) else self.num[epoch]))


def test_epochs_and_steps_are_counted():
    progress, epochs, factory = Progress(max_epoch=2), [], Factory(4)
    hooks = EpochHooks(factory, progress, epochs.append)
    seen = []
    for epoch in (1, 2):
        for batch in hooks.build_iter(epoch, True):
            seen.append((batch, progress.epoch, progress.step, progress.fraction))
    assert factory.asked == [(1, True), (2, True)] and epochs == [1, 2]
    assert [s[:3] for s in seen] == [(b, e, b) for e in (1, 2) for b in range(4)]
    # The first epoch's length is not known before its end.
    assert [s[3] for s in seen] == [0, 0, 0, 0, 0.5, 0.625, 0.75, 0.875]
    assert progress.fraction == 1.0


def test_a_resume_sets_it_anew():
    progress = Progress(max_epoch=4)
    next(EpochHooks(Factory(4), progress, lambda e: None).build_iter(3))
    assert (progress.epoch, progress.step, progress.fraction) == (3, 0, 0.5)


@pytest.mark.parametrize(
    "epoch, step, of, max_epoch, fraction", [(1, 0, None, 1, 0), (3, 9, 3, 2, 1), (1, 1, 2, 1, 0.5)]
)
def test_fraction_stays_within_bounds(epoch, step, of, max_epoch, fraction):
    assert Progress(epoch, max_epoch, step, of).fraction == fraction


def test_ramp_reaches_both_ends():
    ramp = Ramp(0.0, 2.0)
    assert [ramp(Progress(1, 1, s, 4)) for s in range(5)] == [0, 0.5, 1, 1.5, 2]


@pytest.mark.parametrize("by", ["step", "epoch"])
def test_a_ramp_goes_on_after_a_resume(by):
    """If the data loader has the length of an epoch, this includes the first epoch of the new process."""
    ramp = Ramp(0.3, 0.7, 0.3, 0.7, by)

    def weights(epochs):
        progress = Progress(max_epoch=4)
        hooks = EpochHooks(Factory(5, list), progress, lambda epoch: None)
        return [[ramp(progress) for _ in hooks.build_iter(epoch)] for epoch in epochs]

    whole = weights([1, 2, 3, 4])
    assert weights([3, 4]) == whole[2:]
    # This ramp is the α of self-KD: the progress, clipped to 0.3 and 0.7.
    done = [[(e + (s / 5 if by == "step" else 0)) / 4 for s in range(5)] for e in range(4)]
    assert whole == [pytest.approx([min(max(x, 0.3), 0.7) for x in epoch]) for epoch in done]


def test_epochs_of_different_length():
    """An iterator by category makes other batches in each epoch, which a resume must count as the unbroken training."""

    def fractions(epochs):
        progress = Progress(max_epoch=3)
        hooks = EpochHooks(Factory({1: 4, 2: 2, 3: 5}, list), progress, lambda epoch: None)
        return [[progress.fraction * 3 for _ in hooks.build_iter(epoch)] for epoch in epochs]

    whole = fractions([1, 2, 3])
    assert whole == [pytest.approx([e + s / n for s in range(n)]) for e, n in enumerate((4, 2, 5))]
    assert fractions([3]) == whole[2:]
