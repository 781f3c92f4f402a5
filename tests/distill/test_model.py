"""The KD model: without objectives its loss is ESPnet's, the teacher is not part of it, KD and CTC are on one scale."""

import copy

import pytest
import tiny_asr
import tiny_kd
import torch

from espnet_kd import losses
from espnet_kd.distill.model import ESPnetASRKDModel
from espnet_kd.distill.objectives import Batch, Objective, lay_on
from espnet_kd.distill.page import METHODS_DIR, load_page
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.schedule import Progress, Ramp
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.targets.online import OnlineTeacher

PLAIN = {"teacher": "none", "stages": [{"share": 1.0}]}


def one_stage(*objectives, **stage):
    return {"stages": [{"share": 1.0, "objectives": list(objectives), **stage}]}


def adopt(conf, page, stage=None, teacher=None, progress=None, seed=0, sharpen=1.0, nbest=None):
    """The plain student and a KD model of a copy. With ``stage``, the plan has only this KD stage."""
    plain = tiny_asr.build(conf, seed=seed, sharpen=sharpen)
    with torch.no_grad():
        plain.ctc.ctc_lo.bias[-1] = 0.0  # undo tiny_asr's low bias of <sos/eos>, which is for decoding
    page = page if hasattr(page, "stages") else load_page(str(page))
    progress = progress or Progress()
    plan = make_plan(page, progress.max_epoch, stage and [stage])
    return plain, ESPnetASRKDModel.adopt(copy.deepcopy(plain), plan, teacher, progress, 16000.0, nbest)


def in_stage(page, number, teacher, conf=None, **more):
    """A KD model in training mode, with its progress in the middle of a KD stage."""
    progress = Progress(steps_per_epoch=10_000)
    model = adopt(conf or tiny_kd.student_config(), page, teacher=teacher, progress=progress, **more)[1]
    phase = model.plan.phase(number)
    progress.step = round(10_000 * (phase.begin + phase.end) / 2)
    assert model.plan.at(progress).phase is phase
    return model.train()


HYBRID = dict(ctc_weight=0.3)
INTERCTC = dict(interctc_layer_idx=[1], interctc_use_conditioning=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "model_conf, encoder_conf, ctc_conf",
    [
        ({}, {}, {}),
        (HYBRID, {}, {}),
        (dict(interctc_weight=0.4), INTERCTC, {}),
        (dict(ctc_weight=0.5, interctc_weight=0.3), INTERCTC, {}),
        ({}, {}, {"dropout_rate": 0.2}),
    ],
    ids=["ctc", "hybrid", "interctc", "hybrid interctc", "ctc dropout"],
)
def test_without_objectives_it_is_espnets_model(write_page, training, model_conf, encoder_conf, ctc_conf):
    conf = tiny_kd.student_config(**model_conf)
    conf["encoder_conf"].update(encoder_conf)
    conf["ctc_conf"] = ctc_conf
    plain, model = adopt(conf, write_page(PLAIN))
    plain.train(training), model.train(training)
    grads = []
    for m in (plain, model):
        torch.manual_seed(3)
        loss, stats, weight = m(**copy.deepcopy(tiny_kd.batch()))
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
        assert weight == 3
        if m is plain:
            expected, expected_stats = loss, stats
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6 * max(1, expected.item()))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    for key, value in expected_stats.items():
        # ESPnet's character error rates count the padding (cer_ctc), or this model does not compute them (InterCTC).
        if value is not None and not key.startswith("cer_"):
            torch.testing.assert_close(stats[key], value, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert ("loss_att" in stats) == (model_conf.get("ctc_weight", 1.0) < 1)
    assert not {"loss_kd", "agreement"} & set(stats)


def test_names_of_parameters_are_the_plain_students(write_page, teacher):
    plain, model = adopt(tiny_kd.student_config(), write_page(one_stage({"objective": "kl"})), teacher=teacher)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not hasattr(model, "kd_heads")


def test_the_teacher_is_out_of_sight(fkl, teacher_dir):
    teacher = OnlineTeacher(teacher_dir)
    plain = tiny_asr.build(tiny_kd.student_config())
    model = in_stage(fkl, 2, teacher)
    before = {k: v.clone() for k, v in teacher._model.state_dict().items()}
    expected = set(plain.state_dict()) | {f"kd_heads.factorized_representation.0.{n}" for n in ("weight", "bias")}
    assert set(model.state_dict()) == expected
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in teacher._model.parameters()}
    assert len(own) == len(list(plain.parameters())) + 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, _, _ = model(**tiny_kd.batch())
    loss.backward()
    optimizer.step()
    assert not teacher._model.training and not any(m.training for m in teacher._model.modules())
    after = teacher._model.state_dict()
    assert any("running_mean" in k for k in after)
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert all(p.grad is None for p in teacher._model.parameters())


