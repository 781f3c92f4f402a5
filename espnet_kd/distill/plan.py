"""The KD stages of a page as phases of one training, with the objectives and weights of each step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from espnet_kd.cli import UserError
from espnet_kd.distill.schedule import Position, Progress, Ramp, Weight, end_of, weight_at

if TYPE_CHECKING:
    from espnet_kd.distill.page import KDStage, ObjectiveSpec, Page

#: Shares of a training are sums of decimal fractions; differences below this are rounding.
TINY = 1e-9


@dataclass
class Phase:
    """A KD stage with its place in the training, both ends as shares of it."""

    index: int  #: in the plan, from 0
    part: int  #: number of the restarts up to it; phases of one part have the same optimizer and schedule
    stage: KDStage
    begin: float
    end: float
    terms: List[Tuple[ObjectiveSpec, Weight]]  #: its own objectives, and those kept from the previous KD stage

    def epochs(self, max_epoch: int) -> Tuple[int, int]:
        """The epochs in which it begins and ends, from 1."""
        return math.floor(self.begin * max_epoch + TINY) + 1, math.ceil(self.end * max_epoch - TINY)


@dataclass
class Moment:
    """A phase, and the position in it, which determine the weights of a step."""

    phase: Phase
    position: Position

    def __call__(self, weight: Weight) -> float:
        """The value of a weight at this moment."""
        return weight_at(weight, self.position)


@dataclass
class Plan:
    """All KD stages that a student is trained with."""

    page: Page
    max_epoch: int
    phases: List[Phase]

    @property
    def numbers(self) -> List[int]:
        """The KD stages' numbers in the page."""
        return [phase.stage.number for phase in self.phases]

    @property
    def options(self) -> Dict[str, Any]:
        """The options of ESPnet that its page sets for these KD stages."""
        return self.page.options(self.phases[-1].stage)

    def at(self, progress: Progress) -> Moment:
        """The phase and position of a training step."""
        phase = next((p for p in self.phases if progress.fraction < p.end - TINY), self.phases[-1])
        return Moment(phase, progress.within(phase.begin, phase.end))

    def in_epoch(self, epoch: int) -> Iterator[Moment]:
        """Yield the first and the last moment in an epoch of each phase that has a part in it."""
        first, end = (epoch - 1) / self.max_epoch, epoch / self.max_epoch
        for phase in self.phases:
            begin, until = max(phase.begin, first), min(phase.end, end)
            if until - begin > TINY:
                for share in (begin, until):
                    within = ((x - phase.begin) / (phase.end - phase.begin) for x in (share, first))
                    yield Moment(phase, Position(*(min(max(x, 0.0), 1.0) for x in within)))

    @property
    def last(self) -> Moment:
        """The end of the training. Validation uses its weights in every epoch, so that epochs can be compared."""
        return Moment(self.phases[-1], Position(1.0, 1.0))

    def phase(self, number: Optional[int]) -> Phase:
        """The phase of a KD stage; None: of the last."""
        return self.phases[-1] if number is None else self.phases[self.numbers.index(number)]

    def end_epoch(self, number: Optional[int]) -> int:
        """The epoch in which a KD stage ends; None: the last one does."""
        return self.phase(number).epochs(self.max_epoch)[1]

    def share(self, part: int) -> float:
        """The share of the training that a part has: KD stages with the same optimizer and schedule."""
        return sum(phase.end - phase.begin for phase in self.phases if phase.part == part)

    def before(self, epoch: int) -> Phase:
        """The phase in which the epoch before ``epoch`` ends; before the first epoch: the first phase."""
        return next(p for p in self.phases if (epoch - 1) / self.max_epoch <= p.end + TINY)

    def as_record(self) -> List[Dict[str, Any]]:
        """The phases as JSON."""
        return [
            {
                "kd_stage": p.stage.number,
                "name": p.stage.name,
                "share": p.stage.share,
                "epochs": list(p.epochs(self.max_epoch)),
                "restart": p.stage.restart,
                "ctc": {"weight": weight_record(p.stage.ctc_weight), "per": p.stage.ctc_per},
                "attention": weight_record(p.stage.attention_weight),
                "objectives": [{"objective": o.name, "weight": weight_record(w), **o.conf} for o, w in p.terms],
            }
            for p in self.phases
        ]


def make_plan(page: Page, max_epoch: int, wanted: Optional[Sequence[int]] = None) -> Plan:
    """Distribute KD stages over ``max_epoch`` epochs: each has its share, and the last one has the rest.

    The last KD stage thus also has the share of those that are left out, and every student trains ``max_epoch`` epochs.
    A KD stage may begin at any step.

    Args:
        wanted: numbers of the KD stages to use; default: all.

    Raises:
        UserError: the page has no such KD stage.
    """
    chosen = sorted(set(wanted or range(1, len(page.stages) + 1)))
    if chosen[0] < 1 or chosen[-1] > len(page.stages):
        raise UserError(f"--kd_stages {chosen}: {page.path} has KD stages 1 to {len(page.stages)}")
    stages = [page.stages[k - 1] for k in chosen]
    phases: List[Phase] = []
    begin = 0.0
    for stage, following in zip(stages, [*stages[1:], None]):
        end = begin + stage.share if following else 1.0
        before = phases[-1].terms if phases else []
        own = {o.key for o in stage.objectives}
        kept = [(o, end_of(w)) for o, w in before if o.key not in own and (stage.keep == "all" or o.key in stage.keep)]
        part = phases[-1].part + stage.restart if phases else 0
        phases.append(Phase(len(phases), part, stage, begin, end, [*kept, *((o, o.weight) for o in stage.objectives)]))
        begin = end
    return Plan(page, max_epoch, phases)


def weight_record(weight: Weight) -> Union[float, Dict[str, Any]]:
    """A weight as JSON."""
    return asdict(weight) if isinstance(weight, Ramp) else weight
