"""Objectives: the losses that train a student to follow its teacher. Each is a class that method pages name.

A new objective is a subclass of :class:`PosteriorObjective` with ``loss``, or of :class:`Objective` with ``compute``,
and a line in ``OBJECTIVES``. A class outside the package needs no such line: the page names its dotted path.
"""

from espnet2.train.class_choices import ClassChoices

from espnet_kd.distill.objectives.base import Batch, Objective, lay_on
from espnet_kd.distill.objectives.labels import InterCTC, InterKD, LayerPruning, SelfKD, SequenceKD
from espnet_kd.distill.objectives.posteriors import (
    KL,
    AttentionKL,
    BlankKL,
    Consistency,
    DelayedKL,
    FactorizedKL,
    GuidedCTC,
    PosteriorObjective,
    SoftmaxL2,
)
from espnet_kd.distill.objectives.representations import FactorizedRepresentation, WeightedRepresentation

OBJECTIVES = ClassChoices(
    "kd_objective",
    classes=dict(
        kl=KL,
        softmax_l2=SoftmaxL2,
        guided_ctc=GuidedCTC,
        blank_kl=BlankKL,
        factorized_kl=FactorizedKL,
        factorized_representation=FactorizedRepresentation,
        weighted_representation=WeightedRepresentation,
        delayed_kl=DelayedKL,
        attention_kl=AttentionKL,
        sequence_kd=SequenceKD,
        inter_ctc=InterCTC,
        inter_kd=InterKD,
        self_kd=SelfKD,
        consistency=Consistency,
        layer_pruning=LayerPruning,
    ),
    type_check=Objective,
    default=None,
)

__all__ = ["OBJECTIVES", "Batch", "Objective", "PosteriorObjective", "lay_on"]
