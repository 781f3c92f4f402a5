"""Tiny random CTC models of Hugging Face's families, as directories like those that users have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Sequence

import torch

SPECIAL = ["<s>", "</s>", "<unk>"]
LETTERS = "ABCDEFGHIJ'"
#: Options that make a model of each family small.
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
    """The tokens in the order of their ids."""
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
        model.lm_head.weight.mul_(8)  # keeps the posteriors far from ties
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


def save_of_features(directory: Path, family: str, **more) -> Path:
    """Write a model of a family that takes features, with its feature extractor; ``more``: entries of config.json."""
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
        transformers.AutoConfig.for_model(family, vocab_size=len(tokens), pad_token_id=0, **options, **more)
    ).eval()
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    transformers.Wav2Vec2CTCTokenizer(
        str(directory / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    extractor.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


SENTENCES = [
    *("A BAD CAB FACED A DEAD BEE", "HE HID A JADE BEAD", "I FED A BIG CHAFFED BEE", "DAD'S CAB HAD A BAD BED"),
] * 20


def pieces_of(
    kind: str, size: int = 40, sentences: Sequence[str] = SENTENCES, normalisation: str = "identity"
) -> bytes:
    """A SentencePiece model, ``bpe`` or ``unigram``."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=size, model_type=kind, character_coverage=1.0,
        bos_id=-1, eos_id=-1, normalization_rule_name=normalisation, hard_vocab_limit=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def tokenizer_of(model: bytes, kind: str, blank_last: bool = True):
    """A tokenizer of transformers with the tokens of a SentencePiece model, as in checkpoints of Parakeet."""
    import sentencepiece
    import transformers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.get_piece_size())}
    shift = 0 if blank_last else 1  # if the blank is first, all other ids are one higher
    names = [*(["<pad>"] if shift else []), *scores]
    if kind == "unigram":
        backend = Tokenizer(models.Unigram([(n, scores.get(n, 0.0)) for n in names], unk_id=shift))
    else:
        halves = [(p[:i], p[i:]) for p in sorted(scores, key=lambda p: -scores[p]) for i in range(1, len(p))]
        merges = [(a, b) for a, b in halves if a in scores and b in scores]
        numbers = {n: i for i, n in enumerate(names)}
        backend = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True))
    spec = sentencepiece_model_pb2.ModelProto.FromString(model).normalizer_spec
    if spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(spec.precompiled_charsmap)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("<pad>", normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def save_with_pieces(directory: Path, family: str, kind: str, blank_last: bool = True, tokenizer=None) -> Path:
    """Write a model whose vocabulary is SentencePiece's, in a tokenizer.json."""
    import transformers

    tokenizer = tokenizer or tokenizer_of(pieces_of(kind), kind, blank_last)
    torch.manual_seed(0)
    if family == "parakeet_ctc":
        options = {"encoder_config": dict(LAYERS, num_mel_bins=80, subsampling_conv_channels=16)}
        extractor = transformers.ParakeetFeatureExtractor(feature_size=80)
    else:
        options = {**config(family, len(tokenizer), 0), "bos_token_id": None, "eos_token_id": None}
        options.pop("model_type")
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    options.update(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = transformers.AutoModelForCTC.from_config(transformers.AutoConfig.for_model(family, **options)).eval()
    with torch.no_grad():
        (model.lm_head if hasattr(model, "lm_head") else model.ctc_head).weight.mul_(8)
    directory.mkdir(parents=True)
    tokenizer.save_pretrained(directory)
    extractor.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory
