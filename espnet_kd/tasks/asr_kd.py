"""The task ``asr_kd``: ESPnet's ASR task with distillation. It builds the objects for the command line's options."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path
from typing import Any, Container, Dict, List, Optional, Sequence, Tuple

import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.iterators.sequence_iter_factory import SequenceIterFactory
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.trainer import Trainer
from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_pairs
from espnet_kd.data.parallel import leave_with_parent
from espnet_kd.distill.checks import check_models
from espnet_kd.distill.checks.training import check_normalisation
from espnet_kd.distill.epoch_end import check_updated, hand_over
from espnet_kd.distill.model import ESPnetASRKDModel
from espnet_kd.distill.nonfinite import NonFiniteLosses
from espnet_kd.distill.options import KD_OPTIONS
from espnet_kd.distill.page import KDStage, Page, check_cacheable, load_page
from espnet_kd.distill.phases import PhaseChanges
from espnet_kd.distill.plan import Plan, make_plan
from espnet_kd.distill.schedule import EpochHooks, Progress
from espnet_kd.experiments.checkpoints import keep_previous
from espnet_kd.experiments.models import find_experiment
from espnet_kd.files import sha256_of
from espnet_kd.offline import ASRTask
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.loading import Loading
from espnet_kd.targets.nbest import Hypotheses, read_nbest
from espnet_kd.targets.online import OnlineTeacher, sampling_rate
from espnet_kd.targets.teacher import SeveralTeachers, Teacher

# Registered, not derived: the module of EpochHooks is also imported to check pages, which needs no ESPnet.
AbsIterFactory.register(EpochHooks)

DATA_OPTIONS = ("train_data_path_and_name_and_type", "valid_data_path_and_name_and_type")


class KDTrainer(Trainer):
    """ESPnet's trainer, in which the KD stages of a page restart the optimizers and set the patience, and every epoch
    begins without gradients.
    """

    @classmethod
    def run(cls, **arguments: Any) -> None:
        """Train as ESPnet does, with the arguments of its ``Trainer.run``."""
        if ASRKDTask.plan is not None:
            given = {name: arguments[name] for name in ("optimizers", "schedulers", "trainer_options")}
            ASRKDTask.changes = PhaseChanges(ASRKDTask.plan, ASRKDTask.progress, ASRKDTask.scheduler_conf, **given)
        try:
            super().run(**arguments)
        finally:
            ASRKDTask.changes = None  # it holds the optimizers, which a notebook would keep in memory

    @classmethod
    def train_one_epoch(cls, **arguments: Any) -> bool:
        """Train an epoch as ESPnet does, with the arguments of its ``Trainer.train_one_epoch``."""
        # If accum_grad does not divide the steps of an epoch, ESPnet takes the gradients of the last ones into the next
        # epoch, where a resumed training does not have them.
        for optimizer in arguments["optimizers"]:
            optimizer.zero_grad()
        return super().train_one_epoch(**arguments)


class ASRKDTask(ASRTask):
    """ASRTask with the options of :mod:`espnet_kd.distill.options`, of which ``--kd_config`` chooses the method."""

    #: State of the run in this process; ESPnet builds model and iterators by separate class methods of one process.
    progress: Progress = Progress()
    plan: Optional[Plan] = None
    kd_model: Optional[ESPnetASRKDModel] = None
    losses: Optional[NonFiniteLosses] = None
    changes: Optional[PhaseChanges] = None
    scheduler_conf: Dict[str, Any] = {}

    trainer = KDTrainer

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add ESPnet's ASR options and this task's."""
        super().add_task_arguments(parser)
        group = parser.add_argument_group(description="Distillation related")
        for name, arguments in KD_OPTIONS.items():
            group.add_argument(f"--{name}", **arguments)

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> Tuple[str, ...]:
        """Only speech; text is needed only if the KD stage uses labels."""
        return ("speech",)

    @classmethod
    def optional_data_names(cls, train: bool = True, inference: bool = False) -> Tuple[str, ...]:
        """The names of ASRTask, and text."""
        return ("text",) + super().optional_data_names(train, inference)

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetASRModel:
        """Build the student as ESPnet does, and turn it into the KD model of ``--kd_config``.

        Without ``--kd_config``, and for statistics, the student is not changed and no teacher is loaded.

        Raises:
            UserError: student, teacher and page don't fit together, or the disk has too little space.
        """
        cls.kd_model = cls.losses = cls.plan = None
        try:
            student = super().build_model(args)
        except Exception as e:  # ESPnet's classes may raise anything for wrong arguments and files
            raise UserError(f"cannot build the model of {args.config}: {type(e).__name__}: {e}") from e
        if getattr(args, "collect_stats", False):
            student.__class__ = StatisticsModel
            return student
        check_normalisation(args, student)
        cls.progress = Progress(max_epoch=args.max_epoch or 1)
        model, teacher = student, None
        if getattr(args, "kd_config", None) is not None:
            cls.plan = plan = make_plan(load_page(args.kd_config), args.max_epoch or 1, args.kd_stages)
            if args.kd_stage not in (None, *plan.numbers):
                known = f"{plan.numbers} of {plan.page.path}"
                raise UserError(f"--kd_stage {args.kd_stage}: this training has the KD stages {known}")
            check_data(args, [phase.stage for phase in plan.phases])
            nbest = cls._nbest(args) if any(phase.stage.nbest for phase in plan.phases) else None
            teacher = cls._teacher(args, plan.page) if plan.page.teacher == "required" else None
            model = ESPnetASRKDModel.adopt(student, plan, teacher, cls.progress, sampling_rate(args), nbest)
            cls.kd_model = model
        check_models(args, student, model, cls.plan, teacher)
        cls.losses = NonFiniteLosses(args.max_nonfinite, cls.progress)
        cls.losses.watch(model)
        return model

    @classmethod
    def main_worker(cls, args: argparse.Namespace) -> None:
        """Run ESPnet's worker; a process per GPU also reports errors in one line, and ends when its parent ends."""
        leave_with_parent()
        try:
            super().main_worker(args)
            if args.output_dir and not args.collect_stats and not args.dry_run:
                cls._look_at_last_epoch(args)
        except UserError as e:
            if multiprocessing.parent_process() is None:
                raise
            print(f"error: {e}", file=sys.stderr)
            sys.exit(1)

    @classmethod
    def build_optimizers(cls, args: argparse.Namespace, model: torch.nn.Module) -> List[torch.optim.Optimizer]:
        """Build the optimizers, and count their updates. Sets ``max_epoch`` to the last epoch of ``--kd_stage``."""
        optimizers = super().build_optimizers(args, model)
        for optimizer in optimizers:
            optimizer.register_step_post_hook(cls.progress.count_update)
        cls.scheduler_conf = args.scheduler_conf
        if cls.plan is not None:
            args.max_epoch = cls.plan.end_epoch(args.kd_stage)
        return optimizers

    @classmethod
    def _look_at_last_epoch(cls, args: argparse.Namespace) -> None:
        """Refuse an epoch that did not change the model; keep the student at the end of a KD stage."""
        if cls.losses is not None:
            cls.losses.finish()
        # Under torchrun and slurm, ``args`` has no rank.
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        first_rank = not parallel or torch.distributed.get_rank() == 0
        check_updated(Path(args.output_dir), cls.progress, first_rank)
        if first_rank and cls.plan is not None:
            trained = cls.progress.updates is not None  # otherwise it was resumed after its last epoch
            epoch = cls.progress.epoch if trained else args.max_epoch
            ended = args.kd_stage in (None, cls.plan.numbers[-1])
            hand_over(Path(args.output_dir), cls.plan, epoch, stopped=ended and args.patience is not None)

    @staticmethod
    def _nbest(args: argparse.Namespace) -> Optional[Dict[str, Hypotheses]]:
        if args.nbest is None:
            return None
        nbest = read_nbest(Path(args.nbest), args.token_list)
        check_utterances(args, nbest, args.nbest, "asr_kd_nbest, stage 7 of run.sh")
        return nbest

    @staticmethod
    def _teacher(args: argparse.Namespace, page: Page) -> Optional[Teacher]:
        if args.target_cache:
            return cached_teacher(args, page)
        if not args.teacher:
            return None
        if not args.augmented_teacher:
            conf = getattr(args, "preprocessor_conf", None) or {}
            found = [o for o in ("rir_scp", "noise_scp") if getattr(args, o, None)]
            if conf.get("data_aug_effects") and conf.get("data_aug_prob"):
                found.append("preprocessor_conf: data_aug_effects")
            if found:
                raise UserError(
                    f"{', '.join(found)} act before the model, so that an online teacher would get augmented audio; "
                    "take them out, or give --augmented_teacher true"
                )
        # Targets cannot be kept by id if the data loader changes an utterance in each epoch; nor, if a resume is to be
        # exact, if each epoch has other batches, because a teacher's outputs depend on the padding.
        changing = args.augmented_teacher or args.iterator_type != "sequence" or args.shuffle_within_batch
        memory = 0.0 if changing else args.teacher_memory * 1e6
        teachers = [OnlineTeacher(path, memory / len(args.teacher)) for path in args.teacher]
        if len(teachers) == 1 and not page.teacher_weights:
            return teachers[0]
        return SeveralTeachers(teachers, page.teacher_weights)

    @classmethod
    def build_iter_factory(
        cls, args: argparse.Namespace, distributed_option: DistributedOption, mode: str, kwargs: Optional[dict] = None
    ) -> AbsIterFactory:
        """Build the iterator factory; in training it also reports the epoch, and keeps the last finished checkpoint."""
        factory = super().build_iter_factory(args, distributed_option, mode, kwargs)
        if cls.kd_model is not None and mode in ("train", "valid") and type(factory) is SequenceIterFactory:
            teacher = cls.kd_model.teacher if isinstance(cls.kd_model.teacher, CachedTeacher) else None
            parts = cls.kd_model.parts(mode == "train")
            factory.collate_fn = Loading(factory.collate_fn, teacher, parts, cls.progress)
        if mode != "train":
            return factory
        first_rank = not distributed_option.distributed or distributed_option.dist_rank == 0

        def at_epoch(epoch: int) -> None:
            if first_rank and epoch > 1:
                keep_previous(Path(args.output_dir))
                if cls.plan is not None:
                    hand_over(Path(args.output_dir), cls.plan, epoch - 1)
            if cls.changes is not None:
                cls.changes.at_epoch(epoch)

        def at_step() -> None:
            if cls.changes is not None:
                cls.changes.at_step()

        return EpochHooks(factory, cls.progress, at_epoch, at_step)


