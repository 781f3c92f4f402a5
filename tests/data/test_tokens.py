"""Token lists in ESPnet's form."""

from __future__ import annotations

from pathlib import Path
from typing import Union

import pytest
import yaml

from espnet_kd.bin import asr_kd_data
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
    with pytest.raises(UserError, match="--nbpe 99999999999 does not suit"):
        make_token_list([text], tmp_path / "bpe", "bpe", 99_999_999_999)
    with pytest.raises(UserError, match="token_type phoneme"):
        make_token_list([text], tmp_path / "x", "phoneme")
    with pytest.raises(UserError, match="no such file"):
        make_token_list([tmp_path / "none"], tmp_path / "x")
    write_text(tmp_path / "text", "A", "")
    with pytest.raises(UserError, match="text:2: utterance 'u1': the text is empty"):
        make_token_list([text], tmp_path / "x")


def write_teacher(directory: Path, **config) -> Path:
    """An experiment as far as stage 3 looks at it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (directory / "latest.pth").touch()
    return directory


def take(teacher: Path, out: Union[str, Path], token_type: str = "char") -> Path:
    asr_kd_data.main(["tokens", "--teacher", str(teacher), "--out", str(out), "--token_type", token_type])
    return Path(out) / "tokens.txt"


def test_a_teachers_characters(tmp_path: Path) -> None:
    tokens = ["<blank>", "<unk>", "<space>", "Ä", "<sos/eos>"]
    teacher = write_teacher(tmp_path / "exp" / "teacher", token_type="char", token_list=tokens)
    path = take(teacher, tmp_path / "out")
    assert path.read_text(encoding="utf-8").split("\n")[:-1] == tokens
    before = path.stat().st_mtime_ns
    take(teacher / "latest.pth", tmp_path / "out")
    assert path.stat().st_mtime_ns == before
    # The same list as a file, named as from the directory that the teacher was trained in.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "list.txt").write_text("\n".join([*tokens[:3], "B", tokens[-1], ""]))
    write_teacher(teacher, token_type="char", token_list="data/list.txt")
    assert "B" in take(teacher, tmp_path / "out").read_text().split()


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A recipe with a BPE teacher, ``recipe/exp/teacher``."""
    texts = [f"SET THE KITCHEN TIMER TO {w} MINUTES" for w in ("FIVE", "NINE", "FIFTY", "SIXTEEN")] * 5
    text = write_text(tmp_path / "text", *texts)
    path = make_token_list([text], tmp_path / "recipe" / "data" / "bpe", "bpe", 24)
    tokens = path.read_text(encoding="utf-8").split()
    config = {"token_type": "bpe", "token_list": tokens, "bpemodel": "data/bpe/bpe.model"}
    write_teacher(tmp_path / "recipe" / "exp" / "teacher", **config)
    return tmp_path / "recipe"


def test_a_teachers_bpe_model(bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another recipe has a model of the same name, which is not the teacher's.
    here = tmp_path / "here"
    make_token_list([write_text(tmp_path / "t", "ABC DEF GHI", "AB AB")], here / "data" / "bpe", "bpe", 13)
    monkeypatch.chdir(here)
    take(bpe / "exp" / "teacher", "out", "bpe")
    for name in ("tokens.txt", "bpe.model"):
        assert Path("out", name).read_bytes() == (bpe / "data" / "bpe" / name).read_bytes()
    (bpe / "data" / "bpe" / "bpe.model").unlink()
    with pytest.raises(UserError, match="data/bpe/bpe.model does not belong to .*config.yaml"):
        take(bpe / "exp" / "teacher", "out2", "bpe")
    Path("data/bpe/bpe.model").unlink()
    with pytest.raises(UserError, match="found neither from there nor from here"):
        take(bpe / "exp" / "teacher", "out2", "bpe")
    assert not Path("out2").exists()


def test_another_token_type_than_the_teachers(bpe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--token_type char: the teacher's is bpe .*give --token_type bpe"):
        take(bpe / "exp" / "teacher", tmp_path / "out", "char")
    teacher = write_teacher(tmp_path / "t", token_type="phn", token_list=["<blank>"])
    with pytest.raises(UserError, match="the teacher's is phn .*known are char and bpe"):
        take(teacher, tmp_path / "out", "char")
    teacher = write_teacher(tmp_path / "t", token_type="char")
    with pytest.raises(UserError, match="token_list is neither"):
        take(teacher, tmp_path / "out", "char")
