"""Objectives: what pulls the student toward the teacher. One class each, looked up by name in a method page.

A new one is a subclass of :class:`Objective` with ``compute``, and a line in ``OBJECTIVES`` (or, from outside the
package, a dotted path in the page).
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

__all__ = ["OBJECTIVES", "Batch", "Objective", "lay_on"]
