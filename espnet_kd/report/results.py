"""Gather what experiments have left on disk into rows, and write them as JSON and as a Markdown page."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.files import replacing
from espnet_kd.report.compare import compare_with_plain
from espnet_kd.report.curves import Curve
from espnet_kd.report.history import read_stages, seconds

ROLES = ("teacher", "plain", "student")
#: Keys of every row, in this order; None where a fact is not known.
KEYS = (
    "role", "method", "kd_stages", "params", "epochs", "seed", "testset", "cer", "wer", "wer_low", "wer_high", "rtf",
    "train_seconds", "cer_low", "cer_high", "experiment",
)  # fmt: skip


@dataclass
class Gathered:
    """Rows of the table (keys `KEYS`), training curves, and notes on what is missing."""

    expdir: Path
    rows: List[Dict[str, Any]] = field(default_factory=list)
    curves: List[Curve] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)


def gather(expdir: Path, teachers: Sequence[Path] = ()) -> Gathered:
    """Collect the experiments below ``expdir``, and teachers that lie elsewhere.

    An experiment is a directory which holds experiment.json, or scores in decode_*/score.json.

    Raises:
        UserError: no such directory, or nothing in it to report.
    """
    if not expdir.is_dir():
        raise UserError(f"--expdir {expdir} is not a directory")
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
    rank = {describe(row): i for i, row in reversed(list(enumerate(result.rows)))}
    result.curves.sort(key=lambda curve: rank[curve.label])
    return result


def is_experiment(path: Path) -> bool:
    """Whether a directory has something to report."""
    return (path / "experiment.json").is_file() or any(path.glob("decode_*/score.json"))


def describe(row: Dict[str, Any]) -> str:
    """What kind of experiment a row is, the same for all seeds: ``teacher``, ``plain`` or method and KD stages."""
    if row["role"] in ("teacher", "plain"):
        return row["role"]
    stages = show_stages(row["kd_stages"])
    name = row["method"] or row["experiment"]
    return name if stages == "–" else f"{name}, KD stages {stages}"


def show_stages(stages: Any) -> str:
    """KD stages for people: ``1+2+3``."""
    if stages in (None, "", []):
        return "–"
    return "+".join(map(str, stages)) if isinstance(stages, list) else str(stages)


def write_json(rows: Sequence[Dict[str, Any]], path: Path) -> None:
    """Write the rows as a JSON list."""
    with replacing(path) as f:
        json.dump(list(rows), f, indent=2, ensure_ascii=False, allow_nan=False)
        f.write("\n")


def write_markdown(gathered: Gathered, path: Path, picture: Optional[str] = None) -> None:
    """Write the page: environment, table, means over seeds, link to the picture of curves, what is missing."""
    lines = ["# Results", "", "## Environments", "", *(f"- {k}: `{v}`" for k, v in environment().items()), ""]
    lines += ["## Error rates", "", "Rates in percent; in brackets 95 % bootstrap intervals over utterances.", ""]
    lines += _table(
        ("experiment", "role", "method", "KD stages", "seed", "test set", "parameters", "CER", "WER", "RTF", "epochs",
         "training"),
        [_cells(row) for row in gathered.rows],
    )  # fmt: skip
    means = mean_over_seeds(gathered.rows)
    if means:
        lines += ["", "## Means over seeds", "", "In brackets the lowest and the highest seed.", ""]
        lines += _table(("experiment", "test set", "seeds", "CER", "WER"), means)
    against = compare_with_plain(gathered.rows, gathered.expdir, describe)
    if against:
        lines += ["", "## Against the plain student of the same seed", ""]
        lines += ["Points; below 0 is better. Each seed, then the mean, its 95 % interval (paired bootstrap over"]
        lines += ["utterances) and p.", ""]
        lines += _table(("student", "test set", "WER by seed", "WER", "p", "CER by seed", "CER", "p"), against)
    if picture:
        lines += ["", "## Training curves", "", f"![training curves]({picture})"]
    if gathered.notes:
        lines += ["", "## Missing", "", *(f"- {note}" for note in gathered.notes)]
    with replacing(path) as f:
        f.write("\n".join(lines) + "\n")


def mean_over_seeds(rows: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Table lines for every kind of experiment that was scored with two seeds or more."""
    groups: Dict[Tuple, List[Dict[str, Any]]] = {}
    for row in rows:
        if row["cer"] is not None and row["wer"] is not None:
            groups.setdefault((describe(row), row["testset"]), []).append(row)
    lines = []
    for (kind, testset), members in groups.items():
        if len(members) > 1:
            rates = [[r[k] for r in members] for k in ("cer", "wer")]
            shown = [f"{sum(v) / len(v):.2f} ({min(v):.2f}–{max(v):.2f})" for v in rates]
            lines.append([kind, _or_dash(testset), str(len(members)), *shown])
    return lines


