"""The value of each objective, compared with its parts that are tested elsewhere: losses, taps, ESPnet's CTC."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_asr
import tiny_kd
import torch
from test_model import in_stage
from tiny_student import HYBRID, adopt, deeper, page_of, run

from espnet_kd import frames as fr
from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives import OBJECTIVES, PosteriorObjective
from espnet_kd.distill.objectives.base import taps_at
from espnet_kd.distill.page import list_pages, load_page
from espnet_kd.inference.encode import encode
from espnet_kd.targets.nbest import weights
from espnet_kd.targets.online import OnlineTeacher
from espnet_kd.topk import NotKept, compress


def ctc(plain, log_probs, lengths, batch):
    """ESPnet's own CTC loss of the given log-probabilities."""
    labels = torch.cat([t[:n] for t, n in zip(batch["text"], batch["text_lengths"])])
    return plain.ctc.ctc_loss(log_probs.transpose(0, 1), labels, lengths, batch["text_lengths"]).mean()


def speech_of(batch):
    return batch["speech"], batch["speech_lengths"]


def test_every_objective_is_on_a_page_or_says_why():
    used = {o.name for p in list_pages() for s in load_page(p).stages for o in s.objectives}
    assert set(OBJECTIVES.classes) - used == {"attention_kl"}  # may be added to any page for hybrid students


@pytest.mark.parametrize(
    "stage", [s for p in list_pages() for s in load_page(p).stages[-1:] if s.ctc_weight == 0], ids=lambda s: s.name
)
def test_without_ctc_every_frame_has_a_target(stage):
    target = torch.zeros(1, 40, 5)
    target[:, :, 0], target[:, 3, 2] = 6.0, 9.0  # a single token, then a long pause
    logits, lengths = torch.zeros(1, 40, 5, requires_grad=True), torch.tensor([40])
    for objective in stage.objectives:
        made = objective.make()
        student = SimpleNamespace(logits=logits, lengths=lengths)
        made.compute(student, SimpleNamespace(logits=target, lengths=lengths), None, None)[0].backward()
    assert (logits.grad[0].abs().amax(-1) > 0).all()


def test_a_loss_that_takes_tensors_alone_refuses_a_cache():
    class Own(PosteriorObjective):
        loss = staticmethod(lambda student, teacher, lengths, frames, temperature: (teacher / temperature).sum())

    logits, lengths = torch.randn(1, 3, 5), torch.tensor([3])
    student = SimpleNamespace(logits=logits, lengths=lengths)
    with pytest.raises(NotKept, match="/.*give --teacher without --target_cache"):
        Own().compute(student, SimpleNamespace(logits=compress(logits, 2), lengths=lengths), None, None)


@pytest.mark.parametrize(
    "layers, depth, expected",
    [((0.55, 0.73, 0.91), 33, [18, 24, 30]), ((0.55, 0.73, 0.91), 3, [2]), ((0.5,), 12, [6]), ((1, 3), 4, [1, 3])],
)
def test_layers_by_share_of_the_depth(layers, depth, expected):
    assert taps_at(layers, of_depth(depth)) == tuple(f"encoder.{n}" for n in expected)


@pytest.mark.parametrize("layers, depth", [((4,), 4), ((1.5,), 4), ((0.5,), 1), ((0.5,), 0)])
def test_layers_that_are_not_there(layers, depth):
    with pytest.raises(UserError, match="no layers to tap|has layers 1 to"):
        taps_at(layers, of_depth(depth))


