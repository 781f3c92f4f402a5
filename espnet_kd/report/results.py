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
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from espnet_kd.cli import UserError
from espnet_kd.files import replacing
from espnet_kd.report.compare import UNITS, Difference, Kind, Rate, compare, find_plain
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
    labels = label_rows(result.rows)
    named = {row["experiment"]: labels(row) for row in result.rows}
    rank = {labels(row): i for i, row in reversed(list(enumerate(result.rows)))}
    for curve in result.curves:
        curve.label = named[curve.label]
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


def label_rows(rows: Sequence[Dict[str, Any]]) -> Callable[[Dict[str, Any]], str]:
    """A function like `describe` that says what tells these rows apart, and no more.

    KD stages are left out of methods with a single one; the size is added where one kind has several.
    """
    stages: Dict[Any, Set[str]] = {}
    for row in rows:
        stages.setdefault(row["method"], set()).add(show_stages(row["kd_stages"]))

    def kind(row: Dict[str, Any]) -> str:
        single = row["role"] == "student" and row["method"] and stages.get(row["method"]) == {"1"}
        return row["method"] if single else describe(row)

    sizes: Dict[str, Set[int]] = {}
    for row in rows:
        sizes.setdefault(kind(row), set()).update([] if row["params"] is None else [row["params"]])

    def label(row: Dict[str, Any]) -> str:
        tell = row["params"] is not None and len(sizes.get(kind(row), ())) > 1
        return f"{kind(row)}, {row['params']:,} parameters" if tell else kind(row)

    return label


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
    """Write the page: environment, comparison of methods, every run, picture of curves, what is missing."""
    lines = ["# Results", "", "## Environments", "", *(f"- {k}: `{v}`" for k, v in environment().items()), ""]
    kinds = compare(gathered.rows, gathered.expdir, label_rows(gathered.rows))
    if kinds:
        lines += ["## Comparison of methods", "", *_COMPARISON, ""]
        lines += _table(
            ("method", "test set", "seeds", "parameters", "epochs", "CER", "WER", "WER to plain", "p", "CER to plain",
             "p", "training"),
            [_compared(kind) for kind in kinds],
        )  # fmt: skip
        lines.append("")
    lines += ["## Error rates", ""]
    lines += ["Every run. Rates in percent; in brackets 95 % bootstrap intervals over utterances.", ""]
    lines += _table(
        ("experiment", "role", "method", "KD stages", "seed", "test set", "parameters", "CER", "WER", "RTF", "epochs",
         "training", "CER to plain", "WER to plain"),
        [[*_cells(row), *_to_plain(row, gathered.rows)] for row in gathered.rows],
    )  # fmt: skip
    if picture:
        lines += ["", "## Training curves", "", f"![training curves]({picture})"]
    if gathered.notes:
        lines += ["", "## Missing", "", *(f"- {note}" for note in gathered.notes)]
    with replacing(path) as f:
        f.write("\n".join(lines) + "\n")


_COMPARISON = (
    "Means over seeds, in percent. *To plain*: difference in points to the plain student of the same seeds and size;",
    "below 0 is better. In brackets 95 % bootstrap intervals over utterances, paired for the differences; errors are",
    "summed over the seeds, so they say nothing of other seeds, each of which stands below. p is that of one method",
    "alone: of twenty that do nothing, one has p < 0.05.",
)


def _compared(kind: Kind) -> List[str]:
    """One line of the comparison."""
    rows, against = kind.rows, kind.against
    params = rows[0]["params"]
    epochs = sorted({r["epochs"] for r in rows if r["epochs"] is not None})
    times = [r["train_seconds"] for r in rows if r["train_seconds"] is not None]
    if isinstance(against, Difference):
        seeds = [r["seed"] for r in rows]
        only = "" if against.seeds == seeds else f" (seeds {' '.join(map(_or_dash, against.seeds))})"
        differences = []
        for unit in reversed(UNITS):
            rate = against.rates[unit]
            differences += [f"{rate.value:+.2f} [{rate.low:+.2f}, {rate.high:+.2f}]{only}", f"{rate.p:.3f}"]
    else:
        differences = [against or "–", "–", "–", "–"]
    return [
        _or_dash(kind.label),
        _or_dash(rows[0]["testset"]),
        " ".join(_or_dash(r["seed"]) for r in rows),
        "–" if params is None else f"{params:,}",
        "/".join(map(str, epochs)) or "–",
        *(_show(kind.rates[unit]) for unit in UNITS),
        *differences,
        _duration(sum(times) / len(times) if times else None),
    ]


def _to_plain(row: Dict[str, Any], rows: Sequence[Dict[str, Any]]) -> List[str]:
    """Differences of one run to its plain student."""
    plain = find_plain(row, rows) if row["role"] == "student" and row["wer"] is not None else ""
    if isinstance(plain, str):
        return ["–", "–"]
    return ["–" if None in (row[u], plain[u]) else f"{row[u] - plain[u]:+.2f}" for u in UNITS]


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
    result.curves.append(Curve(name, stages))  # `gather` puts a label in the place of the name


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
    return "–" if row[key] is None else _show(Rate(row[key], row[f"{key}_low"], row[f"{key}_high"]))


def _show(rate: Rate) -> str:
    interval = "" if rate.low is None or rate.high is None else f" [{rate.low:.2f}, {rate.high:.2f}]"
    return f"{rate.value:.2f}{interval}"


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
