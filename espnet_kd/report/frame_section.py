"""The alignment section of a report, which runs the models: frames of the students' and the teacher's tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any, Dict, List, Optional, Sequence

from espnet_kd.cli import UserError
from espnet_kd.report.labels import label_rows
from espnet_kd.report.page import Items, Picture, Section, Table
from espnet_kd.report.sections import Pictures, ReportPart
from espnet_kd.report.spikes import Track, draw_offsets, draw_spikes
from espnet_kd.report.worst import Chosen, choose_examples, choose_student

HOW = (
    "CTC gives a token where its probability peaks, and blank between. A student that follows its teacher frame by "
    "frame has its spikes where the teacher has them: dotted lines carry the teacher's down to the students. Pictures "
    "show the four seconds in which the models differ most. The tables count over {} utterances of each test set, "
    "greedily; tokens are matched by the fewest edits, a token stands where its spike begins, and frames are those of "
    "the slower model. NB and BL are the frames on which the teacher gives a token or blank."
)


def show_frames(parts: Sequence[ReportPart], pictures: Pictures, num_utts: int, num_examples: int) -> Section:
    """Run the models, count and draw; the counts are also written to ``frames`` of the rows."""
    section = Section("Alignment", HOW.format(f"up to {num_utts}"))
    for part in parts:
        for testset in part.test_sets:
            _show(part, testset, pictures, num_utts, num_examples, section)
    if not section.blocks:
        section.blocks.append(Items(["Nothing is decoded yet."]))
    return section


def _show(
    part: ReportPart, testset: str, pictures: Pictures, num_utts: int, num_examples: int, section: Section
) -> None:
    # Imported here, because a report without this section needs no models.
    from espnet_kd.report.alignment import Frames, run_models

    where, gathered = part.name(testset), part.gathered
    notes: List[str] = []
    chosen = choose_student(gathered, part.kinds, testset)
    examples = dict(choose_examples(chosen, num_examples)) if chosen else {}
    try:
        frames = run_models(gathered, testset, num_utts, list(examples), notes)
    except UserError as e:
        frames = Frames()
        notes.append(str(e))
    label = label_rows(gathered.rows)
    lines: List[List[str]] = []
    offsets: Dict[str, Counter] = {}
    for row in gathered.rows:
        agreement = frames.agreements.get(row["experiment"])
        if row["testset"] != testset or agreement is None:
            continue
        row["frames"] = {"utterances": frames.num_utts, **agreement.shares()}
        lines.append(_line(row["experiment"], label(row), row["frames"]))
        offsets.setdefault(label(row), Counter()).update(agreement.offsets)
    if lines:
        head = ("experiment", "kind", "teacher's tokens found", "of these on another frame", "by frames", "delay, ms",
                "blank", "blank, teacher", "same as teacher on NB", "same on BL")  # fmt: skip
        section.blocks.append(Table(head, lines, f"{where}: {frames.num_utts} utterances"))
        path = pictures.name("offsets")
        if draw_offsets(offsets, part.labels, path):
            caption = "Distance in frames between the tokens of each kind of student and the teacher's."
            section.blocks.append(Picture(path, f"Offsets of tokens, {where}", caption))
    if chosen is not None:
        for utt_id, why in examples.items():
            path = pictures.name("spikes")
            tracks = _tracks(chosen, frames, utt_id)
            if tracks and utt_id in frames.audio and draw_spikes(tracks, *frames.audio[utt_id], path):
                caption = f"{utt_id} ({where}); {why} in {chosen.student['experiment']}"
                title = f"Spikes of {', '.join(t.label for t in tracks)} over time"
                section.blocks.append(Picture(path, title, caption))
    if not lines and not notes:
        notes.append(f"{where}: no student to compare with a teacher")
    if notes:
        section.blocks.append(Items([f"Missing: {note}" for note in dict.fromkeys(notes)]))


def _tracks(chosen: Chosen, frames: Any, utt_id: str) -> List[Track]:
    """The tracks of teacher, plain and distilled student, without models that have no output for this utterance."""
    name = chosen.student["experiment"]
    models = {"teacher": frames.teachers.get(name)}
    if chosen.plain is not None:
        models["plain student"] = frames.models.get(chosen.plain["experiment"])
    models[chosen.label] = frames.models.get(name)
    tracks = []
    for label, model in models.items():
        if model is not None and utt_id in model.posteriors:
            nonblank = 1 - model.posteriors[utt_id].log_blank.exp().numpy()
            spikes = [(n * model.frame_shift, model.token_list[t]) for t, n in model.spikes(utt_id)]
            tracks.append(Track(label, nonblank, model.frame_shift, spikes))
    return tracks


def _line(experiment: str, label: str, shares: Dict[str, Optional[float]]) -> List[str]:
    def percent(key: str) -> str:
        share = shares[key]
        return "–" if share is None else f"{100 * share:.1f} %"

    distance, delay = shares["distance"], shares["delay"]
    return [
        experiment,
        label,
        f"{percent('matched')} of {shares['tokens']}",
        percent("moved"),
        "–" if distance is None else f"{distance:.2f}",
        "–" if delay is None else f"{round(delay):+d}",
        *map(percent, ("blank", "teacher_blank", "agreement_nb", "agreement_bl")),
    ]
