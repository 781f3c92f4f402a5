"""What would make a training useless without an error, or stop it without a cause: a criterion that no epoch has,
transcripts that are longer than the student's frames, statistics of other features, a teacher that recognises
nothing, a disk without room.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, Optional, Sequence, Set, Tuple

import torch

from espnet_kd.cli import UserError
from espnet_kd.data.audio import is_in_ark, is_pipe, read_samples
from espnet_kd.data.datadir import read_map, read_pairs
from espnet_kd.distill.plan import Moment, Plan
from espnet_kd.frames import best, valid
from espnet_kd.strict import nearest
from espnet_kd.targets.teacher import Teacher

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

    from espnet_kd.distill.page import ObjectiveSpec

SHOWN = 5  # utterances in a message
#: Statistics that ESPnet computes in validation alone.
RATES = {"cer_ctc", "cer", "wer", "cer_transducer", "wer_transducer"}
GIB = 2**30
#: Utterances, and frames of them, on which a teacher is tried.
TRIED, ENOUGH = 50, 1000
#: Share of frames with a token up to which a teacher recognises nothing; of speech a token every few seconds has more.
SILENT = 0.01


def check_criteria(args: argparse.Namespace, model: ESPnetASRModel, plan: Optional[Plan]) -> None:
    """Refuse ``best_model_criterion`` where no epoch will have one of them, and log single ones; refuse a criterion of
    early stopping, or of the learning rate, that no epoch will have, and any that only some epochs will have.

    By a statistic that does not exist ESPnet chooses no model, and removes every epoch's but the last. By the other
    criteria it ends with a KeyError after the first epoch, and by one that earlier epochs lack when it finds it.

    Raises:
        UserError: naming them, and what there is; or a criterion has another form.
    """
    of_validation = statistics(args, model, plan)
    known = {"valid": [of_validation], "train": list(statistics_in_training(args, model, plan))}
    there = f"(there are {', '.join(sorted(of_validation))})"
    for option, criteria in _criteria(args):
        for criterion in criteria:
            _check_form(option, criterion)
        found = {f"{phase},{key}": [key in epoch for epoch in known[phase]] for phase, key, _ in criteria}
        if partly := [name for name, each in found.items() if any(each) and not all(each)]:
            raise UserError(
                f"{option}: only some epochs of this training have {', '.join(partly)}, because its KD stages differ; "
                f"give a statistic of validation {there}, for instance valid,loss_ctc,min"
            )
        absent = [name for name, each in found.items() if not any(each)]
        if not absent:
            continue
        message = f"{option}: no epoch of this training has {', '.join(absent)} {there}"
        if len(absent) == len(criteria):
            raise UserError(f"{message}; give one of these, for instance valid,loss_ctc,min")
        logging.info("%s", message)  # ESPnet's default names some that only attention has


def _criteria(args: argparse.Namespace) -> Iterator[Tuple[str, List[Any]]]:
    """Yield the options with criteria that this training uses, each with its criteria [phase, statistic, mode]."""
    from espnet2.schedulers.abs_scheduler import AbsValEpochStepScheduler
    from espnet2.tasks.abs_task import scheduler_classes

    best = args.best_model_criterion
    yield "best_model_criterion", list(best) if isinstance(best, (list, tuple)) else [best]
    if args.patience is not None:
        yield "early_stopping_criterion", [args.early_stopping_criterion]
    if issubclass(scheduler_classes.get(args.scheduler, object), AbsValEpochStepScheduler):
        yield "val_scheduler_criterion", [[*args.val_scheduler_criterion, "min"]]  # its mode is the scheduler's


def _check_form(option: str, criterion: Any) -> None:
    """Refuse a criterion that is no [phase, statistic, mode] (:class:`UserError`)."""
    parts = list(criterion) if isinstance(criterion, (list, tuple)) else [criterion]
    if len(parts) != 3 or parts[0] not in ("train", "valid") or parts[2] not in ("min", "max"):
        raise UserError(
            f"{option}: expected the phase (train or valid), a statistic and the mode (min or max), found {criterion!r}"
        )


def statistics(args: argparse.Namespace, model: ESPnetASRModel, plan: Optional[Plan]) -> Set[str]:
    """Names of what every epoch reports in validation, where all objectives of the last KD stage are computed."""
    if plan is None:
        return _reported(args, model, "valid", [], True)
    specs = [spec for spec, _ in plan.last.phase.terms]
    return _reported(args, model, "valid", specs, _uses_attention(plan.last, specs))


def statistics_in_training(
    args: argparse.Namespace, model: ESPnetASRModel, plan: Optional[Plan]
) -> Iterator[Set[str]]:
    """Yield, for each epoch, the names of what it reports in training, where weights of 0 are not computed."""
    if plan is None:
        yield _reported(args, model, "train", [], True)
        return
    for epoch in range(1, plan.max_epoch + 1):
        active = [(now, [spec for spec, weight in now.phase.terms if now(weight)]) for now in plan.in_epoch(epoch)]
        specs = [spec for _, each in active for spec in each]
        yield _reported(args, model, "train", specs, any(_uses_attention(now, each) for now, each in active))


def _reported(
    args: argparse.Namespace, model: ESPnetASRModel, phase: str, specs: Sequence[ObjectiveSpec], attention: bool
) -> Set[str]:
    """Names of the statistics of some objectives, of CTC, and of attention where it is computed."""
    known = {"loss"}
    if any(name == "text" for _, name, _ in getattr(args, f"{phase}_data_path_and_name_and_type") or []):
        known |= {"loss_ctc", "cer_ctc"} if model.ctc is not None else set()
        known |= {f"loss_interctc_layer{n}" for n in getattr(model.encoder, "interctc_layer_idx", None) or []}
        if model.ctc_weight < 1.0 and attention:
            known |= {"acc", "cer", "wer", "loss_att", "loss_transducer", "cer_transducer", "wer_transducer"}
    if phase == "train":
        known -= RATES
    for spec in specs:
        objective = spec.make()
        known |= {"loss_kd", f"loss_{spec.key}", *objective.statistics}
        known |= {"nonblank_share", "agreement"} if objective.uses_teacher else set()
    return known


def _uses_attention(now: Moment, specs: Sequence[ObjectiveSpec]) -> bool:
    """Whether the attention decoder is computed at this moment, with these objectives."""
    taps = {tap for spec in specs for tap in spec.make().student_taps}
    return bool(now(now.phase.stage.attention_weight)) or "decoder" in taps


def check_frozen(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Refuse a ``--freeze_param`` that freezes nothing, as after a typing error, or everything (:class:`UserError`)."""
    left = [name for name, _ in model.named_parameters()]
    parts = sorted({name.split(".")[0] for name in left})
    for given in args.freeze_param:
        frozen = [name for name, _ in model.named_parameters() if name == given or name.startswith(f"{given}.")]
        if not frozen:
            raise UserError(f"--freeze_param {given}: the model has no such parameters{nearest(given, parts)}")
        left = [name for name in left if name not in frozen]
    if not left and not getattr(args, "use_adapter", False):
        raise UserError(f"--freeze_param {' '.join(args.freeze_param)} freezes all parameters: nothing is trained")


