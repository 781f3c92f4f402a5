"""Objectives that train with labels: heads on inner layers, a second student inside the first, the teacher's N-best."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives.base import (
    Batch,
    Objective,
    check_layers,
    check_temperature,
    resolve_layer,
    taps_at,
)
from espnet_kd.distill.objectives.posteriors import Selection
from espnet_kd.distill.schedule import Progress
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.losses.common import full_precision
from espnet_kd.targets.nbest import weights
from espnet_kd.targets.teacher import Teacher

HALF = 0.5  #: of the layers: where the self-student ends unless the page says otherwise


class InterCTC(Objective):
    """CTC of inner layers through the student's own head (intermediate CTC, as ESPnet's): the mean over the layers.

    Args:
        layers: numbers, or shares of the depth (0.5: the middle layer).
    """

    needs_teacher = False
    needs_text = True

    def __init__(self, layers: Sequence[float] = (0.5,)):
        super().__init__()
        check_layers(layers)
        self.layers = layers

    def place(self, student: torch.nn.Module) -> None:
        """See :class:`Objective`."""
        self.student_taps = taps_at(self.layers, student)

    def __call__(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`."""
        each = [batch.ctc(batch.ctc_head(student.hidden[tap]), student.lengths) for tap in self.student_taps]
        return sum(each) / len(each), {}


