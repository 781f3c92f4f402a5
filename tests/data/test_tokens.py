"""Token lists in ESPnet's form."""

from __future__ import annotations

from pathlib import Path

import pytest

from espnet_kd.cli import UserError
from espnet_kd.data.tokens import make_token_list


def write_text(path: Path, *texts: str) -> Path:
    path.write_text("".join(f"u{i} {text}\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path


def test_characters_by_frequency(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "AB AB AB", "A'B C", "A")
    path = make_token_list([text], tmp_path / "char")
    # A 5, B and the blank 4 resp. 3, then ties by code point.
    assert path.read_text().split("\n") == ["<blank>", "<unk>", "A", "B", "<space>", "'", "C", "<sos/eos>", ""]


def test_mandarin_has_no_space(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "打开灯", "开门")
    assert make_token_list([text], tmp_path / "c").read_text(encoding="utf-8").split() == [
        "<blank>", "<unk>", "开", "打", "灯", "门", "<sos/eos>",
    ]  # fmt: skip


def test_espnet_reads_the_characters_back(tmp_path: Path) -> None:
    from espnet2.text.char_tokenizer import CharTokenizer

    import espnet_kd.offline  # noqa: F401  (before espnet2.text)

    tokenizer = CharTokenizer()
    text = "IT'S A TEST"
    tokens = make_token_list([write_text(tmp_path / "text", text)], tmp_path / "char").read_text().split("\n")[:-1]
    assert set(tokenizer.text2tokens(text)) == set(tokens[2:-1])


def test_bpe(tmp_path: Path) -> None:
    import sentencepiece

    texts = [f"SET THE KITCHEN TIMER TO {w} MINUTES" for w in ("FIVE", "NINE", "FIFTY", "SIXTEEN")] * 5
    path = make_token_list([write_text(tmp_path / "text", *texts)], tmp_path / "bpe", "bpe", 24)
    tokens = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(tokens) == len(set(tokens)) == 24
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>" and "<s>" not in tokens
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe" / "bpe.model"))
    for text in texts:
        pieces = model.encode(text, out_type=str)
        assert set(pieces) <= set(tokens) and model.decode(pieces) == text
    # Made again from the same texts: the same list.
    again = make_token_list([tmp_path / "text"], tmp_path / "bpe2", "bpe", 24)
    assert again.read_bytes() == path.read_bytes()


def test_again_only_when_needed(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "AB")
    path = make_token_list([text], tmp_path / "char")
    before = path.stat().st_mtime_ns
    assert make_token_list([text], tmp_path / "char").stat().st_mtime_ns == before
    write_text(tmp_path / "text", "ABC")
    assert "C" in make_token_list([text], tmp_path / "char").read_text()


def test_mistakes_are_named(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "AB CD")
    with pytest.raises(UserError, match="--nbpe 5000 .*(?s:.)*<= "):
        make_token_list([text], tmp_path / "bpe", "bpe", 5000)
    with pytest.raises(UserError, match="token_type phoneme"):
        make_token_list([text], tmp_path / "x", "phoneme")
    with pytest.raises(UserError, match="no such file"):
        make_token_list([tmp_path / "none"], tmp_path / "x")
    write_text(tmp_path / "text", "A", "")
    with pytest.raises(UserError, match="text:2: utterance 'u1': the text is empty"):
        make_token_list([text], tmp_path / "x")
