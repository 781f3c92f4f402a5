"""Collect the results of experiments from their directories as rows."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from espnet_kd.cli import UserError
from espnet_kd.experiments.history import read_parts, read_stages, seconds
from espnet_kd.files import replacing
from espnet_kd.report.curves import Curve
from espnet_kd.report.labels import GREEDY, Row, describe_kind, label_rows

ROLES = ("teacher", "plain", "student")
#: Keys of every row, in this order; a value is None if the fact is not known. ``expdir`` is the path as it was given;
#: ``decoding`` is the scored directory of the experiment, ``search`` describes the search (`show_search`), and
#: ``frames`` is the result of `espnet_kd.report.alignment`.
KEYS = (
    "role", "method", "kd_stages", "params", "epochs", "seed", "testset", "cer", "wer", "wer_low", "wer_high", "rtf",
    "train_seconds", "cer_low", "cer_high", "experiment", "expdir", "decoding", "model_bytes", "search", "frames",
)  # fmt: skip


@dataclass
class Gathered:
    """Rows of the table (keys `KEYS`), training curves, and notes on what is missing, of one EXPDIR."""

    expdir: Path
    rows: List[Row] = field(default_factory=list)
    curves: List[Curve] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    paths: Dict[str, Path] = field(default_factory=dict)  #: directory of each experiment
    spans: Dict[str, Tuple[float, float]] = field(default_factory=dict)  #: when each was trained, seconds since 1970

    def ran_alone(self, row: Row) -> bool:
        """Whether no other experiment was trained at the same time, judged by the times of the files."""
        name = row["experiment"]
        mine = self.spans.get(name)
        others = [span for other, span in self.spans.items() if other != name]
        return mine is not None and all(end <= mine[0] or mine[1] <= start for start, end in others)

    def decoding(self, row: Row) -> Path:
        """The directory with the decoding of a scored row."""
        return self.paths[row["experiment"]] / row["decoding"]


def gather(expdir: Path, teachers: Sequence[Path] = ()) -> Gathered:
    """Collect the experiments below ``expdir``, and teachers that lie elsewhere.

    An experiment is a directory which holds experiment.json, or scores in decode_*/score.json.

    Raises:
        UserError: no such directory, or nothing in it to report.
    """
    if not expdir.is_dir():
        raise UserError(f"{expdir} is not a directory; give one that holds experiments")
    for teacher in teachers:
        if not teacher.exists():
            raise UserError(f"--teacher {teacher} does not exist")
    outside = [t.parent if t.is_file() else t for t in teachers]
    known = {t.resolve() for t in outside}
    inside = [p for p in sorted(expdir.iterdir()) if p.is_dir() and p.resolve() not in known and is_experiment(p)]
    if not inside and not outside:
        raise UserError(f"no experiment in {expdir}: none has experiment.json or decode_*/score.json; train one first")
    result = Gathered(expdir)
    for path in outside:
        _add(result, path, {"role": "teacher"})
    for path in inside:
        _add(result, path, {})
    result.rows.sort(key=_order)
    labels = label_rows(result.rows)
    named = {row["experiment"]: labels(row) for row in result.rows}
    rank = {labels(row): i for i, row in reversed(list(enumerate(result.rows)))}
    for curve in result.curves:
        curve.label = named[curve.experiment]
    result.curves.sort(key=lambda curve: rank[curve.label])
    return result


def is_experiment(path: Path) -> bool:
    """Whether a directory is an experiment with results."""
    return (path / "experiment.json").is_file() or any(path.glob("decode_*/score.json"))


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a JSON list."""
    with replacing(path) as f:
        json.dump(list(rows), f, indent=2, ensure_ascii=False, allow_nan=False)
        f.write("\n")


