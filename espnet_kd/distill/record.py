"""The record of a distillation, in the student's directory: its inputs and options, and the finished KD stages."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.distill.checks.options import tokens_of
from espnet_kd.distill.page import Page
from espnet_kd.distill.plan import Plan
from espnet_kd.experiments.checkpoints import CHECKPOINT, read_checkpoint
from espnet_kd.experiments.models import find_experiment, read_config
from espnet_kd.experiments.record import differences
from espnet_kd.experiments.resume import is_compared, rule_of
from espnet_kd.files import replacing, sha256_of
from espnet_kd.targets.cache import read_manifest

RECORD = "kd_stage.json"
#: Files that only a training leaves.
TRACES = ("checkpoint.pth", "config.yaml", "*epoch.pth")
#: The options that choose the directory, for messages.
OUTPUT_OPTION = "--output_dir (of run.sh: --expdir, or for a student --tag)"


def make_record(args: argparse.Namespace, parser: argparse.ArgumentParser, plan: Plan) -> Dict[str, Any]:
    """Everything that determines the training, as JSON values."""
    page: Page = plan.page
    stages = plan.as_record()
    record: Dict[str, Any] = {
        "method": page.method,
        "kd_stages": plan.numbers,
        "epochs": plan.max_epoch,
        "seed": args.seed,
        # A cache has the identity of its teacher; --teacher is only compared with it, and its path may differ.
        "teacher": args.teacher if page.teacher == "required" and not args.target_cache else [],
        "teacher_weights": page.teacher_weights,
        "pool": page.pool,
        "train": plan.options,
        "stages": stages,
        "options": {k: v for k, v in sorted(vars(args).items()) if is_compared(k) and v != parser.get_default(k)},
        "data": _hashes(
            [
                args.token_list,
                *(path for path, _, _ in args.train_data_path_and_name_and_type or []),
                *(args.train_shape_file or []),  # the shape files list the utterances that are used
            ]
        ),
        "objectives": list({o["objective"]: o for stage in stages for o in stage["objectives"]}.values()),
    }
    if page.teacher == "required" and not args.target_cache:
        models = [(teacher, find_experiment(teacher)[1]) for teacher in args.teacher]
        record["teacher_files"] = {f"{teacher}: {model.name}": sha256_of(model)[:12] for teacher, model in models}
    if page.teacher == "required" and args.target_cache:
        manifest = read_manifest(args.target_cache)
        identity = {"teacher": manifest.teacher_sha256, "config": manifest.config_sha256}
        record["target_cache"] = {**identity, **asdict(manifest.policy)}
    if args.nbest and any(phase.stage.nbest for phase in plan.phases):
        record["nbest"] = _hashes([args.nbest])
    return json.loads(json.dumps(record, default=str))  # as it will be read: tuples become lists


def claim(output_dir: Path, record: Dict[str, Any], plan: Plan) -> int:
    """Compare a directory with what is to be trained into it.

    A training that has ended may be continued with a higher ``max_epoch``, which extends its last KD stage. The epochs
    of the earlier KD stages then stay in ``record`` as they were trained.

    Returns:
        the number of the last KD stage that is finished there, 0 for none

    Raises:
        UserError: the directory holds another training, or one without a record.
    """
    try:
        found = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        trace = next((p for name in TRACES for p in output_dir.glob(name)), None)
        if trace is not None:
            raise UserError(
                f"{output_dir} holds a training that is not a distillation ({trace.name} without {RECORD}); choose "
                f"another {OUTPUT_OPTION}"
            ) from None
        return 0
    except ValueError as e:
        raise UserError(f"{output_dir / RECORD} is damaged ({e}); remove {output_dir} to train again") from e
    done = found.pop("finished_kd_stage", 0)
    ended = found.pop("finished", False)
    before = found.get("epochs", 0)
    longer = ended and record["epochs"] > before
    # Refused if the new plan begins the last KD stage after the trained epochs, which would train its beginning twice.
    extended = longer and _trained_epochs(output_dir, before) >= plan.phases[-1].epochs(plan.max_epoch)[0]
    if extended:
        found["epochs"] = record["epochs"]
        done = plan.numbers[-2] if len(plan.numbers) > 1 else 0
    differing = list(differences(_without_epochs(_as_now(found, record)), _without_epochs(record)))
    # If nothing was trained yet, a corrected command may use the directory.
    if differing and (output_dir / "checkpoint.pth").exists():
        raise UserError(
            f"{output_dir} holds a student with other settings ({in_words(differing)}); choose another {OUTPUT_OPTION}"
        )
    if differing:
        return 0
    for mine, theirs in zip(record["stages"], found["stages"]):
        mine["epochs"] = theirs["epochs"]
    if extended:
        record["stages"][-1]["epochs"][1] = plan.max_epoch
    return done


def claim_plain(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Compare a directory with the plain training (without a method) that is to begin or to resume in it.

    Raises:
        UserError: the directory holds a distilled student, or a training with other options.
    """
    output_dir = Path(args.output_dir)
    if (output_dir / RECORD).exists():
        raise UserError(
            f"{output_dir} holds a distilled student ({RECORD}), and no --kd_config is given; choose another "
            f"{OUTPUT_OPTION}"
        )
    if not (args.resume and (output_dir / "checkpoint.pth").exists() and (output_dir / "config.yaml").exists()):
        return
    found = read_config(output_dir / "config.yaml")
    now = json.loads(json.dumps({**vars(args), "token_list": tokens_of(args.token_list)}, default=str))
    if now.get("input_size") is not None:  # ESPnet then builds no frontend, and config.yaml has none
        found = {k: v for k, v in found.items() if not k.startswith("frontend")}
    # A higher max_epoch extends a training.
    compared = [k for k in now if k in found and rule_of(k) in ("refused", "higher")]
    if (now["max_epoch"] or 0) >= (found.get("max_epoch") or 0):
        compared.remove("max_epoch")
    if differing := list(differences({k: found[k] for k in compared}, {k: now[k] for k in compared})):
        raise UserError(
            f"{output_dir} holds a model of other settings ({in_words(differing)}); choose another {OUTPUT_OPTION}"
        )


