"""Token lists in ESPnet's format."""

from __future__ import annotations

from pathlib import Path
from typing import Union

import numpy as np
import pytest
import soundfile
import yaml

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import Utterance, write_data_dir
from espnet_kd.data.tokenizing import TokenList
from espnet_kd.data.tokens import make_token_list


def write_text(path: Path, *texts: str) -> Path:
    path.write_text("".join(f"u{i} {text}\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path


def test_characters_by_frequency(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "AB AB AB", "A'B C", "A")
    path = make_token_list([text], tmp_path / "char")
    # A occurs 5 times, B 4, the blank 3; equal counts are sorted by code point.
    assert path.read_text().split("\n") == ["<blank>", "<unk>", "A", "B", "<space>", "'", "C", "<sos/eos>", ""]


def test_mandarin_has_no_space(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "打开灯", "开门")
    assert make_token_list([text], tmp_path / "c").read_text(encoding="utf-8").split() == [
        "<blank>", "<unk>", "开", "打", "灯", "门", "<sos/eos>",
    ]  # fmt: skip


def test_words_by_frequency(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "TWO RED BOXES", "RED RED BOXES", "TWO")
    path = make_token_list([text], tmp_path / "word", "word")
    assert path.read_text().split() == ["<blank>", "<unk>", "RED", "BOXES", "TWO", "<sos/eos>"]


def test_words_need_blanks_between_them(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "打开灯", "开门")
    with pytest.raises(UserError, match=f"--token_type word: .*{text}.*char"):
        make_token_list([text], tmp_path / "word", "word")


def test_espnet_reads_the_characters_back(tmp_path: Path) -> None:
    from espnet2.text.char_tokenizer import CharTokenizer

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
    # The same texts give the same list again.
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
    with pytest.raises(UserError, match="--nbpe 5000 does not suit .*: give 8 or less"):
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
    """An experiment with only those files that stage 3 reads."""
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
    # A list in a file, whose path starts from the directory where the teacher was trained.
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
    with pytest.raises(UserError, match="config.yaml: bpemodel: data/bpe/bpe.model is found neither .*; copy it to"):
        take(bpe / "exp" / "teacher", "out2", "bpe")
    assert not Path("out2").exists()


def test_another_token_type_than_the_teachers(bpe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--token_type char: the teacher's is bpe .*give --token_type bpe"):
        take(bpe / "exp" / "teacher", tmp_path / "out", "char")
    teacher = write_teacher(tmp_path / "t", token_type="phn", token_list=["<blank>"])
    with pytest.raises(UserError, match="the teacher's is phn .*known are char, word, bpe"):
        take(teacher, tmp_path / "out", "char")
    teacher = write_teacher(tmp_path / "t", token_type="char")
    with pytest.raises(UserError, match="token_list is neither"):
        take(teacher, tmp_path / "out", "char")


# ---- texts tokenized as ESPnet does ----

UNKNOWN_WORD = ["A <unk> B", "<unk>", "AB <unk> <unk> BA", "A<unk>"]


@pytest.mark.parametrize("token_type", ["char", "bpe"])
def test_an_unknown_word_is_one_token(tmp_path: Path, token_type: str) -> None:
    """ESPnet gives the same tokens with the files of stage 3; no letter of <unk> is a token."""
    import espnet_kd.offline  # noqa: F401, I001  (before espnet2.text)
    from espnet2.text.build_tokenizer import build_tokenizer

    out = tmp_path / "out"
    tokens = make_token_list([write_text(tmp_path / "text", *UNKNOWN_WORD)], out, token_type, 8).read_text().split("\n")
    assert not {"<", "u", "n", "k", ">"} & set(tokens) and tokens[1] == "<unk>" and tokens.count("<unk>") == 1
    if token_type == "bpe":
        tokenizer = build_tokenizer("bpe", bpemodel=str(out / "bpe.model"))
        assert len(tokens) - 1 == 8
    else:
        tokenizer = build_tokenizer("char", non_linguistic_symbols=out / "nlsyms.txt")
    for text in UNKNOWN_WORD:
        found = tokenizer.text2tokens(text)
        assert found.count("<unk>") == text.count("<unk>") and set(found) <= set(tokens)
        assert found == TokenList(out / "tokens.txt", token_type).split(text)
        assert tokenizer.tokens2text(found).strip() == text
    assert TokenList(out / "tokens.txt", token_type).special_fault("A <unk>") is None


@pytest.mark.parametrize("token_type", ["char", "bpe"])
@pytest.mark.parametrize("name", ["<blank>", "<sos/eos>", "<space>", "<s>", "</s>"])
def test_names_of_special_tokens_in_a_text(tmp_path: Path, name: str, token_type: str) -> None:
    text = write_text(tmp_path / "text", "AB BA", f"AB {name} BA")
    with pytest.raises(UserError, match=f"text:2: utterance 'u1': the text has {name}, the name of a special token"):
        make_token_list([text], tmp_path / "out", token_type, 9)


def test_a_model_that_spells_an_unknown_word(tmp_path: Path) -> None:
    """Such a token list comes from elsewhere, as that of an ESPnet teacher on TED-LIUM 2."""
    make_token_list([write_text(tmp_path / "t", "AB BA unk", "unk")], tmp_path / "out", "bpe", 9)
    data = write_data(tmp_path, ["AB <unk>"])
    with pytest.raises(UserError, match="text:1: utterance 'u0': the text has <unk>.* spelled letter by letter"):
        asr_kd_data.main(["validate", *data, "--token_list", f"{tmp_path}/out/tokens.txt", "--token_type", "bpe"])


def write_data(root: Path, texts: list) -> list:
    root.mkdir(exist_ok=True)
    soundfile.write(root / "a.wav", np.zeros(16000), 16000)
    write_data_dir(root / "d", [Utterance(f"u{i}", "s", f"{root}/a.wav", text) for i, text in enumerate(texts)])
    return [str(root / "d")]


@pytest.mark.parametrize(
    "text",
    ["\u00fcber", "u\u0308ber", "\uff35\uff22\uff25\uff32", "of\ufb01ce", "\u00fcber\u3000office", "\u00fcber\toffice"],
    ids=["composed", "decomposed", "full width", "ligature", "U+3000", "tab"],
)
def test_a_bpe_model_is_asked(tmp_path: Path, text: str) -> None:
    """The model's normalisation decides what it covers, not the characters of its pieces."""
    words = "\u00fcber UBER office"
    make_token_list([write_text(tmp_path / "t", words, f"{words} {words}")], tmp_path / "out", "bpe", 16)
    options = ["--token_list", f"{tmp_path}/out/tokens.txt", "--token_type", "bpe"]
    asr_kd_data.main(["validate", *write_data(tmp_path, [text]), *options])
    other = write_data(tmp_path / "other", [text, text + " XYZ"])
    with pytest.raises(UserError, match="text:2: utterance 'u1': not in .*XYZ"):
        asr_kd_data.main(["validate", *other, *options])


def test_unknown_tokens_are_counted_where_they_are_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_token_list([write_text(tmp_path / "t", "AB")], tmp_path / "out")
    data = write_data(tmp_path, ["AB", "ABC", "CD"])
    with caplog.at_level("WARNING"):
        asr_kd_data.main(["validate", *data, "--token_list", f"{tmp_path}/out/tokens.txt", "--allow_unknown"])
    assert "2 utterances have tokens that are not in" in caplog.text and "C (2) D (1)" in caplog.text


@pytest.mark.parametrize("token_type", ["char", "bpe"])
def test_symbols_that_stay_whole(tmp_path: Path, token_type: str) -> None:
    (tmp_path / "nlsyms").write_text("[NOISE]\n<laugh>\n")
    text = write_text(tmp_path / "text", "AB [NOISE] BA", "AB <laugh>")
    options = ["--token_type", token_type, "--nbpe", "8", "--nlsyms", str(tmp_path / "nlsyms")]
    asr_kd_data.main(["tokens", "--text", str(text), "--out", str(tmp_path / "out"), *options])
    tokens = TokenList(tmp_path / "out/tokens.txt", token_type)
    assert "[NOISE]" in tokens.tokens and "<laugh>" in tokens.tokens and "N" not in tokens.tokens
    assert tokens.split("A[NOISE]")[-1] == "[NOISE]" and not tokens.unknown("AB [NOISE] <laugh>")
    for faulty, message in (("[A\n[AB]\n", "nlsyms:1: .* the beginning of"), ("[A B]\n", "nlsyms:1: .*white space")):
        (tmp_path / "nlsyms").write_text(faulty)
        with pytest.raises(UserError, match=message):
            asr_kd_data.main(["tokens", "--text", str(text), "--out", str(tmp_path / "out"), *options])


@pytest.mark.parametrize("more", [True, False])
def test_a_bpe_model_of_another_size(bpe: Path, tmp_path: Path, more: bool) -> None:
    """Pieces that are no tokens would become <unk>, so the model is refused from a teacher and for a check."""
    config = bpe / "exp/teacher/config.yaml"
    content = yaml.safe_load(config.read_text())
    at = content["token_list"].index("<sos/eos>") - 6
    if more:  # the model has pieces that the list lacks
        content["token_list"] = [*content["token_list"][:at], "<sos/eos>"]
        message = "bpe.model does not belong to .*config.yaml: 6 of its 24 pieces are none of the 18 tokens"
    else:
        content["token_list"] = [*content["token_list"][:-1], "XYZ", "<sos/eos>"]
        message = "bpe.model does not belong to .*config.yaml: it has no pieces XYZ"
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        take(bpe / "exp/teacher", tmp_path / "out", "bpe")
    assert not (tmp_path / "out").exists()
    (bpe / "data/bpe/tokens.txt").write_text("\n".join(content["token_list"]))
    with pytest.raises(UserError, match="bpe.model does not belong to .*tokens.txt"):
        TokenList(bpe / "data/bpe/tokens.txt", "bpe")


def test_a_teachers_symbols_and_cleaner(tmp_path: Path) -> None:
    """The student's texts are tokenized as the teacher's were."""
    import espnet_kd.offline  # noqa: F401, I001  (before espnet2.text)
    from espnet2.text.build_tokenizer import build_tokenizer
    from espnet2.text.cleaner import TextCleaner

    tokens = ["<blank>", "<unk>", "<space>", *"ABCDEGHIKLMNORSTUWY", "[NOISE]", "<sos/eos>"]
    recipe = tmp_path / "recipe"
    names = {"token_type": "char", "token_list": tokens, "non_linguistic_symbols": "data/nlsyms.txt"}
    teacher = write_teacher(recipe / "exp/teacher", **names, cleaner="tacotron")
    with pytest.raises(UserError, match="non_linguistic_symbols: data/nlsyms.txt is found neither"):
        take(teacher, tmp_path / "out")
    (recipe / "data").mkdir()
    (recipe / "data/nlsyms.txt").write_text("[NOISE]\n")
    taken = take(teacher, tmp_path / "out")
    assert (tmp_path / "out/nlsyms.txt").read_text() == "[NOISE]\n"
    assert (tmp_path / "out/cleaner").read_text() == "tacotron\n"
    text = "Mr. Smith had 20 cats"
    want = build_tokenizer("char", non_linguistic_symbols=tmp_path / "out/nlsyms.txt")
    assert TokenList(taken).split(text) == want.text2tokens(TextCleaner("tacotron")(text))
    options = ["--token_list", str(taken)]
    asr_kd_data.main(["validate", *write_data(tmp_path, ["[NOISE] good luck", "Mr. Smith had 20 cats"]), *options])
    # Another teacher without symbols and cleaner, in the same place: the two files are removed.
    write_teacher(teacher, token_type="char", token_list=tokens)
    take(teacher, tmp_path / "out")
    assert not (tmp_path / "out/nlsyms.txt").exists() and not (tmp_path / "out/cleaner").exists()
    write_teacher(teacher, token_type="char", token_list=tokens, cleaner="no_such_cleaner")
    with pytest.raises(UserError, match="the teacher's text cleaner 'no_such_cleaner' cannot be used here"):
        take(teacher, tmp_path / "out")