@pytest.mark.parametrize("value", [[], ["a"], [float("nan")], [0], [-1], [True]])
@pytest.mark.parametrize("name", ["inter_ctc", "inter_kd"])
def test_layers_that_are_no_layers(write_page, name, value):
    with pytest.raises(UserError, match="layers: (must be a list of layer numbers|expected a list, each a number)"):
        page_of(write_page, {"objective": name, "layers": value})


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"objective": "kl", "temperature": float("nan")}, "temperature: must be a number above 0"),
        ({"objective": "kl", "weight": -1.0}, "weight must be 0 or more"),
        ({"objective": "kl", "weight": float("inf")}, "weight must be 0 or more"),
        ({"objective": "kl", "weight": None}, "weight: expected a number, or a ramp .*, found None"),
        ({"objective": "kl", "weight": {"start": 0, "end": -1}}, "weight.end must be 0 or more"),
        ({"objective": "kl", "weight": {"start": 0, "end": 1, "by": "hour"}}, "by: .*'hour' .known: step, epoch"),
        ({"objective": "kl", "frames": {"rule": "symetric"}}, "frames: unknown frame selection 'symetric'"),
        ({"objective": "kl", "frames": {"n": 2}}, "frames: unknown frame selection None"),
        ({"objective": "kl", "frames": {"rule": "symmetric", "n": -1}}, "frames: .*n must be a whole number"),
        ({"objective": "kl", "frames": "symmetric"}, "frames: expected a mapping, found 'symmetric'"),
        ({"objective": "kl", "frames": {"rule": "elimination", "prior_scale": 0.5}}, "log_prior, which is not given"),
        ({"objective": "kl", "frames": {"rule": "elimination", "log_prior": "nowhere.npy"}}, "log_prior nowhere.npy"),
        ({"objective": "delayed_kl", "max_delay": -1}, "max_delay: must be 0 or more"),
        ({"objective": "factorized_kl", "nonblank_weight": -1}, "nonblank_weight: must be a number, 0 or more, not -1"),
        ({"objective": "factorized_kl", "blank_weight": float("nan")}, "blank_weight: must be a number, 0 or more"),
        ({"objective": "inter_kd", "l2_weight": -0.25}, "l2_weight: must be a number, 0 or more, not -0.25"),
        ({"objective": "sequence_kd", "nbest": 0}, "nbest: must be 1 or more"),
        ({"objective": "weighted_representation", "weights": "mass"}, "weights: .*'mass' .known: nonblank, "),
        ({"objective": "weighted_representation", "taps": [1, 2]}, "taps: expected a list, each a list"),
        ({"objective": "weighted_representation", "taps": [["encoder"]]}, "taps: must be pairs"),
        ({"objective": "weighted_representation", "taps": [["decoder", "decoder"]]}, "decoder has no frames"),
    ],
)
def test_options_refused_with_the_page(write_page, entry, message):
    with pytest.raises(UserError, match=message):
        page_of(write_page, entry)


def test_a_prior_is_of_the_students_vocabulary(write_page, teacher, tmp_path):
    for size in (14, 9):
        np.save(tmp_path / f"{size}.npy", np.log(np.full(size, 1 / size)))
    good, bad = (
        page_of(write_page, {"objective": "kl", "frames": {"rule": "elimination", "log_prior": str(tmp_path / f)}})
        for f in ("14.npy", "9.npy")
    )
    _, model = adopt(good, teacher)
    assert torch.isfinite(run(model, tiny_kd.batch())[0])
    with pytest.raises(UserError, match="log_prior has 9 numbers, the student 14 tokens"):
        adopt(bad, teacher)


@pytest.mark.parametrize("option, value", [("layer_drop_rate", 0.3), ("gradient_checkpoint_layers", [1])])
def test_layers_that_may_be_skipped_cannot_be_tapped(write_page, option, value):
    conf = tiny_asr.config("e_branchformer", num_blocks=4, **{option: value})
    with pytest.raises(UserError, match=f"inter_ctc: the student's encoder has {option}"):
        adopt(page_of(write_page, {"objective": "inter_ctc"}, teacher="none"), conf=conf)


def of_depth(depth):
    encoder = type("ConformerEncoder" if depth else "RNNEncoder", (), {"encoders": [None] * depth})()
    return SimpleNamespace(encoder=encoder)


@pytest.mark.parametrize("hybrid", [{}, HYBRID])
def test_inter_ctc_is_espnets(write_page, hybrid):
    conf = deeper(interctc_weight=0.3, **hybrid)
    conf["encoder_conf"]["interctc_layer_idx"] = [1, 3]
    theirs = tiny_asr.build(conf, sharpen=1.0)
    page = page_of(
        write_page, {"objective": "inter_ctc", "weight": 0.3, "layers": [1, 3]}, teacher="none", ctc={"weight": 0.7}
    )
    _, ours = adopt(page, conf=deeper(**hybrid))
    ours.load_state_dict(theirs.state_dict())
    batch = tiny_kd.batch()
    expected = theirs(**copy.deepcopy(batch))[0]
    torch.testing.assert_close(run(ours, batch)[0], expected.squeeze(), rtol=1e-6, atol=1e-5)


