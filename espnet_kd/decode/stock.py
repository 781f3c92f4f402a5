"""Decoding by ``espnet2.bin.asr_inference``, one utterance at a time, for searches with an attention decoder."""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, Sequence, Union

import numpy as np
import yaml

from espnet_kd.cli import UserError
from espnet_kd.experiments.audio_options import volume
from espnet_kd.experiments.models import drop_nothing, load_model, read_config, write_statistics
from espnet_kd.experiments.named_files import find_token_model
from espnet_kd.experiments.trust import guarded
from espnet_kd.inference.encode import input_width, least_samples
from espnet_kd.inference.recognise import Hypothesis, audio_rate, normalise

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel


class StockRecogniser:
    """Has the interface of `espnet_kd.inference.recognise.Recogniser`; for one thread only."""

    def __init__(
        self,
        config: Union[str, Path],
        model_file: Union[str, Path],
        device: str = "cpu",
        *,
        ctc_weight: float,
        **options: Any,
    ):
        """Load an experiment.

        Args:
            config: config.yaml; the files that it names are found as in any other decoding.
            model_file: the model.
            device: where the model runs.
            ctc_weight: weight of CTC; the attention decoder has the rest.
            options: of ``espnet2.bin.asr_inference.Speech2Text``: beam_size, nbest, ngram_file, ….

        Raises:
            UserError: the files cannot be loaded, or the options need an attention decoder and the model has none.
        """
        from espnet2.bin import asr_inference

        # ESPnet's loader ignores missing keys and runs code in a pickle; load_model refuses both, so it runs first.
        model, args = load_model(config, model_file)
        if ctc_weight < 1 and model.decoder is None:
            raise UserError(
                f"the model of {config} has no attention decoder (its ctc_weight is 1), which "
                f"--ctc_weight {ctc_weight} needs; leave it at 1"
            )
        if input_width(model):
            raise UserError(f"the model of {config} takes features (input_size is set), not audio")
        if ctc_weight > 0 and model.ctc is None:
            raise UserError(f"the model of {config} has no CTC head; give --ctc_weight 0")
        self.rate = audio_rate(args)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._volume = volume(args)
        self._least_samples = least_samples(model, self.rate or 16000)
        for name in ("espnet", "espnet2.bin.asr_inference"):
            logging.getLogger(name).setLevel(logging.WARNING)  # otherwise ESPnet logs a dozen lines per utterance
        try:
            with _for_espnet(Path(config), model) as here, guarded():
                self._speech2text = asr_inference.Speech2Text(
                    str(here), str(model_file), device=device, ctc_weight=ctc_weight, **options
                )
            drop_nothing(self._speech2text.asr_model)
        except ModuleNotFoundError as e:
            raise UserError(f"ESPnet's decoding needs {e.name}, which is not installed: pip install {e.name}") from e
        except OSError as e:
            raise UserError(f"ESPnet cannot load {config}: {e}; run from the recipe's directory") from e

    def __call__(self, speech: Sequence[np.ndarray]) -> List[List[Hypothesis]]:
        """Recognise utterances, each (N_i,) float samples at ``rate`` Hz, in turn; best hypotheses first."""
        return [self._recognise(samples) for samples in speech]

    def _recognise(self, samples: np.ndarray) -> List[Hypothesis]:
        if len(samples) < self._least_samples:
            return [Hypothesis([], [], "", 0.0)]
        found = self._speech2text(normalise(samples, self._volume))
        if isinstance(found, tuple):  # (hypotheses, outputs of InterCTC layers)
            found = found[0]
        return [Hypothesis(ids, tokens, text or "", float(h.score)) for text, tokens, ids, h in found]


@contextlib.contextmanager
def _for_espnet(config: Path, model: ESPnetASRModel) -> Iterator[Path]:
    """Write a temporary config.yaml whose files ESPnet finds from any working directory."""
    content = read_config(config)
    with tempfile.TemporaryDirectory() as scratch:
        if str(content.get("normalize")).lower() == "global_mvn":
            stats = Path(scratch) / "feats_stats.npz"
            write_statistics(stats, model.normalize.mean, model.normalize.std)
            content["normalize_conf"] = {**(content.get("normalize_conf") or {}), "stats_file": str(stats)}
        if content.get("token_type") == "bpe" and content.get("bpemodel"):
            content["bpemodel"] = str(find_token_model(argparse.Namespace(**content), config).absolute())
        here = Path(scratch) / "config.yaml"
        here.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        yield here
