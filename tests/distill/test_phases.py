"""KD stages in one run or one after the other give the same student, with every kind of target and student."""

import json
import shutil

import pytest
import tiny_asr
import tiny_kd
import torch
from test_model import adopt, in_stage
from tiny_phases import EPOCHS, MID, MID_RESTART, RESTART, Killed, assert_same, train, write_page

from espnet_kd.bin import asr_kd_cache
from espnet_kd.cli import UserError
from espnet_kd.distill.page import load_page
from espnet_kd.distill.schedule import Progress
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.experiments.models import load_state

pytestmark = pytest.mark.trains

PAGES = {"mid": MID, "restart": RESTART, "mid_restart": MID_RESTART, "whole epochs": dict(shares=(0.25, 0.25, 0.5))}


@pytest.mark.parametrize("name", PAGES)
def test_one_after_the_other_as_in_one_run(corpus, teacher_dir, tmp_path, name):
    """The results agree bit for bit. If a KD stage ends within an epoch, ``--kd_stage`` trains that whole epoch."""
    page, one, other = write_page(tmp_path, **PAGES[name]), tmp_path / "one", tmp_path / "other"
    train(corpus, one, page, "--teacher", teacher_dir)
    ends = [stage["epochs"][1] for stage in json.loads((one / "kd_stage.json").read_text())["stages"]]
    for number, end in enumerate(ends, 1):
        train(corpus, other, page, "--teacher", teacher_dir, "--kd_stage", number)
        record = json.loads((other / "kd_stage.json").read_text())
        assert (record["finished_kd_stage"], record["finished"]) == (number, number == 3)
        assert read_checkpoint(other / "checkpoint.pth")["reporter"]["epoch"] == end
        assert (other / "student.pth").exists() == (other / "experiment.json").exists() == (number == 3)
        assert (other / f"kd_stage{number}/student.pth").exists() == (number < 3)
    assert ends[2] == EPOCHS
    assert_same(one, other)


def test_each_kd_stage_trains_with_its_own(corpus, teacher_dir, tmp_path):
    """Each KD stage has its own losses. The learning rate goes on across stages and restarts only with ``restart``."""
    rates = {}
    for name in ("mid", "restart"):
        out = tmp_path / name
        train(corpus, out, write_page(tmp_path, **PAGES[name]), "--teacher", teacher_dir)
        stats = read_checkpoint(out / "checkpoint.pth")["reporter"]["stats"]
        rates[name] = [stats[e]["train"]["optim0_lr0"].value if hasattr(stats[e]["train"]["optim0_lr0"], "value")
                       else float(stats[e]["train"]["optim0_lr0"]) for e in range(1, 5)]  # fmt: skip
        named = [{k for k in stats[e]["train"] if k.startswith("loss_f")} for e in range(1, 5)]
        representation, fkl = "loss_factorized_representation", "loss_factorized_kl"
        assert named == [set(), {representation}, {representation, fkl}, {representation, fkl}]
    warm, anew = rates["mid"], rates["restart"]
    assert warm[0] < warm[1] < warm[2]  # eight steps of warm-up, three steps per epoch
    # KD stage 1 has one epoch of four, and therefore 2 of the 8 warm-up steps: its rate rises faster. After the
    # restart the other 6 warm-up steps begin at 0.
    assert anew[0] > warm[0] and anew[1] < anew[0] and anew[2] > anew[1]


def test_two_of_three(corpus, teacher_dir, tmp_path, caplog):
    page, one, other = write_page(tmp_path, **MID), tmp_path / "one", tmp_path / "other"
    command = ("--teacher", teacher_dir, "--kd_stages", 1, 3)
    train(corpus, one, page, *command)
    for number in (1, 2, 3):
        with caplog.at_level("INFO"):
            train(corpus, other, page, *command, "--kd_stage", number)
    assert "KD stage 2: nothing to do, this run has KD stages [1, 3]" in caplog.text
    assert_same(one, other, ends=("kd_stage1", "."))
    assert not (one / "kd_stage2").exists()
    record = json.loads((one / "kd_stage.json").read_text())
    assert record["kd_stages"] == json.loads((one / "experiment.json").read_text())["kd_stages"] == [1, 3]
    # KD stage 3 keeps the representation of stage 2. As stage 2 is left out, neither it nor its projection exists.
    assert [[o["objective"] for o in s["objectives"]] for s in record["stages"]] == [
        ["blank_kl"],
        ["blank_kl", "factorized_kl"],
    ]
    assert not [k for k in load_state(one / "4epoch.pth") if k.startswith("kd_heads")]