class InterKD(Objective):
    """CTC + λ·‖p − q‖² at heads of their own on inner layers (mean over them), and λ·‖p − q‖² at the end.

    Inter-KD: Yoon et al., SLT 2022; λ and the layers' places from a public port, the mean a reconstruction.

    Args:
        layers: numbers, or shares of the depth; 18, 24 and 30 of 33 layers in the port.
        l2_weight: λ.
        temperature: τ of both softmaxes.
        per: scale of the L2, see :class:`Objective`.
    """

    needs_text = True
    statistics = ("loss_ctc_inner", "loss_l2")

    def __init__(
        self,
        layers: Sequence[float] = (0.55, 0.73, 0.91),
        l2_weight: float = 0.25,
        temperature: float = 1.0,
        per: str = "utterance",
    ):
        super().__init__(per)
        self.temperatures = check_temperature(temperature)
        check_layers(layers)
        self.layers = layers
        self.l2_weight = l2_weight
        self.temperature = temperature

    def place(self, student: torch.nn.Module) -> None:
        """See :class:`Objective`."""
        self.student_taps = taps_at(self.layers, student)

    def build(self, student: torch.nn.Module, teacher: Optional[Teacher]) -> torch.nn.ModuleList:
        """A CTC head per layer."""
        self.heads = torch.nn.ModuleList(new_head(student) for _ in self.student_taps)
        return self.heads

    def __call__(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`."""
        inner = [log_probs(head, student.hidden[tap]) for head, tap in zip(self.heads, self.student_taps)]
        ctc = sum(batch.ctc(q, student.lengths) for q in inner) / len(inner)
        final, *distances = (self._distance(q, student, target) for q in [student.logits, *inner])
        l2 = final + sum(distances) / len(distances)
        return ctc + self.l2_weight * l2, {"loss_ctc_inner": ctc.detach(), "loss_l2": l2.detach()}

    def _distance(self, q: Tensor, student: EncoderOutputs, target: EncoderOutputs) -> Tensor:
        mean = losses.softmax_l2(q, target.logits, target.lengths, temperature=self.temperature)
        return self.scale(mean, target.lengths.sum(), student)


class SelfKD(Objective):
    """CTC of the self-student + KL(sg self-teacher ‖ self-student), both inside one encoder.

    The self-teacher is all of the student's YAML, the self-student its first ``layer`` layers with a linear head of
    their own; that is what the export keeps. The page weighs the self-teacher's CTC with 1 − α and this with α.
    Source: Kim, Kim, Lee, Interspeech 2024.

    Args:
        layer: number, or share of the depth.
        temperature: τ of both softmaxes.
        tau_squared: multiply the KL by τ².
        frames: selection by the self-teacher's posteriors; the paper advises against leaving blank frames out.
        per: scale of the KL, see :class:`Objective`.
    """

    needs_teacher = False
    needs_text = True
    statistics = ("loss_ctc_student", "loss_kl_student")

    def __init__(
        self,
        layer: float = HALF,
        temperature: float = 1.0,
        tau_squared: bool = False,
        frames: Dict[str, Any] = {},  # noqa: B006 (never written to)
        per: str = "utterance",
    ):
        super().__init__(per)
        check_temperature(temperature)
        check_layers([layer])
        self.layer = layer
        self.temperature = temperature
        self.factor = temperature**2 if tau_squared else 1.0
        self.selection = Selection(frames)

    def place(self, student: torch.nn.Module) -> None:
        """See :class:`Objective`."""
        if getattr(student.encoder, "interctc_use_conditioning", False):
            # Its layers hear what the self-teacher's head says; exported they would hear the self-student's.
            raise UserError("self-KD cannot export an encoder with interctc_use_conditioning; switch it off")
        self.student_taps = taps_at([self.layer], student)
        self.selection.check(student)

    def build(self, student: torch.nn.Module, teacher: Optional[Teacher]) -> torch.nn.Linear:
        """The self-student's head: all that is added to plain training.

        On a page with a teacher, whose layers the student begins with, it begins as a copy of the student's [ours].
        """
        self.head = new_head(student)
        if teacher is not None:
            self.head.load_state_dict(student.ctc.ctc_lo.state_dict())
        return self.head

    def __call__(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`."""
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
        """Keep the first layers and their head. A hybrid's decoder, which listens to the last layer, goes with it."""
        head = {name: state.get(f"kd_heads.{key}.{name}") for name in ("weight", "bias")}
        if None in head.values():
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


class SequenceKD(Objective):
    """CTC of the teacher's N best hypotheses, weighted by their renormalised scores (Takashima et al.).

    Args:
        nbest: how many hypotheses of each utterance count, at most.
    """

    needs_teacher = False  # what it said lies in a file

    def __init__(self, nbest: int = 5):
        super().__init__()
        if nbest < 1:
            raise UserError(f"nbest: must be 1 or more, not {nbest}")
        self.nbest = nbest

    def __call__(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`."""
        lists = [hypotheses[: self.nbest] for hypotheses in batch.nbest]
        shares = [weights([score for score, _ in hypotheses]) for hypotheses in lists]
        total = student.logits.new_zeros(())
        for rank in range(max(map(len, lists))):
            labels: List[Sequence[int]] = [h[rank][1] if rank < len(h) else () for h in lists]
            weight = [w[rank] if rank < len(w) else 0.0 for w in shares]
            # Made on the CPU and moved in one piece each, for which the host does not wait.
            text, lengths, weight = (
                x.to(student.logits.device, non_blocking=True)
                for x in (
                    _padded(labels),
                    torch.tensor([len(x) for x in labels], device="cpu"),
                    torch.tensor(weight, dtype=student.logits.dtype, device="cpu"),
                )
            )
            total = total + batch.ctc(student.logits, student.lengths, text, lengths, weight)
        return total, {}


class LayerPruning(Objective):
    """No loss, but a beginning: the student's layers are the teacher's lowest; so are features, input layer and head.

    A hybrid student's attention decoder is new.
    """

    reads_target = False

    def __init__(self) -> None:
        super().__init__()

    def init_student(self, student: torch.nn.Module, teacher: Optional[Teacher]) -> None:
        """Copy what the student has of frontend, normalisation, encoder and CTC head.

        Raises:
            UserError: the teacher lacks one, or has it in another size.
        """
        mine, theirs = student.state_dict(), teacher.state_dict()
        for name, value in mine.items():
            if not name.startswith(("frontend.", "normalize.", "encoder.", "ctc.")):
                continue
            if name not in theirs or theirs[name].shape != value.shape:
                found = tuple(theirs[name].shape) if name in theirs else "absent"
                raise UserError(
                    f"layer pruning keeps the teacher's lower layers, so that the student must be like it: {name} is "
                    f"{tuple(value.shape)} in the student, {found} in the teacher {teacher.name}"
                )
            mine[name] = theirs[name]
        student.load_state_dict(mine)

    def compute(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Tensor]:
        """Nothing: what is trained on is the page's CTC."""
        return student.logits[..., :0].sum(), student.lengths.sum()


def _padded(labels: Sequence[Sequence[int]]) -> Tensor:
    """(B, L) of B sequences, on the CPU; L is 1 at least."""
    rows = [torch.tensor(x, dtype=torch.long, device="cpu") for x in labels]
    text = pad_sequence(rows, batch_first=True)
    return text if text.size(1) else text.new_zeros(len(rows), 1)


def new_head(student: torch.nn.Module) -> torch.nn.Linear:
    """A CTC head like the student's."""
    return torch.nn.Linear(student.encoder.output_size(), student.ctc.ctc_lo.out_features)


def log_probs(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    """(B, T, V) log-probabilities of a head, in float32 or better."""
    return full_precision(head(hidden)).log_softmax(-1)
