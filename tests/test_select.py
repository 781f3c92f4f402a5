"""Frame selections: compared with slow ones, and at the edges."""

import math

import pytest
import torch

from espnet_kd import frames as fr
from espnet_kd.frames import check_rule, select
from espnet_kd.topk import compress

WIDTH = 5
RULES = {
    "all": {},
    "elimination": {},
    "symmetric": {"n": 1},
    "trim": {},
    "threshold": {"theta": 0.2},
    "random": {"ratio": 0.5},
}
each_rule = pytest.mark.parametrize("rule", RULES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])


def batch(lengths=(40, 23, 7, 1, 0), blank_id=0, seed=0, dtype=torch.float32, padding=math.nan):
    """Logits (B, T, V) and lengths; blank is the best token on about two of three frames, more or less certain."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lengths), max(lengths) + 3, WIDTH, generator=g)
    logits[..., blank_id] += 3 * torch.rand(logits.shape[:2], generator=g)
    lengths = torch.tensor(lengths)
    logits[~fr.valid(lengths, logits.size(1))] = padding
    return logits.to(dtype), lengths


def spikes(*rows, sure=5.0):
    """Logits and lengths for rows as ``"_a_"``: ``_`` is a blank frame, ``a`` and padding are frames of a token."""
    width = max(len(r) for r in rows) + 1
    logits = torch.zeros(len(rows), width, WIDTH)
    for b, row in enumerate(rows):
        for t, c in enumerate(row.ljust(width)):
            logits[b, t, 0 if c == "_" else 2] = sure
    return logits, torch.tensor([len(r) for r in rows])


def drawn(mask):
    return ["".join(".x"[int(k)] for k in row) for row in mask]


def slow(logits, lengths, rule, blank_id=0, **options):
    """The selection by the table of rules, computed frame by frame."""
    num = logits.size(1)
    kept = [
        slow_utterance(row[:length], rule, blank_id, **options) + [False] * (num - length)
        for row, length in zip(logits.double().tolist(), lengths.tolist())
    ]
    return torch.tensor(kept)


def slow_utterance(row, rule, blank_id, n=0, theta=0.0, log_prior=None, prior_scale=0.5):
    def is_nonblank(z):
        z = z if log_prior is None else [v - prior_scale * k for v, k in zip(z, log_prior.tolist())]
        return z.index(max(z)) != blank_id

    def p_blank(z):
        return math.exp(z[blank_id]) / sum(map(math.exp, z))

    nb = [t for t, z in enumerate(row) if is_nonblank(z)]
    kept = {
        "all": lambda t: True,
        "elimination": lambda t: t in nb,
        "symmetric": lambda t: any(abs(t - k) <= n for k in nb),
        "trim": lambda t: bool(nb) and nb[0] <= t <= nb[-1],
        "threshold": lambda t: t in nb or p_blank(row[t]) <= 1 - theta,
    }[rule]
    return [kept(t) for t in range(len(row))]


@each_dtype
@pytest.mark.parametrize("blank_id", [0, 2, WIDTH - 1])
@pytest.mark.parametrize(
    "rule, options",
    [
        ("all", {}),
        ("elimination", {}),
        ("trim", {}),
        *(("symmetric", {"n": n}) for n in (0, 1, 2, 3, 6, 39, 40, 10**9)),
        *(("threshold", {"theta": theta}) for theta in (0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 1, 1.0)),
    ],
)
def test_equals_slow_selection(rule, options, blank_id, dtype):
    logits, lengths = batch(blank_id=blank_id, dtype=dtype)
    got = select(logits, lengths, rule, blank_id=blank_id, **options)
    assert got.dtype == torch.bool and got.shape == logits.shape[:2]
    assert torch.equal(got, slow(logits, lengths, rule, blank_id, **options))


def test_dilation_at_both_edges_and_next_to_padding():
    logits, lengths = spikes("a_____", "_____a", "__a___", "a____", "____a", "a", "_")
    assert drawn(select(logits, lengths, "symmetric", n=2)) == [
        "xxx....", "...xxx.", "xxxxx..", "xxx....", "..xxx..", "x......", ".......",
    ]  # fmt: skip


def test_rows_do_not_leak_into_each_other():
    """A shift that wraps at an end, or over a flattened batch, would select frames of the neighbours."""
    rows = ["_____a", "______", "a_____"]
    for n in (1, 3, 6):
        assert not select(*spikes(*rows), "symmetric", n=n)[1].any()
    assert drawn(select(*spikes(*rows), "trim")) == [".....x.", ".......", "x......"]
    logits, lengths = batch()
    for rule, options in RULES.items():
        if rule != "random":
            whole = select(logits, lengths, rule, **options)
            for b in range(len(lengths)):
                assert torch.equal(whole[b], select(logits[b : b + 1], lengths[b : b + 1], rule, **options)[0])


def test_trim():
    logits, lengths = spikes("__a__a_a__", "a__a", "__a", "a___", "____", "a")
    assert drawn(select(logits, lengths, "trim")) == [
        "..xxxxxx...", "xxxx.......", "..x........", "x..........", "...........", "x..........",
    ]  # fmt: skip


@each_rule
@pytest.mark.parametrize("padding", [0.0, 1e4, -math.inf, math.inf, math.nan])
def test_padding_is_never_read(rule, padding):
    logits, lengths = batch()
    inside = fr.valid(lengths, logits.size(1))
    kept = []
    for fill in (math.nan, padding):
        seeded = {"generator": torch.Generator().manual_seed(7)} if rule == "random" else {}
        kept.append(select(logits.masked_fill(~inside[..., None], fill), lengths, rule, **RULES[rule], **seeded))
    assert torch.equal(*kept)
    assert not (kept[1] & ~inside).any() and kept[1].any()


@each_rule
def test_log_probabilities_may_stand_for_logits(rule):
    logits, lengths = batch(dtype=torch.float64)
    kept = []
    for x in (logits, logits.log_softmax(-1)):
        seeded = {"generator": torch.Generator().manual_seed(3)} if rule == "random" else {}
        kept.append(select(x, lengths, rule, **RULES[rule], **seeded))
    assert torch.equal(*kept) and kept[0].any()


def test_one_rule_becomes_another():
    logits, lengths = batch((40, 23, 7))
    every, nb = (select(logits, lengths, r) for r in ("all", "elimination"))
    assert torch.equal(every, fr.valid(lengths, logits.size(1)))
    assert torch.equal(nb, fr.nonblank(logits, every))
    assert 0 < nb.sum() < every.sum() and nb.any(1).all()
    for same, rule, options in [
        (nb, "symmetric", {"n": 0}),
        (every, "symmetric", {"n": 40}),
        (nb, "threshold", {"theta": 1.0}),
        (nb, "threshold", {"theta": 0.999}),
        (every, "threshold", {"theta": 0.0}),
        (nb, "random", {"ratio": 0}),
        (every, "random", {"ratio": 1000.0}),
        (nb, "elimination", {"log_prior": None}),
        (nb, "elimination", {"log_prior": torch.full((WIDTH,), -math.log(WIDTH))}),
        (nb, "elimination", {"log_prior": torch.tensor([-0.1, -3.0, -4.0, -5.0, -6.0]), "prior_scale": 0}),
    ]:
        assert torch.equal(select(logits, lengths, rule, **options), same), (rule, options)


def test_selections_grow():
    logits, lengths = batch()
    for rule, name, values in [("symmetric", "n", range(7)), ("threshold", "theta", [1, 0.5, 0.3, 0.1, 0.05, 0])]:
        previous = select(logits, lengths, "elimination")
        for value in values:
            kept = select(logits, lengths, rule, **{name: value})
            assert (kept | ~previous).all()  # a superset
            previous = kept


@each_dtype
def test_no_nonblank_frame_at_all(dtype):
    logits, lengths = batch(dtype=dtype)
    logits[..., 0] = 20.0
    for rule in ("elimination", "symmetric", "trim", "random"):
        assert not select(logits, lengths, rule, **RULES[rule]).any()
    assert not select(logits, lengths, "symmetric", n=100).any()
    assert not select(logits, lengths, "random", ratio=100.0).any()
    assert not select(logits, lengths, "threshold", theta=0.1).any()
    assert torch.equal(select(logits, lengths, "threshold", theta=0), select(logits, lengths, "all"))


@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("all", "threshold")])
def test_one_utterance_without_nonblank_frame_beside_others(rule):
    logits, lengths = spikes("__a__b_", "____", "_a__")
    kept = select(logits, lengths, rule, **RULES[rule])
    assert kept.any(1).tolist() == [True, False, True]


# threshold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("big", [1e4, math.inf])
def test_threshold_with_certain_posteriors(dtype, big):
    """A p(blank) of exactly 1 is kept only by θ = 0; a p(blank) of exactly 0 is a non-blank frame."""
    logits = torch.full((1, 2, WIDTH), -big, dtype=dtype)
    logits[0, 0, 0] = logits[0, 1, 3] = min(big, 1e4) if math.isfinite(big) else 0
    for theta, expected in ((0.0, [True, True]), (1e-6, [False, True]), (1.0, [False, True])):
        assert select(logits, torch.tensor([2]), "threshold", theta=theta)[0].tolist() == expected


def test_threshold_is_computed_in_full_precision():
    """Each of 2048 equal tokens has 2e-4; their sum in half precision would give a wrong p(blank)."""
    logits = torch.zeros(1, 1, 2049)
    logits[..., 0] = 8.0  # exact in float16: p(blank) = e⁸ / (e⁸ + 2048) = 0.59274
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for theta, kept in ((0.4071, True), (0.4074, False)):
            got = select(logits.to(dtype), torch.tensor([1]), "threshold", theta=theta)
            assert got.item() is kept


# elimination with a prior


@each_dtype
@pytest.mark.parametrize("blank_id", [0, 2])
@pytest.mark.parametrize("scale", [None, 0.25, 1.0])
def test_prior(dtype, blank_id, scale):
    logits, lengths = batch(blank_id=blank_id, dtype=dtype)
    prior = torch.full((WIDTH,), 0.05, dtype=torch.float64)
    prior[blank_id] = 0.8
    options = {} if scale is None else {"prior_scale": scale}
    got = select(logits, lengths, "elimination", blank_id=blank_id, log_prior=prior.log(), **options)
    assert torch.equal(got, slow(logits, lengths, "elimination", blank_id, log_prior=prior.log(), **options))
    # Blank is the likeliest token a priori, so the prior makes more frames non-blank.
    plain = select(logits, lengths, "elimination", blank_id=blank_id)
    assert (got | ~plain).all() and got.sum() > plain.sum()


# random


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1, 1.3])
def test_random_counts_are_exact_per_utterance(ratio):
    logits, lengths = spikes(*("_" * 60 + "ab" * k for k in (0, 1, 2, 5, 17, 40)))
    nb = select(logits, lengths, "elimination")
    kept = select(logits, lengths, "random", ratio=ratio)
    assert (kept | ~nb).all()
    blanks = (kept & ~nb).sum(1).tolist()
    assert blanks == [min(60, round(ratio * 2 * k)) for k in (0, 1, 2, 5, 17, 40)]


def test_random_takes_no_more_than_there_are():
    logits, lengths = spikes("aaaa_a_", "aaaaaa")
    for ratio in (2, 1e9):
        assert torch.equal(select(logits, lengths, "random", ratio=ratio), select(logits, lengths, "all"))


def test_random_is_drawn_anew_and_seeded():
    logits, lengths = spikes("_" * 50 + "a" * 20, "_" * 70 + "a" * 20)

    def draws(seed, count=3):
        g = torch.Generator().manual_seed(seed)
        return [select(logits, lengths, "random", ratio=0.5, generator=g) for _ in range(count)]

    first, again, other = draws(1), draws(1), draws(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert not torch.equal(first[0], other[0])
    # Each utterance has a draw of its own, so equal utterances get different frames.
    twins = select(logits[:1].repeat(2, 1, 1), lengths[:1].repeat(2), "random", ratio=0.5)
    assert not torch.equal(twins[0], twins[1])
    # Without a generator, torch's global seed decides.
    torch.manual_seed(5)
    a, b = (select(logits, lengths, "random", ratio=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(select(logits, lengths, "random", ratio=0.5), a) and not torch.equal(a, b)


def test_every_blank_frame_is_drawn_as_often():
    logits, lengths = spikes("__aa____aa__", "_a_a_a_")
    g = torch.Generator().manual_seed(0)
    draws = 4000
    counts = sum(select(logits, lengths, "random", ratio=0.5, generator=g).double() for _ in range(draws)) / draws
    blank = fr.valid(lengths, logits.size(1)) & ~select(logits, lengths, "elimination")
    for row, share in ((0, 2 / 8), (1, 2 / 4)):  # round(0.5 · 3) is 2, so both rows draw 2 frames
        there = counts[row][blank[row]]
        assert there.sum().item() == pytest.approx(2)
        assert (there - share).abs().max() < 5 * math.sqrt(share * (1 - share) / draws)


# options


def test_selections_names_every_rule():
    assert list(fr.SELECTIONS) == list(RULES)
    for rule, options in RULES.items():
        check_rule(rule, options)
        assert set(options) <= set(fr.SELECTIONS[rule])


@pytest.mark.parametrize(
    "rule, options, parts",
    [
        ("symetric", {"n": 1}, ["unknown frame selection 'symetric'", "symmetric", "threshold"]),
        (["all"], {}, ["unknown frame selection ['all']"]),
        (None, {}, ["unknown frame selection None"]),
        ("all", {"n": 1}, ["all", "unknown option 'n'", "takes no options"]),
        ("symmetric", {"n": 1, "theta": 0.1}, ["symmetric", "unknown option 'theta'", "takes n"]),
        ("random", {"ratio": 1, "seed": 3}, ["random", "unknown option 'seed'", "ratio, generator"]),
        ("symmetric", {}, ["symmetric", "n must be given"]),
        ("threshold", {}, ["threshold", "theta must be given"]),
        ("random", {"generator": None}, ["random", "ratio must be given"]),
        *(
            ("symmetric", {"n": n}, ["symmetric", "n must be a whole number", repr(n)])
            for n in (-1, 1.5, "1", True, None)
        ),
        *(
            ("threshold", {"theta": theta}, ["threshold", "theta must be a number from 0 to 1", repr(theta)])
            for theta in (-0.1, 1.1, math.nan, "0.1", True, None)
        ),
        *(
            ("random", {"ratio": ratio}, ["random", "ratio must be a finite number", repr(ratio)])
            for ratio in (-0.5, math.inf, math.nan, "half", None)
        ),
        ("random", {"ratio": 1, "generator": 3}, ["random", "generator must be a torch.Generator"]),
        ("elimination", {"prior_scale": -1}, ["elimination", "prior_scale"]),
        ("elimination", {"log_prior": [0.1]}, ["elimination", "log_prior must be a tensor (V,)"]),
        ("elimination", {"log_prior": torch.zeros(1, WIDTH)}, ["elimination", "log_prior must be a tensor (V,)"]),
        ("elimination", {"log_prior": torch.zeros(WIDTH).log()}, ["elimination", "finite log-probabilities"]),
    ],
)
def test_mistakes_are_named(rule, options, parts):
    logits, lengths = batch()
    for call in (lambda: check_rule(rule, options), lambda: select(logits, lengths, rule, **options)):
        with pytest.raises(ValueError) as e:
            call()
        for part in parts:
            assert part in str(e.value)


def test_a_prior_of_another_width_is_named():
    logits, lengths = batch()
    with pytest.raises(ValueError, match=f"log_prior has 7 entries, the teacher {WIDTH} tokens"):
        select(logits, lengths, "elimination", log_prior=torch.zeros(7))


@each_rule
def test_a_teacher_with_gradients_leaves_no_graph(rule):
    """In self-distillation the teacher is part of the student, and its logits must not be held a second time."""

    def refuse(tensor):
        raise AssertionError("a tensor was saved for backward")

    logits, lengths = batch()
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda x: x):
        select(logits.requires_grad_(), lengths, rule, **RULES[rule], blank_id=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False")
@each_rule
@pytest.mark.parametrize("cached", [False, True])
def test_on_a_gpu_it_is_the_same_and_nothing_waits(rule, cached):
    logits, lengths = batch((40, 23, 7, 1, 0), padding=0.0)
    target = compress(logits, 3) if cached else logits
    expected = select(target, lengths, rule, **RULES[rule])
    there = target.map(lambda x: x.cuda()) if cached else target.cuda()
    lengths = lengths.cuda()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            got = select(there, lengths, rule, **RULES[rule])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if rule == "random":  # other frames, but as many
            assert torch.equal(got.cpu().sum(1), expected.sum(1))
        else:
            assert torch.equal(got.cpu(), expected)