def test_a_kd_stage_that_training_has_left_long_ago(corpus, teacher_dir, tmp_path):
    """A command for all KD stages was killed in the third. Then each stage has its own command, as in run.sh."""
    page, one, other = write_page(tmp_path, **MID), tmp_path / "one", tmp_path / "other"
    train(corpus, one, page, "--teacher", teacher_dir)
    with pytest.raises(Killed):
        train(corpus, other, page, "--teacher", teacher_dir, kill_at=("step", 4, 1))
    (other / "2epoch.pth").rename(tmp_path / "2epoch.pth")  # as if it had been removed because it is not among the best
    for number in (1, 2, 3):
        train(corpus, other, page, "--teacher", teacher_dir, "--kd_stage", number)
        assert json.loads((other / "kd_stage.json").read_text())["finished_kd_stage"] == number
    (tmp_path / "2epoch.pth").rename(other / "2epoch.pth")
    assert_same(one, other)


def test_a_restart_of_what_comes_first(corpus, teacher_dir, tmp_path):
    """If a KD stage with ``restart`` is trained first, there is no optimizer to restart."""
    page, out = write_page(tmp_path, **RESTART), tmp_path / "student"
    train(corpus, out, page, "--teacher", teacher_dir, "--kd_stages", 2, 3)
    assert [s["epochs"] for s in json.loads((out / "kd_stage.json").read_text())["stages"]] == [[1, 2], [2, 4]]
    assert (out / "kd_stage2/student.pth").is_file()


def by_cache(corpus, teacher_dir, directory):
    command = ["--teacher", str(teacher_dir), "--kd_config", "progressive_fkl", "--output", str(directory / "targets")]
    for name in ("train", "valid"):
        command += ["--data_dir", str(corpus.dir / name)]
    asr_kd_cache.main(command)
    return dict(more=["--target_cache", directory / "targets"])


def in_half_precision(corpus, teacher_dir, directory):
    """On a CPU ESPnet's gradient scaler exists but does nothing."""
    return dict(more=["--teacher", teacher_dir, "--use_amp", "true"])


def hybrid(corpus, teacher_dir, directory):
    more = ["--teacher", teacher_dir, "--model_conf", "ctc_weight=0.3", "--decoder", "transformer"]
    return dict(more=[*more, *(x for o in ("num_blocks=1", "linear_units=16", "attention_heads=2")
                               for x in ("--decoder_conf", o))])  # fmt: skip


def by_nbest(corpus, teacher_dir, directory):
    """KD stage 1 uses no N-best, stage 2 does, and stage 3 keeps that objective."""
    ids = [line.split()[0] for n in ("train", "valid") for line in (corpus.dir / n / "text").read_text().splitlines()]
    (directory / "nbest").write_text("".join(f"{u} {r} {-r}.5 {' '.join('abcde'[r:])}\n" for u in ids for r in (1, 2)))
    stages = [
        {"share": 0.3, "objectives": [{"objective": "kl"}]},
        {"share": 0.25, "objectives": [{"objective": "sequence_kd", "nbest": 2, "weight": {"start": 0, "end": 0.5}}]},
        {"share": 0.45, "keep": "all", "objectives": [{"objective": "factorized_kl"}]},
    ]
    page = tiny_kd.write_yaml(directory / "nbest.yaml", {"stages": stages})
    return dict(page=page, more=["--teacher", teacher_dir, "--nbest", directory / "nbest"])


def untranscribed(corpus, teacher_dir, directory):
    """Three of nine training utterances have no transcript."""
    own = tiny_kd.Corpus(directory / "corpus")
    for file, empty in (("text", ""), ("text_shape.char", f"0,{len(tiny_asr.TOKENS)}")):
        lines = (own.dir / "train" / file).read_text().splitlines()
        lines = [f"{line.split()[0]} {empty}" if n % 3 == 0 else line for n, line in enumerate(lines)]
        (own.dir / "train" / file).write_text("".join(f"{line}\n" for line in lines))
    return dict(corpus=own, more=["--teacher", teacher_dir])


def unlabelled(corpus, teacher_dir, directory):
    """There is no text at all, and therefore no CTC."""
    page = write_page(directory, **MID, ctc={"weight": 0.0})
    return dict(page=page, text=False, more=["--teacher", teacher_dir])


CASES = [by_cache, in_half_precision, hybrid, by_nbest, untranscribed, unlabelled]


@pytest.mark.faults("a training killed in each KD stage and at each boundary")
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_every_kind_of_target_and_student(corpus, teacher_dir, tmp_path, case, record_property):
    """A training that is killed in KD stages 2 and 3 gives the same student, bit for bit, as one without a kill."""
    setting = {"corpus": corpus, "page": write_page(tmp_path, **MID), **case(corpus, teacher_dir, tmp_path)}
    own, page, more = (setting.pop(k) for k in ("corpus", "page", "more"))
    command, changes = (page, *more), setting
    one, other = tmp_path / "one", tmp_path / "other"
    train(own, one, *command, **changes)
    for moment in (("step", 2, 2), ("while", "checkpoint", 3)):
        with pytest.raises(Killed):
            train(own, other, *command, kill_at=moment, **changes)
    train(own, other, *command, **changes)
    if case is unlabelled:  # the best model is chosen by loss_kd
        for out in (one, other):
            shutil.copy(out / "valid.loss_kd.ave.pth", out / "valid.loss_ctc.ave.pth")
    assert_same(one, other)
    state = load_state(one / "student.pth")
    assert all(torch.isfinite(v).all() for v in state.values())
    assert any(k.startswith("decoder.") for k in state) == (case is hybrid)
    record_property("faults", 2)


def losses_of(model, batch=None):
    return {k for k in model(**(batch or tiny_kd.batch()))[1] if k.startswith("loss_")} - {"loss_ctc", "loss_kd"}


def test_what_is_kept_counts_with_its_last_weight(fkl, teacher):
    model = in_stage(fkl, 3, teacher)
    stats = model(**tiny_kd.batch())[1]
    expected = 15.0 * stats["loss_factorized_representation"] + 0.3 * stats["loss_factorized_kl"]
    assert stats["loss_kd"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_one_loss_goes_while_the_other_comes(fkl, teacher):
    """FKL contains the binary KL: in the first 4 % of the last KD stage their weights always add up to FKL's last."""
    model = in_stage(fkl, 3, teacher)
    phase, progress, found = model.plan.phase(3), model.progress, []
    for done in (0.0, 0.01, 0.02, 0.03, 0.05):
        progress.step = round(progress.steps_per_epoch * (phase.begin + done * (phase.end - phase.begin)))
        now = model.plan.at(progress)
        weights = {spec.key: now(weight) for spec, _, weight in model.terms[2]}
        assert weights["blank_kl"] + weights["factorized_kl"] == pytest.approx(0.3)
        found.append(weights["factorized_kl"])
        assert losses_of(model) == {f"loss_{k}" for k, w in weights.items() if w}
    assert found == pytest.approx([0, 0.075, 0.15, 0.225, 0.3], abs=0.003)


def test_the_teacher_runs_where_an_objective_reads_it(write_page_of, teacher, monkeypatch):
    """The teacher does not run where its objectives have weight 0: in a KD stage without one, or before a ramp."""
    ramp = {"objective": "kl", "weight": {"start": 0.0, "end": 1.0, "begin": 0.5}}
    page = write_page_of({"share": 0.4}, {"share": 0.4, "objectives": [ramp]}, {"share": 0.2, "keep": "all"})
    progress = Progress(steps_per_epoch=10)
    model = adopt(tiny_kd.student_config(), page, teacher=teacher, progress=progress)[1].train()
    ran, targets = [], teacher.targets
    monkeypatch.setattr(teacher, "targets", lambda *args: (ran.append(progress.step), targets(*args))[1])
    for progress.step in range(10):
        model(**tiny_kd.batch())
    assert ran == [7, 8, 9]


@pytest.fixture
def write_page_of(write_page):
    return lambda *stages: write_page({"stages": list(stages)})


def test_validation_is_the_same_in_every_epoch(fkl, teacher):
    """Validation uses the final weights in every epoch, so that a difference between epochs comes from the student."""
    progress = Progress(max_epoch=100, steps_per_epoch=10)
    model = adopt(tiny_kd.student_config(), fkl, teacher=teacher, progress=progress)[1].eval()
    found = []
    for progress.epoch, progress.step in ((1, 0), (1, 9), (2, 5), (3, 0), (5, 9), (6, 0), (50, 3), (100, 9)):
        with torch.no_grad():
            stats = model(**tiny_kd.batch())[1]
        found.append({k: v.item() for k, v in stats.items() if v is not None})
    assert all(f == found[0] for f in found)
    named = found[0]
    assert named["loss_kd"] == pytest.approx(
        15 * named["loss_factorized_representation"] + 0.3 * named["loss_factorized_kl"], rel=1e-6
    )
    assert named["loss"] == pytest.approx(named["loss_kd"] + named["loss_ctc"], rel=1e-6)


def test_ctc_of_a_later_kd_stage_alone(write_page_of, teacher):
    """In training CTC is off at first, but validation includes it from the beginning."""
    kl = {"objectives": [{"objective": "kl"}]}
    page = write_page_of({"share": 0.5, "ctc": {"weight": 0.0}, **kl}, {"share": 0.5, **kl})
    model = in_stage(load_page(str(page)), 1, teacher)
    stats = model(**tiny_kd.batch())[1]
    assert stats["loss"].item() == pytest.approx(stats["loss_kd"].item())
    stats = model.eval()(**tiny_kd.batch())[1]
    assert stats["loss"].item() == pytest.approx((stats["loss_kd"] + stats["loss_ctc"]).item())


def test_a_head_is_the_same_in_all_kd_stages(fkl, teacher):
    """The projection of KD stage 2 is created once, and KD stage 3 continues to train it."""
    _, model = adopt(tiny_kd.student_config(), fkl, teacher=teacher)
    objectives = {spec.key: set() for terms in model.terms for spec, *_ in terms}
    for terms in model.terms:
        for spec, objective, _ in terms:
            objectives[spec.key].add(id(objective))
    assert {k: len(v) for k, v in objectives.items()} == dict.fromkeys(objectives, 1)


def test_patience_may_end_the_last_kd_stage_only(corpus, teacher_dir, tmp_path, monkeypatch):
    from espnet2.train.reporter import Reporter

    monkeypatch.setattr(Reporter, "check_early_stopping", lambda self, patience, *criterion: True)
    page, out = write_page(tmp_path, **MID), tmp_path / "student"
    train(corpus, out, page, "--teacher", teacher_dir, "--patience", 1, max_epoch=6)
    # KD stage 2 ends in epoch 4, so that patience may end the training after epoch 5 at the earliest.
    assert sorted(read_checkpoint(out / "checkpoint.pth")["reporter"]["stats"]) == [1, 2, 3, 4, 5]
    record = json.loads((out / "kd_stage.json").read_text())
    assert record["finished"] and [s["epochs"] for s in record["stages"]] == [[1, 2], [2, 4], [4, 6]]
    last, student = load_state(out / "5epoch.pth"), load_state(out / "student.pth")
    assert all(torch.equal(v, last[k]) for k, v in student.items())
    assert (out / "kd_stage1/student.pth").is_file() and (out / "kd_stage2/student.pth").is_file()
    # One command per KD stage, as in run.sh, gives the same.
    other = tmp_path / "other"
    for number in (1, 2, 3):
        train(corpus, other, page, "--teacher", teacher_dir, "--patience", 1, "--kd_stage", number, max_epoch=6)
    assert_same(out, other)


def test_an_end_before_the_end_of_a_kd_stage_is_an_error(corpus, teacher_dir, tmp_path, monkeypatch):
    """If ESPnet ends a training too early without an error, for any reason, the error is raised here."""
    from espnet2.train.reporter import Reporter

    from espnet_kd.distill.phases import PhaseChanges

    monkeypatch.setattr(Reporter, "check_early_stopping", lambda self, patience, *criterion: True)
    early = {"patience": 1}
    monkeypatch.setattr(PhaseChanges, "at_epoch", lambda changes, _: vars(changes.trainer_options).update(early))
    page = write_page(tmp_path, **MID)
    with pytest.raises(
        UserError, match="training ended after epoch 1 of 2 in .*patience may only end the last KD stage"
    ):
        train(corpus, tmp_path / "out", page, "--teacher", teacher_dir, "--kd_stage", 1)
    assert json.loads((tmp_path / "out/kd_stage.json").read_text())["finished_kd_stage"] == 0
