"""The KD model: an ESPnet ASR model whose forward adds the objectives of the current KD stage."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.torch_utils.device_funcs import force_gatherable
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.cli import UserError
from espnet_kd.distill.checks.pairs import (
    check_objective,
    check_pair,
    check_phase,
    check_rates,
    warn_of_time_warp,
)
from espnet_kd.distill.objectives import Batch, Objective, lay_on
from espnet_kd.distill.page import ObjectiveSpec
from espnet_kd.distill.plan import Moment, Plan
from espnet_kd.distill.schedule import Progress, Weight
from espnet_kd.inference.encode import EncoderOutputs, encode, measure_frame_shift, recording_decoder
from espnet_kd.losses.common import full_precision
from espnet_kd.targets.loading import BROUGHT, Brought, ReadPart
from espnet_kd.targets.nbest import Hypotheses
from espnet_kd.targets.teacher import Teacher
from espnet_kd.topk import NotKept

#: Statistics for ESPnet's reporter; None for a statistic that this batch does not have.
Statistics = Dict[str, Union[Tensor, float, None]]
#: An objective's entry in the page, the objective, its weight.
Term = Tuple[ObjectiveSpec, Objective, Weight]


class ESPnetASRKDModel(ESPnetASRModel):
    """A student in all KD stages of a plan. It is made with :meth:`adopt`, never constructed.

    Its parameters have the plain student's names. Modules that are trained with it are under ``kd_heads``. The teacher
    is not registered.
    """

    @classmethod
    def adopt(
        cls,
        student: ESPnetASRModel,
        plan: Plan,
        teacher: Optional[Teacher],
        progress: Progress,
        sampling_rate: float,
        nbest: Optional[Mapping[str, Hypotheses]] = None,
    ) -> ESPnetASRKDModel:
        """Turn the student that ESPnet built into the KD model of a training.

        Args:
            progress: the position in the training, which determines the KD stage of a step.
            sampling_rate: of the audio that the student's frontend expects, Hz.
            nbest: the teacher's N-best by utterance.

        Raises:
            UserError: student, teacher and page don't fit together.
        """
        if type(student) is not ESPnetASRModel:
            raise UserError(f"the student must be a plain ESPnet model (model: espnet), not {type(student).__name__}")
        if student.ctc is None or student.use_transducer_decoder:
            raise UserError("the student has no CTC branch to distil into: use ctc_weight above 0, and no transducer")
        if student.ctc.ctc_type not in ("builtin", "builtin2"):
            raise UserError(f"ctc_conf: ctc_type {student.ctc.ctc_type} is not supported here; use ctc_type: builtin")
        if student.blank_id != 0:
            raise UserError(f"<blank> must be token 0, as ESPnet's CTC takes it; it is token {student.blank_id}")
        page = plan.page
        if page.teacher == "none":
            teacher = None
        elif teacher is None:
            raise UserError(f"{page.path} needs a teacher: give --teacher EXP")
        if teacher is not None:
            check_pair(student, teacher, sampling_rate)

        model = cls.__new__(cls)
        model.__dict__ = student.__dict__  # parameters, buffers and modules, under their own names
        model.plan, model.progress, model.teacher, model.nbest = plan, progress, teacher, nbest
        model.frame_shift = measure_frame_shift(student, sampling_rate)
        if teacher is not None:
            check_rates(student, model.frame_shift, teacher, sampling_rate)
        new: List[Tuple[ObjectiveSpec, Objective]] = []
        model.terms = []
        for phase in plan.phases:
            check_phase(phase, student, page.path)
            terms = []
            for spec, weight in phase.terms:
                # An objective with equal options is one object, with one head, in all KD stages.
                objective = next((o for s, o in new if (s.name, s.conf) == (spec.name, spec.conf)), None)
                if objective is None:
                    objective = spec.make()
                    try:
                        objective.place(student)
                        check_objective(objective, student, teacher, nbest is not None)
                    except UserError as e:
                        raise UserError(f"{page.path}: KD stage {phase.stage.number}: {spec.name}: {e}") from e
                    new.append((spec, objective))
                terms.append((spec, objective, weight))
            model.terms.append(terms)
        warn_of_time_warp(student, [objective for _, objective in new])
        # If the training is resumed, its checkpoint later replaces these parameters.
        for _, objective in new:
            objective.init_student(student, teacher)
        # Heads are built afterwards, in whatever order a page lists them: one may begin as a copy of the student's.
        built = [(spec.key, objective.build(student, teacher)) for spec, objective in new]
        if heads := {key: head for key, head in built if head is not None}:
            model.kd_heads = torch.nn.ModuleDict(heads)
        return model

    # Set in adopt; annotated here because there is no __init__.
    plan: Plan
    progress: Progress
    teacher: Optional[Teacher]
    frame_shift: float  #: seconds
    terms: List[List[Term]]  #: of each phase of the plan
    nbest: Optional[Mapping[str, Hypotheses]]

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
            text: (B, L) · text_lengths: (B,), 0 where an utterance is not transcribed; both absent in training
                without labels
            kwargs: ``utt_id``, auxiliary labels of InterCTC, and the entry of :mod:`espnet_kd.targets.loading`

        Returns:
            loss, statistics, batch size, as ESPnet's trainer expects them

        The loss is ctc_weight · (w_ctc · CTC + Σ weight · objective) + (1 − ctc_weight) · (w_att · attention + Σ weight
        · objective of the decoder); without objectives and with weights 1 it is ESPnetASRModel's. In validation the
        weights are those at the end of the training, in every epoch.
        """
        batch_size = speech.size(0)
        now = self.plan.at(self.progress) if self.training else self.plan.last
        terms = self._active(now)
        if text is not None:
            # The padded length is kept: reading the true length would make the host wait for a GPU, and is not needed.
            text = text.masked_fill(text == -1, self.ignore_id)
        # SpecAugment draws new masks for every row, so that repeated rows are two views. Validation has no masks.
        views = max((o.views for _, o, _ in terms), default=1) if self.training else 1
        speech, speech_lengths, text, text_lengths, kwargs = _repeat(
            views, (speech, speech_lengths, text, text_lengths, kwargs)
        )

        brought = Brought(kwargs.pop(BROUGHT, None))
        labels, counts = (text, text_lengths), brought.label_counts(speech.size(0))
        taps = [t for _, o, _ in terms for t in o.student_taps]
        out, lengths, intermediate, hidden = encode(self, speech, speech_lengths, taps)
        log_probs = self._log_probs(out)
        student = EncoderOutputs(log_probs, lengths, self.frame_shift, hidden)
        batch = Batch(
            kwargs.get("utt_id", ()), text, text_lengths, self._hypotheses(kwargs.get("utt_id", ())), views,
            ctc=lambda *args: self._ctc(now, *(args if len(args) > 2 else (*args, *labels, None, counts))),
            ctc_head=self._log_probs,
        )  # fmt: skip
        stats: Statistics = {}
        loss = log_probs.new_zeros(())
        if text is not None:
            loss = loss + self.ctc_weight * self._ctc_branch(
                now, log_probs, lengths, intermediate, *labels, counts, stats, kwargs
            )
        if self.ctc_weight < 1.0:
            loss = loss + (1 - self.ctc_weight) * self._attention_branch(
                now, out, student, *labels, counts, taps, stats
            )
        if terms:
            loss = loss + self._objectives(now, terms, student, speech, speech_lengths, batch, brought, stats)

        if self.training and not loss.requires_grad:
            # All weights are 0, as where ramps begin: a path for the backward pass, whose gradients are 0.
            loss = loss + log_probs[..., :0].sum()
        stats["loss"] = loss.detach()
        return force_gatherable((loss, stats, batch_size), loss.device)

    def parts(self, train: bool) -> List[ReadPart]:
        """The taps that the parts of the training, or validation, need (`espnet_kd.targets.loading`)."""
        found: List[ReadPart] = []
        for phase, terms in zip(self.plan.phases, self.terms):
            taps = [o.teacher_taps for _, o, _ in terms if o.uses_teacher]
            reads = tuple(sorted({t for each in taps for t in each})) if taps else None
            found.append((phase.begin, phase.end, reads))
        return found if train else [(0.0, 1.0, found[-1][2])]

    def _active(self, now: Moment) -> List[Term]:
        """The objectives to compute: in training those with a weight other than 0, in validation all of the phase."""
        terms = self.terms[now.phase.index]
        return [term for term in terms if not self.training or now(term[2])]

    def _hypotheses(self, utt_ids: Sequence[str]) -> Optional[List[Hypotheses]]:
        """The N-best of a batch."""
        if self.nbest is None:
            return None
        try:
            return [self.nbest[utt_id] for utt_id in utt_ids]
        except KeyError as e:
            raise UserError(f"utterance {e} is not in the N-best file; make it again for this data (stage 7)") from e

    def _attention_branch(
        self,
        now: Moment,
        out: Tensor,
        student: EncoderOutputs,
        text: Optional[Tensor],
        text_lengths: Optional[Tensor],
        label_counts: Optional[List[int]],
        taps: Sequence[str],
        stats: Statistics,
    ) -> Tensor:
        """Weighted attention loss of the transcribed utterances; keeps the decoder's outputs if a tap needs them."""
        weight = now(now.phase.stage.attention_weight)
        loss = out.new_zeros(())
        if not weight and "decoder" not in taps:
            return loss
        if text is None or text_lengths is None:
            raise UserError("the attention decoder needs text; set attention: {weight: 0} or ctc_weight: 1.0")
        counts = text_lengths.tolist() if label_counts is None else label_counts
        rows = [i for i, n in enumerate(counts) if n > 0]
        if not rows:
            # Every rank of a parallel run must report the same statistics and give every parameter a gradient.
            nothing = sum((p.flatten()[:0].sum() for p in self.decoder.parameters()), loss)
            errors = None if self.training or self.error_calculator is None else math.nan
            stats.update(acc=math.nan, cer=errors, wer=errors, loss_att=nothing.detach())
            return nothing
        branch: Tuple[Tensor, ...] = (out, student.lengths, text, text_lengths)
        if len(rows) < len(counts):
            chosen = torch.tensor(rows).to(out.device, non_blocking=True)
            branch = tuple(x.index_select(0, chosen) for x in branch)
        with recording_decoder(self) if "decoder" in taps else contextlib.nullcontext([None]) as outputs:
            loss, stats["acc"], stats["cer"], stats["wer"] = self._calc_att_loss(*branch)
        student.decoder = outputs[0]
        loss = loss * (len(rows) / len(counts))  # ESPnet averages over these rows, CTC over the batch
        stats["loss_att"] = loss.detach()
        return weight * loss if weight else torch.zeros_like(loss)

    def _log_probs(self, out: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) for CTC and all objectives; dropout as in ESPnet's CTC, also in eval mode."""
        return full_precision(self.ctc.ctc_lo(F.dropout(out, p=self.ctc.dropout_rate))).log_softmax(-1)

    def _ctc(
        self,
        now: Moment,
        log_probs: Tensor,
        lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        weights: Optional[Tensor] = None,
        label_counts: Optional[List[int]] = None,
    ) -> Tensor:
        """ESPnet's CTC (sum over the utterance, averaged over the batch), or the same per label, as the page sets.

        ``weights`` (B,) of the utterances; by default 1, or 0 where there are no labels. ``label_counts``:
        ``text_lengths`` as Python numbers if they are known, because torch's CTC copies both lengths to the host. In
        ESPnet's own step the host waits for them too, and for each utterance's labels.
        """
        per_label = now.phase.stage.ctc_per == "label"
        by_time = log_probs.transpose(0, 1)
        on_host = text_lengths if label_counts is None else torch.tensor(label_counts)
        if self.ctc.ctc_type != "builtin":
            if per_label or weights is not None or not on_host.all():
                raise UserError(
                    f"ctc_type {self.ctc.ctc_type} gives no loss of single utterances, which ctc: per: label, N-best "
                    "and untranscribed audio need; use ctc_type: builtin"
                )
            labels = torch.cat([t[:n] for t, n in zip(text, on_host)])
            return self.ctc.loss_fn(by_time, labels, lengths, text_lengths)
        # Labels are passed with padding, because selecting those of each utterance would make the host wait.
        each = self.ctc.ctc_loss(by_time, text, lengths, on_host)
        if weights is None:
            weights = (text_lengths > 0).to(log_probs.dtype)
        if per_label:
            each = each / text_lengths.clamp(min=1)
        # where instead of a product, because 0 · ∞ would be NaN
        return torch.where(weights > 0, each, 0.0).mul(weights).mean()

    def _ctc_branch(
        self,
        now: Moment,
        log_probs: Tensor,
        lengths: Tensor,
        intermediate: List[Tuple[int, Tensor]],
        text: Tensor,
        text_lengths: Tensor,
        label_counts: Optional[List[int]],
        stats: Statistics,
        batch: Dict[str, Any],
    ) -> Tensor:
        """Weighted CTC and InterCTC; with weight 0, CTC is computed for the statistics only."""
        weight = now(now.phase.stage.ctc_weight)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            loss = self._ctc(now, log_probs, lengths, text, text_lengths, None, label_counts)
            stats["loss_ctc"] = loss.detach()
            stats["cer_ctc"] = None
            if not self.training and self.error_calculator is not None:
                # The padding is set to blank, because ESPnet's own CER would count labels there.
                best = log_probs.argmax(-1).masked_fill(~fr.valid(lengths, log_probs.size(1)), self.blank_id)
                rate = self.error_calculator(best.cpu(), text.cpu(), is_ctc=True)
                # NaN without transcripts, because a rank with fewer statistics than the others would wait for ever.
                stats["cer_ctc"] = math.nan if rate is None else rate
            if self.interctc_weight and intermediate:
                inner = []
                for layer, x in intermediate:
                    labels = self._aux_labels(layer, batch, text, text_lengths)
                    on_host = label_counts if labels[0] is text else None
                    inner.append(self._ctc(now, self._log_probs(x), lengths, *labels, None, on_host))
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
        now: Moment,
        terms: Sequence[Term],
        student: EncoderOutputs,
        speech: Tensor,
        speech_lengths: Tensor,
        batch: Batch,
        brought: Brought,
        stats: Statistics,
    ) -> Tensor:
        target = None
        if self.teacher is not None and any(o.uses_teacher for _, o, _ in terms):
            taps = [t for _, o, _ in terms for t in o.teacher_taps]
            target = brought.targets(taps) or self.teacher.targets(
                batch.utt_ids, speech, speech_lengths, taps, batch.text, batch.text_lengths
            )
            try:
                target = lay_on(student, target, self.plan.page.pool, batch.utt_ids)
            except ValueError as e:
                raise UserError(str(e)) from e
            stats.update(_agreement(student, target))
        total = pulled = student.logits.new_zeros(())
        branches = {"ctc": self.ctc_weight, "attention": 1 - self.ctc_weight}
        for spec, objective, weight in terms:
            try:
                value, extra = objective(student, target, batch, now.position)
            except NotKept as e:  # an objective reads more than its `needs` names
                raise UserError(f"{spec.name}: {e}") from e
            weighted = now(weight) * value
            total = total + branches[objective.branch] * weighted
            pulled = pulled + weighted.detach()
            stats[f"loss_{spec.key}"] = value.detach()
            stats.update(extra)
        stats["loss_kd"] = pulled
        return total


def _repeat(times: int, x: Any) -> Any:
    """Repeat everything in ``x`` that has a row per utterance ``times`` times, batch after batch."""
    if times == 1:
        return x
    if isinstance(x, Tensor):
        return x.repeat(times, *[1] * (x.dim() - 1))
    if isinstance(x, tuple):
        return tuple(_repeat(times, y) for y in x)
    if isinstance(x, dict):
        return {k: _repeat(times, v) for k, v in x.items()}
    return x * times if isinstance(x, list) else x


def _agreement(student: EncoderOutputs, target: EncoderOutputs) -> Dict[str, Tensor]:
    """Share of the teacher's frames that are non-blank, and of frames on which both models have the same argmax."""
    valid = fr.valid(target.lengths, target.logits.size(1))
    best = fr.best(target.logits)
    count = valid.sum().clamp(min=1)
    return {
        "nonblank_share": ((best != 0) & valid).sum() / count,
        "agreement": ((best == fr.best(student.logits)) & valid).sum() / count,
    }