def check_normalisation(args: argparse.Namespace, model: ESPnetASRModel) -> None:
    """Refuse statistics for ``global_mvn`` that are of other features than the model's (:class:`UserError`)."""
    mean = getattr(model.normalize, "mean", None)
    if model.frontend is None or not isinstance(mean, torch.Tensor):
        return
    size = model.frontend.output_size()
    if mean.numel() != size:
        raise UserError(
            f"normalize_conf: {args.normalize_conf.get('stats_file')} has statistics of {mean.numel()} features, and "
            f"the frontend of this configuration makes {size} (frontend_conf: n_mels); give it the same, or an --expdir"
            " of its own, from stage 4 on"
        )


def check_text_lengths(args: argparse.Namespace, frame_shift: float, rate: float) -> None:
    """Count the utterances whose transcript has more tokens than the student has frames: CTC's loss of them is 0.

    Args:
        frame_shift: of the student, in seconds.
        rate: sampling rate of the audio, Hz.

    Raises:
        UserError: no utterance of a part has enough frames.
    """
    for part in ("train", "valid"):
        files: List[str] = getattr(args, f"{part}_shape_file") or []
        if len(files) < 2:
            continue
        speech, text = (read_map(path) for path in files[:2])
        frames = {u: int(shape.split(",")[0]) / rate / frame_shift for u, shape in speech.items()}
        long = [u for u, shape in text.items() if u in frames and int(shape.split(",")[0]) > frames[u]]
        if not long:
            continue
        message = (
            f"{files[1]}: the transcripts of {len(long)} of {len(text)} utterances ({', '.join(long[:SHOWN])}) have "
            f"more tokens than the student has frames of {1000 * frame_shift:.0f} ms; CTC's loss of them is 0"
        )
        if len(long) == len(text):
            raise UserError(f"{message}; take longer tokens (bpe), or an input layer with less subsampling")
        logging.warning("%s", message)


