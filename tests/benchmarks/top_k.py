"""What is lost when a target cache keeps k tokens of a frame: error of factorized KL and of its gradient, and bytes.

    python tests/benchmarks/top_k.py --teacher exp/teacher --student exp/student_progressive_fkl \
        --data_dir dump/raw/train

Teacher and student should be trained: random ones agree with anything. Caches are made with asr_kd_cache and read as in
training; the reference is the same loss on the teacher's logits. Value: |sum over the batches − reference| / reference;
gradient: norm of the difference / norm of the reference, on the student's logits, over all batches. The default --top_k
of asr_kd_cache is the smallest within 1 %.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from espnet_kd.bin import asr_kd_cache
from espnet_kd.decode.recognise import Recogniser, Utterance, make_batches, read_audio, read_utterances
from espnet_kd.distill.objectives import lay_on
from espnet_kd.losses import factorized_kl
from espnet_kd.targets.cache import read_manifest
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.encode import EncoderOutputs, measure_frame_shift
from espnet_kd.targets.experiment import find_experiment, load_model
from espnet_kd.topk import Posterior

PAGE = {
    "teacher": "required",
    "stages": [{"name": "fkl", "share": 1.0, "objectives": [{"objective": "factorized_kl", "weight": 1.0}]}],
}


class Model:
    """A trained model and its frame shift in seconds."""

    def __init__(self, experiment: str):
        config, file = find_experiment(experiment)
        model, args = load_model(config, file)
        self.recogniser = Recogniser(model, args, config.parent)
        self.frame_shift = measure_frame_shift(model, self.recogniser.rate)

    def outputs(self, audio: Sequence) -> EncoderOutputs:
        """Logits of a batch."""
        logits, lengths = self.recogniser.logits(audio)
        return EncoderOutputs(logits.clone(), lengths.clone(), self.frame_shift)  # no longer of inference mode


def value_and_gradient(student: Tensor, teacher: Posterior, lengths: Tensor) -> Tuple[float, Tensor]:
    """The loss, and its gradient on the student's logits (B, T, V)."""
    student = student.detach().requires_grad_()
    value = factorized_kl(student, teacher, lengths)
    return value.item(), torch.autograd.grad(value, student)[0]


def make_caches(args: argparse.Namespace, utterances: Sequence[Utterance], work: Path) -> Dict[int, CachedTeacher]:
    """A cache of the utterances for each k."""
    (work / "data").mkdir()
    lines = sorted(f"{u.utt_id} {Path(u.path).resolve()}\n" for u in utterances)
    (work / "data" / "wav.scp").write_text("".join(lines), encoding="utf-8")
    (work / "page.yaml").write_text(yaml.safe_dump(PAGE), encoding="utf-8")
    for k in args.k:
        asr_kd_cache.main(
            ["--teacher", args.teacher, "--kd_config", str(work / "page.yaml"), "--data_dir", str(work / "data")]
            + ["--output", str(work / str(k)), "--top_k", str(k)]
        )
    return {k: CachedTeacher(work / str(k)) for k in args.k}


def measure(args: argparse.Namespace, work: Path) -> List[str]:
    """The table."""
    student, teacher = Model(args.student), Model(args.teacher)
    utterances = read_utterances(args.data_dir, student.recogniser.rate)
    if args.most and args.most < len(utterances):
        chosen = torch.linspace(0, len(utterances) - 1, args.most).long().tolist()
        utterances = [utterances[i] for i in chosen]
    caches = make_caches(args, utterances, work)
    full = norm = 0.0
    values, norms = dict.fromkeys(args.k, 0.0), dict.fromkeys(args.k, 0.0)
    for batch in tqdm(make_batches(utterances, 120.0), unit="batch"):
        audio = [read_audio(u) for u in batch]
        theirs = student.outputs(audio)
        exact = lay_on(theirs, teacher.outputs(audio), "least_blank")
        value, gradient = value_and_gradient(theirs.logits, exact.logits, exact.lengths)
        full += value
        norm += gradient.square().sum().item()
        for k, cache in caches.items():
            kept = lay_on(theirs, cache.targets([u.utt_id for u in batch], None, None), "least_blank")
            value, other = value_and_gradient(theirs.logits, kept.logits, kept.lengths)
            values[k] += value
            norms[k] += (other - gradient).square().sum().item()
    counts = read_manifest(work / str(args.k[0])).counts
    lines = [
        f"{len(utterances)} utterances, {counts['frames']} frames of {1000 * teacher.frame_shift:.0f} ms, "
        f"NB share {counts['rows'] / counts['frames']:.3f}, V = {len(teacher.recogniser.token_list)}",
        "| k | error of the value | error of the gradient | bytes per frame |",
        "|---|---|---|---|",
    ]
    for k in args.k:
        size = read_manifest(work / str(k)).counts["bytes"] / counts["frames"]
        lines.append(
            f"| {k} | {100 * abs(values[k] / full - 1):.2f} % | {100 * (norms[k] / norm) ** 0.5:.2f} % | {size:.1f} |"
        )
    return lines


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="experiment")
    parser.add_argument("--student", required=True, help="experiment or export, trained")
    parser.add_argument("--data_dir", required=True, type=Path)
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8, 16, 32, 48, 64, 80, 96, 128])
    parser.add_argument("--most", type=int, default=100, help="utterances, spread over the data dir; 0: all")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        print("\n".join(measure(args, Path(work))))


if __name__ == "__main__":
    main()
