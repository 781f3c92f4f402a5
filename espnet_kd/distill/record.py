"""The record of a distillation, in the student's directory: what it is made with, and how far it is."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Tuple

from espnet_kd.cli import UserError
from espnet_kd.distill.page import Page
from espnet_kd.distill.plan import Plan
from espnet_kd.files import replacing
from espnet_kd.targets.cache import read_manifest

RECORD = "kd_stage.json"
#: Files that only a training leaves.
TRACES = ("checkpoint.pth", "config.yaml", "*epoch.pth")
#: What a user changes to train elsewhere.
OUTPUT_OPTION = "--output_dir (of run.sh: --tag or --expdir)"
#: Options of the training command that may change between two runs of one training: they do not change what is learnt,
#: or the record has them under a name of its own.
HARMLESS = frozenset(
    (
        *("config", "output_dir", "resume", "dry_run", "print_config", "log_level", "log_interval"),
        *("ngpu", "num_workers", "num_att_plot", "use_matplotlib", "use_tensorboard", "create_graph_in_tensorboard"),
        *("use_wandb", "wandb_project", "wandb_id", "wandb_entity", "wandb_name", "wandb_model_log_interval"),
        *("dist_backend", "dist_init_method", "dist_world_size", "dist_rank", "local_rank", "dist_master_addr"),
        *("dist_master_port", "dist_launcher", "multiprocessing_distributed", "unused_parameters"),
        *("gradient_as_bucket_view", "ddp_comm_hook", "sharded_ddp", "cudnn_enabled", "cudnn_benchmark"),
        *("cudnn_deterministic", "use_tf32", "detect_anomaly", "max_cache_size", "max_cache_fd"),
        *("valid_max_cache_size", "collect_stats", "write_collected_feats", "allow_variable_data_keys"),
        *("nbest_averaging_interval", "save_strategy"),
        *("seed", "max_epoch", "teacher", "target_cache", "kd_config", "kd_stage", "kd_stages", "nbest"),
        *("teacher_memory", "max_nonfinite"),
    )
)


def make_record(args: argparse.Namespace, parser: argparse.ArgumentParser, plan: Plan) -> Dict[str, Any]:
    """All that decides what is trained, as JSON has it."""
    page: Page = plan.page
    stages = plan.as_record()
    record: Dict[str, Any] = {
        "method": page.method,
        "kd_stages": plan.numbers,
        "epochs": plan.max_epoch,
        "seed": args.seed,
        # A cache names its teacher itself; with it, --teacher is only compared, and may be spelled in any way.
        "teacher": args.teacher if page.teacher == "required" and not args.target_cache else [],
        "teacher_weights": page.teacher_weights,
        "pool": page.pool,
        "train": page.train,
        "stages": stages,
        "options": {k: v for k, v in sorted(vars(args).items()) if k not in HARMLESS and v != parser.get_default(k)},
        "data": _hashes(
            [
                args.token_list,
                *(path for path, _, _ in args.train_data_path_and_name_and_type or []),
                *(args.train_shape_file or []),  # which utterances are trained on
            ]
        ),
        "objectives": list({o["objective"]: o for stage in stages for o in stage["objectives"]}.values()),
    }
    if page.teacher == "required" and args.target_cache:
        manifest = read_manifest(args.target_cache)
        identity = {"teacher": manifest.teacher_sha256, "config": manifest.config_sha256}
        record["target_cache"] = {**identity, **asdict(manifest.policy)}
    if args.nbest and any(phase.stage.nbest for phase in plan.phases):
        record["nbest"] = _hashes([args.nbest])
    return json.loads(json.dumps(record, default=str))  # as it is read again: tuples are lists


def claim(output_dir: Path, record: Dict[str, Any], plan: Plan) -> int:
    """Compare a directory with what is to be trained into it.

    A training that has ended may go on with a higher ``max_epoch``: its last KD stage does. The epochs of KD stages
    that were trained before then stay in ``record`` as they were.

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
        raise UserError(f"{output_dir / RECORD} is damaged ({e}); remove {output_dir} to train anew") from e
    done = found.pop("finished_kd_stage", 0)
    ended = found.pop("finished", False)
    before = found.get("epochs", 0)
    # Not where the last KD stage would only begin after what is trained: its beginning would be trained twice.
    extended = ended and record["epochs"] > before >= plan.phases[-1].epochs(plan.max_epoch)[0]
    if extended:
        found["epochs"] = record["epochs"]
        done = plan.numbers[-2] if len(plan.numbers) > 1 else 0
    differing = list(differences(_without_epochs(found), _without_epochs(record)))
    # A directory in which nothing was trained yet may take a mended command.
    if differing and (output_dir / "checkpoint.pth").exists():
        what = "; ".join(f"{key}: {a} there, {b} now" for key, a, b in differing[:5])
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"{output_dir} holds a student with other settings ({what}{more}); choose another {OUTPUT_OPTION}"
        )
    if differing:
        return 0
    for mine, theirs in zip(record["stages"], found["stages"]):
        mine["epochs"] = theirs["epochs"]
    if extended:
        record["stages"][-1]["epochs"][1] = plan.max_epoch
    return done


def refuse_distillation(output_dir: Path) -> None:
    """Refuse to train without a method into a directory that holds a distilled student (:class:`UserError`)."""
    if (output_dir / RECORD).exists():
        raise UserError(
            f"{output_dir} holds a distilled student ({RECORD}), and no --kd_config is given; choose another "
            f"{OUTPUT_OPTION}"
        )


def write_record(output_dir: Path, record: Mapping[str, Any], done: int, ended: bool) -> None:
    """Write the record of a training whose KD stages up to number ``done`` are finished; ``ended``: all are."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with replacing(output_dir / RECORD) as f:
        json.dump({**record, "finished_kd_stage": done, "finished": ended}, f, indent=2)


def differences(old: Any, new: Any, where: str = "") -> Iterator[Tuple[str, Any, Any]]:
    """(place, old value, new value) of everything that differs between two values read from JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f"{where}[{i}]")
    elif old != new:
        yield where, old, new


def _without_epochs(record: Mapping[str, Any]) -> Dict[str, Any]:
    """A record without the epochs of its KD stages, which follow from the rest, but not after an extension."""
    stages = record.get("stages")
    if not isinstance(stages, list):
        return dict(record)
    stages = [{k: v for k, v in s.items() if k != "epochs"} if isinstance(s, dict) else s for s in stages]
    return {**record, "stages": stages}


def _hashes(paths: List[Any]) -> Dict[str, str]:
    """Path to the beginning of the file's SHA-256, for those that are files (a token list may stand in the YAML)."""
    files = [Path(p) for p in paths if isinstance(p, str) and Path(p).is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in files}
