"""The sections of a report, made of the collected results; pictures are drawn at the same time."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Optional, Sequence

from espnet_kd.environment import environment
from espnet_kd.experiments.history import History, read_parts, seconds
from espnet_kd.report.audio import Audio
from espnet_kd.report.compare import UNITS, Difference, Kind, Rate, compare, find_plain
from espnet_kd.report.curves import draw_curves
from espnet_kd.report.labels import Row, label_rows
from espnet_kd.report.learning import best_teacher_cer, collect_learning, draw_learning, rank_by_epoch, rank_by_time
from espnet_kd.report.page import Block, Examples, Items, Picture, Section, Table
from espnet_kd.report.results import Gathered, read_scores
from espnet_kd.report.tradeoff import AXES, draw_tradeoff
from espnet_kd.report.verdict import make_verdicts
from espnet_kd.report.worst import choose_student, collect_worst


@dataclass
class ReportPart:
    """The results and comparisons of one EXPDIR; ``where`` names it if there are several, and is "" otherwise."""

    gathered: Gathered
    kinds: List[Kind]
    where: str = ""

    @property
    def test_sets(self) -> List[str]:
        """The test sets for which any experiment is scored, sorted."""
        return sorted({row["testset"] for row in self.gathered.rows if row["decoding"]})

    @property
    def labels(self) -> List[str]:
        """The labels in this part's pictures, which have the same order in all of them."""
        label = label_rows(self.gathered.rows)
        return list(dict.fromkeys([*map(label, self.gathered.rows), *(kind.label for kind in self.kinds)]))

    def name(self, what: str) -> str:
        """``what``, and the EXPDIR if there are several."""
        return f"{what}, {self.where}" if self.where else what


def make_parts(everything: Sequence[Gathered]) -> List[ReportPart]:
    """Compare the experiments of each EXPDIR among themselves."""
    several = len(everything) > 1
    return [ReportPart(g, compare(g), str(g.expdir) if several else "") for g in everything]


def title_of(parts: Sequence[ReportPart]) -> str:
    """The title of a report: the last parts of its EXPDIRs."""
    return f"Knowledge distillation: {', '.join(str(Path(*p.gathered.expdir.resolve().parts[-3:])) for p in parts)}"