def test_inter_kd(write_page, teacher):
    page = page_of(write_page, {"objective": "inter_kd", "layers": [1, 2], "l2_weight": 0.25}, ctc={"weight": 1.0})
    plain, model = adopt(page, teacher, deeper())
    assert len(model.kd_heads["inter_kd"]) == 2
    batch = tiny_kd.batch()
    out, lengths, _, hidden = encode(plain, *speech_of(batch), ["encoder.1", "encoder.2"])
    target = teacher.targets((), *speech_of(batch))
    valid = torch.minimum(lengths, target.lengths)

    def l2(q):
        return losses.softmax_l2(q, target.logits[:, : q.size(1)], valid) * valid.sum() / 3

    final = plain.ctc.ctc_lo(out).log_softmax(-1)
    inner = [h(hidden[f"encoder.{n}"]).log_softmax(-1) for n, h in enumerate(model.kd_heads["inter_kd"], 1)]
    expected = ctc(plain, final, lengths, batch) + 0.25 * l2(final)
    expected = expected + sum(ctc(plain, q, lengths, batch) + 0.25 * l2(q) for q in inner) / 2
    torch.testing.assert_close(run(model, batch)[0], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frames", [{"rule": "all"}, {"rule": "elimination"}])
def test_self_kd(write_page, frames):
    objective = {"objective": "self_kd", "weight": 0.4, "layer": 2, "temperature": 2.0, "frames": frames}
    plain, model = adopt(page_of(write_page, objective, teacher="none", ctc={"weight": 0.6}), conf=deeper())
    added = [p for k, p in model.named_parameters() if k.startswith("kd_heads")]
    assert sum(p.numel() for p in added) == plain.ctc.ctc_lo.weight.numel() + plain.ctc.ctc_lo.bias.numel()
    batch = tiny_kd.batch()
    out, lengths, _, hidden = encode(plain, *speech_of(batch), ["encoder.2"])
    p = plain.ctc.ctc_lo(out).log_softmax(-1)
    q = model.kd_heads["self_kd"](hidden["encoder.2"]).log_softmax(-1)
    chosen = fr.select(p, lengths, **frames)
    kl = losses.kl(q, p, lengths, temperature=2.0, frames=chosen) * chosen.sum() / 3
    expected = 0.6 * ctc(plain, p, lengths, batch) + 0.4 * (ctc(plain, q, lengths, batch) + kl)
    loss, stats = run(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert stats["loss_ctc_student"].item() == pytest.approx(ctc(plain, q, lengths, batch).item(), rel=1e-5)
    # KD must not change the self-teacher: its head learns only from its own CTC, whose weight is 0 here.
    model.zero_grad()
    model.plan.phases[0].stage.ctc_weight = 0.0
    run(model, batch)[0].backward()
    assert model.ctc.ctc_lo.weight.grad is None or not model.ctc.ctc_lo.weight.grad.any()


@pytest.mark.parametrize("name", ["transformer", "conformer", "branchformer", "e_branchformer"])
@pytest.mark.parametrize("ctc_weight", [1.0, 0.3])
def test_the_export_of_self_kd_computes_what_its_head_computed(write_page, name, ctc_weight):
    conf = {**tiny_asr.config(name, num_blocks=4), "model_conf": {"ctc_weight": ctc_weight}}
    if name == "branchformer":
        conf["encoder_conf"].update(cgmlp_linear_units=32, cgmlp_conv_kernel=7)
        conf["encoder_conf"]["cgmlp_weight"] = [0.5, 0.4, 0.3, 0.2]  # one value per layer
    page = page_of(write_page, {"objective": "self_kd", "layer": 0.5}, teacher="none", ctc={"weight": 0.5})
    _, model = adopt(page, conf=conf)
    with torch.no_grad():
        for p in model.encoder.parameters():  # so that after_norm is no longer the identity
            p.add_(0.1 * torch.randn_like(p))
    batch = tiny_kd.batch()
    _, lengths, _, hidden = encode(model, *speech_of(batch), ["encoder.2"])
    expected = model.kd_heads["self_kd"](hidden["encoder.2"])
    cls = OBJECTIVES.get_class("self_kd")
    exported, state = cls.export("self_kd", {"layer": 0.5}, conf, model.state_dict())
    plain = tiny_asr.build(exported, seed=5)
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("kd_heads")})  # fails if keys differ
    assert len(plain.encoder.encoders) == 2 and plain.decoder is None
    encoded, encoded_lengths = plain.encode(*speech_of(batch))
    assert torch.equal(lengths, encoded_lengths)
    torch.testing.assert_close(plain.ctc.ctc_lo(encoded), expected, rtol=0, atol=1e-6)


def test_self_kd_under_conditioning_is_refused(write_page):
    conf = deeper()
    conf["encoder_conf"].update(interctc_layer_idx=[1], interctc_use_conditioning=True)
    conf["model_conf"]["interctc_weight"] = 0.3
    with pytest.raises(UserError, match="self_kd: self-KD cannot export .*interctc_use_conditioning"):
        adopt(page_of(write_page, {"objective": "self_kd"}, teacher="none"), conf=conf)