def test_the_optimiser_sees_the_heads(fkl, teacher):
    model = in_stage(fkl, 2, teacher)
    head = model.kd_heads["factorized_representation"][0]
    assert (head.in_features, head.out_features) == (16, teacher.hidden_size)
    assert any(p is head.weight for p in model.parameters())
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**tiny_kd.batch())[0].backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)
    # The objective uses the very parameter that the optimizer updates.
    (objective,) = {id(o): o for terms in model.terms for spec, o, _ in terms if spec.has_head}.values()
    assert objective.heads[0].weight is head.weight


def spied(teacher, monkeypatch):
    heard = []
    original = teacher.targets

    def targets(utt_ids, speech, speech_lengths, taps=(), *text):
        heard.append((list(utt_ids), speech.clone(), speech_lengths, list(taps)))
        heard.append(original(utt_ids, speech, speech_lengths, taps, *text))
        return heard[-1]

    monkeypatch.setattr(teacher, "targets", targets)
    return heard


def test_the_teacher_hears_unaugmented_audio(fkl, teacher_dir, monkeypatch):
    """SpecAugment changes the student's outputs from call to call, but never the teacher's."""
    teacher = OnlineTeacher(teacher_dir)
    alone = teacher.targets((), *(tiny_kd.batch()[k] for k in ("speech", "speech_lengths"))).logits
    model = in_stage(fkl, 3, teacher)
    heard = spied(teacher, monkeypatch)
    batch = tiny_kd.batch()
    student = []
    model.ctc.ctc_lo.register_forward_hook(lambda m, i, o: student.append(o.detach()))
    for _ in range(2):
        model(**copy.deepcopy(batch))
    assert heard[0][0] == batch["utt_id"]
    assert torch.equal(heard[0][1], batch["speech"]) and torch.equal(heard[2][1], batch["speech"])
    assert torch.equal(heard[1].logits, alone) and torch.equal(heard[3].logits, alone)
    assert not torch.allclose(student[0], student[1], atol=1e-3)


def test_the_teacher_moves_with_the_student(fkl, teacher_dir):
    teacher = OnlineTeacher(teacher_dir)
    _, model = adopt(tiny_kd.student_config(), fkl, teacher=teacher)
    moved = model.to(torch.float64)
    assert moved is model
    floats = [p for p in teacher._model.state_dict().values() if p.is_floating_point()]
    assert {p.dtype for p in floats} == {torch.float64}
    assert model.kd_heads["factorized_representation"][0].weight.dtype == torch.float64
    # A whole step works in float64, including every statistic.
    loss, stats, _ = model.eval()(**tiny_kd.batch(dtype=torch.float64))
    assert loss.dtype == torch.float64 and stats["loss_kd"].isfinite()
    loss.backward()


