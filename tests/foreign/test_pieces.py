"""CTC models with SentencePiece's vocabulary in tokenizer.json have the same tokens in ESPnet, or are refused."""

import json

import pytest
import tiny_asr
import torch
import yaml

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'espnet_kd[foundation]'")

import sentencepiece  # noqa: E402
import tiny_hf  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from espnet_kd.bin import asr_kd_import  # noqa: E402
from espnet_kd.cli import UserError  # noqa: E402
from espnet_kd.experiments.models import find_experiment, load_model  # noqa: E402
from espnet_kd.inference.recognise import Recogniser  # noqa: E402
from espnet_kd.targets.online import OnlineTeacher  # noqa: E402

TEXTS = ["A BAD CAB", "FACED HE", "JADE BEADED CHAFFED", "DAD'S BIG BEE", "GJ CC 'I"]


@pytest.mark.parametrize("blank_last", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("family", ["wav2vec2", "parakeet_ctc"])
def test_tokens_posteriors_and_text_are_those_of_transformers(tmp_path, family, kind, blank_last):
    directory = tiny_hf.save_with_pieces(tmp_path / "hf", family, kind, blank_last)
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    conf = yaml.safe_load((tmp_path / "exp/config.yaml").read_text())
    assert (conf["token_type"], conf["bpemodel"]) == ("bpe", "bpe.model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    mine = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "exp/bpe.model"))
    for text in TEXTS:
        assert mine.encode_as_pieces(text) == tokenizer.tokenize(text)
    tokens, theirs = conf["token_list"], tokenizer.get_vocab()
    assert tokens[:2] == ["<blank>", "<unk>"] and set(tokens[1:-1]) == set(theirs) - {"<pad>"}
    waves = [tiny_asr.audio(s, i) for i, s in enumerate((1.3, 0.7))]
    model = transformers.AutoModelForCTC.from_pretrained(directory).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    out = OnlineTeacher(tmp_path / "exp").targets(
        ["a", "b"], *(torch.nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in waves], batch_first=True),
                      torch.tensor([len(w) for w in waves]))
    )  # fmt: skip
    recogniser = Recogniser(*load_model(*find_experiment(tmp_path / "exp")), tmp_path / "exp")
    order = [theirs["<pad>" if t == "<blank>" else t] for t in tokens[:-1]]
    for i, wave in enumerate(waves):
        with torch.no_grad():
            logits = model(**extractor(wave, sampling_rate=16000, return_tensors="pt")).logits[0]
        assert out.lengths[i] == len(logits)
        found = out.logits[i, : len(logits)].softmax(-1)
        assert (found[:, :-1] - logits.softmax(-1)[:, order]).abs().max() <= 1e-6
        best = [int(k) for k in logits.argmax(-1).unique_consecutive() if k != theirs["<pad>"]]
        wanted = tokenizer.decode([k for k in best if k != theirs["<unk>"]])
        [hypothesis] = recogniser([wave])[0]
        text = recogniser.to_text([t for t in hypothesis.tokens if t != "<unk>"])
        assert text == wanted and text


def test_characters_that_sentencepiece_replaces_are_replaced(tmp_path):
    """tokenizer.json maps characters, such as full-width letters, to others; the map must go into bpe.model."""
    tokenizer = tiny_hf.tokenizer_of(tiny_hf.pieces_of("unigram", normalisation="nfkc"), "unigram")
    directory = tiny_hf.save_with_pieces(tmp_path / "hf", "wav2vec2", "unigram", tokenizer=tokenizer)
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    mine = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "exp/bpe.model"))
    wide = "".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in "A BAD CAB")
    assert mine.encode_as_pieces(wide) == tokenizer.tokenize("A BAD CAB")


def native(kind):
    """A tokenizer that no SentencePiece model equals."""
    if kind == "bytes":
        backend, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    elif kind == "WordPiece":
        backend, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    backend.train_from_iterator(
        tiny_hf.SENTENCES, trainer(vocab_size=60, special_tokens=["<unk>", "<pad>"], show_progress=False)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["bytes", "WordPiece"])
def test_what_sentencepiece_cannot_do_is_refused_by_file(tmp_path, kind):
    directory = tiny_hf.save_with_pieces(tmp_path / "hf", "wav2vec2", kind, tokenizer=native(kind))
    refused(tmp_path, directory, kind)


def refused(tmp_path, directory, named):
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{named}") as refusal:
        asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    assert "\n" not in str(refusal.value) and "asr_kd_pseudo" in str(refusal.value)
    assert not (tmp_path / "exp").exists()


def test_merges_in_an_order_of_their_own_are_refused(tmp_path):
    """A merge is missing that SentencePiece would make."""
    directory = tiny_hf.save_with_pieces(tmp_path / "hf", "wav2vec2", "bpe")
    content = json.loads((directory / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    long = next(m for m in merges if sum("".join(n) == "".join(m) for n in merges) > 1)
    content["model"]["merges"] = [m for m in merges if m != long]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    refused(tmp_path, directory, "merges")


def test_texts_that_are_cut_otherwise_are_refused(tmp_path):
    directory = tiny_hf.save_with_pieces(tmp_path / "hf", "wav2vec2", "unigram")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        content["pre_tokenizer"], {"type": "Split", "pattern": {"String": "A"}, "behavior": "Isolated", "invert": False}
    ]}  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(content))
    refused(tmp_path, directory, "SentencePiece into")


def test_a_tokenizer_that_changed_is_refused(tmp_path):
    directory = tiny_hf.save_with_pieces(tmp_path / "hf", "wav2vec2", "bpe")
    command = [f"hf:{directory}", "--output_dir", str(tmp_path / "exp")]
    asr_kd_import.main(command)
    (tmp_path / "exp/bpe.model").unlink()  # an incomplete import is made again
    asr_kd_import.main(command)
    assert (tmp_path / "exp/bpe.model").is_file()
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps({**content, "version": "1.1"}))
    with pytest.raises(UserError, match=r"exp .*tokenizer\.json"):
        asr_kd_import.main(command)
