"""ESPnet's ASR task, imported fast and without touching the network; import it from here, before other parts of ESPnet.

With any configuration, ESPnet imports a phonemizer (which would download NLTK data), Transformers, S3PRL,
text-to-speech and more, and typeguard rewrites each of its functions; this took most of the start-up time. Here these
libraries are imported when a configuration uses them, and ESPnet's functions do not check the types of their arguments:
the user's options are checked by :mod:`espnet_kd.distill.checks.configuration`.
"""

from __future__ import annotations

import argparse
import types
from typing import Any

from espnet_kd.lazy import importing_lazily

#: Imports of ESPnet's ASR task that few configurations use. Not flash_attn: only its import shows whether it works.
DEFERRED = {
    **dict.fromkeys(("g2p_en", "tacotron_cleaner", "whisper", "transformers", "s3prl", "loralib", "wandb"), ()),
    **dict.fromkeys(("scipy.signal", "music21", "miditoolkit"), ()),
    "librosa": ("scipy.signal", "scipy.ndimage"),  # every frontend uses librosa's mel filters, which need neither
    **dict.fromkeys(("espnet2.tasks.ssl", "espnet2.gan_tts", "espnet2.asr.state_spaces"), ()),
    "espnet2.layers.create_adapter_fn": (),
}


def _unchecked(target: Any = None, **options: Any) -> Any:
    """A substitute for ``typeguard.typechecked`` that does not change the function."""
    return target if target is not None else _unchecked


with importing_lazily(
    ("espnet", "espnet2"), DEFERRED, {"typeguard": types.SimpleNamespace(typechecked=_unchecked)}
):
    from espnet2.asr.espnet_model import ESPnetASRModel
    from espnet2.tasks import asr


class ASRTask(asr.ASRTask):
    """ESPnet's ASR task; its models have the attribute ``input_size``, the width of their input features."""

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetASRModel:
        """Build ESPnet's model. Its ``input_size`` is None if a frontend computes the features, and 1 for audio."""
        model = super().build_model(args)
        model.input_size = args.input_size
        return model


__all__ = ["ASRTask"]
