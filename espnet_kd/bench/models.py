"""Random models, audio and experiments of a given size, for measurements."""

from __future__ import annotations

import argparse
import sys
import unittest.mock
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

import torch
import yaml
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

RATE = 16000  # Hz
TOKENS_PER_SECOND = 4  # about that of BPE units in English

Size = Tuple[int, int]  #: blocks, width


def config(vocabulary: int, size: Size) -> Dict[str, Any]:
    """An ESPnet configuration: Conformer CTC, 40 ms frames, no augmentation."""
    from espnet_kd.offline import ASRTask

    blocks, width = size
    with unittest.mock.patch.object(sys, "argv", sys.argv[:1]):  # ESPnet would read this command's options
        conf = ASRTask.get_default_config()
    conf.update(
        token_list=["<blank>", "<unk>", *map(str, range(vocabulary - 3)), "<sos/eos>"],
        token_type="word",
        encoder="conformer",
        encoder_conf=dict(
            output_size=width, attention_heads=4, linear_units=4 * width, num_blocks=blocks, cnn_module_kernel=15,
            macaron_style=True, rel_pos_type="latest", pos_enc_layer_type="rel_pos",
            selfattention_layer_type="rel_selfattn",
        ),
        model_conf=dict(ctc_weight=1.0), ctc_conf={}, normalize=None, specaug=None,
        frontend_conf=dict(fs=RATE, n_fft=512, hop_length=160),
    )  # fmt: skip
    return conf


def random_model(conf: Dict[str, Any]) -> ESPnetASRModel:
    """The model of a configuration, with random parameters."""
    from espnet_kd.offline import ASRTask

    return ASRTask.build_model(argparse.Namespace(**conf))


def batch(utts: int, seconds: float, vocabulary: int) -> Dict[str, Any]:
    """A batch as the trainer gives it to ``forward``: noise, with random transcripts."""
    samples, labels = int(seconds * RATE), int(seconds * TOKENS_PER_SECOND)
    return dict(
        utt_id=[f"utt{i}" for i in range(utts)],
        speech=0.1 * torch.randn(utts, samples),
        speech_lengths=torch.full((utts,), samples),
        text=torch.randint(2, vocabulary - 1, (utts, labels)),
        text_lengths=torch.full((utts,), labels),
    )


def copied(data: Dict[str, Any], device: str = "cpu") -> Dict[str, Any]:
    """A copy of a batch for one step, because ESPnet changes the tensors that it is given."""
    return tree_map(lambda v: v.clone().to(device) if isinstance(v, torch.Tensor) else v, data)


@torch.no_grad()
def save_experiment(directory: Path, conf: Dict[str, Any], data: Dict[str, Any], nonblank: float) -> Path:
    """An experiment of random parameters that outputs a token on the share ``nonblank`` of a batch's frames."""
    model = random_model(conf).eval()
    logits = model.ctc.ctc_lo(model.encode(data["speech"], data["speech_lengths"])[0])
    lead = logits[..., 1:].amax(-1) - logits[..., 0]
    model.ctc.ctc_lo.bias[0] += lead.flatten().quantile(1 - nonblank)
    directory.mkdir(parents=True)
    kept = {k: v for k, v in conf.items() if isinstance(v, (str, int, float, bool, list, dict, type(None)))}
    (directory / "config.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    torch.save(model.state_dict(), directory / "model.pth")
    return directory


def save_data_dir(directory: Path, data: Dict[str, Any]) -> Path:
    """A data dir with the audio of a batch."""
    import soundfile

    directory.mkdir(parents=True)
    lines: List[str] = []
    for utt_id, x in zip(data["utt_id"], data["speech"]):
        path = directory / f"{utt_id}.wav"
        soundfile.write(path, x.clamp(-1, 1).numpy(), RATE, subtype="FLOAT")
        lines.append(f"{utt_id} {path}\n")
    (directory / "wav.scp").write_text("".join(sorted(lines)), encoding="utf-8")
    return directory
