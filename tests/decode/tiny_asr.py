"""A tiny random ESPnet experiment and data dir on disk, for the tests of decoding."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

TOKENS = ["<blank>", "<unk>", "<space>", *"abcdefghij", "<sos/eos>"]


def config(encoder: str = "conformer", **encoder_conf) -> dict:
    """Those entries of a small CTC model's config.yaml that inference needs."""
    layers = {"output_size": 16, "attention_heads": 2, "num_blocks": 2, "dropout_rate": 0.0}
    if encoder in ("conformer", "transformer"):
        layers["linear_units"] = 32
    if encoder == "conformer":
        layers.update(cnn_module_kernel=7, rel_pos_type="latest", pos_enc_layer_type="rel_pos")
        layers.update(selfattention_layer_type="rel_selfattn", macaron_style=True)
    if encoder == "e_branchformer":
        layers.update(linear_units=32, cgmlp_linear_units=32, cgmlp_conv_kernel=7, merge_conv_kernel=3)
        layers.update(use_ffn=True, macaron_ffn=True, rel_pos_type="latest", pos_enc_layer_type="rel_pos")
        layers.update(attention_layer_type="rel_selfattn")
    return {
        "token_list": TOKENS, "token_type": "char", "bpemodel": None, "init": None, "input_size": None,
        "frontend": "default", "frontend_conf": {"fs": 16000, "n_fft": 256, "hop_length": 160, "n_mels": 40},
        "specaug": None, "specaug_conf": {}, "normalize": "utterance_mvn", "normalize_conf": {},
        "preencoder": None, "preencoder_conf": {}, "encoder": encoder, "encoder_conf": {**layers, **encoder_conf},
        "postencoder": None, "postencoder_conf": {}, "decoder": "transformer",
        "decoder_conf": {"attention_heads": 2, "linear_units": 16, "num_blocks": 1}, "ctc_conf": {},
        "joint_net_conf": None, "model": "espnet", "model_conf": {"ctc_weight": 1.0}, "use_preprocessor": True,
        "preprocessor": "default", "preprocessor_conf": {}, "non_linguistic_symbols": None, "cleaner": None,
        "g2p": None, "speech_volume_normalize": None, "rir_scp": None, "noise_scp": None,
        "best_model_criterion": [["valid", "loss", "min"]],
    }  # fmt: skip


def build(conf: dict, seed: int = 0, sharpen: float = 30.0) -> torch.nn.Module:
    """Random model in eval mode whose CTC posteriors are far from ties."""
    from espnet_kd.offline import ASRTask

    torch.manual_seed(seed)
    model = ASRTask.build_model(argparse.Namespace(**conf)).eval()
    with torch.no_grad():
        model.ctc.ctc_lo.weight.mul_(sharpen)
        model.ctc.ctc_lo.bias[-1] = -1e4  # a trained CTC model never gives <sos/eos>
    return model


def save(model: torch.nn.Module, conf: dict, directory: Path, name: str = "valid.loss.ave.pth") -> Path:
    """Write an experiment directory in ESPnet's layout."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), directory / name)
    (directory / "config.yaml").write_text(yaml.safe_dump(conf), encoding="utf-8")
    return directory


def audio(seconds: float, seed: int) -> np.ndarray:
    """Coloured noise which changes every 80 ms, float32 in [-1, 1] at 16 kHz, on the grid of 16-bit files."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000))
    tone = np.sin(2 * np.pi * rng.uniform(100, 5000, 1 + len(t) // 1280)[t // 1280] * t / 16000)
    return (np.round((0.3 * tone + 0.05 * rng.standard_normal(len(t))).clip(-1, 1) * 32767) / 32768).astype(np.float32)


def data_dir(directory: Path, waves: dict) -> Path:
    """Write a data dir of 16-bit files, {utt_id: samples}."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "wav.scp", "w") as f:
        for utt_id, samples in waves.items():
            soundfile.write(directory / f"{utt_id}.wav", samples, 16000, subtype="PCM_16")
            f.write(f"{utt_id} {directory / f'{utt_id}.wav'}\n")
    return directory


BACK_OFF = -0.3


def write_arpa(path: Path, unigrams: dict, bigrams: dict) -> Path:
    """Write a bigram model {token: log10 P}, {(a, b): log10 P}, with the weight `BACK_OFF` wherever it backs off."""
    rows = {"<unk>": -9.0, "<s>": -99.0, "</s>": -1.5, **unigrams}
    one = "".join(f"{p}\t{t}" + ("\n" if t == "</s>" else f"\t{BACK_OFF}\n") for t, p in rows.items())
    two = "".join(f"{p}\t{a} {b}\n" for (a, b), p in bigrams.items())
    counts = f"ngram 1={len(rows)}\nngram 2={len(bigrams)}\n"
    path.write_text(f"\\data\\\n{counts}\n\\1-grams:\n{one}\n\\2-grams:\n{two}\n\\end\\\n", encoding="utf-8")
    return path
