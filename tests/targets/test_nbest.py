"""The N-best file can be read back as it was written, and an error names its line."""

import math
from array import array

import pytest
import torch

from espnet_kd.cli import UserError
from espnet_kd.targets.nbest import read_nbest, retokenise, weights, write_nbest

TOKENS = ["<blank>", "<unk>", "▁a", "b", "中", "\u3000", "<sos/eos>"]


def test_round_trip(tmp_path):
    nbest = {
        "sp1.1-u2": [(-0.25, [2, 3]), (-3.5, []), (-12.125, [4, 5, 1])],
        "u1": [(0.0, array("i"))],
    }
    write_nbest(tmp_path / "new" / "nbest", nbest, TOKENS)
    assert (tmp_path / "new" / "nbest").read_text(encoding="utf-8") == (
        "sp1.1-u2 1 -0.250000 ▁a b\nsp1.1-u2 2 -3.500000\nsp1.1-u2 3 -12.125000 中 \u3000 <unk>\nu1 1 0.000000\n"
    )
    found = read_nbest(tmp_path / "new" / "nbest", TOKENS)
    assert {u: [(s, list(ids)) for s, ids in h] for u, h in found.items()} == {**nbest, "u1": [(0.0, [])]}
    assert list(found) == list(nbest)
    assert torch.tensor(found["sp1.1-u2"][2][1], dtype=torch.long).tolist() == [4, 5, 1]


def test_ids_follow_the_token_list_of_the_reader(tmp_path):
    write_nbest(tmp_path / "nbest", {"u": [(-1.0, [3, 2])]}, TOKENS)
    assert list(read_nbest(tmp_path / "nbest", ["<blank>", "x", "b", "▁a"])["u"][0][1]) == [2, 3]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_nbest(tmp_path / "nbest", {"u": [(-1.0, [3])]}, TOKENS)
    old = (tmp_path / "nbest").read_bytes()
    with pytest.raises(IndexError):
        write_nbest(tmp_path / "nbest", {"u": [(-1.0, [2]), (-2.0, [99])]}, TOKENS)
    assert (tmp_path / "nbest").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["nbest"]


def test_hand_made_file(tmp_path):
    (tmp_path / "nbest").write_bytes("u1\t1 -1  b\r\n\n u1 2 -1e0 ▁a\n".encode())
    assert [(s, list(ids)) for s, ids in read_nbest(tmp_path / "nbest", TOKENS)["u1"]] == [(-1.0, [3]), (-1.0, [2])]


@pytest.mark.parametrize(
    "content, message",
    [
        ("u1 1 -1 b\nu1 2 -2 b c", r"nbest:2: token 'c' of 'u1'"),
        ("u1 1 -1 b <blank>", r"nbest:1: token '<blank>' of 'u1'"),
        ("u1 1 -1 b\nu1 2 b", r"nbest:2: the score 'b' of 'u1'"),
        ("u1 1 nan b", r"nbest:1: the score 'nan'"),
        ("u1 1 -inf b", r"nbest:1: the score '-inf'"),
        ("u1 1", r"nbest:1: expected 'utterance rank score"),
        ("u1 1 -1 b\nu1 3 -2", r"nbest:2: 'u1' has rank '3' where 2 must come"),
        ("u1 1 -1 b\nu1 1 -2", r"nbest:2: 'u1' has rank '1' where 2 must come"),
        ("u1 0 -1 b", r"nbest:1: 'u1' has rank '0' where 1 must come"),
        ("u1 1 -1 b\nu2 2 -2", r"nbest:2: 'u2' has rank '2' where 1 must come"),
        ("u1 x -1 b", r"nbest:1: 'u1' has rank 'x' where 1 must come"),
        ("u1 1 -1 b\nu2 1 -1\n\nu1 2 -2", r"nbest:4: utterance 'u1' stands twice"),
        ("u1 1 -1 b\nu1 2 -2 ▁a\nu1 3 -3 b", r"nbest:3: this hypothesis of 'u1' stands there already"),
        (b"u1 1 -1 b\nu1 2 -2 \xff", r"nbest:2: not UTF-8"),
        ("\n", r"nbest: no hypotheses"),
    ],
)
def test_mistakes_name_their_line(tmp_path, content, message):
    (tmp_path / "nbest").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_nbest(tmp_path / "nbest", TOKENS)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="nbest: no such file"):
        read_nbest(tmp_path / "nbest", TOKENS)
    with pytest.raises(UserError, match="cannot read"):
        read_nbest(tmp_path, TOKENS)


def test_weights_are_the_scores_renormalised():
    assert weights([math.log(0.3), math.log(0.1)]) == pytest.approx([0.75, 0.25])
    assert weights([-2000.0, -2000.0 - math.log(3)]) == pytest.approx([0.75, 0.25])  # exp(-2000) is 0
    assert weights([-7.0]) == [1.0]
    assert weights([]) == []


@pytest.mark.parametrize("token", ["", " ", "a b", "\t", "\u3000", "\u00a0", "<id:3>"])
def test_every_token_comes_back(tmp_path, token):
    """This includes tokens of blanks only, such as U+3000, which reading by blanks would lose."""
    tokens = ["<blank>", "<unk>", "a", "b", token, "<sos/eos>"]
    nbest = {"u": [(-1.0, [2, 4, 3]), (-2.0, [4]), (-3.0, [4, 4, 2]), (-4.0, [])]}
    write_nbest(tmp_path / "nbest", nbest, tokens)
    found = read_nbest(tmp_path / "nbest", tokens)
    assert [list(ids) for _, ids in found["u"]] == [ids for _, ids in nbest["u"]]


def test_the_same_texts_in_other_tokens():
    """Hypotheses with the same tokens are merged and their probabilities added; a piece that is no token is <unk>."""
    letters = {2: "a", 3: " ", 4: "b", 5: "c"}
    pieces = {"<unk>": 1, "ab": 7, "a": 8, "b": 9}

    def to_ids(text):
        return [pieces.get(word, 1) for word in text.split()]

    nbest = {
        "u": [(math.log(p), ids) for p, ids in ((0.5, [2, 4]), (0.2, [2, 3, 4]), (0.1, [2, 3, 3, 4]), (0.05, [5]))],
        "v": [(-1.0, [])],
        "w": [(math.log(p), ids) for p, ids in ((0.3, [5]), (0.25, [2, 4]), (0.2, [5, 5]))],
    }
    found, merged, unknown = retokenise(nbest, lambda ids: "".join(letters[i] for i in ids), to_ids, 1)
    assert [(round(math.exp(s), 6), list(ids)) for s, ids in found["u"]] == [(0.5, [7]), (0.3, [8, 9]), (0.05, [1])]
    assert [(s, list(ids)) for s, ids in found["v"]] == [(-1.0, [])]
    # Merged, as both are <unk>; the sum, not the probability of the better one alone.
    assert [(round(math.exp(s), 6), list(ids)) for s, ids in found["w"]] == [(0.5, [1]), (0.25, [7])]
    assert (merged, unknown) == (2, 2)


def test_merging_keeps_the_best_first():
    nbest = {"u": [(math.log(0.4), [1]), (math.log(0.3), [2]), (math.log(0.3), [2, 2])]}
    found, *_ = retokenise(nbest, lambda ids: "a" if 1 in ids else "b", lambda text: [ord(text)], 0)
    assert [list(ids) for _, ids in found["u"]] == [[ord("b")], [ord("a")]]
