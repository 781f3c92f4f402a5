"""Keep ESPnet off the network: importing ``espnet2.text`` would try to download NLTK data for a phonemizer.

Import this module before ``espnet2.tasks``. Who uses ``g2p_en`` runs ``nltk.download`` once, by hand.
"""

from __future__ import annotations

import nltk


def _no_download(*args: object, **kwargs: object) -> bool:
    return False


nltk.download = _no_download
