"""Checks before a training whether utterances have enough frames for the model's encoder and for their texts.

An encoder that subsamples needs a minimum of feature frames; with fewer, ESPnet stops in the middle of an epoch. CTC
needs a frame for each token and one for the blank between two equal tokens; with fewer, ESPnet silently takes a loss
of 0, also in validation, by which the model is chosen.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import MAX_SHOWN, join_sorted, read_sorted
from espnet_kd.data.tokenizing import TokenList
from espnet_kd.files import PathLike, replacing

LONG = (2.0, 4.0)  # seconds; lengths of the two signals from which the frame shift is measured
MARGIN = 6  # frames by which an estimate from this frame shift may be too high


class Need(NamedTuple):
    """The length of an utterance, and the length that its text needs."""

    utt_id: str
    samples: int
    frames: int  # frames that CTC needs for the text; at least 1


def frames_needed(tokens: Sequence[str]) -> int:
    """Frames that CTC needs for a text: one for each token, and a blank between two equal ones; at least 1."""
    return max(1, len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:])))


def read_needs(speech_shape: PathLike, text: Optional[PathLike], tokens: TokenList) -> Iterator[Need]:
    """Yield the utterances of a shape file, sorted by id.

    Args:
        speech_shape: a shape file of ESPnet's statistics: an utterance and its number of samples in each line.
        text: the texts, or None; an utterance without text needs one frame.

    Raises:
        UserError: a file is missing, or is not a shape file.
    """
    streams = {"shape": read_sorted(speech_shape)}
    if text is not None and Path(text).exists():
        streams["text"] = read_sorted(text)
    for utt_id, found in join_sorted(streams):
        if "shape" not in found:
            continue
        shape = found["shape"][0][2].split(",")[0]
        if not shape.isdecimal():
            raise UserError(f"{speech_shape}: utterance '{utt_id}': '{shape}' is no number of samples; make it again "
                            "(stage 4)")  # fmt: skip
        needed = frames_needed(tokens.split(found["text"][0][2])) if "text" in found else 1
        yield Need(utt_id, int(shape), needed)


class FrameCounter:
    """Counts the frames that an encoder makes of a number of samples.

    Args:
        encode: gives the number of frames for a number of samples; it may raise an error if the signal is too short.
        rate: sampling rate, Hz.

    Raises:
        UserError: the encoder fails even on some seconds of audio.
    """

    def __init__(self, encode: Callable[[int], int], rate: int) -> None:
        self._encode = encode
        self._known: Dict[int, int] = {}
        self._first, self._second = (int(seconds * rate) for seconds in LONG)
        try:
            self._slope = (encode(self._second) - encode(self._first)) / (self._second - self._first)
            self._base = encode(self._first)
        except Exception as e:  # a model of other origin may raise any error
            raise UserError(f"the model cannot take {LONG[0]:g} s of audio: {e}") from e

    def count(self, samples: int) -> int:
        """Return the number of frames for ``samples``; 0 if the encoder refuses a signal of this length."""
        if samples not in self._known:
            try:
                self._known[samples] = max(0, self._encode(samples))
            except Exception:  # ESPnet's TooShortUttError, or a kernel that is larger than its input
                self._known[samples] = 0
        return self._known[samples]

    def are_enough(self, samples: int, frames: int) -> bool:
        """Whether ``samples`` make at least ``frames``; the encoder runs only if an estimate does not decide it."""
        estimate = self._base + (samples - self._first) * self._slope - MARGIN
        return estimate >= frames or self.count(samples) >= frames

    def shortest(self) -> int:
        """Return the least number of samples that makes a frame."""
        low, high = 0, self._first
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.count(middle) else (middle, high)
        return high


def check_lengths(
    name: str, needs: Iterator[Need], counter: FrameCounter, model: str, rate: int, report: Optional[PathLike] = None
) -> Tuple[int, int]:
    """Refuse utterances that are too short for a model, and count those that are too short for their texts.

    Args:
        name: the name of the data in messages.
        model: the name of the model in messages.
        rate: sampling rate, Hz.
        report: a file for the ids of the utterances that are too short for their texts.

    Returns:
        the number of utterances, and of those that are too short for their texts.

    Raises:
        UserError: an utterance makes no frame.
    """
    short: List[str] = []
    tight: List[str] = []
    number = too_short = 0
    for need in needs:
        number += 1
        if counter.are_enough(need.samples, need.frames):
            continue
        frames = counter.count(need.samples)
        if not frames:
            too_short += 1
            short += [f"{need.utt_id} ({need.samples / rate:.3f} s)"] if too_short <= MAX_SHOWN else []
        else:
            tight.append(f"{need.utt_id} {frames} {need.frames}\n")
    if too_short:
        more = f" and {too_short - MAX_SHOWN} more" if too_short > MAX_SHOWN else ""
        seconds = counter.shortest() / rate
        raise UserError(
            f"{name}: {too_short} of {number} utterances are too short for {model}: {', '.join(short)}{more}; it needs "
            f"{seconds:.3f} s: leave them out, with --min_seconds {seconds + 0.0005:.3f} in stages 2 to 4"
        )
    if report is not None:
        Path(report).unlink(missing_ok=True)
    if tight:
        shown = ", ".join("{} ({} frames, {} needed)".format(*line.split()) for line in tight[:5])
        more = f" and {len(tight) - 5} more" if len(tight) > 5 else ""
        where = f"; all in {report}" if report is not None else ""
        logging.warning("%s: %d of %d utterances (%.1f %%) have fewer frames in %s than CTC needs for their tokens, "
                        "and add a loss of 0: %s%s%s", name, len(tight), number, 100 * len(tight) / number, model,
                        shown, more, where)  # fmt: skip
        if report is not None:
            with replacing(report) as f:
                f.writelines(tight)
    else:
        logging.info("%s: all %d utterances have enough frames in %s", name, number, model)
    return number, len(tight)


def parse_model(value: str) -> Tuple[str, List[str]]:
    """Return the name and the options of a ``--model NAME=OPTIONS``.

    Raises:
        UserError: it has no name or no options. ESPnet would make its default model without any, and ignores words that
            are no options.
    """
    name, _, options = value.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name) or not options.lstrip().startswith("--"):
        raise UserError(f"--model '{value}': give a name and the options of asr_train that make the model, such as "
                        "'student=--config conf/train_student.yaml'")  # fmt: skip
    return name, options.split()


def espnet_encoder(options: Sequence[str], token_list: PathLike) -> Tuple[Callable[[int], int], int]:
    """Return ``encode`` of :class:`FrameCounter` for the model that ESPnet builds, and its sampling rate in Hz.

    Args:
        options: options of ``espnet2.bin.asr_train``, such as ``--config conf/train_student.yaml``.

    Raises:
        UserError: ESPnet cannot build a model from them.
    """
    with _quiet():
        return _build(options, token_list)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress ESPnet's messages about the model, because this model is never trained."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _build(options: Sequence[str], token_list: PathLike) -> Tuple[Callable[[int], int], int]:
    import espnet_kd.offline  # noqa: F401, I001  (before espnet2)
    import torch
    from espnet2.tasks.asr import ASRTask

    # Options that ESPnet does not have are ignored: they are those of distillation, and do not change lengths.
    args, _ = ASRTask.get_parser().parse_known_args([*options, "--token_list", str(token_list), "--output_dir", "no"])
    args.normalize, args.normalize_conf, args.specaug = None, {}, None  # these do not change lengths
    args.token_list = [line.rstrip("\n") for line in open(token_list, encoding="utf-8")]  # noqa: SIM115
    try:
        model = ASRTask.build_model(args).eval()
    except Exception as e:  # ESPnet's components raise different errors for wrong options
        raise UserError(f"{' '.join(options)}: ESPnet makes no model of these: {e}") from e
    rate = args.frontend_conf.get("fs", 16000)
    if isinstance(rate, str):
        import humanfriendly

        rate = humanfriendly.parse_size(rate)

    def encode(samples: int) -> int:
        with torch.no_grad(), _quiet():
            signal = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
            return int(model.encode(signal, torch.tensor([samples]))[1][0])

    return encode, int(rate)
