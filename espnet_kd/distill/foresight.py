"""What a training would pass over in silence: a criterion that no epoch has, transcripts that no alignment fits."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, List, Optional, Set

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_map
from espnet_kd.distill.plan import Plan

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

SHOWN = 5  # utterances in a message


def check_criteria(args: argparse.Namespace, model: ESPnetASRModel, plan: Optional[Plan]) -> None:
    """Refuse ``best_model_criterion`` where no epoch will have one of them; warn of single ones.

    By a statistic that does not exist ESPnet chooses no model, and removes every epoch's but the last.

    Raises:
        UserError: naming them, and what there is.
    """
    known = statistics(args, model, plan)
    absent = [f"{phase},{key}" for phase, key, _ in args.best_model_criterion if key not in known]
    if not absent:
        return
    there = ", ".join(sorted(known))
    message = f"best_model_criterion: no epoch of this training has {', '.join(absent)} (there are {there})"
    if len(absent) == len(args.best_model_criterion):
        raise UserError(f"{message}; give one of these, for instance valid,loss_ctc,min")
    logging.info("%s", message)  # ESPnet's default names some that only attention has


def statistics(args: argparse.Namespace, model: ESPnetASRModel, plan: Optional[Plan]) -> Set[str]:
    """Names of what an epoch reports in validation."""
    known = {"loss"}
    if any(name == "text" for _, name, _ in args.valid_data_path_and_name_and_type or []):
        known |= {"loss_ctc", "cer_ctc"} if model.ctc is not None else set()
        known |= {f"loss_interctc_layer{n}" for n in getattr(model.encoder, "interctc_layer_idx", None) or []}
        if model.ctc_weight < 1.0:
            known |= {"acc", "cer", "wer", "loss_att", "loss_transducer", "cer_transducer", "wer_transducer"}
    if plan is not None:
        known |= {"loss_kd", "nonblank_share", "agreement"}
        for spec, _ in plan.phases[-1].terms:
            known |= {f"loss_{spec.key}", *spec.make().statistics}
    return known


def check_text_lengths(args: argparse.Namespace, frame_shift: float, rate: float) -> None:
    """Count the utterances whose transcript has more tokens than the student has frames: CTC's loss of them is 0.

    Args:
        frame_shift: of the student, in seconds.
        rate: sampling rate of the audio, Hz.

    Raises:
        UserError: no utterance of a part has enough frames.
    """
    for part in ("train", "valid"):
        files: List[str] = getattr(args, f"{part}_shape_file") or []
        if len(files) < 2:
            continue
        speech, text = (read_map(path) for path in files[:2])
        frames = {u: int(shape.split(",")[0]) / rate / frame_shift for u, shape in speech.items()}
        long = [u for u, shape in text.items() if u in frames and int(shape.split(",")[0]) > frames[u]]
        if not long:
            continue
        message = (
            f"{files[1]}: the transcripts of {len(long)} of {len(text)} utterances ({', '.join(long[:SHOWN])}) have "
            f"more tokens than the student has frames of {1000 * frame_shift:.0f} ms; CTC's loss of them is 0"
        )
        if len(long) == len(text):
            raise UserError(f"{message}; take longer tokens (bpe), or an input layer with less subsampling")
        logging.warning("%s", message)
