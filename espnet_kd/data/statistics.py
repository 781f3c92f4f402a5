"""Check of the feature statistics (stage 4), with which all models normalise: they have to be finite."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Union

from espnet_kd.cli import UserError


def check_statistics(path: Union[str, Path]) -> None:
    """Refuse a ``feats_stats.npz`` of ESPnet with which normalisation is impossible, or makes every feature NaN.

    It holds ``count`` (frames), ``sum`` and ``sum_square`` of each feature, or one matrix of these, as in Kaldi.

    Raises:
        UserError: the file is missing or of another kind, or has a NaN, an infinite number or a negative variance.
    """
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            count, total, squares = loaded[0, -1], loaded[0, :-1], loaded[1, :-1]
        else:
            with loaded:
                count, total, squares = (np.asarray(loaded[name]) for name in ("count", "sum", "sum_square"))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; stage 4 makes it") from e
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: no statistics of features as ESPnet writes them ({e}); remove it, and make it "
                        "again (stage 4)") from e  # fmt: skip
    if not (np.isfinite(count) and count > 0):
        raise UserError(f"{path}: statistics of {count:g} frames; remove it, and make it again (stage 4)")
    bad = [i for i, pair in enumerate(zip(total, squares)) if not np.isfinite(pair).all()]
    if bad:
        raise UserError(f"{path}: {len(bad)} of {len(total)} features have a sum that is no number (NaN or infinite): "
                        "some audio they were made of has such samples; 'asr_kd_data validate' names it. Then remove "
                        "the statistics, and make them again (stage 4)")  # fmt: skip
    variance = squares / count - (total / count) ** 2
    if (variance < -1e-3 * np.maximum(squares / count, 1)).any():
        raise UserError(f"{path}: a variance is negative, so these are sums of something else; make it again (stage 4)")
