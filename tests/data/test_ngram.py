"""A token n-gram model: its probabilities sum to one, as KenLM reads it for beam search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.tokens import make_token_list

TEXTS = ["THE CAT SAT", "THE CAT ATE", "A CAT", "THE TAT", "CATS"]


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    text = tmp_path / "text"
    text.write_text("".join(f"u{i} {t}\n" for i, t in enumerate(TEXTS)))
    (tmp_path / "more").write_text("THE CAT SAT\n\nA QUICK CAT\n")
    make_token_list([text], tmp_path / "tokens")
    order = getattr(request, "param", 3)
    options = ["--token_list", str(tmp_path / "tokens/tokens.txt"), "--order", str(order)]
    asr_kd_data.main(["ngram", "--text", str(text), "--lm_text", str(tmp_path / "more"), *options,
                      "--out", str(tmp_path / "lm.arpa")])  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("made", [2, 3, 6], indirect=True)
def test_probabilities_sum_to_one(made: Path) -> None:
    """Probabilities sum to one after every history, seen or not, as KenLM reads the model."""
    from espnet_kd.decode.beam import load_ngram

    tokens = (made / "tokens/tokens.txt").read_text().split("\n")[1:-2]  # without blank and <sos/eos>
    lm = load_ngram(made / "lm.arpa", tokens, tokens.index("<unk>"))

    def total(state) -> float:
        scores = [lm.score(state, i)[1] for i in range(len(tokens))]
        return float(np.sum(10.0 ** np.array([*scores, lm.finish(state)[1]])))

    for history in ("", "T", "TH", "THE", "THE C", "CAT", "XQ", "SS", "EEE", "THE CAT SAT"):
        state = lm.start(False)
        for char in history:
            name = "<space>" if char == " " else char
            state, _ = lm.score(state, tokens.index(name if name in tokens else "<unk>"))
        assert total(state) == pytest.approx(1, abs=2e-4), history


def test_what_was_seen_is_likelier(made: Path) -> None:
    from espnet_kd.decode.beam import load_ngram

    tokens = (made / "tokens/tokens.txt").read_text().split("\n")[1:-2]
    lm = load_ngram(made / "lm.arpa", tokens, tokens.index("<unk>"))

    def score(text: str) -> float:
        state, sum_ = lm.start(False), 0.0
        for char in text:
            state, s = lm.score(state, tokens.index("<space>" if char == " " else char))
            sum_ += s
        return sum_ + lm.finish(state)[1]

    assert score("THE CAT") > score("THE ACT") > score("EHT TCA")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--order", "1"], "--order is 1; .* 2 to 6"), (["--text"], "no text to make"), ([], "no --text and no")],
)
def test_mistakes(made: Path, options: list, message: str) -> None:
    (made / "empty").write_text("u1\n")
    if options[:1] == ["--text"]:
        options = ["--text", str(made / "empty")]
    elif options:
        options += ["--text", str(made / "text")]
    with pytest.raises(UserError, match=message):
        asr_kd_data.main(["ngram", *options, "--token_list", f"{made}/tokens/tokens.txt", "--out", f"{made}/x.arpa"])
    assert not (made / "x.arpa").exists()
