"""Loading a student for its export."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Optional, Union

from espnet_kd.distill.export import TOKEN_MODEL, export
from espnet_kd.experiments.audio_options import sampling_rate, volume
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.encode import ctc_tokens

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel


@dataclass
class Student:
    """A loaded student with its properties."""

    model: ESPnetASRModel
    args: Any
    name: str
    rate: int  #: Hz
    volume: Optional[float]  #: peak to which utterances are scaled
    tokens: List[str]
    no_text: List[int]  #: tokens that are not text: <sos/eos>
    token_model: Optional[bytes]  #: content of the SentencePiece model


def load_student(experiment: Union[str, Path]) -> Student:
    """Load the student of an experiment as it is exported for ESPnet, without the modules that distillation added.

    Raises:
        UserError: as :func:`espnet_kd.distill.export.export`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(experiment, Path(scratch) / "export")
        model, args = load_model(*find_experiment(folder))
        token_model = (folder / TOKEN_MODEL).read_bytes() if (folder / TOKEN_MODEL).exists() else None
    name = find_experiment(experiment)[0].parent.resolve().name
    no_text = sorted({model.sos, model.eos})
    rate = int(sampling_rate(args))
    return Student(model, args, name, rate, volume(args), ctc_tokens(model), no_text, token_model)