def test_self_kd_with_a_postencoder_is_refused(write_page):
    """The exported model would run it between the self-student's last layer and its head."""
    conf = {**deeper(), "postencoder": "length_adaptor", "postencoder_conf": {"length_adaptor_n_layers": 1}}
    with pytest.raises(UserError, match="self_kd: .* postencoder"):
        adopt(page_of(write_page, {"objective": "self_kd"}, teacher="none", ctc={"weight": 0.5}), conf=conf)


def test_sequence_kd(write_page):
    page = page_of(
        write_page, {"objective": "sequence_kd", "weight": 0.5, "nbest": 2}, teacher="none", ctc={"weight": 0.5}
    )
    batch = tiny_kd.batch()
    # Utterances with three hypotheses (of which the third is not used), with an empty one, and with a single one.
    nbest = {
        "utt0": [(-1.0, [3, 4]), (-2.0, [3]), (-2.5, [9])],
        "utt1": [(-0.5, [5, 6, 7]), (-3.0, [])],
        "utt2": [(-4.0, [8])],
    }
    plain, model = adopt(page, nbest=nbest)
    out, lengths = plain.encode(*speech_of(batch))
    log_probs = plain.ctc.ctc_lo(out).log_softmax(-1)
    total = 0.0
    for b, hypotheses in enumerate(nbest.values()):
        shares = weights([s for s, _ in hypotheses[:2]])
        assert sum(shares) == pytest.approx(1.0)
        for share, (_, labels) in zip(shares, hypotheses):
            each = plain.ctc.ctc_loss(
                log_probs[b : b + 1].transpose(0, 1), torch.tensor(labels, dtype=torch.long), lengths[b : b + 1],
                torch.tensor([len(labels)]),
            )  # fmt: skip
            total = total + share * each.sum()
    expected = 0.5 * ctc(plain, log_probs, lengths, batch) + 0.5 * total / 3
    torch.testing.assert_close(run(model, batch)[0], expected, rtol=1e-5, atol=1e-4)
    del nbest["utt1"]
    with pytest.raises(UserError, match="utterance 'utt1' is not in the N-best file"):
        run(model, batch)
    with pytest.raises(UserError, match="sequence_kd: needs the teacher's N-best: give --nbest"):
        adopt(page)


def test_consistency_is_two_views_of_each_utterance(write_page, monkeypatch):
    page = page_of(write_page, {"objective": "consistency", "weight": 0.2}, teacher="none", ctc={"weight": 1.0})
    plain, model = adopt(page)
    batch = tiny_kd.batch()
    assert run(model, batch)[1]["loss_consistency"] == 0  # validation has only one view
    encoded = []
    original = model.encode

    def encode_and_keep(speech, lengths):
        encoded.append((speech, original(speech, lengths)))
        return encoded[-1][1]

    monkeypatch.setattr(model, "encode", encode_and_keep)
    model.train()
    torch.manual_seed(0)
    loss, stats, weight = model(**copy.deepcopy(batch))
    assert weight == 3  # counts utterances, not views
    speech, (out, lengths) = encoded[0]
    assert torch.equal(speech[:3], speech[3:]) and torch.equal(lengths[:3], lengths[3:])
    assert not torch.allclose(out[:3], out[3:], atol=1e-3)  # SpecAugment masks the two views differently
    log_probs = model.ctc.ctc_lo(out).log_softmax(-1)
    twice = {k: torch.cat([batch[k], batch[k]]) for k in ("text", "text_lengths")}
    value = losses.consistency(log_probs[:3], log_probs[3:], lengths[:3]) * lengths[:3].sum() / 3
    expected = ctc(plain, log_probs, lengths, twice) + 0.2 * value
    torch.testing.assert_close(loss.squeeze(), expected, rtol=1e-5, atol=1e-4)
    assert value > 0


def test_layer_pruning_begins_with_the_teachers_layers(write_page, teacher, monkeypatch):
    page = page_of(write_page, {"objective": "layer_pruning"})
    conf = tiny_kd.student_config()
    conf["encoder_conf"].update(output_size=24, num_blocks=2)
    plain, model = adopt(page, teacher, conf)
    theirs = teacher.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith(("encoder.", "ctc.")):
            assert torch.equal(value, theirs[name]), name
    with monkeypatch.context() as m:
        m.setattr(teacher, "targets", None)  # must not be called in training
        run(model, tiny_kd.batch())
    assert not torch.equal(plain.ctc.ctc_lo.weight, model.ctc.ctc_lo.weight)
    with pytest.raises(UserError, match=r"layer pruning .* encoder\.\S+ is \(\d.*in the teacher"):
        adopt(page, teacher)
    conf["encoder_conf"]["num_blocks"] = 4
    with pytest.raises(UserError, match="absent in the teacher"):
        adopt(page, teacher, conf)


