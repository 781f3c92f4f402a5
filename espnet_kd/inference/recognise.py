"""Batched CTC recognition of a data dir with an ESPnet ASR experiment or export.

Audio goes in as in ``espnet2.bin.asr_inference`` (soundfile's floats in [-1, 1], no augmentation). Batches are made of
utterances of similar length, and each utterance gets the same result as alone (see `espnet_kd.inference.padding`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

import numpy as np
import torch
from tqdm import tqdm

from espnet_kd.cli import UserError, check_gpus
from espnet_kd.data.audio import read_audio_info, read_samples
from espnet_kd.data.datadir import read_map
from espnet_kd.experiments.audio_options import sampling_rate, takes_audio, volume
from espnet_kd.inference.detokenise import build_detokeniser
from espnet_kd.inference.encode import ctc_tokens, input_width, least_samples
from espnet_kd.inference.greedy import ctc_greedy
from espnet_kd.inference.padding import make_batch_exact

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

BLANK_ID = 0  # ESPnet's CTC: the first token of every token list
Found = TypeVar("Found")


@dataclass
class Hypothesis:
    """A recognised token sequence, which may be empty. ``score``: log-probability in nats."""

    token_ids: List[int]
    tokens: List[str]
    text: str
    score: float


@dataclass
class AudioFile:
    """One line of a wav.scp and the length of its audio (``samples`` at ``rate`` Hz)."""

    utt_id: str
    path: str
    samples: int
    rate: int


@dataclass
class Timing:
    """Seconds of audio decoded, and of wall time in the decoding loop and in reading audio."""

    audio_seconds: float = 0.0
    decode_seconds: float = 0.0
    read_seconds: float = 0.0


class Recogniser:
    """An ESPnet model with its tokens, ready to decode batches."""

    def __init__(self, model: ESPnetASRModel, args: argparse.Namespace, config_dir: Union[str, Path] = "."):
        """Take a loaded ESPnetASRModel and its configuration (see `espnet_kd.experiments.models.load_model`).

        Args:
            model: in eval mode on its device; it is changed for exact batches, so don't train it afterwards.
            args: contents of config.yaml.
            config_dir: where the token model is looked for if its path in ``args`` doesn't exist.

        Raises:
            UserError: no CTC head, or a model which takes features instead of audio.
        """
        if getattr(model, "ctc", None) is None:
            raise UserError(f"the model of {config_dir} has no CTC head; decode it with espnet2.bin.asr_inference")
        if input_width(model):
            raise UserError(f"the model of {config_dir} takes features (input_size is set), not audio")
        self.rate = audio_rate(args)
        self.volume = volume(args)
        self._where = config_dir
        self.token_list: List[str] = ctc_tokens(model)
        self.to_text = build_detokeniser(args, config_dir)
        self.device = next(model.parameters()).device
        #: None: not known, because they are in an ONNX graph
        self.num_parameters: Optional[int] = None
        if not getattr(model.encoder, "is_graph", False):
            self.num_parameters = sum(p.numel() for p in model.parameters())
        self.no_text = sorted({model.sos, model.eos})
        self._min_samples = least_samples(model, self.rate or 16000)
        if not make_batch_exact(model):
            logging.warning("%s: the last frames of a batch depend a little on padding", type(model.encoder).__name__)
        if self.device.type == "cpu":  # convolutions compute in this layout there, and would copy to it otherwise
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.model = model
        self._here = threading.local()

    @property
    def own_model(self) -> ESPnetASRModel:
        """A copy of the model for this thread, which shares the parameters.

        ESPnet's attention modules store their last weights as an attribute, so that threads must not share a module.
        """
        if not hasattr(self._here, "model"):
            shared = {id(x): x for x in (*self.model.parameters(), *self.model.buffers())}
            self._here.model = copy.deepcopy(self.model, shared)
        return self._here.model

    def encode(self, speech: torch.Tensor, lengths: torch.Tensor) -> Tuple[Any, torch.Tensor]:
        """Run the model's own ``encode``; a subclass may run it in another precision."""
        return self.own_model.encode(speech, lengths)

    @torch.inference_mode()
    def logits(self, speech: Sequence[np.ndarray]) -> Tuple[torch.Tensor, torch.Tensor]:
        """CTC logits (B, T, V) and frames (B,) of utterances (N_i,); frames are 0 where the audio is too short."""
        waves = [torch.from_numpy(normalise(x, self.volume)) for x in speech]
        lengths = torch.tensor([len(w) for w in waves])
        too_short = lengths < self._min_samples
        # Utterances that are too short are padded with silence, so that the batch can be encoded; they get 0 frames.
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        padded = torch.nn.functional.pad(padded, (0, max(0, self._min_samples - padded.size(1))))
        encoded, frames = self.encode(padded.to(self.device), lengths.clamp(min=self._min_samples).to(self.device))
        if isinstance(encoded, tuple):  # (output, outputs of InterCTC layers)
            encoded = encoded[0]
        frames = frames.cpu().clamp(max=encoded.size(1)).masked_fill(too_short, 0)
        return self.own_model.ctc.ctc_lo(encoded), frames

    def __call__(self, speech: Sequence[np.ndarray]) -> List[Any]:
        """Recognise utterances, each (N_i,) float samples at ``rate`` Hz, as one batch.

        Returns:
            For each utterance a list with one :class:`Hypothesis`. Subclasses return something else for each.

        Raises:
            UserError: the model gives NaN.
        """
        found = ctc_greedy(*self.logits(speech), blank_id=BLANK_ID, drop=self.no_text)
        if any(math.isnan(score) for _, score in found):
            raise self.diverged()
        return [[self.hypothesis(ids, score)] for ids, score in found]

    #: Number of batches that may be started before the result of the first is needed.
    ahead = 0

    def begin(self, speech: Sequence[np.ndarray]) -> Callable[[], List[Any]]:
        """Start a batch, and return a function that gives the result. This class computes the result at once."""
        found = self(speech)
        return lambda: found

    def diverged(self) -> UserError:
        """The error for a model whose outputs are not finite."""
        return UserError(f"the model of {self._where} gives NaN; it has diverged, or its file is damaged")

    def hypothesis(self, token_ids: List[int], score: float) -> Hypothesis:
        """Make a hypothesis of token ids."""
        tokens = [self.token_list[i] for i in token_ids]
        return Hypothesis(token_ids, tokens, self.to_text(tokens), score)