def check_teacher_recognises(args: argparse.Namespace, teacher: Teacher) -> None:
    """Refuse a teacher that is blank on nearly all frames of training utterances: a student would learn to be.

    Args:
        args: options of training; with ``--target_cache`` the teacher is found by utterance id, and no audio is read.

    Raises:
        UserError: naming the teacher and the share; or it gives NaN; or some audio cannot be read.
    """
    frames = tokens = tried = 0
    data = args.train_data_path_and_name_and_type or []
    for path in [path for path, name, kind in data if (name, kind) == ("speech", "sound")]:
        pairs = list(read_pairs(path))
        for utt_id, audio in pairs[:: max(1, len(pairs) // TRIED)]:
            speech = torch.zeros(1, 1)
            if not args.target_cache:
                if is_pipe(audio) or is_in_ark(audio):
                    continue
                samples, _ = read_samples(audio, f"{path}: utterance {utt_id}")
                speech = torch.from_numpy(samples).float()[None]
            # Without an id it is not remembered: in training the utterance may be normalised otherwise.
            out = teacher.targets([utt_id] if args.target_cache else [], speech, torch.tensor([speech.size(1)]))
            inside = valid(out.lengths, out.logits.size(1))
            if isinstance(out.logits, torch.Tensor) and out.logits[inside].isnan().any():
                raise UserError(f"the teacher {teacher.name} gives NaN for utterance {utt_id}; it has diverged")
            frames, tried = frames + int(inside.sum()), tried + 1
            tokens += int(((best(out.logits) != 0) & inside).sum())
            if frames >= ENOUGH:
                break
    if frames and tokens <= SILENT * frames and not args.blank_teacher:
        raise UserError(
            f"the teacher {teacher.name} is blank on {100 - 100 * tokens / frames:.1f} % of the frames of {tried} "
            "training utterances: it recognises nothing, and neither would its student. Decode this data with "
            "asr_kd_inference to see, and give another --teacher; --blank_teacher true trains all the same"
        )


def check_disk(args: argparse.Namespace, model: torch.nn.Module, kept: int = 0) -> None:
    """Refuse a disk without room for what a training of ``model`` writes (:class:`UserError`).

    Args:
        kept: students that are kept beside the checkpoints and models of ESPnet, one for each KD stage.
    """
    weights = sum(x.nbytes for x in model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # The checkpoint holds Adam's two moments beside the model; the one before stays, and both are there twice while
    # they are replaced. Models: the n best by each criterion, the newest, an average each.
    criteria = len(args.best_model_criterion)
    best = args.keep_nbest_models if isinstance(args.keep_nbest_models, list) else [args.keep_nbest_models]
    models = criteria * (max(best, default=1) + len(best)) + 1 + kept
    needed = 3 * (weights + 2 * trained) + models * weights
    out = Path(args.output_dir)
    files = [*out.glob("*.pth"), *out.glob("kd_stage*/*.pth")]
    there = sum(p.stat().st_size for p in files if not p.is_symlink())  # of this run: to be replaced
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    if needed - there > free:
        raise UserError(
            f"{args.output_dir}: checkpoints and models take about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB "
            "are free; make room, or lower keep_nbest_models"
        )