def in_words(differing: Sequence[Tuple[str, Any, Any]], shown: int = 5) -> str:
    """Differences (:func:`espnet_kd.experiments.record.differences`) in words: ``encoder_conf.num_blocks: 2 → 3``.

    For a file that differs, only its name is given, not its hashes.
    """
    words = []
    for key, old, new in differing[:shown]:
        what, _, rest = key.partition(".")
        if what in ("data", "nbest", "teacher_files"):
            words.append(f"{rest} {'is new' if old is None else 'is no longer used' if new is None else 'has changed'}")
        elif key in ("target_cache.teacher", "target_cache.config"):
            words.append("target_cache is another teacher's")
        else:
            words.append(f"{rest if what == 'options' else key}: {old} → {new}")
    more = len(differing) - shown
    return "; ".join(words) + (f"; and {more} more" if more > 0 else "")


def write_record(output_dir: Path, record: Mapping[str, Any], done: int, ended: bool) -> None:
    """Write the record of a training whose KD stages up to number ``done`` are finished; ``ended``: all are."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with replacing(output_dir / RECORD) as f:
        json.dump({**record, "finished_kd_stage": done, "finished": ended}, f, indent=2)


def finished_stage(output_dir: Path) -> int:
    """The number of the last KD stage that is finished in a directory by its record, 0 for none."""
    try:
        number = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))["finished_kd_stage"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return 0
    return int(number)


def _trained_epochs(output_dir: Path, planned: int) -> int:
    """The number of epochs of a training that has ended; with ``patience`` it may be below ``planned``."""
    states = read_checkpoint(output_dir / CHECKPOINT)
    return planned if states is None else min(planned, states["reporter"]["epoch"])


def _as_now(found: Mapping[str, Any], record: Mapping[str, Any]) -> Dict[str, Any]:
    """``found`` with the path of the N-best in ``record``, because only the content of this file counts.

    Records of earlier versions have no ``teacher_files``, which are then not compared.
    """
    as_now = dict(found)
    if "teacher_files" in record:
        as_now.setdefault("teacher_files", record["teacher_files"])
    old, new = found.get("nbest"), record.get("nbest")
    if isinstance(old, dict) and isinstance(new, dict) and len(old) == len(new) == 1:
        as_now["nbest"] = dict(zip(new, old.values()))
    return as_now


def _without_epochs(record: Mapping[str, Any]) -> Dict[str, Any]:
    """A record without the epochs of its KD stages, which follow from its other values, except after an extension."""
    stages = record.get("stages")
    if not isinstance(stages, list):
        return dict(record)
    stages = [{k: v for k, v in s.items() if k != "epochs"} if isinstance(s, dict) else s for s in stages]
    return {**record, "stages": stages}


def _hashes(paths: List[Any]) -> Dict[str, str]:
    """{path: beginning of the file's SHA-256}; values that are not files are skipped (a token list in the YAML)."""
    files = [Path(p) for p in paths if isinstance(p, str) and Path(p).is_file()]
    return {str(p): sha256_of(p)[:12] for p in files}
