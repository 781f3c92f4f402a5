"""On which frames a student emits its tokens, and on which it agrees with its teacher. This module runs models."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from tqdm import tqdm

from espnet_kd.cli import UserError
from espnet_kd.experiments.audio_options import sampling_rate
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.frames import align, nearest_multiple, valid
from espnet_kd.inference.encode import measure_frame_shift
from espnet_kd.inference.recognise import BLANK_ID, AudioFile, Recogniser, read_audio, read_utterances, recognise
from espnet_kd.report.labels import Row
from espnet_kd.report.matching import match
from espnet_kd.report.results import Gathered, find_data, find_recipe, read_json_object
from espnet_kd.topk import TopK, compress


class FrameRecogniser(Recogniser):
    """A recogniser that gives for each frame (T,) p(blank) and the likeliest other token."""

    def __call__(self, speech: Sequence[np.ndarray]) -> List[TopK]:
        """Process utterances, each (N_i,) float samples at ``rate`` Hz, as one batch."""
        logits, frames = self.logits(speech)
        if not logits[valid(frames, logits.size(1)).to(logits.device)].isfinite().all():
            raise UserError("it gives NaN; it has diverged, or its file is damaged")
        short = compress(logits.float(), 1).map(torch.Tensor.cpu)
        return [short[i, :n] for i, n in enumerate(frames.tolist())]


@dataclass
class FramePosteriors:
    """The frame posteriors of a model: ``posteriors`` (T,) by utterance id."""

    token_list: List[str]
    frame_shift: float  #: seconds
    posteriors: Dict[str, TopK]

    def spikes(self, utt_id: str) -> List[Tuple[int, int]]:
        """(token, frame in which it begins) of the greedy path, without blanks."""
        path, counts = torch.unique_consecutive(self.posteriors[utt_id].argmax(), return_counts=True)
        starts = counts.cumsum(0) - counts
        return [(t, n) for t, n in zip(path.tolist(), starts.tolist()) if t != BLANK_ID]


@dataclass
class Agreement:
    """A student compared with its teacher. Counts are of frames or of tokens; a ratio without a basis is None."""

    step: float  #: seconds per frame of an offset: the longer of both frame shifts
    tokens: int = 0  #: number of the teacher's tokens
    offsets: Counter = field(default_factory=Counter)  #: {frames later than the teacher: tokens that both have}
    frames: Counter = field(default_factory=Counter)  #: see `compare_frames`

    @staticmethod
    def _ratio(part: float, whole: float) -> Optional[float]:
        return part / whole if whole else None

    def shares(self) -> Dict[str, Optional[float]]:
        """The numbers of the table.

        Returns:
            {tokens, matched: share of the teacher's tokens that the student has too, moved: share of these that are on
            another frame, distance: by how many frames on average, delay: mean of all in ms (above 0: later),
            blank, teacher_blank: share of frames, agreement_nb, agreement_bl: share of the teacher's non-blank (blank)
            frames on which the student has the same argmax}
        """
        both = sum(self.offsets.values())
        moved = both - self.offsets[0]
        return {
            "tokens": self.tokens,
            "matched": self._ratio(both, self.tokens),
            "moved": self._ratio(moved, both),
            "distance": self._ratio(sum(abs(k) * n for k, n in self.offsets.items()), moved),
            "delay": self._ratio(1000 * self.step * sum(k * n for k, n in self.offsets.items()), both),
            "blank": self._ratio(self.frames["blank"], self.frames["all"]),
            "teacher_blank": self._ratio(self.frames["teacher_blank"], self.frames["teacher_all"]),
            "agreement_nb": self._ratio(self.frames["nb_same"], self.frames["nb"]),
            "agreement_bl": self._ratio(self.frames["bl_same"], self.frames["bl"]),
        }


def compare_frames(teacher: FramePosteriors, student: FramePosteriors) -> Agreement:
    """Count where two models agree, over the utterances of the student.

    Frames are aligned as in training (:func:`espnet_kd.frames.align`). Tokens are matched by the fewest
    edits between both greedy paths; the position of a token is its first frame, in frames of the slower rate.

    Raises:
        UserError: the token lists differ, or the lengths do not fit.
    """
    if teacher.token_list != student.token_list:
        raise UserError("its tokens are not the teacher's")
    ratio = nearest_multiple(student.frame_shift, teacher.frame_shift)
    result = Agreement(max(teacher.frame_shift, student.frame_shift))
    for utt_id, own in student.posteriors.items():
        target = teacher.posteriors[utt_id]
        num = torch.tensor([len(own.log_blank)])
        theirs = torch.tensor([len(target.log_blank)])
        try:
            aligned, _, both = align(
                *(target[None], {}, theirs, teacher.frame_shift, int(num), num, student.frame_shift), blank_id=BLANK_ID
            )
        except ValueError as e:
            raise UserError(f"{utt_id}: {e}") from e
        mine, wanted = own.argmax()[: int(both)], aligned.argmax()[0, : int(both)]
        nb = wanted != BLANK_ID
        result.frames.update(
            all=int(num), blank=int((own.argmax() == BLANK_ID).sum()), teacher_all=int(theirs),
            teacher_blank=int((target.argmax() == BLANK_ID).sum()), nb=int(nb.sum()), bl=int((~nb).sum()),
            nb_same=int((mine == wanted)[nb].sum()), bl_same=int((mine == wanted)[~nb].sum()),
        )  # fmt: skip
        before, after = teacher.spikes(utt_id), student.spikes(utt_id)
        result.tokens += len(before)
        for kind, there, here in match(*([str(t) for t, _ in spikes] for spikes in (before, after))):
            if kind == "equal":
                for (_, j), (_, i) in zip(before[there], after[here]):
                    result.offsets[_offset(j, i, ratio)] += 1
    return result


def _offset(teacher_frame: int, student_frame: int, ratio: float) -> int:
    """The delay in frames of the slower rate; ``ratio`` is the student's frame shift divided by the teacher's."""
    # 1e-9 is added, because rounding must not move the first fast frame within a slow frame to the slow frame before.
    if ratio >= 1:
        return student_frame - int(teacher_frame / ratio + 1e-9)
    return int(student_frame * ratio + 1e-9) - teacher_frame


@dataclass
class Frames:
    """The outputs of all models for some utterances of one test set, by experiment."""

    models: Dict[str, FramePosteriors] = field(default_factory=dict)
    teachers: Dict[str, FramePosteriors] = field(default_factory=dict)  #: each student's teacher
    agreements: Dict[str, Agreement] = field(default_factory=dict)
    audio: Dict[str, Tuple[np.ndarray, int]] = field(default_factory=dict)  #: (N,) samples, and Hz
    num_utts: int = 0


def run_models(
    gathered: Gathered, testset: str, num_utts: int, examples: Sequence[str], notes: List[str], progress: bool = True
) -> Frames:
    """Run the models of all experiments on ``num_utts`` utterances of a test set: ``examples``, and others.

    If a model or the audio is missing or does not fit, a line is added to ``notes``, and the rest is done.
    """
    result = Frames()
    rows = [row for row in gathered.rows if row["testset"] == testset]
    models, teachers = _find_models(gathered, rows, notes)
    data = next(filter(None, (find_data(gathered.decoding(row)) for row in rows)), None)
    if data is None:
        notes.append(f"{testset}: its data dir is not there, so that its frames cannot be compared")
        return result
    with _inside(data[0]):
        try:
            utterances = _choose(read_utterances(data[1]), num_utts, examples)
        except UserError as e:
            notes.append(str(e))
            return result
        result.audio = {u.utt_id: (read_audio(u), u.rate) for u in utterances if u.utt_id in examples}
    result.num_utts = len(utterances)
    outputs: Dict[str, FramePosteriors] = {}
    places = {_key(place): place for place in [*models.values(), *teachers.values()]}
    for key, place in tqdm(places.items(), desc=f"frames of {testset}", unit="model", disable=not progress):
        try:
            outputs[key] = _run_model(place, data[0], utterances)
        except UserError as e:
            notes.append(f"{place[1]}: {e}")
    for name, place in models.items():
        if _key(place) in outputs:
            result.models[name] = outputs[_key(place)]
    for name, place in teachers.items():
        if _key(place) in outputs and name in result.models:
            result.teachers[name] = outputs[_key(place)]
            try:
                result.agreements[name] = compare_frames(result.teachers[name], result.models[name])
            except UserError as e:
                notes.append(f"{name}: {e}")
    return result


Place = Tuple[Path, str]  # a recipe's directory, and a path relative to it


def _find_models(
    gathered: Gathered, rows: Sequence[Row], notes: List[str]
) -> Tuple[Dict[str, Place], Dict[str, Place]]:
    """The model that decoded each experiment, and each student's teacher: its own, or else the one in the table."""
    models: Dict[str, Place] = {}
    for row in rows:
        decoding = gathered.decoding(row)
        given = (read_json_object(decoding / "decode.json", notes) or {}).get("model")
        recipe = find_recipe(decoding, given)
        if recipe is None:
            notes.append(f"{row['experiment']}: the model that decoded it, {given or 'of unknown name'}, is not there")
        else:
            models[row["experiment"]] = (recipe, str(given))
    theirs = [models[row["experiment"]] for row in rows if row["role"] == "teacher" and row["experiment"] in models]
    teachers: Dict[str, Place] = {}
    for row in rows:
        name = row["experiment"]
        if row["role"] != "teacher" and name in models:
            own = _teacher_of(gathered.paths[name], notes) or next(iter(theirs), None)
            if own is None:
                notes.append(f"{name}: no teacher to be compared with")
            else:
                teachers[name] = own
    return models, teachers