def choose_device(args: argparse.Namespace) -> str:
    """Return the device for ``args.ngpu``, and adapt ``args.nj`` and the number of torch's threads to it.

    ``args.search_jobs``: processes for a beam search beside the model (see `BeamRecogniser`).

    Raises:
        UserError: there is no GPU.
    """
    check_gpus(args.ngpu)
    args.search_jobs = args.nj if args.ngpu else 0
    if args.ngpu:
        args.nj = 1  # parallel batches do not speed up a GPU; recipes pass both options
    if args.nj > 1:
        torch.set_num_threads(1)  # batches run in parallel instead
    return "cuda" if args.ngpu else "cpu"


def read_utterances(data_dir: Union[str, Path], rate: Optional[int] = None) -> List[AudioFile]:
    """List the utterances of a data dir with their lengths, reading only the headers of the audio.

    Args:
        data_dir: holds wav.scp, each line one audio file.
        rate: sampling rate in Hz that the model needs; None accepts any.

    Raises:
        UserError: an entry cannot be used; the message names the line or the utterance.
    """
    data_dir = Path(data_dir)
    if (data_dir / "segments").exists():
        raise UserError(f"{data_dir} has a segments file: use the formatted data dir (stage 2 writes one file each)")
    utterances = []
    for utt_id, path in read_map(data_dir / "wav.scp").items():
        try:
            samples, found, _ = read_audio_info(path)
        except UserError as e:
            raise UserError(f"{data_dir}/wav.scp, utterance {utt_id}: {e}") from e
        if rate is not None and found != rate:
            raise UserError(f"{data_dir}/wav.scp: {utt_id} has {found} Hz and the model needs {rate} Hz; resample it")
        utterances.append(AudioFile(utt_id, path, samples, found))
    if not utterances:
        raise UserError(f"{data_dir}/wav.scp is empty")
    return utterances


def read_all_utterances(data_dirs: Sequence[str], rate: Optional[int]) -> List[AudioFile]:
    """List the utterances of several data dirs as one (see :func:`read_utterances`).

    Raises:
        UserError: an utterance is in two data dirs, or as in `read_utterances`.
    """
    utterances: List[AudioFile] = []
    home: Dict[str, str] = {}
    for data_dir in data_dirs:
        for utterance in read_utterances(data_dir, rate):
            if utterance.utt_id in home:
                other = home[utterance.utt_id]
                raise UserError(
                    f"{data_dir}/wav.scp: {utterance.utt_id} stands in {other}/wav.scp too; leave one data dir out"
                )
            home[utterance.utt_id] = data_dir
            utterances.append(utterance)
    return utterances


