"""Tiny random CTC models of Hugging Face's families, written as a user would find them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SPECIAL = ["<s>", "</s>", "<unk>"]
LETTERS = "ABCDEFGHIJ'"
#: By family: what makes it small.
LAYERS = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
CONVOLUTIONS = dict(
    conv_dim=(16, 16, 16), conv_kernel=(10, 8, 4), conv_stride=(5, 8, 8), num_feat_extract_layers=3,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, conv_bias=True,
)  # fmt: skip
FAMILIES = {
    "wav2vec2": dict(feat_extract_norm="group"),
    "hubert": dict(feat_extract_norm="layer", do_stable_layer_norm=True),
    "wavlm": dict(feat_extract_norm="group", num_buckets=16, max_bucket_distance=32),
    "wav2vec2-conformer": dict(feat_extract_norm="layer"),
    "data2vec-audio": dict(conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    "unispeech-sat": dict(feat_extract_norm="group", num_clusters=8, codevector_dim=16),
    "sew": dict(feat_extract_norm="group", squeeze_factor=2),
    "unispeech": dict(feat_extract_norm="group", codevector_dim=16),
}


def config(family: str, vocabulary: int, blank: int) -> dict:
    """Contents of config.json."""
    return {
        "model_type": family, **LAYERS, **CONVOLUTIONS, **FAMILIES[family], "vocab_size": vocabulary,
        "pad_token_id": blank, "bos_token_id": 1, "eos_token_id": 2, "apply_spec_augment": False,
    }  # fmt: skip


def names(blank_last: bool, letters: str = LETTERS) -> list:
    """The tokens by row."""
    rest = [*SPECIAL, "|", *letters]
    return [*rest, "<pad>"] if blank_last else ["<pad>", *rest]


def save(directory: Path, family: str, blank_last: bool = False, seed: int = 0, letters: str = LETTERS) -> Path:
    """Write a model's directory with config, vocabulary, preprocessor and weights."""
    import transformers

    tokens = names(blank_last, letters)
    torch.manual_seed(seed)
    options = config(family, len(tokens), tokens.index("<pad>"))
    model = transformers.AutoModelForCTC.from_config(
        transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    ).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from ties
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(
        str(directory / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(directory)
    transformers.Wav2Vec2FeatureExtractor(
        do_normalize=True, return_attention_mask=FAMILIES[family].get("feat_extract_norm") == "layer"
    ).save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def save_of_features(directory: Path, family: str) -> Path:
    """A model of a family that takes features, with its feature extractor."""
    import transformers

    tokens = names(False)
    if family == "wav2vec2-bert":
        options = dict(LAYERS, feature_projection_input_dim=160, output_hidden_size=32, bos_token_id=1, eos_token_id=2)
        extractor = transformers.SeamlessM4TFeatureExtractor()
    else:
        options = {"encoder_config": dict(LAYERS, num_mel_bins=80, subsampling_conv_channels=16)}
        extractor = transformers.ParakeetFeatureExtractor(feature_size=80)
    torch.manual_seed(0)
    model = transformers.AutoModelForCTC.from_config(
        transformers.AutoConfig.for_model(family, vocab_size=len(tokens), pad_token_id=0, **options)
    ).eval()
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    transformers.Wav2Vec2CTCTokenizer(
        str(directory / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    extractor.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory
