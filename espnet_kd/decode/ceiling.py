"""Tokens of a teacher that are lost on the student's frames: its output before and after the alignment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Optional, Tuple, Union

import torch
from tqdm import tqdm

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_map
from espnet_kd.data.tokenizing import Tokenizer
from espnet_kd.decode.score import count_errors
from espnet_kd.frames import align
from espnet_kd.inference.greedy import ctc_greedy
from espnet_kd.inference.recognise import read_audio, read_utterances
from espnet_kd.targets.online import OnlineTeacher


@dataclass(frozen=True)
class Ceiling:
    """Token error rates of a teacher, greedy, in percent."""

    utterances: int
    tokens: int  #: tokens in the teacher's output at its own frame rate
    teacher_shift: float  #: seconds
    student_shift: float  #: seconds
    lost: float  #: error rate of the teacher on the student's frames, against its output at its own rate
    own: Optional[float] = None  #: error rate of the teacher against the transcripts; None without transcripts
    aligned: Optional[float] = None  #: error rate of the teacher on the student's frames against the transcripts


def measure_ceiling(
    teacher: OnlineTeacher,
    data_dir: Union[str, Path],
    frames_of: Callable[[int], int],
    student_shift: float,
    *,
    utterances: int = 200,
    pool: str = "least_blank",
    tokenizer: Optional[Tokenizer] = None,
) -> Ceiling:
    """Decode the first utterances of a data dir twice: at the teacher's frame rate and on the student's frames.

    Args:
        frames_of: the student's frames for a number of samples.
        student_shift: seconds per student frame.
        tokenizer: cuts the transcripts into the teacher's tokens; without one they are not read.

    Raises:
        UserError: there is no audio, it has another sampling rate, or an utterance is too short for the student.
    """
    found = read_utterances(data_dir, int(teacher.sampling_rate))[:utterances]
    text = Path(data_dir) / "text"
    texts = read_map(text) if tokenizer is not None and text.is_file() else {}
    own: Dict[str, Tuple[str, str]] = {}
    aligned: Dict[str, Tuple[str, str]] = {}
    lost: Dict[str, Tuple[str, str]] = {}
    last = len(teacher.token_list) - 1  # <sos/eos>
    for utterance in tqdm(found, unit="utt", desc="teacher ceiling"):
        samples = torch.from_numpy(read_audio(utterance))[None]
        out = teacher.targets([utterance.utt_id], samples, torch.tensor([samples.size(1)]))
        try:
            frames = torch.tensor([frames_of(samples.size(1))])
        except Exception as e:  # ESPnet's TooShortUttError, or a kernel that is larger than its input
            raise UserError(
                f"{data_dir}, utterance {utterance.utt_id}: {utterance.samples / utterance.rate:.3f} s are too short "
                f"for the student's encoder; leave it out ({' '.join(str(e).split()) or type(e).__name__})"
            ) from e
        try:
            logits, _, lengths = align(
                out.logits, {}, out.lengths, out.frame_shift, int(frames), frames, student_shift, pool=pool
            )
        except ValueError as e:
            raise UserError(f"{data_dir}, utterance {utterance.utt_id}: {e}") from e
        # The outputs of a running teacher are tensors, not compressed posteriors.
        assert isinstance(out.logits, torch.Tensor) and isinstance(logits, torch.Tensor)
        first, second = (
            " ".join(teacher.token_list[k] for k in ctc_greedy(x, n, drop=[last])[0][0])
            for x, n in ((out.logits, out.lengths), (logits, lengths))
        )
        lost[utterance.utt_id] = second, first
        if tokenizer is not None and utterance.utt_id in texts:
            reference = " ".join(tokenizer.split(texts[utterance.utt_id])).replace("   ", " <space> ")
            own[utterance.utt_id], aligned[utterance.utt_id] = (first, reference), (second, reference)
    counts = count_errors(lost, "word")
    return Ceiling(
        len(found), int(counts.lengths.sum()), teacher.frame_shift, student_shift, _rate(lost),
        _rate(own) if own else None, _rate(aligned) if own else None,
    )  # fmt: skip


def _rate(pairs: Dict[str, Tuple[str, str]]) -> float:
    """Errors in percent of the reference's tokens."""
    counts = count_errors(pairs, "word")
    return 100 * float(counts.errors.sum()) / max(1, int(counts.lengths.sum()))