def test_layer_pruning_copies_what_is_around_the_encoder(write_page, tmp_path):
    """A trained encoder after a new pre-encoder would recognise nothing."""
    around = {"preencoder": "linear", "preencoder_conf": {"input_size": 40, "output_size": 20}}
    around |= {"postencoder": "length_adaptor", "postencoder_conf": {"length_adaptor_n_layers": 1}}
    conf = {**tiny_kd.student_config(), **around}
    theirs = OnlineTeacher(tiny_asr.save(tiny_asr.build(conf, seed=7), conf, tmp_path / "teacher"))
    _, model = adopt(page_of(write_page, {"objective": "layer_pruning"}), theirs, conf)
    expected = theirs.state_dict()
    copied = {name.split(".")[0] for name in expected if torch.equal(model.state_dict()[name], expected[name])}
    assert copied >= {"preencoder", "encoder", "postencoder", "ctc"}
    for name, value in model.state_dict().items():
        assert name.startswith("decoder.") or torch.equal(value, expected[name]), name


@pytest.mark.parametrize("order", [("layer_pruning", "self_kd"), ("self_kd", "layer_pruning")])
def test_the_self_students_head_begins_as_the_teachers(write_page, teacher, order):
    """The order of the objectives on a page has no meaning."""
    conf = tiny_kd.student_config()
    conf["encoder_conf"].update(output_size=24, num_blocks=3)
    _, model = adopt(page_of(write_page, *({"objective": name} for name in order)), teacher, conf)
    for name, value in model.kd_heads["self_kd"].state_dict().items():
        assert torch.equal(value, teacher.state_dict()[f"ctc.ctc_lo.{name}"])


def test_a_teacher_whose_outputs_no_objective_uses_does_not_run(write_page, teacher, monkeypatch):
    conf = tiny_kd.student_config()
    conf["encoder_conf"].update(output_size=24, num_blocks=2)
    _, model = adopt(page_of(write_page, {"objective": "layer_pruning"}, {"objective": "inter_ctc"}), teacher, conf)
    monkeypatch.setattr(teacher, "targets", None)
    assert run(model, tiny_kd.batch())[1]["loss_inter_ctc"] > 0


def test_untranscribed_utterances_are_left_out_of_ctc(write_page, teacher):
    page = page_of(write_page, {"objective": "kl", "weight": 0.0}, ctc={"weight": 1.0})
    plain, model = adopt(page, teacher)
    batch = tiny_kd.batch((16000,) * 3)
    each = []
    for row in range(3):
        single = {k: v[row : row + 1] for k, v in batch.items()}
        each.append(run(plain, single)[0].item())
    batch["text_lengths"][1] = 0
    batch["text"][1] = 7  # with length 0 these labels must not count
    loss, _ = run(model, batch)
    assert loss.item() == pytest.approx((each[0] + each[2]) / 3, rel=1e-4)
    batch["text_lengths"][:] = 0
    batch["text"] = batch["text"][:, :0]
    loss, _ = run(model.train(), batch)
    loss.backward()
    assert loss.item() == 0.0


RNN = dict(num_layers=1, hidden_size=8, output_size=12)


@pytest.mark.parametrize(
    "encoder, conf, ratio",
    [
        ("vgg_rnn", RNN, 1),
        ("rnn", {**RNN, "subsample": [1]}, 0.25),
        ("conformer", dict(input_layer="conv2d6", output_size=20), 1.5),
        ("conformer", dict(input_layer="conv2d8", output_size=20), 2),
    ],
)
def test_tutornet_across_topologies_widths_and_frame_rates(teacher, encoder, conf, ratio):
    page = load_page("tutornet")
    student = tiny_kd.student_config(encoder)
    student["encoder_conf"] = conf if "rnn" in encoder else {**student["encoder_conf"], **conf}
    for stage in page.stages:
        model = in_stage(page, stage.number, teacher, student)
        assert model.frame_shift / teacher.frame_shift == pytest.approx(ratio)
        loss = run(model, tiny_kd.batch((32000, 24000, 16000)))[0]
        loss.backward()
        assert torch.isfinite(loss)
        assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