def read_json_object(path: Path, notes: List[str]) -> Optional[Dict[str, Any]]:
    """A JSON object, or None: silently if there is no file, with a note if it can't be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        notes.append(f"{_short(path)} cannot be read: {e}")
        return None
    if not isinstance(content, dict):
        notes.append(f"{_short(path)} is not a JSON object")
        return None
    return content


def find_recipe(near: Path, given: Any) -> Optional[Path]:
    """The directory to which the path ``given`` is relative; None if it is not found.

    The directories above ``near`` (an experiment) are tried first, then the working directory.
    """
    if not isinstance(given, str) or not given:
        return None
    places = [*near.resolve().parents, Path.cwd()]
    return next((place for place in places if (place / given).exists()), None)


def find_data(decoding: Path) -> Optional[Tuple[Path, str]]:
    """(recipe's directory, data dir relative to it) of a decoding; None if it does not exist any more.

    It is the one that decode.json names, or else the one in the recipes' usual place.
    """
    given = (read_json_object(decoding / "decode.json", []) or {}).get("data_dir")
    for name in (given, f"dump/raw/{decoding.name[len('decode_') :]}"):
        recipe = find_recipe(decoding, name)
        if recipe:
            return recipe, str(name)
    return None


def find_teacher(experiment: Path) -> Optional[Path]:
    """The directory or zip of a student's (first) teacher; None if it is not recorded, or does not exist any more."""
    given = _record(experiment).get("teacher")
    first = given[0] if isinstance(given, list) and given else None
    recipe = find_recipe(experiment, first)
    return _model_home(recipe / str(first)) if recipe else None


def had_no_teacher(experiment: Path) -> bool:
    """Whether a student's record shows that it was trained without a teacher, its targets on disk, and its N-best."""
    record = _record(experiment)
    return "teacher" in record and not any(record.get(name) for name in ("teacher", "target_cache", "nbest"))


def _record(experiment: Path) -> Dict[str, Any]:
    return read_json_object(experiment / "kd_stage.json", []) or {}


def model_homes(teacher: Path) -> Set[Path]:
    """The directories and zips that a teacher of the table can have as a student's teacher (`find_teacher`).

    run.sh keeps the results of a given teacher in a directory of their own, with a link to the model.
    """
    return {_model_home(path) for path in (teacher, teacher / "export", teacher / "packed.zip")}


def _model_home(path: Path) -> Path:
    path = path.resolve()
    return path.parent if path.suffix == ".pth" else path


def show_search(decode: Mapping[str, Any]) -> Optional[str]:
    """The search of a decoding in words; None if decode.json does not have it."""
    width, weight = decode.get("beam_size"), decode.get("ctc_weight", 1.0)
    if not isinstance(width, int) or not isinstance(weight, (int, float)):
        return None
    words = [GREEDY if width == 1 and weight == 1 else f"beam size {width}"]
    words += [] if weight == 1 else [f"CTC weight {weight:g}"]
    if decode.get("ngram_file"):
        words.append(f"{Path(str(decode['ngram_file'])).name} with weight {decode.get('ngram_weight')}")
    return ", ".join(words)


def read_scores(run_dir: Path) -> List[Row]:
    """Test set, ``cer`` and ``wer`` of each decode_*/score.json in a directory, such as that of an earlier KD stage."""
    return [
        {"testset": str(score.get("testset") or score_file.parent.name[len("decode_") :]), **_rates(score)}
        for score_file in sorted(run_dir.glob("decode_*/score.json"))
        if (score := read_json_object(score_file, [])) is not None
    ]


def _add(result: Gathered, path: Path, forced: Dict[str, Any]) -> None:
    """Append the rows, the curve and the notes of one experiment."""
    name = _name(path, result)
    given = read_json_object(path / "experiment.json", result.notes)
    if given is None and not forced:
        result.notes.append(f"{name}: no experiment.json, so role and method are not known")
    facts = {**(given or {}), **forced}
    if facts.get("role") not in ROLES and given is not None:
        result.notes.append(f"{name}: role {facts.get('role')!r} in experiment.json is none of {', '.join(ROLES)}")
    base = dict.fromkeys(KEYS)
    base.update(experiment=name, expdir=str(result.expdir))
    for key, kind in (("role", str), ("method", str), ("kd_stages", list), ("seed", int)):
        base[key] = facts[key] if isinstance(facts.get(key), kind) else None
    if base["seed"] is None:
        base["seed"] = _seed(path)
    stages = read_stages(path)
    if stages:
        base.update(epochs=sum(map(len, stages)), train_seconds=_finite(sum(map(seconds, stages))))
    elif base["role"] != "teacher":  # a teacher may have been trained elsewhere
        result.notes.append(f"{name}: no training statistics (checkpoint.pth or train.log)")
    rows = []
    for score_file in sorted(path.glob("decode_*/score.json")):
        score = read_json_object(score_file, result.notes)
        if score is not None:
            rows.append({**base, **_score(score, score_file, result)})
    if not rows:
        result.notes.append(f"{name}: not scored yet (no decode_*/score.json)")
        rows = [base]
    result.paths[name] = path
    files = [d / name for d in (path, *path.glob("kd_stage*")) for name in ("config.yaml", "checkpoint.pth")]
    times = [p.stat().st_mtime for p in files if p.is_file()]
    if stages and times:
        result.spans[name] = min(times), max(times)
    result.rows += rows
    parts = read_parts(path)
    changes = [part.last + 0.5 * (following.first > part.last) for part, following in zip(parts, parts[1:])]
    result.curves.append(Curve(name, stages, name, changes))  # `gather` replaces the label


def _name(path: Path, result: Gathered) -> str:
    """A name for an experiment: that of its directory, with those above it if another experiment has it already."""
    parts = path.resolve().parts
    names = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next((name for name in names if name not in result.paths), str(path))


def _score(score: Dict[str, Any], score_file: Path, result: Gathered) -> Dict[str, Any]:
    """Columns that come from a decoding directory."""
    where = f"{score_file.parent.parent.resolve().name}/{score_file.parent.name}"
    decode = read_json_object(score_file.parent / "decode.json", result.notes)
    if decode is None:
        result.notes.append(f"{where}: no decode.json, so parameters and real-time factor are not known")
    decode = decode or {}
    recipe = find_recipe(score_file.parent, decode.get("model"))
    model = recipe / decode["model"] if recipe else None
    columns = {
        "testset": str(score.get("testset") or score_file.parent.name[len("decode_") :]),
        "decoding": score_file.parent.name,
        "params": decode["params"] if isinstance(decode.get("params"), int) else None,
        "rtf": _finite(decode.get("rtf")),
        "model_bytes": model.stat().st_size if model and model.is_file() else None,
        "search": show_search(decode),
    }
    return {**columns, **_rates(score)}


def _rates(score: Dict[str, Any]) -> Dict[str, Optional[float]]:
    """``cer``, ``wer`` and their intervals' ends in percent; None where a score.json has no number."""
    columns = {}
    for unit in ("cer", "wer"):
        rates = score.get(unit)
        rates = rates if isinstance(rates, dict) else {}
        columns[unit] = _finite(rates.get("err"))
        columns.update({f"{unit}_{end}": _finite(rates.get(end)) for end in ("low", "high")})
    return columns


def _short(path: Path) -> str:
    """The last parts of a path, enough to find the file below the experiments."""
    return "/".join(path.resolve().parts[-3:])


def _seed(path: Path) -> Optional[int]:
    if not (path / "config.yaml").is_file():
        return None
    from espnet_kd.experiments.models import read_config  # imported here, because it imports torch

    try:
        return read_config(path / "config.yaml").get("seed")
    except UserError as e:
        logging.warning("%s", e)
        return None


def _finite(value: Any) -> Optional[float]:
    """A finite number, or None for anything else."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _order(row: Row) -> Tuple:
    role = ROLES.index(row["role"]) if row["role"] in ROLES else len(ROLES)
    seed = row["seed"] if isinstance(row["seed"], int) else 0
    return role, row["testset"] or "", describe_kind(row), seed, row["experiment"]
