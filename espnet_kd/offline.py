"""ESPnet's ASR task, imported without touching the network; import it from here.

``espnet2.text``, which it imports, would try to download NLTK data for a phonemizer: delay and noise offline.
Who uses ``g2p_en`` runs ``nltk.download`` once, by hand.
"""

from __future__ import annotations

import nltk


def _no_download(*args: object, **kwargs: object) -> bool:
    return False


nltk.download = _no_download

from espnet2.tasks.asr import ASRTask  # noqa: E402

__all__ = ["ASRTask"]
