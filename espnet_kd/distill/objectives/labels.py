"""Objectives that train with labels: heads on inner layers, a self-student inside the encoder, the teacher's N-best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict, List, Literal, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives.base import (
    Batch,
    Objective,
    SoftenedObjective,
    check_layers,
    check_weights,
    resolve_layer,
    taps_at,
)
from espnet_kd.distill.objectives.posteriors import FrameObjective
from espnet_kd.distill.schedule import Position
from espnet_kd.inference.encode import StudentOutputs, TeacherOutputs
from espnet_kd.losses.common import full_precision
from espnet_kd.targets.nbest import weights
from espnet_kd.targets.teacher import Teacher

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

HALF = 0.5  #: the depth at which the self-student ends by default, as a share of the layers


@dataclass(kw_only=True)
class UtteranceObjective(Objective):
    """An objective that has no option ``per``: its loss is a CTC loss, or none."""

    per: Literal["utterance", "frame"] = field(init=False, default="utterance")


@dataclass(kw_only=True)
class InterCTC(UtteranceObjective):
    """Intermediate CTC as ESPnet's: CTC of inner layers through the student's own head, averaged over the layers."""

    needs_teacher = False
    needs_text = True

    layers: Sequence[float] = (0.5,)  #: layer numbers, or shares of the depth (0.5: the middle layer)

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        check_layers(self.layers)

    def place(self, student: ESPnetASRModel) -> None:
        """See :class:`Objective`."""
        self.student_taps = taps_at(self.layers, student)

    def __call__(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`."""
        assert batch.ctc is not None and batch.ctc_head is not None
        each = [batch.ctc(batch.ctc_head(student.hidden[tap]), student.lengths) for tap in self.student_taps]
        return torch.stack(each).mean(), {}