class Pictures:
    """Names for the pictures of one report in its directory."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._numbers: Counter[str] = Counter()

    def name(self, kind: str) -> Path:
        """A file for another picture of this kind."""
        self._numbers[kind] += 1
        return self.directory / f"{kind}_{self._numbers[kind]}.png"

    def remove_others(self, sections: Sequence[Section]) -> None:
        """Remove the pictures of an earlier report, which would show other experiments."""
        shown = {block.path for section in sections for block in section.blocks if isinstance(block, Picture)}
        for path in self.directory.glob("*_*.png"):
            if re.fullmatch(r"(size|speed|learning|curves|offsets|spikes)_\d+\.png", path.name) and path not in shown:
                path.unlink()


def tell_verdict(parts: Sequence[ReportPart]) -> Section:
    """The effect of distillation in words; the first block has a paragraph for each distilled kind."""
    verdicts = [text for part in parts for text in make_verdicts(part.kinds, part.where)]
    how = (
        "Each distilled student against the plain student, which has the same size and was trained on the "
        "transcripts alone, and against its teacher."
    )
    return Section("Verdict", how, [Items(verdicts or ["No distilled student is scored yet."])])


def texts_of(section: Section) -> List[str]:
    """The short texts of a section."""
    return [text for block in section.blocks if isinstance(block, Items) for text in block.texts]


def compare_methods(parts: Sequence[ReportPart]) -> Section:
    """Error rates and costs of all methods; the single runs are folded."""
    blocks: List[Block] = []
    for part in parts:
        gathered = part.gathered
        if part.kinds:
            head = ["method", "test set", "seeds", "parameters", "epochs", "CER", "WER", "WER to plain", "p",
                    "CER to plain", "Sub/Del/Ins", "real-time factor", "training"]  # fmt: skip
            blocks.append(Table(head, [_compared(kind) for kind in part.kinds], part.where))
        stages = [line for curve in gathered.curves for line in _stages(curve.experiment, curve.stages, gathered)]
        if stages:
            head = ["experiment", "KD stage", "epochs", "training", "validation loss, first → last", "test set",
                    "CER", "WER"]  # fmt: skip
            blocks.append(Table(head, stages, part.name("KD stages"), folded=True))
        head = ["experiment", "kind", "seed", "test set", "CER", "WER", "CER to plain", "WER to plain",
                "real-time factor", "epochs", "training"]  # fmt: skip
        label = label_rows(gathered.rows)
        body = [_run(row, label(row), gathered) for row in gathered.rows]
        blocks.append(Table(head, body, part.name("Every run"), folded=True))
    return Section("Comparison of methods", _COMPARISON, blocks)


_COMPARISON = (
    "Means over seeds, in percent. To plain: difference in points to the plain student of the same seeds, size and "
    "search, of several to that of the same tag; below 0 is better. In brackets 95 % bootstrap intervals, for "
    "differences paired by seed and utterance: over seeds and utterances where a line has several seeds, so that they "
    "hold for other seeds and utterances of the same kind; "
    "over utterances alone where it has one seed, and then another seed may well lie outside. With two or three seeds "
    "an interval is rough. p belongs to the difference in WER, of one method alone: of twenty that do nothing, one has "
    "p < 0.05. Sub/Del/Ins: words substituted, deleted, inserted. Real-time factor: the mean over all models of "
    "one size, which do the same work. Training: the time, and in brackets its multiple of the plain student's; left "
    "out (–) where another experiment here was trained at the same time, as run_all.sh does on two cores. "
    "A KD stage without CTC teaches no text: its error rates only show what the next one starts from."
)


def draw_progress(parts: Sequence[ReportPart], pictures: Pictures) -> Section:
    """Learning curves of all methods in one picture, and tables of the CER at several times."""
    section = Section(
        "Learning curves",
        "Validation, greedy: CTC loss and CER by epoch, and by the time that training has taken. Lines are means over "
        "seeds, bands go from the lowest seed to the highest. The tables show the CER in percent, after equal epochs "
        "and, where no two of these runs shared cores (as far as their files' times tell), after equal times, counted "
        "by the plain student's training.",
    )
    for part in parts:
        learned, teacher = collect_learning(part.gathered), best_teacher_cer(part.gathered)
        path = pictures.name("learning")
        if not draw_learning(learned, part.labels, path, teacher):
            section.blocks.append(Items([part.name("No student has validation statistics of two epochs")]))
            continue
        section.blocks.append(Picture(path, part.name("Validation CTC loss and CER of all methods"), part.where))
        for what, (head, body) in (("epochs", rank_by_epoch(learned)), ("training time", rank_by_time(learned))):
            if body:
                section.blocks.append(Table(head, body, part.name(f"Who is ahead when, by {what}")))
    return section


def draw_costs(parts: Sequence[ReportPart], pictures: Pictures) -> Section:
    """Accuracy against size and speed."""
    section = Section(
        "Accuracy against size and speed",
        "Down is more accurate, left is smaller or faster: the lower left corner is the best. Bars are 95 % intervals; "
        "points of equal size are moved apart a little. "
        "Speed is as decoding measured it, a mean over models of one size; it can be compared within one machine.",
    )
    for part in parts:
        for key, what in AXES.items():
            path = pictures.name("size" if key == "params" else "speed")
            if draw_tradeoff(part.kinds, key, part.labels, path):
                section.blocks.append(Picture(path, part.name(f"Error rates against {what}"), part.where))
            else:
                section.blocks.append(Items([part.name(f"No two models are known to differ in {what}")]))
    return section


def draw_training(parts: Sequence[ReportPart], pictures: Pictures) -> Section:
    """Curves of every loss."""
    section = Section(
        "Training curves",
        "Every loss by epoch; solid lines are validation, dashed ones training. Dotted lines separate KD stages; a "
        "training loss may jump there, because the next KD stage has other objectives. In every epoch the validation "
        "loss has the weights with which the training ends.",
    )
    for part in parts:
        path = pictures.name("curves")
        if draw_curves(part.gathered.curves, part.labels, path):
            section.blocks.append(Picture(path, part.name("Training curves"), part.where))
        else:
            section.blocks.append(Items([part.name("No training statistics of two epochs")]))
    return section


def show_worst(parts: Sequence[ReportPart]) -> Section:
    """Texts of the utterances with the most errors and the largest changes."""
    section = Section(
        "Worst utterances",
        "Those with the most errors of the distilled student that stands first in the table, then those that changed "
        "most against the plain student. What a model adds is underlined, what it lacks is struck out.",
    )
    audio = Audio()
    for part in parts:
        for testset in part.test_sets:
            where, notes = part.name(testset), []
            chosen = choose_student(part.gathered, part.kinds, testset)
            if chosen is None:
                notes.append(f"{where}: no distilled student is scored")
            else:
                found = collect_worst(part.gathered, chosen, notes, audio)
                for what, examples in found.items():
                    title = f"{where}: {what} in {chosen.student['experiment']}"
                    section.blocks.append(Examples(examples, title))
                if not found and not notes:
                    notes.append(f"{where}: no errors, or none counted (per_utt.tsv)")
            if notes:
                section.blocks.append(Items(notes))
    return section


def tell_environment() -> Section:
    """The software that made the report."""
    facts = Items([f"{k}: {v}" for k, v in environment().items()])
    return Section("Environments", "Of the report; decode.json beside each result has those of decoding.", [facts])


def list_missing(parts: Sequence[ReportPart]) -> Optional[Section]:
    """The section on what the report lacks; None if it lacks nothing."""
    notes = [note for part in parts for note in dict.fromkeys(part.gathered.notes)]
    return Section("Missing", "What this report lacks, and why.", [Items(notes)]) if notes else None


def _compared(kind: Kind) -> List[str]:
    rows, against = kind.rows, kind.against
    params = rows[0]["params"]
    epochs = sorted({r["epochs"] for r in rows if r["epochs"] is not None})
    if isinstance(against, Difference):
        seeds = [r["seed"] for r in rows]
        only = "" if against.seeds == seeds else f" (seeds {' '.join(map(_or_dash, against.seeds))})"
        cer, wer = (
            f"{rate.value:+.2f} [{rate.low:+.2f}, {rate.high:+.2f}]{only}"
            for rate in (against.rates[unit] for unit in UNITS)
        )
        differences = [wer, f"{against.rates['wer'].p:.3f}", cer]
    else:
        differences = [against or "–", "–", "–"]
    size, took = kind.mean("model_bytes"), duration(kind.mean("train_seconds")) if kind.alone else "–"
    disk = "" if size is None else f" ({size / 1e6:.2f} MB)"
    return [
        kind.label,
        _or_dash(rows[0]["testset"]),
        " ".join(_or_dash(r["seed"]) for r in rows),
        ("–" if params is None else f"{params:,}") + disk,
        "/".join(map(str, epochs)) or "–",
        *(_show(kind.rates[unit]) for unit in UNITS),
        *differences,
        "/".join(f"{kind.split[k]:.1f}" for k in ("sub", "del", "ins")) if kind.split else "–",
        "–" if kind.rtf is None else f"{kind.rtf:.4f}",
        took if kind.cost is None else f"{took} ({kind.cost:.2f} ×)",
    ]


def _stages(experiment: str, stages: Sequence[History], gathered: Gathered) -> List[List[str]]:
    """Lines for each KD stage of an experiment that has several: one, or one for each test set it is scored on."""
    rows = [row for row in gathered.rows if row["experiment"] == experiment]
    parts = [(part.number, part.epochs, part.history) for part in read_parts(gathered.paths[experiment])]
    if not parts:  # each KD stage was a training of its own
        numbers = rows[0]["kd_stages"]
        if numbers is None or len(numbers) != len(stages):  # one of them has left no statistics
            numbers = list(range(1, len(stages) + 1))
        parts = [(number, str(len(history)), history) for number, history in zip(numbers, stages)]
    lines = []
    for number, epochs, history in parts:
        found = (history[e].get("valid", {}).get("loss") for e in sorted(history))
        losses = [f"{loss:.2f}" for loss in found if loss is not None]
        change = f"{losses[0]} → {losses[-1]}" if losses else "–"
        scored = rows if number == parts[-1][0] else read_scores(gathered.paths[experiment] / f"kd_stage{number}")
        for row in scored or [dict.fromkeys(("testset", *UNITS))]:
            rates = ("–" if row[unit] is None else f"{row[unit]:.2f}" for unit in UNITS)
            lines.append(
                [experiment, str(number), epochs, duration(seconds(history)), change]
                + [_or_dash(row["testset"]), *rates]
            )
    return lines if len(parts) > 1 else []


def _run(row: Row, label: str, gathered: Gathered) -> List[str]:
    plain = find_plain(row, gathered.rows) if row["role"] == "student" and row["wer"] is not None else ""
    shared = ", cores shared" if row["experiment"] in gathered.spans and not gathered.ran_alone(row) else ""
    to_plain = ["–", "–"]
    if not isinstance(plain, str):
        to_plain = ["–" if None in (row[u], plain[u]) else f"{row[u] - plain[u]:+.2f}" for u in UNITS]
    return [
        row["experiment"],
        label,
        _or_dash(row["seed"]),
        _or_dash(row["testset"]),
        *("–" if row[u] is None else _show(Rate(row[u], row[f"{u}_low"], row[f"{u}_high"])) for u in UNITS),
        *to_plain,
        "–" if row["rtf"] is None else f"{row['rtf']:.4f}",
        _or_dash(row["epochs"]),
        f"{duration(row['train_seconds'])}{shared}",
    ]


def _or_dash(value: Any) -> str:
    return "–" if value is None else str(value)


def _show(rate: Rate) -> str:
    interval = "" if rate.low is None or rate.high is None else f" [{rate.low:.2f}, {rate.high:.2f}]"
    return f"{rate.value:.2f}{interval}"


def duration(value: Optional[float]) -> str:
    """Seconds as hours, minutes and seconds."""
    if value is None or not math.isfinite(value):
        return "–"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
