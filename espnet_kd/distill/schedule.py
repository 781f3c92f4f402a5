"""The position in a training, and weights that depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Optional, Sized, Union

if TYPE_CHECKING:
    from espnet2.iterators.abs_iter_factory import AbsIterFactory


@dataclass(frozen=True)
class Position:
    """A point of a KD stage: 0 at its beginning, 1 at its end."""

    fraction: float
    epoch_fraction: float  #: the same, but constant within an epoch


@dataclass
class Progress:
    """A position in a training. Epochs count from 1. It is not in the checkpoint, but set again after a resume."""

    epoch: int = 1
    max_epoch: int = 1
    step: int = 0  #: step in this epoch, from 0
    steps_per_epoch: Optional[int] = None  #: of the data loader, or else known after the first epoch
    updates: Optional[int] = None  #: optimizer updates in this epoch; None: no epoch has begun

    @property
    def fraction(self) -> float:
        """Finished share of the training, 0…1."""
        within = min(self.step / self.steps_per_epoch, 1.0) if self.steps_per_epoch else 0.0
        return min((self.epoch - 1 + within) / max(self.max_epoch, 1), 1.0)

    @property
    def epoch_fraction(self) -> float:
        """Like ``fraction``, but constant within an epoch."""
        return min((self.epoch - 1) / max(self.max_epoch, 1), 1.0)

    def within(self, begin: float, end: float) -> Position:
        """The position in a part of the training from the share ``begin`` to the share ``end``."""
        shares = ((x - begin) / (end - begin) for x in (self.fraction, self.epoch_fraction))
        return Position(*(min(max(x, 0.0), 1.0) for x in shares))

    def count_update(self, *_: Any) -> None:
        """Count an update; a hook for an optimizer's ``register_step_post_hook``."""
        self.updates = (self.updates or 0) + 1


@dataclass
class Ramp:
    """A weight that moves linearly from ``start`` to ``end`` between two shares of the KD stage, by step or epoch."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    by: str = "step"

    def __call__(self, position: Union[Position, Progress]) -> float:
        """The weight at ``position``."""
        fraction = position.fraction if self.by == "step" else position.epoch_fraction
        if fraction >= self.until:
            return self.end
        done = max(fraction - self.begin, 0.0) / (self.until - self.begin)
        return self.start + (self.end - self.start) * done


Weight = Union[float, Ramp]


def weight_at(weight: Weight, position: Union[Position, Progress]) -> float:
    """A constant weight, or the value of a ramp."""
    return weight(position) if isinstance(weight, Ramp) else weight


def end_of(weight: Weight) -> float:
    """A constant weight, or the value that a ramp ends with."""
    return weight.end if isinstance(weight, Ramp) else weight


class EpochHooks:
    """An iterator factory (ESPnet's ``AbsIterFactory``) that reports epoch and step to :class:`Progress`.

    ESPnet's trainer has no hooks, but calls ``build_iter(epoch)`` in the training process at the start of each epoch,
    also after a resume and in every spawned process.
    """

    def __init__(
        self,
        factory: AbsIterFactory,
        progress: Progress,
        at_epoch: Callable[[int], None],
        at_step: Callable[[], None] = lambda: None,
    ):
        self.factory = factory
        self.progress = progress
        self.at_epoch = at_epoch  #: called before an epoch, with its number
        self.at_step = at_step  #: called before each step

    def build_iter(self, epoch: int, shuffle: Optional[bool] = None) -> Iterator:
        """Yield the wrapped factory's batches, and count them in ``progress``."""
        self.at_epoch(epoch)
        self.progress.epoch, self.progress.step, self.progress.updates = epoch, 0, 0
        batches = self.factory.build_iter(epoch, shuffle)
        # If their number is known beforehand, a ramp continues after a resume as without an interruption. Asked of the
        # data loader, not of the factory, because an epoch may have another number than the first one.
        if isinstance(batches, Sized):
            self.progress.steps_per_epoch = len(batches)
        return self._count(batches)

    def _count(self, batches: Iterable) -> Iterator:
        steps = 0
        for steps, batch in enumerate(batches, 1):
            self.at_step()
            yield batch
            self.progress.step = steps
        self.progress.steps_per_epoch = steps
