"""Recognition by beam search: the best hypotheses with their texts, or the N-best for sequence-level distillation."""

from __future__ import annotations

import argparse
import contextlib
import functools
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Sequence, Tuple, Union

import numpy as np
import torch

from espnet_kd.decode.beam import BeamSearch
from espnet_kd.decode.beside import BesideSearch
from espnet_kd.frames import valid
from espnet_kd.inference.recognise import Recogniser
from espnet_kd.targets.nbest import Hypotheses

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel


class BeamRecogniser(Recogniser):
    """A recogniser that searches a beam, with or without an n-gram model."""

    def __init__(
        self,
        model: ESPnetASRModel,
        args: argparse.Namespace,
        config_dir: Union[str, Path] = ".",
        *,
        search_jobs: int = 0,
        **options: Any,
    ):
        """Take the arguments of `Recogniser`, and the options of `espnet_kd.decode.beam.BeamSearch` from ``nbest`` on.

        ``search_jobs``: number of processes that search while the model runs on the next batch, for a model on a GPU;
        0: the search runs in this process, after the model.

        Raises:
            UserError: as in `Recogniser`, or the n-gram model cannot be used.
        """
        super().__init__(model, args, config_dir)
        options["drop"] = self.no_text
        if search_jobs:
            beside = BesideSearch(self.token_list, search_jobs, **options)
            self.ahead = beside.ahead
            self._begin_search: Callable[..., Callable[[], List[Hypotheses]]] = beside.begin
        else:
            here = BeamSearch(self.token_list, **options)
            self._begin_search = functools.partial(functools.partial, here)

    def begin_search(self, log_probs: torch.Tensor, frames: torch.Tensor) -> Callable[[], List[Hypotheses]]:
        """Start to search log-probabilities (B, T, V); the result is the N-best of each utterance.

        Raises:
            UserError: the model gives NaN; raised here or by the returned function.
        """
        with self._no_nan():
            finish = self._begin_search(log_probs, frames)

        def result() -> List[Hypotheses]:
            with self._no_nan():
                return finish()

        return result

    @contextlib.contextmanager
    def _no_nan(self) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as e:
            raise self.diverged() from e

    def begin(self, speech: Sequence[np.ndarray]) -> Callable[[], List[Any]]:
        """Run the model on utterances, each (N_i,) float samples at ``rate`` Hz, as one batch, and begin to search.

        Returns:
            A function that returns for each utterance its :class:`Hypothesis` objects, best first.

        Raises:
            UserError: the model gives NaN; raised here or by the returned function.
        """
        logits, frames = self.logits(speech)
        finish = self.begin_search(logits.float().log_softmax(dim=-1), frames)
        return lambda: [[self.hypothesis(list(ids), score) for score, ids in hypotheses] for hypotheses in finish()]

    def __call__(self, speech: Sequence[np.ndarray]) -> List[Any]:
        """Recognise a batch (see ``begin``); best hypotheses first."""
        return self.begin(speech)()


class NbestRecogniser(BeamRecogniser):
    """A recogniser that gives each utterance its N-best as `espnet_kd.targets.nbest` writes them, and the prior."""

    def __init__(
        self, model: ESPnetASRModel, args: argparse.Namespace, config_dir: Union[str, Path] = ".", **options: Any
    ):
        super().__init__(model, args, config_dir, **options)
        # Sum of the posteriors, and number of frames, of each batch; appending to a list is thread-safe.
        self._mass: List[Tuple[torch.Tensor, int]] = []

    def log_prior(self) -> np.ndarray:
        """Log of the tokens' mean posterior (V,) over all frames searched so far; finite."""
        total = torch.stack([mass for mass, _ in self._mass]).sum(0) / max(sum(n for _, n in self._mass), 1)
        return total.clamp(min=1e-10).log().numpy()

    def begin(self, speech: Sequence[np.ndarray]) -> Callable[[], List[Hypotheses]]:
        """Run the model on utterances, each (N_i,) float samples at ``rate`` Hz, as one batch, and begin to search.

        Returns:
            A function that returns for each utterance (log-probability in nats, token ids) of up to ``nbest``
            hypotheses, best first.

        Raises:
            UserError: the model gives NaN; raised here or by the returned function.
        """
        logits, frames = self.logits(speech)
        log_probs = logits.float().log_softmax(dim=-1)
        counted = valid(frames, log_probs.size(1)).to(log_probs.device)
        self._mass.append((log_probs[counted].double().exp().sum(0).cpu(), int(frames.sum())))
        finish = self.begin_search(log_probs, frames)
        # Arrays save memory, because the hypotheses of the whole corpus are held at once.
        return lambda: [[(score, array("i", ids)) for score, ids in hypotheses] for hypotheses in finish()]