def _key(place: Place) -> str:
    return os.path.realpath(place[0] / place[1])


def _teacher_of(experiment: Path, notes: List[str]) -> Optional[Place]:
    """The teacher of a student, the first of several; None if it has none, or if it no longer exists."""
    given = (read_json_object(experiment / "kd_stage.json", notes) or {}).get("teacher")
    if not isinstance(given, list) or not given:
        return None
    recipe = find_recipe(experiment, given[0])
    if recipe is None:
        notes.append(f"{experiment.name}: its teacher {given[0]} is not there; that of the table is taken")
        return None
    with _inside(recipe):
        try:
            return recipe, str(find_experiment(given[0])[1])
        except UserError as e:
            notes.append(f"{experiment.name}: {e}; the teacher of the table is taken")
            return None


def _choose(utterances: Sequence[AudioFile], num: int, wanted: Sequence[str]) -> List[AudioFile]:
    """Choose the wanted utterances, and others evenly spread, because neighbours are often of one speaker."""
    chosen = [u for u in utterances if u.utt_id in wanted]
    others = [u for u in utterances if u.utt_id not in wanted]
    num = min(max(num - len(chosen), 0), len(others))
    return chosen + [others[i * len(others) // num] for i in range(num)]


def _run_model(place: Place, data_home: Path, utterances: Sequence[AudioFile]) -> FramePosteriors:
    with _inside(place[0]):
        config, model_file = find_experiment(place[1])
        model, args = load_model(config, model_file)
        recogniser = FrameRecogniser(model, args, config.parent)
        shift = measure_frame_shift(model, recogniser.rate or sampling_rate(args))
    wrong = next((u for u in utterances if u.rate != (recogniser.rate or u.rate)), None)
    if wrong is not None:
        raise UserError(f"it needs {recogniser.rate} Hz, and {wrong.utt_id} has {wrong.rate} Hz")
    with _inside(data_home):
        posteriors, _ = recognise(recogniser, utterances, progress=False)
    return FramePosteriors(recogniser.token_list, shift, posteriors)


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[None]:
    """Change to a recipe's directory, to which the paths in its files are relative."""
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)