def read_audio(utterance: AudioFile) -> np.ndarray:
    """Samples (N,) as float32 in [-1, 1]; the first of several channels, as in ESPnet's frontend in eval mode.

    Raises:
        UserError: as `read_samples`, naming utterance and file.
    """
    samples, _ = read_samples(utterance.path, f"utterance {utterance.utt_id}: {utterance.path}", channels=0)
    return np.ascontiguousarray(samples, dtype=np.float32)


def make_batches(utterances: Sequence[AudioFile], batch_seconds: float) -> List[List[AudioFile]]:
    """Group utterances of similar length, longest first; a padded batch has at most ``batch_seconds`` of audio."""
    batches: List[List[AudioFile]] = []
    for utterance in sorted(utterances, key=lambda u: (-u.samples / u.rate, u.utt_id)):
        longest = batches[-1][0] if batches else None
        if longest is None or (len(batches[-1]) + 1) * longest.samples / longest.rate > batch_seconds:
            batches.append([])
        batches[-1].append(utterance)
    return batches


def recognise(
    recogniser: Callable[[Sequence[np.ndarray]], List[Found]],
    utterances: Sequence[AudioFile],
    batch_seconds: float = 60.0,
    nj: int = 1,
    progress: bool = True,
) -> Tuple[Dict[str, Found], Timing]:
    """Decode utterances in batches.

    Args:
        recogniser: maps a batch of samples to a result for each utterance, usually a `Recogniser`. It is called from
            ``nj`` threads. With ``nj`` 1 further batches are started (``begin``) before the first is finished, as many
            as its ``ahead``.
        utterances: in the order wanted in the result.
        batch_seconds: audio in a batch, padding included; a longer utterance is a batch of its own.
        nj: batches decoded at the same time (threads: torch releases Python's lock).
        progress: show a bar.

    Returns:
        The result of each utterance id, and the times; decoding and reading are measured separately.
    """
    batches, timing = make_batches(utterances, batch_seconds), Timing()

    def read() -> Iterator[List[np.ndarray]]:
        for batch in batches:
            start = time.perf_counter()
            samples = [read_audio(u) for u in batch]
            timing.read_seconds += time.perf_counter() - start
            timing.audio_seconds += sum(len(x) / u.rate for x, u in zip(samples, batch))
            yield samples

    found: Dict[str, Found] = {}
    start = time.perf_counter()
    with tqdm(total=len(utterances), unit="utt", desc="decoding", disable=not progress) as bar:
        for results, batch in zip(recognise_batches(recogniser, read(), nj), batches):
            found.update((u.utt_id, result) for u, result in zip(batch, results))
            bar.update(len(batch))
    timing.decode_seconds = time.perf_counter() - start - timing.read_seconds
    return {u.utt_id: found[u.utt_id] for u in utterances}, timing


def recognise_batches(
    recogniser: Callable[[Sequence[np.ndarray]], List[Found]], audio: Iterable[Sequence[np.ndarray]], nj: int = 1
) -> Iterator[List[Found]]:
    """Yield the results of each batch of samples in turn (see `recognise`)."""
    if nj > 1:
        source = iter(audio)
        with ThreadPoolExecutor(nj) as pool:
            while group := list(itertools.islice(source, nj)):
                yield from pool.map(recogniser, group)
        return
    begin = getattr(recogniser, "begin", None) or functools.partial(functools.partial, recogniser)
    waiting: Deque[Callable[[], List[Found]]] = deque()
    for samples in audio:
        waiting.append(begin(samples))
        while len(waiting) > getattr(recogniser, "ahead", 0):
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def normalise(samples: np.ndarray, volume: Optional[float]) -> np.ndarray:
    """Bring the peak to ``volume`` (``speech_volume_normalize``), as ESPnet's preprocessor does at inference too."""
    peak = np.abs(samples).max(initial=0.0)
    if volume is not None and peak > 0:
        samples = samples * (volume / peak)
    return samples.astype(np.float32, copy=False)


def audio_rate(args: argparse.Namespace) -> Optional[int]:
    """Sampling rate in Hz of the audio that a model takes; None for one that takes features."""
    return int(sampling_rate(args)) if takes_audio(args) else None
