"""One interface for exports that run in ESPnet (with torch) and in onnxruntime (without it)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Protocol, Union

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.deploy.session import SHERPA_FRAME, onnx_session, run_of, run_of_sherpa
from espnet_kd.files import sha256_of

ABOUT, MODEL = "student.json", "model.onnx"
#: The keys of student.json and their types.
_FIELDS: Dict[str, Any] = {
    "format": str, "sampling_rate": int, "frame_shift": (int, float), "least_samples": int,
    "max_seconds": (int, float, type(None)),
    "token_type": str, "space_symbol": str, "blank": int, "no_text": list, "tokens": list, "files": dict,
}  # fmt: skip


class Backend(Protocol):
    """A loaded student."""

    rate: int  #: Hz
    frame_shift: float  #: seconds
    tokens: List[str]
    blank: int
    no_text: List[int]  #: tokens that are not text: <sos/eos>
    max_seconds: Optional[float]  #: longest audio that the model accepts; None: any length
    to_text: Callable[[List[str]], str]

    def log_probs(self, speech: np.ndarray) -> np.ndarray:
        """Map samples (N,) to log-probabilities (T, V); T is 0 where the audio is too short."""
        ...


def load(path: Union[str, Path], threads: int = 1) -> Backend:
    """Load an export of any format, or an experiment.

    Raises:
        UserError: there is no export or experiment, or it is damaged.
    """
    folder = Path(path)
    if (folder / ABOUT).is_file():
        return OnnxBackend(folder, threads)
    return EspnetBackend(folder)


def choose_longest(backend: Backend, asked: Optional[float], default: float) -> float:
    """The length in seconds to which audio is cut: ``asked``, or else ``default``, within the limit of the export.

    Raises:
        UserError: ``asked`` is more than the export accepts.
    """
    most = backend.max_seconds
    if asked is not None and most is not None and asked > most:
        raise UserError(f"--longest_seconds is {asked:g}, and this export takes {most:g}; export it with --max_seconds")
    return asked if asked is not None else min(default, most or default)


class OnnxBackend:
    """A folder of ``--format onnx``, ``sherpa`` or ``web`` in onnxruntime on the CPU."""

    def __init__(self, folder: Path, threads: int = 1):
        about = read_about(folder)
        if about["format"] == "stream":
            raise UserError(f"{folder} is a graph for streams; give --streaming")
        self.rate, self.frame_shift, self.tokens = about["sampling_rate"], about["frame_shift"], about["tokens"]
        self.blank, self.no_text, self.max_seconds = about["blank"], about["no_text"], about["max_seconds"]
        self._least = about["least_samples"]
        self.to_text = text_of(about, folder)
        session = onnx_session(str(folder / MODEL), threads)
        is_sherpas = about["format"] == "sherpa"
        self._run = run_of_sherpa(session, round(self.frame_shift / SHERPA_FRAME)) if is_sherpas else run_of(session)

    def log_probs(self, speech: np.ndarray) -> np.ndarray:
        """See `Backend`."""
        if len(speech) < self._least:
            return np.zeros((0, len(self.tokens)), dtype=np.float32)
        return self._run([speech.astype(np.float32, copy=False)])[0]


class EspnetBackend:
    """An experiment or an export for ESPnet, run by ESPnet."""

    max_seconds: Optional[float] = None
    blank = 0

    def __init__(self, path: Path):
        from espnet_kd.experiments.models import find_experiment, load_model
        from espnet_kd.inference.encode import measure_frame_shift
        from espnet_kd.inference.recognise import Recogniser, audio_rate

        config, model_file = find_experiment(path)
        model, args = load_model(config, model_file)
        rate = audio_rate(args)
        if rate is None:
            raise UserError(f"the model of {config.parent} takes features, not audio")
        self.frame_shift = measure_frame_shift(model, rate)
        self.recogniser = Recogniser(model, args, config.parent)
        self.rate, self.tokens, self.to_text = rate, self.recogniser.token_list, self.recogniser.to_text
        self.no_text = self.recogniser.no_text

    def log_probs(self, speech: np.ndarray) -> np.ndarray:
        """See `Backend`."""
        logits, frames = self.recogniser.logits([speech])
        return logits[0, : int(frames[0])].float().log_softmax(dim=-1).cpu().numpy()


def read_about(folder: Path) -> Any:
    """Read student.json of an exported graph, and check that it describes the graph in the folder.

    Raises:
        UserError: a file is damaged, or the graph is another one.
    """
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        wrong = [k for k, kind in _FIELDS.items() if not isinstance(about.get(k), kind)]
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{path} is damaged: {e}; export the student again") from e
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is missing or of another type; export the student again")
    try:
        found = sha256_of(folder / MODEL)
    except OSError as e:
        raise UserError(f"cannot read {folder / MODEL}: {e.strerror}; export the student again") from e
    if found != about["files"].get(MODEL):
        raise UserError(f"{folder / MODEL} is not the file that {path} describes; export the student again")
    return about


def text_of(about: Any, folder: Path) -> Callable[[List[str]], str]:
    """Return a function from tokens to text; without a SentencePiece model, pieces are joined."""
    kind = about["token_type"]
    if kind == "bpe" and not (folder / "bpe.model").is_file():
        return lambda tokens: "".join(tokens).replace("▁", " ").strip()
    from espnet_kd.inference.detokenise import build_detokeniser

    options = {"space_symbol": about["space_symbol"], "bpemodel": "bpe.model", "token_list": about["tokens"]}
    return build_detokeniser(argparse.Namespace(token_type=kind, **options), folder)

