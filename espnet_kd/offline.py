"""ESPnet's ASR task, imported fast and without touching the network; import it from here, before other parts of ESPnet.

ESPnet imports a phonemizer (which would download NLTK data), Transformers, S3PRL, text-to-speech and more, whatever the
configuration, and has typeguard rewrite each of its functions: most of the time that a process took to start. Here
these libraries wait until a configuration uses them, and ESPnet's functions do not check their arguments' types: what a
user writes is checked by :mod:`espnet_kd.distill.checks.configuration`.
"""

from __future__ import annotations

import argparse
import types
from typing import Any

from espnet_kd.lazy import importing_lazily

#: What ESPnet's ASR task imports and few configurations use. Not flash_attn: whether it works shows on import alone.
DEFERRED = {
    **dict.fromkeys(("g2p_en", "tacotron_cleaner", "whisper", "transformers", "s3prl", "loralib", "wandb"), ()),
    **dict.fromkeys(("scipy.signal", "music21", "miditoolkit"), ()),
    "librosa": ("scipy.signal", "scipy.ndimage"),  # every frontend takes its mel filters, which need neither
    **dict.fromkeys(("espnet2.tasks.ssl", "espnet2.gan_tts", "espnet2.asr.state_spaces"), ()),
    "espnet2.layers.create_adapter_fn": (),
}


def _unchecked(target: Any = None, **options: Any) -> Any:
    """``typeguard.typechecked``, which leaves the function as it is."""
    return target if target is not None else _unchecked


with importing_lazily(
    ("espnet", "espnet2"), DEFERRED, {"typeguard": types.SimpleNamespace(typechecked=_unchecked)}
):
    from espnet2.asr.espnet_model import ESPnetASRModel
    from espnet2.tasks import asr


class ASRTask(asr.ASRTask):
    """ESPnet's, whose models know the width of the features that they are fed with."""

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetASRModel:
        """ESPnet's model; its attribute ``input_size`` is None where it makes its features itself, 1 for audio."""
        model = super().build_model(args)
        model.input_size = args.input_size
        return model


__all__ = ["ASRTask"]
