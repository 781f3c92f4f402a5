"""The KD model: an ESPnet ASR model whose forward adds the objectives of a KD stage."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.torch_utils.device_funcs import force_gatherable
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives import Batch, Objective, lay_on
from espnet_kd.distill.page import KDStage, ObjectiveSpec, Page
from espnet_kd.distill.schedule import Progress
from espnet_kd.losses.common import full_precision
from espnet_kd.targets.encode import EncoderOutputs, check_taps, encode, measure_frame_shift, probe
from espnet_kd.targets.online import OnlineTeacher


class ESPnetASRKDModel(ESPnetASRModel):
    """A student in one KD stage. Made with :meth:`adopt`, never constructed.

    Its parameters have the plain student's names; what is trained beside it lies under ``kd_heads``; the teacher is not
    registered at all.
    """

    @classmethod
    def adopt(
        cls,
        student: ESPnetASRModel,
        page: Page,
        kd_stage: int,
        teacher: Optional[OnlineTeacher],
        progress: Progress,
        sampling_rate: float,
    ) -> ESPnetASRKDModel:
        """Turn the student that ESPnet built into the KD model of one KD stage.

        ``sampling_rate`` (Hz) is what the student's frontend expects. All KD stages of the page are checked, so that a
        mistake in the third shows before the first has trained.

        Raises:
            UserError: student, teacher and page don't fit.
        """
        if type(student) is not ESPnetASRModel:
            raise UserError(f"the student must be a plain ESPnet model (model: espnet), not {type(student).__name__}")
        if student.ctc is None or student.use_transducer_decoder:
            raise UserError("the student has no CTC branch to distil into: use ctc_weight above 0, and no transducer")
        if student.blank_id != 0:
            raise UserError(f"<blank> must be token 0, as ESPnet's CTC takes it; it is token {student.blank_id}")
        if page.teacher == "required" and teacher is None:
            raise UserError(f"{page.path} needs a teacher: give --teacher EXP")
        if teacher is not None:
            check_pair(student, teacher, sampling_rate)

        for stage in page.stages:
            for spec in stage.objectives:
                objective = spec.make()
                if teacher is None and objective.needs_teacher:
                    raise UserError(f"{page.path}: {spec.name} needs a teacher, but the page says teacher: none")
                check_taps(student.encoder, objective.student_taps, "student")
                if teacher is not None:
                    teacher.check_taps(objective.teacher_taps)

        model = cls.__new__(cls)
        model.__dict__ = student.__dict__  # parameters, buffers and modules, under their own names
        stage = page.stages[kd_stage - 1]
        model.kd_stage = stage
        model.progress = progress
        model.pool = page.pool
        model.teacher = teacher
        model.frame_shift = measure_frame_shift(student, sampling_rate)
        model.objectives = [(spec, spec.make()) for spec in stage.objectives]
        if teacher is not None:
            check_rates(student, model.frame_shift, teacher, sampling_rate)
        heads = {spec.key: objective.build(student, teacher) for spec, objective in model.objectives}
        heads = {k: h for k, h in heads.items() if h is not None}
        if heads:
            model.kd_heads = torch.nn.ModuleDict(heads)
        return model

    # Given in adopt; annotated here because no __init__ says so.
    kd_stage: KDStage
    progress: Progress
    pool: str
    teacher: Optional[OnlineTeacher]
    frame_shift: float  #: seconds
    objectives: List[Tuple[ObjectiveSpec, Objective]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ESPnetASRKDModel:
        if self.teacher is not None:
            self.teacher.move(fn)
        return super()._apply(fn, recurse)

    def forward(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        text: Optional[Tensor] = None,
        text_lengths: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tuple[Tensor, Dict[str, Tensor], Tensor]:
        """One step.

        Args:
            speech: (B, samples) · speech_lengths: (B,)
            text: (B, L) · text_lengths: (B,); both absent in training without labels
            kwargs: ``utt_id``, and auxiliary labels of InterCTC

        Returns:
            loss, statistics, batch size, as ESPnet's trainer wants them

        The loss is ctc_weight · (w_ctc · CTC + Σ weight · objective) + (1 − ctc_weight) · w_att · attention; without
        objectives and with weights 1 it is ESPnetASRModel's.
        """
        if text is not None:
            text[text == -1] = self.ignore_id
            text = text[:, : text_lengths.max()]
        taps = [t for _, o in self.objectives for t in o.student_taps]
        out, lengths, intermediate, hidden = encode(self, speech, speech_lengths, taps)
        log_probs = self._log_probs(out)
        stats: Dict[str, Optional[Tensor]] = {}

        loss = log_probs.new_zeros(())
        if text is not None:
            loss = loss + self.ctc_weight * self._ctc_branch(
                out, log_probs, lengths, intermediate, text, text_lengths, stats, kwargs
            )
        if self.objectives:
            student = EncoderOutputs(log_probs, lengths, self.frame_shift, hidden)
            batch = Batch(kwargs.get("utt_id", ()), text, text_lengths)
            loss = loss + self.ctc_weight * self._objectives(student, speech, speech_lengths, batch, stats)
        if self.ctc_weight < 1.0 and self.kd_stage.attention_weight:
            if text is None:
                raise UserError("the attention decoder needs text; set attention: {weight: 0} or ctc_weight: 1.0")
            loss_att, stats["acc"], stats["cer"], stats["wer"] = self._calc_att_loss(out, lengths, text, text_lengths)
            stats["loss_att"] = loss_att.detach()
            loss = loss + (1 - self.ctc_weight) * self.kd_stage.attention_weight * loss_att

        stats["loss"] = loss.detach()
        return force_gatherable((loss, stats, speech.size(0)), loss.device)

    def _log_probs(self, out: Tensor) -> Tensor:
        """(B, T, V), once for CTC and every objective; dropout as in ESPnet's CTC, which has it in eval too."""
        return full_precision(self.ctc.ctc_lo(F.dropout(out, p=self.ctc.dropout_rate))).log_softmax(-1)

    def _ctc(self, log_probs: Tensor, lengths: Tensor, text: Tensor, text_lengths: Tensor, per: str) -> Tensor:
        """ESPnet's CTC (sum over the utterance, averaged over the batch), or that per label."""
        labels = torch.cat([t[:n] for t, n in zip(text, text_lengths)])
        by_time = log_probs.transpose(0, 1)
        if self.ctc.ctc_type != "builtin":
            if per == "label":
                raise UserError(f"ctc: per: label needs ctc_type builtin, not {self.ctc.ctc_type}")
            return self.ctc.loss_fn(by_time, labels, lengths, text_lengths)
        each = self.ctc.ctc_loss(by_time, labels, lengths, text_lengths)
        return (each / text_lengths.clamp(min=1)).mean() if per == "label" else each.mean()

    def _ctc_branch(
        self,
        out: Tensor,
        log_probs: Tensor,
        lengths: Tensor,
        intermediate: List[Tuple[int, Tensor]],
        text: Tensor,
        text_lengths: Tensor,
        stats: Dict[str, Optional[Tensor]],
        batch: Dict[str, Any],
    ) -> Tensor:
        """Weighted CTC and InterCTC; with weight 0 CTC is computed for the statistics alone."""
        weight, per = self.kd_stage.ctc_weight, self.kd_stage.ctc_per
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            loss = self._ctc(log_probs, lengths, text, text_lengths, per)
            stats["loss_ctc"] = loss.detach()
            stats["cer_ctc"] = None
            if not self.training and self.error_calculator is not None:
                # Blank outside the utterance: ESPnet's own figure counts what it reads in the padding.
                best = log_probs.argmax(-1).masked_fill(~fr.valid(lengths, log_probs.size(1)), self.blank_id)
                stats["cer_ctc"] = self.error_calculator(best.cpu(), text.cpu(), is_ctc=True)
            if self.interctc_weight and intermediate:
                inner = []
                for layer, x in intermediate:
                    aux, aux_lengths = self._aux_labels(layer, batch, text, text_lengths)
                    inner.append(self._ctc(self._log_probs(x), lengths, aux, aux_lengths, per))
                    stats[f"loss_interctc_layer{layer}"] = inner[-1].detach()
                loss = (1 - self.interctc_weight) * loss + self.interctc_weight * sum(inner) / len(inner)
        return weight * loss if weight else torch.zeros_like(loss)  # 0 · ∞ would be NaN

    def _aux_labels(
        self, layer: int, batch: Dict[str, Any], text: Tensor, text_lengths: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Labels of an InterCTC layer: its own (``aux_ctc``) where configured."""
        key = (self.aux_ctc or {}).get(str(layer))
        if key is None:
            return text, text_lengths
        if key not in batch:
            raise UserError(f"aux_ctc names {key!r} for layer {layer}, but the data has no such name")
        return batch[key], batch[f"{key}_lengths"]

    def _objectives(
        self,
        student: EncoderOutputs,
        speech: Tensor,
        speech_lengths: Tensor,
        batch: Batch,
        stats: Dict[str, Optional[Tensor]],
    ) -> Tensor:
        target = None
        if self.teacher is not None:
            taps = [t for _, o in self.objectives for t in o.teacher_taps]
            target = self.teacher.targets(batch.utt_ids, speech, speech_lengths, taps)
            try:
                target = lay_on(student, target, self.pool)
            except ValueError as e:
                raise UserError(f"{e}, in the batch of {', '.join(batch.utt_ids)}") from e
            stats.update(_agreement(student, target))
        total = student.logits.new_zeros(())
        for spec, objective in self.objectives:
            value, extra = objective(student, target, batch, self.progress)
            weight = spec.weight if isinstance(spec.weight, float) else spec.weight(self.progress)
            total = total + weight * value
            stats[f"loss_{spec.key}"] = value.detach()
            stats.update(extra)
        stats["loss_kd"] = total.detach()
        return total


def _agreement(student: EncoderOutputs, target: EncoderOutputs) -> Dict[str, Tensor]:
    """Share of the teacher's frames that are non-blank, and of frames on which both have the same argmax."""
    valid = fr.valid(target.lengths, target.logits.size(1))
    best = target.logits.argmax(-1)
    count = valid.sum().clamp(min=1)
    return {
        "nonblank_share": ((best != 0) & valid).sum() / count,
        "agreement": ((best == student.logits.argmax(-1)) & valid).sum() / count,
    }


def check_rates(student: ESPnetASRModel, frame_shift: float, teacher: OnlineTeacher, rate: float) -> None:
    """Refuse a teacher whose frames cannot be laid beside the student's: tried on a test signal.

    Raises:
        UserError: naming lengths and frame shifts of both.
    """
    speech, lengths, frames = probe(student, rate, seconds=3.0)
    logits = speech.new_zeros(1, frames, 1)
    try:
        lay_on(
            EncoderOutputs(logits, torch.tensor([frames], device=speech.device), frame_shift),
            teacher.targets((), speech, lengths),
            pool="least_blank",
        )
    except ValueError as e:
        raise UserError(f"teacher {teacher.name}: {e}") from e


def check_pair(student: ESPnetASRModel, teacher: OnlineTeacher, rate: float) -> None:
    """Refuse a teacher whose tokens or sampling rate are not the student's.

    Raises:
        UserError: naming the tokens or the rates that differ.
    """
    if rate != teacher.sampling_rate:
        raise UserError(f"the student hears {rate:g} Hz, the teacher {teacher.name} {teacher.sampling_rate:g} Hz")
    mine, theirs = list(student.token_list), teacher.token_list
    if mine == theirs:
        return
    only_mine = [t for t in mine if t not in set(theirs)][:5]
    only_theirs = [t for t in theirs if t not in set(mine)][:5]
    moved = [f"{t!r} is {i} / {theirs.index(t)}" for i, t in enumerate(mine) if t in theirs and theirs.index(t) != i]
    raise UserError(
        f"the token lists differ: student {len(mine)} tokens, teacher {teacher.name} {len(theirs)}; "
        f"only the student has {only_mine}, only the teacher {only_theirs}, moved {moved[:3]}. "
        "Train the student with the teacher's token list (and BPE model)"
    )