@dataclass(kw_only=True)
class InterKD(SoftenedObjective):
    """CTC + λ·‖p − q‖² at heads of their own on inner layers (averaged over the layers), and λ·‖p − q‖² at the end.

    Inter-KD: Yoon et al., SLT 2022. λ and the places of the layers are those of a public port; the average over the
    layers is a reconstruction. ``per`` is the scale of ‖p − q‖².
    """

    needs_text = True
    statistics = ("loss_ctc_inner", "loss_l2")

    #: Layer numbers, or shares of the depth; the port has 18, 24 and 30 of 33 layers.
    layers: Sequence[float] = (0.55, 0.73, 0.91)
    l2_weight: float = 0.25  #: λ

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        check_layers(self.layers)
        check_weights(l2_weight=self.l2_weight)

    def place(self, student: ESPnetASRModel) -> None:
        """See :class:`Objective`."""
        self.student_taps = taps_at(self.layers, student)

    def build(self, student: ESPnetASRModel, teacher: Optional[Teacher]) -> torch.nn.ModuleList:
        """One CTC head per layer."""
        self.heads = torch.nn.ModuleList(new_head(student) for _ in self.student_taps)
        return self.heads

    def __call__(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`."""
        assert target is not None and batch.ctc is not None
        inner = [log_probs(head, student.hidden[tap]) for head, tap in zip(self.heads, self.student_taps)]
        ctc = torch.stack([batch.ctc(q, student.lengths) for q in inner]).mean()
        final, *distances = (self._distance(q, student, target) for q in [student.logits, *inner])
        l2 = final + torch.stack(distances).mean()
        return ctc + self.l2_weight * l2, {"loss_ctc_inner": ctc.detach(), "loss_l2": l2.detach()}

    def _distance(self, q: Tensor, student: StudentOutputs, target: TeacherOutputs) -> Tensor:
        mean = losses.softmax_l2(q, target.logits, target.lengths, temperature=self.temperature)
        return self.scale(mean, target.lengths.sum(), student)


@dataclass(kw_only=True)
class SelfKD(FrameObjective):
    """CTC of the self-student + KL(sg self-teacher ‖ self-student), both inside one encoder.

    The self-teacher is the whole student of the YAML file. The self-student is its first layers with a linear head of
    their own, and is what the export keeps. The page multiplies the self-teacher's CTC by 1 − α and this loss by α.
    Frames are selected by the self-teacher's posteriors (the paper advises against leaving out blank frames), and
    ``per`` is the scale of the KL. Source: Kim, Kim, Lee, Interspeech 2024.
    """

    needs_teacher = False
    needs_text = True
    statistics = ("loss_ctc_student", "loss_kl_student")

    layer: float = HALF  #: the self-student's last layer: a number, or a share of the depth

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        check_layers([self.layer])

    def place(self, student: ESPnetASRModel) -> None:
        """See :class:`Objective`."""
        if getattr(student.encoder, "interctc_use_conditioning", False):
            # Its layers get the predictions of the self-teacher's head; after the export, the self-student's.
            raise UserError("self-KD cannot export an encoder with interctc_use_conditioning; switch it off")
        if student.postencoder is not None:
            # It follows the last layer; the self-student's head does not read it, but the exported model would.
            raise UserError("self-KD cannot export a student with a postencoder; leave it out")
        super().place(student)
        self.student_taps = taps_at([self.layer], student)

    def build(self, student: ESPnetASRModel, teacher: Optional[Teacher]) -> torch.nn.Linear:
        """The self-student's head, which is all that is added to plain training.

        On a page with a teacher, the student is initialised with the teacher's layers, and this head with the student's
        [ours].
        """
        self.head = new_head(student)
        if teacher is not None:
            self.head.load_state_dict(student.ctc.ctc_lo.state_dict())
        return self.head

    def __call__(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`."""
        assert batch.ctc is not None
        q = log_probs(self.head, student.hidden[self.student_taps[0]])
        ctc = batch.ctc(q, student.lengths)
        frames = self.selection(student.logits.detach(), student.lengths)
        kl = losses.kl(q, student.logits, student.lengths, temperature=self.temperature, frames=frames)
        kl = self.factor * self.scale(kl, frames.sum(), student)
        return ctc + kl, {"loss_ctc_student": ctc.detach(), "loss_kl_student": kl.detach()}

    @classmethod
    def export(
        cls, key: str, options: Dict[str, Any], config: Dict[str, Any], state: Dict[str, Tensor]
    ) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
        """Keep the first layers and their head, and drop a hybrid's decoder, whose input is the last layer."""
        head = {name: state[k] for name in ("weight", "bias") if (k := f"kd_heads.{key}.{name}") in state}
        if len(head) < 2:
            raise UserError("the self-student's head is not in this file; give the experiment, or an …epoch.pth of it")
        conf = dict(config["encoder_conf"])
        depth = len({k.split(".")[2] for k in state if k.startswith("encoder.encoders.")})
        layer = resolve_layer(options.get("layer", HALF), depth)
        for name, value in conf.items():  # per-layer options
            if isinstance(value, list) and len(value) == depth and name != "interctc_layer_idx":
                conf[name] = value[:layer]
        inner = [n for n in conf.get("interctc_layer_idx") or [] if n < layer]
        conf.update(num_blocks=layer, **({"interctc_layer_idx": inner} if "interctc_layer_idx" in conf else {}))
        model_conf = {**(config.get("model_conf") or {}), "ctc_weight": 1.0}
        if not inner:
            model_conf.pop("interctc_weight", None)
        kept = {
            k: v
            for k, v in state.items()
            if not k.startswith("decoder.")
            and not (k.startswith("encoder.encoders.") and int(k.split(".")[2]) >= layer)
        }
        kept.update({f"ctc.ctc_lo.{name}": value for name, value in head.items()})
        return {**config, "encoder_conf": conf, "model_conf": model_conf}, kept


@dataclass(kw_only=True)
class SequenceKD(UtteranceObjective):
    """CTC of the teacher's N best hypotheses, weighted by their renormalised scores (Takashima et al.)."""

    needs_teacher = False  # the hypotheses are read from a file

    nbest: int = 5  #: the number of hypotheses of each utterance, at most

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        if self.nbest < 1:
            raise UserError(f"nbest: must be 1 or more, not {self.nbest}")

    def __call__(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`."""
        assert batch.ctc is not None and batch.nbest is not None
        lists = [hypotheses[: self.nbest] for hypotheses in batch.nbest]
        shares = [weights([score for score, _ in hypotheses]) for hypotheses in lists]
        total = student.logits.new_zeros(())
        for rank in range(max(map(len, lists))):
            labels: List[Sequence[int]] = [h[rank][1] if rank < len(h) else () for h in lists]
            shares_of_rank = [w[rank] if rank < len(w) else 0.0 for w in shares]
            # Each is made on the CPU and moved in one piece, so that the host does not wait.
            text, lengths, weight = (
                x.to(student.logits.device, non_blocking=True)
                for x in (
                    _padded(labels),
                    torch.tensor([len(x) for x in labels], device="cpu"),
                    torch.tensor(shares_of_rank, dtype=student.logits.dtype, device="cpu"),
                )
            )
            total = total + batch.ctc(student.logits, student.lengths, text, lengths, weight)
        return total, {}


class LayerPruning(UtteranceObjective):
    """An initialisation without a loss: the student begins with the teacher's features, pre-encoder, input layer,
    lowest layers and CTC head. A hybrid student's attention decoder is new.
    """

    reads_target = False

    def init_student(self, student: ESPnetASRModel, teacher: Optional[Teacher]) -> None:
        """Copy the teacher's frontend, normalisation, encoder and CTC head, and what is between them, as far as the
        student has them.

        Raises:
            UserError: the teacher lacks one of the student's parameters, or has it in another size.
        """
        assert teacher is not None
        mine, theirs = student.state_dict(), teacher.state_dict()
        for name, value in mine.items():
            if not name.startswith(("frontend.", "normalize.", "preencoder.", "encoder.", "postencoder.", "ctc.")):
                continue
            if name not in theirs or theirs[name].shape != value.shape:
                found = tuple(theirs[name].shape) if name in theirs else "absent"
                raise UserError(
                    f"layer pruning copies the teacher's lower layers, for which the sizes must be equal: {name} is "
                    f"{tuple(value.shape)} in the student, {found} in the teacher {teacher.name}"
                )
            mine[name] = theirs[name]
        student.load_state_dict(mine)

    def compute(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Tensor]:
        """Return 0: the student is trained with the page's CTC."""
        return student.logits[..., :0].sum(), student.lengths.sum()


def _padded(labels: Sequence[Sequence[int]]) -> Tensor:
    """B sequences as one tensor (B, L) on the CPU; L is at least 1."""
    rows = [torch.tensor(x, dtype=torch.long, device="cpu") for x in labels]
    text = pad_sequence(rows, batch_first=True)
    return text if text.size(1) else text.new_zeros(len(rows), 1)


def new_head(student: ESPnetASRModel) -> torch.nn.Linear:
    """A new CTC head of the same size as the student's."""
    return torch.nn.Linear(student.encoder.output_size(), student.ctc.ctc_lo.out_features)


def log_probs(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The log-probabilities (B, T, V) of a head, in float32 or float64."""
    return full_precision(head(hidden)).log_softmax(-1)
