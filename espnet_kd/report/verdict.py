"""The results in words: one short paragraph for each kind of distilled student."""

from __future__ import annotations

from typing import Dict, List, Sequence

from espnet_kd.decode.decodings import REFERENCE_IS_TEACHER
from espnet_kd.report.compare import Difference, Kind

#: {unit of errors: name of its errors}.
ERRORS = {"wer": "word errors", "cer": "character errors"}


def make_verdicts(kinds: Sequence[Kind], where: str = "") -> List[str]:
    """A paragraph for each distilled kind, test sets together, in the table's order; [] where none is scored.

    ``where`` names the experiments' directory, if there are several.
    """
    by_label: Dict[str, List[Kind]] = {}
    for kind in kinds:
        if kind.rows[0]["role"] == "student":
            by_label.setdefault(kind.label, []).append(kind)
    paragraphs = []
    for label, members in by_label.items():
        sentences = [_against_plain(kind) for kind in members]
        if any(isinstance(k.against, Difference) and k.against.other_epochs for k in members):
            sentences.append("The two were trained for different numbers of epochs.")
        if members[0].teacher is not None:
            testset = f" on {members[0].rows[0]['testset']}" if len(members) > 1 else ""
            sentences.append(_against_teacher(members[0], members[0].teacher, testset))
        paragraphs.append(f"{label}{f' ({where})' if where else ''}: {' '.join(filter(None, sentences))}")
    return paragraphs


def _against_plain(kind: Kind) -> str:
    testset, found, unit = kind.rows[0]["testset"], kind.against, kind.unit
    if not isinstance(found, Difference):
        return f"{unit.upper()} {kind.rates[unit].value:.2f} on {testset}; not compared ({found})."
    rate, plain = found.rates[unit], found.plain[unit]
    change = abs(100 * rate.value / plain) if plain else None
    if not round(rate.value, 2):
        much = f"as many {ERRORS[unit]} as"
    else:
        size = f"{abs(rate.value):.2f} points" if change is None else f"{change:.{0 if change >= 9.95 else 1}f} %"
        much = f"{size} {'fewer' if rate.value < 0 else 'more'} {ERRORS[unit]} than"
    seeds = f"{len(found.seeds)} seeds and " if len(found.seeds) > 1 else ""
    text = (
        f"{much} the plain student on {testset}: {unit.upper()} {plain + rate.value:.2f} against {plain:.2f}, "
        f"{rate.value:+.2f} points, 95 % interval {rate.low:+.2f} to {rate.high:+.2f} over {seeds}{found.utterances} "
        "utterances, "
    )
    if rate.low is not None and rate.high is not None and rate.low <= 0 <= rate.high:
        text += "which includes 0: it may be chance"
    else:
        text += f"which excludes 0: more than chance{'' if seeds else ', for this one seed'}"
    return f"{text}."


def _against_teacher(student: Kind, teacher: Kind, where: str) -> str:
    unit, facts = student.unit, []
    ours, theirs = student.rows[0]["params"], teacher.rows[0]["params"]
    if ours and theirs:
        size = _times(theirs / ours, "smaller", "larger", "as large")
        facts.append(f"{size} ({_millions(ours)} parameters against {_millions(theirs)})")
    if student.rtf and teacher.rtf:
        facts.append(f"{_times(teacher.rtf / student.rtf, 'faster', 'slower', 'as fast')}, as decoding was timed here")
    if student.rows[0]["testset"].endswith(REFERENCE_IS_TEACHER):  # the teacher has no errors then, by definition
        return f"Beside its teacher it is {' and '.join(facts)}." if facts else ""
    beside = f"Beside its teacher, {unit.upper()} {teacher.rates[unit].value:.2f}{where}"
    return f"{beside}, it is {' and '.join(facts)}." if facts else f"{beside}."


def _times(ratio: float, more: str, less: str, equal: str) -> str:
    word, ratio = (more, ratio) if ratio >= 1 else (less, 1 / ratio)
    return f"{ratio:.1f} times {word}" if ratio >= 1.05 else equal


def _millions(params: int) -> str:
    return f"{params / 1e6:.2f} M" if params >= 10_000 else f"{params:,}"