WEIGHTS = [
    {"blank_kl": 0.3},
    {"blank_kl": 0.3, "factorized_representation": 7.5},
    {"factorized_representation": 15.0, "factorized_kl": 0.3},
]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_statistics(fkl, teacher, stage):
    model = in_stage(fkl, stage, teacher)
    model.specaug = None
    batch = tiny_kd.batch()
    with torch.no_grad():
        loss, stats, _ = model(**copy.deepcopy(batch))
        out, lengths = model.encode(batch["speech"], batch["speech_lengths"])
        student = model.ctc.ctc_lo(out).argmax(-1)
        best = teacher.targets((), batch["speech"], batch["speech_lengths"]).logits.argmax(-1)
    frames = [(b, t) for b, n in enumerate(lengths.tolist()) for t in range(n)]
    nonblank = sum(best[f].item() != 0 for f in frames) / len(frames)
    assert 0.1 < nonblank < 0.9
    assert stats["nonblank_share"].item() == pytest.approx(nonblank)
    assert stats["agreement"].item() == pytest.approx(sum((best[f] == student[f]).item() for f in frames) / len(frames))
    named = WEIGHTS[stage - 1]
    assert {k for k in stats if k.startswith("loss")} == {f"loss_{n}" for n in named} | {"loss", "loss_ctc", "loss_kd"}
    expected = sum(w * stats[f"loss_{n}"].item() for n, w in named.items())
    assert stats["loss_kd"].item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == stats["loss"].item() == pytest.approx(expected + stats["loss_ctc"].item(), rel=1e-5)