def environment() -> Dict[str, str]:
    """Date, versions and processor of this run."""
    facts = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python version": platform.python_version(),
    }
    for package in ("torch", "espnet", "espnet_kd"):
        try:
            facts[f"{package} version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[f"{package} version"] = "not installed"
    facts["CPU"] = _processor()
    return facts


def _add(result: Gathered, path: Path, forced: Dict[str, Any]) -> None:
    """Append the rows, the curve and the notes of one experiment."""
    name = path.resolve().name
    given = _read_json(path / "experiment.json", result.notes)
    if given is None and not forced:
        result.notes.append(f"{name}: no experiment.json, so role and method are not known")
    facts = {**(given or {}), **forced}
    if facts.get("role") not in ROLES and given is not None:
        result.notes.append(f"{name}: role {facts.get('role')!r} in experiment.json is none of {', '.join(ROLES)}")
    base = dict.fromkeys(KEYS)
    base.update({k: facts.get(k) for k in ("role", "method", "kd_stages", "seed")}, experiment=name)
    if base["seed"] is None:
        base["seed"] = _seed(path)
    stages = read_stages(path)
    if stages:
        base.update(epochs=sum(map(len, stages)), train_seconds=_finite(sum(map(seconds, stages))))
    elif base["role"] != "teacher":  # a teacher may have been trained elsewhere
        result.notes.append(f"{name}: no training statistics (checkpoint.pth or train.log)")
    rows = []
    for score_file in sorted(path.glob("decode_*/score.json")):
        score = _read_json(score_file, result.notes)
        if score is not None:
            rows.append({**base, **_score(score, score_file, result.notes)})
    if not rows:
        result.notes.append(f"{name}: not scored yet (no decode_*/score.json)")
        rows = [base]
    result.rows += rows
    result.curves.append(Curve(describe(base), stages))


def _score(score: Dict[str, Any], score_file: Path, notes: List[str]) -> Dict[str, Any]:
    """Columns that come from a decoding directory."""
    where = f"{score_file.parent.parent.resolve().name}/{score_file.parent.name}"
    decode = _read_json(score_file.parent / "decode.json", notes)
    if decode is None:
        notes.append(f"{where}: no decode.json, so parameters and real-time factor are not known")
    decode = decode or {}
    cer, wer = score.get("cer") or {}, score.get("wer") or {}
    return {
        "testset": score.get("testset") or score_file.parent.name[len("decode_") :],
        "params": decode.get("params"),
        "rtf": _finite(decode.get("rtf")),
        "cer": _finite(cer.get("err")),
        "cer_low": _finite(cer.get("low")),
        "cer_high": _finite(cer.get("high")),
        "wer": _finite(wer.get("err")),
        "wer_low": _finite(wer.get("low")),
        "wer_high": _finite(wer.get("high")),
    }


def _read_json(path: Path, notes: List[str]) -> Optional[Dict[str, Any]]:
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


def _short(path: Path) -> str:
    """The end of a path, enough to find the file below the experiments."""
    return "/".join(path.resolve().parts[-3:])


def _seed(path: Path) -> Optional[int]:
    if not (path / "config.yaml").is_file():
        return None
    from espnet_kd.targets.experiment import read_config

    try:
        return read_config(path / "config.yaml").get("seed")
    except UserError as e:
        logging.warning("%s", e)
        return None


def _finite(value: Any) -> Optional[float]:
    """The number, or None for anything that JSON has no number for."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _order(row: Dict[str, Any]) -> Tuple:
    role = ROLES.index(row["role"]) if row["role"] in ROLES else len(ROLES)
    seed = row["seed"] if isinstance(row["seed"], int) else 0
    return role, row["testset"] or "", describe(row), seed, row["experiment"]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> List[str]:
    return [f"|{'|'.join(cells)}|" for cells in (head, ["---"] * len(head), *body)]


def _cells(row: Dict[str, Any]) -> List[str]:
    return [
        row["experiment"],
        _or_dash(row["role"]),
        _or_dash(row["method"]),
        show_stages(row["kd_stages"]),
        _or_dash(row["seed"]),
        _or_dash(row["testset"]),
        "–" if row["params"] is None else f"{row['params']:,}",
        _rate(row, "cer"),
        _rate(row, "wer"),
        "–" if row["rtf"] is None else f"{row['rtf']:.4f}",
        _or_dash(row["epochs"]),
        _duration(row["train_seconds"]),
    ]


def _or_dash(value: Any) -> str:
    return "–" if value is None else str(value).replace("|", "\\|")


def _rate(row: Dict[str, Any], key: str) -> str:
    if row[key] is None:
        return "–"
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return f"{row[key]:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")


def _duration(value: Optional[float]) -> str:
    if value is None:
        return "–"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _processor() -> str:
    """Name of the processor: Linux tells it only here."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
