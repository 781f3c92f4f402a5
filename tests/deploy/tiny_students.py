"""Tiny random students of every encoder and normalisation, for the tests of exports."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import tiny_asr

from espnet_kd.deploy.student import load_student

#: encoder → (name in a configuration, encoder_conf)
ENCODERS = {
    "conformer": ("conformer", {}),
    "conformer with InterCTC": (
        "conformer",
        {"num_blocks": 3, "interctc_layer_idx": [1], "interctc_use_conditioning": True},
    ),
    "conformer, older positions": (
        "conformer",
        {
            "rel_pos_type": "legacy",
            "pos_enc_layer_type": "legacy_rel_pos",
            "selfattention_layer_type": "legacy_rel_selfattn",
        },
    ),
    "conformer, 60 ms": ("conformer", {"input_layer": "conv2d6"}),
    "transformer": ("transformer", {}),
    "e_branchformer": ("e_branchformer", {}),
    "branchformer": (
        "branchformer",
        {
            "cgmlp_linear_units": 32,
            "cgmlp_conv_kernel": 7,
            "rel_pos_type": "latest",
            "pos_enc_layer_type": "rel_pos",
            "attention_layer_type": "rel_selfattn",
        },
    ),
    "contextual_block_conformer": ("contextual_block_conformer", {}),
    "contextual_block_transformer": ("contextual_block_transformer", {}),
    "contextual_block_conformer, 60 ms": (
        "contextual_block_conformer",
        {"input_layer": "conv2d6", "ctx_pos_enc": False, "normalize_before": False},
    ),
    "rnn": ("rnn", {}),
    "vgg_rnn": ("vgg_rnn", {}),
}
NORMALISATIONS = ("global_mvn", "utterance_mvn", None)
_LAYERS = {"output_size": 16, "attention_heads": 2, "linear_units": 32, "num_blocks": 2, "dropout_rate": 0.0}


def configuration(encoder="conformer", normalize="utterance_mvn", **changes):
    """Configuration and statistics (or None) of a tiny student."""
    name, more = ENCODERS[encoder]
    conf = tiny_asr.config(name, **more)
    if name.startswith("contextual"):
        conf["encoder_conf"] = {**_LAYERS, "block_size": 20, "hop_size": 8, "look_ahead": 4, **more}
        if name.endswith("conformer"):
            conf["encoder_conf"].update(macaron_style=True, cnn_module_kernel=7)
    if name.endswith("rnn"):
        conf["encoder_conf"] = {"hidden_size": 16, "output_size": 16, "num_layers": 1}
    conf["normalize"] = normalize
    return {**conf, **changes}


def experiment(directory, encoder="conformer", normalize="utterance_mvn", *, sharpen=4.0, **changes):
    """Write the experiment of a tiny student."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    conf = configuration(encoder, normalize, **changes)
    if normalize == "global_mvn":
        rng = np.random.default_rng(3)
        mean, spread = rng.normal(-8, 3, 40), rng.uniform(1, 4, 40)
        np.savez(directory / "feats_stats.npz", count=1, sum=mean, sum_square=spread**2 + mean**2)
        conf["normalize_conf"] = {"stats_file": str(directory / "feats_stats.npz")}
    return tiny_asr.save(tiny_asr.build(conf, sharpen=sharpen), conf, directory)


@functools.cache
def student(encoder="conformer", normalize="utterance_mvn"):
    """The loaded student, which all tests of a process share."""
    with tempfile.TemporaryDirectory() as scratch:
        return load_student(experiment(Path(scratch) / "tiny", encoder, normalize))