def test_an_objective_is_its_loss_on_the_scale_of_per(write_page, teacher):
    batch = tiny_kd.batch()
    for per in ("frame", "utterance"):
        entry = {"objective": "factorized_kl", "temperature": 2.0, "tau_squared": True, "per": per, "weight": 0.5}
        _, model = adopt(tiny_kd.student_config(), write_page(one_stage(entry, ctc={"weight": 0})), teacher=teacher)
        with torch.no_grad():
            loss = model(**copy.deepcopy(batch))[0]
            out, lengths = model.encode(batch["speech"], batch["speech_lengths"])
            target = teacher.targets((), batch["speech"], batch["speech_lengths"])
            expected = losses.factorized_kl(model.ctc.ctc_lo(out), target.logits, lengths, temperature=2.0) * 4 * 0.5
        if per == "utterance":
            expected = expected * lengths.sum() / 3
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def keep_gradient(outputs):
    def hook(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    return hook


def with_ctc():
    pages = [load_page(str(p)) for p in sorted(METHODS_DIR.glob("*.yaml"))]
    losses_of = [(p, s) for p in pages for s in p.stages if s.ctc_weight and s.objectives]
    # layer_pruning has no loss, and for consistency two views of an untrained student hardly differ.
    return [(p, s) for p, s in losses_of if s.objectives[0].name not in ("layer_pruning", "consistency")]


@pytest.mark.parametrize("page, stage", with_ctc(), ids=lambda x: getattr(x, "method", getattr(x, "name", "")))
def test_kd_and_ctc_are_on_one_scale(page, stage, teacher):
    """At initialisation the gradients of KD and CTC on the logits are within a factor of 10, for every page."""
    seconds = (5.0, 3.0, 4.0)  # as long as real utterances: a KD loss per frame would be far too weak
    batch = tiny_kd.batch(tuple(int(s * 16000) for s in seconds))
    nbest = {u: [(-1.0, [3, 4, 5, 6]), (-2.0, [3, 4, 5])] for u in batch["utt_id"]}
    # In the middle of the KD stage, because there ramps are above their start and kept objectives count.
    model = in_stage(page, stage.number, teacher, nbest=nbest)
    phase = model.plan.phase(stage.number)
    heads = [m for m in (model.ctc, *getattr(model, "kd_heads", {}).values()) for m in m.modules()]
    heads = [m for m in heads if isinstance(m, torch.nn.Linear) and m.out_features == len(tiny_kd.TOKENS)]
    norms = {}
    for which in ("ctc", "kd"):
        logits = []
        handles = [head.register_forward_hook(keep_gradient(logits)) for head in heads]
        torch.manual_seed(0)
        terms, own = model.terms, model._ctc
        phase.stage = copy.copy(stage)
        if which == "kd":
            phase.stage.ctc_weight = 0.0
            if stage.objectives[0].name in ("inter_kd", "self_kd"):  # these include the CTC of other heads
                model._ctc = lambda now, log_probs, *_: log_probs[..., :0].sum()
        else:
            model.terms = [[] for _ in terms]
        model(**copy.deepcopy(batch))[0].backward()
        norms[which] = torch.stack([x.grad.norm() for x in logits if x.grad is not None]).norm().item()
        model.terms, model._ctc = terms, own
        for handle in handles:
            handle.remove()
    assert 0.1 < norms["kd"] / norms["ctc"] < 10, norms


@pytest.mark.parametrize("model_conf", [{}, HYBRID, dict(interctc_weight=0.4)])
def test_ctc_weight_0_learns_nothing_from_labels(write_page, teacher, model_conf):
    conf = tiny_kd.student_config(**model_conf)
    if "interctc_weight" in model_conf:
        conf["encoder_conf"].update(INTERCTC)
    _, model = adopt(conf, write_page(one_stage({"objective": "kl"}, ctc={"weight": 0.0})), teacher=teacher)
    model.train()
    grads = []
    for text in ("as it is", "other", "none"):
        batch = tiny_kd.batch()
        if text == "other":
            batch["text"] = batch["text"].clamp(max=2) + 1
        if text == "none":
            del batch["text"], batch["text_lengths"]
        model.zero_grad()
        torch.manual_seed(0)
        loss, stats, _ = model(**batch)
        loss.backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        assert ("loss_ctc" in stats) == (text != "none")
        assert not (text != "none" and stats["loss_ctc"].requires_grad)
        assert stats["loss"] == stats["loss_kd"] * model.ctc_weight
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        assert all(torch.equal(g, grads[0][k]) for k, g in other.items())
    assert not any("decoder" in k for k in grads[0])


def test_ctc_per_label(write_page):
    batch = tiny_kd.batch((16000,) * 3)
    each = []
    for per in ("label", "utterance"):
        page = write_page({"teacher": "none", "stages": [{"share": 1.0, "ctc": {"weight": 2.0, "per": per}}]})
        _, model = adopt(tiny_kd.student_config(), page)
        with torch.no_grad():
            loss, stats, _ = model(**copy.deepcopy(batch))
            singles = [model(**{k: v[i : i + 1] for k, v in batch.items()})[1]["loss_ctc"].item() for i in range(3)]
        assert loss.item() == pytest.approx(2 * stats["loss_ctc"].item(), rel=1e-6)
        assert stats["loss_ctc"].item() == pytest.approx(sum(singles) / 3, rel=1e-5)
        each.append(singles)
    lengths = batch["text_lengths"].tolist()
    assert each[0] == pytest.approx([x / n for x, n in zip(each[1], lengths)], rel=1e-5)


def test_character_errors_do_not_count_the_padding(write_page):
    """ESPnet's own cer_ctc would count padded frames."""
    _, model = adopt(tiny_kd.student_config(), write_page(PLAIN), sharpen=30.0)
    batch = tiny_kd.batch((16000, 6000))
    with torch.no_grad():
        lengths = model.encode(batch["speech"], batch["speech_lengths"])[1].tolist()

    def babble(module, inputs, output):
        output = output.clone()
        for t in range(lengths[1], lengths[0]):
            output[1, t, 3 + t % 2] += 1e4
        return output

    stats = model(**copy.deepcopy(batch))[1]
    model.ctc.ctc_lo.register_forward_hook(babble)
    assert model(**copy.deepcopy(batch))[1]["cer_ctc"] == stats["cer_ctc"] is not None
    with torch.no_grad():
        best = model.ctc.ctc_lo(model.encode(batch["speech"], batch["speech_lengths"])[0]).argmax(-1)
    reading_it = model.error_calculator(best, batch["text"], is_ctc=True)
    assert stats["cer_ctc"].item() < reading_it - 1


def test_labels_that_do_not_fit_harm_nothing_with_ctc_weight_0(write_page, teacher):
    """With more labels than frames CTC is infinite, and a weight of 0 must not give 0 · ∞, which is NaN."""
    conf = tiny_kd.student_config()
    conf["ctc_conf"] = {"zero_infinity": False}
    _, model = adopt(conf, write_page(one_stage({"objective": "kl"}, ctc={"weight": 0.0})), teacher=teacher)
    batch = tiny_kd.batch()
    batch["text"], batch["text_lengths"] = torch.full((3, 60), 5), torch.tensor([60, 60, 60])
    loss, stats, _ = model(**batch)
    loss.backward()
    assert stats["loss_ctc"].isinf() and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_ramped_weights_follow_progress(write_page, teacher):
    entry = {"objective": "blank_kl", "weight": {"start": 0.0, "end": 4.0}}
    progress = Progress(max_epoch=4)
    page = write_page(one_stage(entry, ctc={"weight": 0.0}))
    _, model = adopt(tiny_kd.student_config(), page, teacher=teacher, progress=progress)
    assert isinstance(model.terms[0][0][2], Ramp)
    ratios = []
    for progress.epoch in (2, 4, 5):
        stats = model.train()(**tiny_kd.batch())[1]
        ratios.append((stats["loss_kd"] / stats["loss_blank_kl"]).item())
        stats = model.eval()(**tiny_kd.batch())[1]  # validation uses the final weights
        assert stats["loss_kd"].item() == pytest.approx(4 * stats["loss_blank_kl"].item())
    assert ratios == pytest.approx([1, 3, 4])
    progress.epoch = 1  # the weight is 0 at first, and the loss is not computed
    loss, stats, _ = model.train()(**tiny_kd.batch())
    assert "loss_blank_kl" not in stats
    loss.backward()  # the trainer does so at every step
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_slower_student(write_page, teacher):
    """Frames of 60 ms are aligned with the teacher's of 40 ms, and objectives of logits and hidden states work."""
    conf = tiny_kd.student_config()
    conf["encoder_conf"]["input_layer"] = "conv2d6"
    entry = [{"objective": "factorized_kl"}, {"objective": "factorized_representation"}]
    _, model = adopt(conf, write_page(one_stage(*entry)), teacher=teacher)
    assert model.frame_shift == pytest.approx(0.06)
    loss, stats, _ = model(**tiny_kd.batch())
    loss.backward()
    assert loss.isfinite() and 0 < stats["nonblank_share"] < 1


def outputs(lengths, num, shift=0.04, width=5, hidden=()):
    g = torch.Generator().manual_seed(len(lengths) + num)
    logits = torch.randn(len(lengths), num, width, generator=g)
    return EncoderOutputs(logits, torch.tensor(lengths), shift, {h: torch.randn(len(lengths), num, 3) for h in hidden})


def test_lay_on():
    student, target = outputs([5, 4], 5, 0.08), outputs([10, 7], 10, 0.04, hidden=["encoder"])
    got = lay_on(student, target, "least_blank")
    assert got.logits.shape == student.logits.shape and got.lengths.tolist() == [5, 4]
    assert got.frame_shift == 0.08 and got.hidden["encoder"].shape == (2, 5, 3)
    assert target.logits.shape == (2, 10, 5)


def test_the_protocols_base_class():
    with pytest.raises(NotImplementedError, match="Objective needs a compute method"):
        Objective()(outputs([2], 2), None, Batch(()), Progress())

    class Constant(Objective):
        def compute(self, student, target, batch, progress):
            return torch.tensor(3.0), torch.tensor(8)

    assert Constant("frame")(outputs([4, 4], 4), None, Batch(()), Progress()) == (3.0, {})
    assert Constant("utterance")(outputs([4, 4], 4), None, Batch(()), Progress())[0] == 12.0
