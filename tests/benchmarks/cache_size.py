"""Error and size of a target cache: a nucleus of each frame's tokens, compared with a fixed number of tokens.

    python tests/benchmarks/cache_size.py --teacher exp/teacher --student exp/student_plain --data_dir dump/raw/train

The errors are those of factorized KL and of its gradient, with cached targets in place of the teacher's logits. Bytes
per frame are those of the arks that asr_kd_cache would write, and of the earlier format (4 bytes a frame, and 2 bytes
and 4 per token on a non-blank frame; a fixed number of tokens, whose values are not rounded here). Error of the value:
|sum over the batches − reference| / reference; of the gradient: norm of the difference / norm of the reference, on the
student's logits, over all batches. Teacher and student should be trained, because random ones hide the errors. Below
the table: the cheapest cache of each kind within 1 %, and its bytes per frame of 40 ms, if a second has as many
non-blank frames as here.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Sequence, Tuple

import kaldiio
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from espnet_kd.distill.objectives import lay_on
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.encode import EncoderOutputs, measure_frame_shift
from espnet_kd.inference.recognise import Recogniser, make_batches, read_audio, read_utterances
from espnet_kd.losses import factorized_kl
from espnet_kd.targets.cache import Policy, ark_names
from espnet_kd.targets.cache_writer import compression
from espnet_kd.targets.cached import pad_frames
from espnet_kd.targets.nucleus import pack_targets, unpack_targets
from espnet_kd.topk import Posterior, TopK, compress

WITHIN = 0.01  #: limit of the errors of value and gradient


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
        return EncoderOutputs(logits.clone(), lengths.clone(), self.frame_shift)  # a clone is not an inference tensor


@dataclass
class Way:
    """One way to keep targets, with the sums of its errors and bytes."""

    name: str
    k: int
    mass: Optional[float] = None  #: None: the earlier format
    difference: float = 0.0
    squares: float = 0.0
    tokens: float = 0.0
    blank_bytes: float = 0.0
    row_bytes: float = 0.0

    def keep(self, utt_id: str, logits: Tensor) -> TopK:
        """Return one utterance's targets (T, V) as they are read back, and count their bytes."""
        if self.mass is None:
            x = compress(logits, self.k)
            spoken = x.argmax() != 0
            self.tokens += self.k * int(spoken.sum())
            self.blank_bytes += 4 * len(logits)
            self.row_bytes += int(spoken.sum()) * (2 + 4 * self.k)
            return x
        policy = Policy(self.k, self.mass)
        back: List[np.ndarray] = []
        for name, x in zip(ark_names(policy), pack_targets(compress(logits, self.k), [], policy)):
            if x.size:
                ark = io.BytesIO()
                kaldiio.save_ark(ark, {utt_id: x}, compression_method=compression(name, x, policy))
                self.tokens += len(x) if name == "tokens" else 0
                if name == "blank":
                    self.blank_bytes += ark.tell()
                else:
                    self.row_bytes += ark.tell()
                ark.seek(len(f"{utt_id} ".encode()))
                x = np.array(kaldiio.matio.read_kaldi(ark), dtype=np.float32)
            back.append(x)
        return unpack_targets([back], policy, logits.size(-1))

    def row(self, full: float, norm: float, frames: int, spoken: int, frame_shift: float) -> Tuple[str, bool, float]:
        """A line of the table, whether it is within 1 %, and its bytes per frame at 40 ms."""
        errors = abs(self.difference / full), (self.squares / norm) ** 0.5
        size = (self.blank_bytes + self.row_bytes) / frames
        at_40_ms = self.blank_bytes / frames + self.row_bytes / (frames * frame_shift) * 0.04
        cells = f"{self.name} | {self.tokens / max(spoken, 1):.1f} | {100 * errors[0]:.2f} % | {100 * errors[1]:.2f} %"
        return f"| {cells} | {size:.1f} | {at_40_ms:.1f} |", max(errors) <= WITHIN, at_40_ms