class StatisticsModel(ESPnetASRModel):
    """The model for ``--collect_stats``; ESPnet's own requires text there, which it does not use."""

    def collect_feats(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        text: Optional[Tensor] = None,
        text_lengths: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Dict[str, Tensor]:
        """ESPnetASRModel's features (B, T, D) and their lengths (B,)."""
        return super().collect_feats(speech, speech_lengths, text, text_lengths, **kwargs)


def check_data(args: argparse.Namespace, stages: Sequence[KDStage]) -> None:
    """Refuse training or validation data without text where a KD stage needs it (:class:`UserError`)."""
    needy = [stage for stage in stages if stage.needs_text]
    for option in DATA_OPTIONS:
        names: List[str] = [name for _, name, _ in getattr(args, option) or []]
        if names and needy and "text" not in names:
            raise UserError(
                f"KD stage {needy[0].number} ({needy[0].name}) trains with transcripts, but --{option} has no text; "
                "add it, or choose a method without labels (label_free)"
            )


def cached_teacher(args: argparse.Namespace, page: Page) -> CachedTeacher:
    """The teacher of ``--target_cache``.

    Raises:
        UserError: the cache lacks utterances or outputs that the page needs, or its teacher is not ``--teacher``.
    """
    check_cacheable(page)
    teacher = CachedTeacher(args.target_cache)
    if len(args.teacher) > 1:
        raise UserError(f"--target_cache {args.target_cache} has one teacher's targets; for several, leave it out")
    for path in args.teacher:
        config, file = find_experiment(path)
        for given, kept in ((file, teacher.manifest.teacher_sha256), (config, teacher.manifest.config_sha256)):
            if sha256_of(given) != kept:
                raise UserError(
                    f"--target_cache {args.target_cache} was made with {teacher.manifest.teacher}, which differs from "
                    f"--teacher {path} in {given.name}; make the cache again, or leave --teacher out"
                )
    check_utterances(args, teacher, args.target_cache, "asr_kd_cache")
    return teacher


def check_utterances(args: argparse.Namespace, known: Container[str], path: str, maker: str) -> None:
    """Refuse a file of targets that lacks utterances of the training or validation data (:class:`UserError`)."""
    for option in DATA_OPTIONS:
        for data, name, _ in getattr(args, option) or []:
            if name != "speech":
                continue
            missing = [utt_id for utt_id, _ in read_pairs(data) if utt_id not in known]
            if missing:
                raise UserError(
                    f"{path} lacks {len(missing)} utterances of {data} ({', '.join(missing[:5])} …); make it for this "
                    f"data: {maker}"
                )