def together(each: Sequence[TopK], lengths: Tensor) -> TopK:
    """Join the targets of utterances to those of a batch."""
    k = max(x.tokens.size(-1) for x in each)
    fill = {torch.int64: 0, torch.float32: -torch.inf}

    def widen(x: Tensor) -> Tensor:
        return x if x.dim() == 1 else torch.nn.functional.pad(x, (0, k - x.size(1)), value=fill[x.dtype])

    wide = [x.map(widen) for x in each]
    names = ("log_blank", "tokens", "log_probs")
    return pad_frames(TopK(*(torch.cat([getattr(x, n) for x in wide]) for n in names), each[0].num_tokens), lengths)


def value_and_gradient(student: Tensor, teacher: Posterior, lengths: Tensor) -> Tuple[float, Tensor]:
    """The loss, and its gradient on the student's logits (B, T, V)."""
    student = student.detach().requires_grad_()
    value = factorized_kl(student, teacher, lengths)
    return value.item(), torch.autograd.grad(value, student)[0]


def measure(args: argparse.Namespace) -> List[str]:
    """The lines of the table, and the cheapest ways below it."""
    student, teacher = Model(args.student), Model(args.teacher)
    utterances = read_utterances(args.data_dir, student.recogniser.rate)
    if args.most and args.most < len(utterances):
        utterances = [utterances[i] for i in torch.linspace(0, len(utterances) - 1, args.most).long().tolist()]
    num_tokens = len(teacher.recogniser.token_list)
    fixed = [k for k in args.k if k < num_tokens]
    ways = [Way(f"before, k = {k}", k) for k in fixed]
    ways += [Way(f"k = {k}", k, 1.0) for k in fixed]
    ways += [Way(f"mass {mass:g}", min(args.top_k, num_tokens - 1), mass) for mass in args.mass]
    full = norm = 0.0
    frames = spoken = 0
    for batch in tqdm(make_batches(utterances, 120.0), unit="batch"):
        audio = [read_audio(u) for u in batch]
        of_student, of_teacher = student.outputs(audio), teacher.outputs(audio)
        exact = lay_on(of_student, of_teacher, "least_blank")
        reference, gradient = value_and_gradient(of_student.logits, exact.logits, exact.lengths)
        full += reference
        norm += gradient.square().sum().item()
        each = [x[:n].float() for x, n in zip(of_teacher.logits, of_teacher.lengths)]
        frames += sum(map(len, each))
        spoken += sum(int((x.argmax(-1) != 0).sum()) for x in each)
        for way in ways:
            kept = together([way.keep(u.utt_id, x) for u, x in zip(batch, each)], of_teacher.lengths)
            laid = lay_on(of_student, replace(of_teacher, logits=kept), "least_blank")
            value, other = value_and_gradient(of_student.logits, laid.logits, laid.lengths)
            way.difference += value - reference
            way.squares += (other - gradient).square().sum().item()
    lines = [
        f"{len(utterances)} utterances, {frames} frames of {1000 * teacher.frame_shift:.0f} ms, "
        f"NB share {spoken / frames:.3f}, V = {num_tokens}",
        "| kept | tokens of an NB frame | error of the value | error of the gradient | bytes per frame | at 40 ms |",
        "|---|---|---|---|---|---|",
    ]
    best: Dict[str, Tuple[float, str]] = {}
    for way in ways:
        line, within, size = way.row(full, norm, frames, spoken, teacher.frame_shift)
        lines.append(line)
        kind = "the format before" if way.mass is None else "fixed k" if way.mass == 1 else "nucleus"
        if within:
            best[kind] = min(best.get(kind, (size, way.name)), (size, way.name))
    lines += [f"within 1 %, {kind}: {name}, {size:.1f} bytes per frame at 40 ms" for kind, (size, name) in best.items()]
    return lines


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="experiment")
    parser.add_argument("--student", required=True, help="experiment or export, trained")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16, 32, 48, 64, 80, 96, 128])
    parser.add_argument(
        "--mass", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99, 0.995, 0.997, 0.998, 0.999, 0.9995]
    )
    parser.add_argument("--top_k", type=int, default=96, help="the most tokens of a nucleus")
    parser.add_argument("--most", type=int, default=100, help="utterances, spread over the data dir; 0: all")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("\n".join(measure(args)))


if __name__ == "__main__":
    main()
