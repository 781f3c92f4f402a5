"""Trainings that would only seem to succeed: into another one's directory, without a step, with a useless criterion."""

import json
import shutil

import pytest
import tiny_kd
import torch

from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError


def contents(directory):
    """Every file but locks and logs, by name."""
    files = (p for p in directory.rglob("*") if p.is_file() and not p.is_symlink() and not p.name.startswith(".lock"))
    return {str(p.relative_to(directory)): p.read_bytes() for p in files if p.suffix != ".log"}


def plain(corpus, out, teacher):
    asr_kd_train.main(corpus.options(out, "--max_epoch", "1"))


def stock(corpus, out, teacher):
    from espnet_kd.offline import ASRTask

    cmd = [o for o in corpus.options(out, "--max_epoch", "1", "--use_tensorboard", "false")]
    ASRTask.main(cmd=cmd)


def other_page(corpus, out, teacher):
    asr_kd_train.main(corpus.options(out, "--teacher", teacher, "--kd_config", "softmax_l2", "--max_epoch", "1"))


def without_record(corpus, out, teacher):
    """Make a training whose record somebody removed."""
    other_page(corpus, out, teacher)
    (out / "kd_stage.json").unlink()


def downloaded(corpus, out, teacher):
    """Make a finished experiment without a checkpoint."""
    shutil.copytree(teacher, out)


THERE = {
    "a plain training": plain,
    "a training of stock ESPnet": stock,
    "one by another page": other_page,
    "one without its record": without_record,
    "a downloaded experiment": downloaded,
}


@pytest.mark.parametrize("make", THERE.values(), ids=THERE)
@pytest.mark.parametrize("page", ["kl", "progressive_fkl"])
def test_a_directory_that_holds_something_else_is_refused_and_kept(corpus, teacher_dir, tmp_path, make, page):
    """A directory without a matching record is neither treated as finished nor continued nor overwritten."""
    out = tmp_path / "out"
    make(corpus, out, str(teacher_dir))
    before = contents(out)
    with pytest.raises(UserError, match=str(out)):
        asr_kd_train.main(corpus.options(out, "--teacher", str(teacher_dir), "--kd_config", page, "--max_epoch", "3"))
    assert contents(out) == before


def test_a_plain_training_is_not_put_over_a_distilled_one(corpus, teacher_dir, tmp_path):
    out = tmp_path / "out"
    other_page(corpus, out, str(teacher_dir))
    before = contents(out)
    with pytest.raises(UserError, match=str(out)):
        asr_kd_train.main(corpus.options(out, "--max_epoch", "2"))
    assert contents(out) == before


@pytest.fixture
def nan_teacher(teacher_dir, tmp_path):
    """A teacher whose posteriors are NaN; their argmax is blank everywhere."""
    broken = shutil.copytree(teacher_dir, tmp_path / "broken")
    for path in broken.glob("*.pth"):
        state = torch.load(path, weights_only=True)
        state["encoder.after_norm.weight"] = state["encoder.after_norm.weight"] * float("nan")
        torch.save(state, path)
    return broken


STOPS = {"one epoch": {"max_epoch": 1}, "patience": {"max_epoch": 5, "patience": 2}, "several": {"max_epoch": 2}}


@pytest.mark.faults("losses that are no numbers")
@pytest.mark.parametrize("changes", STOPS.values(), ids=STOPS)
def test_a_stage_without_a_single_step_is_not_finished(corpus, nan_teacher, tmp_path, changes):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no step|not finite|NaN"):
        asr_kd_train.main(corpus.options(out, "--teacher", str(nan_teacher), "--kd_config", "kl", **changes))
    record = out / "kd_stage.json"
    assert not (record.is_file() and json.loads(record.read_text()).get("finished"))
    assert not (out / "student.pth").exists()


@pytest.mark.faults("losses that are no numbers")
def test_a_plain_training_without_a_single_step_is_not_finished(corpus, tmp_path, monkeypatch):
    from espnet_kd.tasks.asr_kd import ASRKDTask

    build = ASRKDTask.build_model.__func__

    def build_broken(cls, args):
        model = build(cls, args)
        torch.nn.init.constant_(model.ctc.ctc_lo.bias, float("nan"))
        return model

    monkeypatch.setattr(ASRKDTask, "build_model", classmethod(build_broken))
    out = tmp_path / "out"
    for _ in range(2):  # not even on a second call, which finds the files of the first
        with pytest.raises(UserError, match="out: no step of epoch 1 had finite gradients"):
            asr_kd_train.main(corpus.options(out, "--max_nonfinite", "999", max_epoch=1))
        assert not (out / "checkpoint.pth").exists() and not (out / "1epoch.pth").exists()


#: Criteria that no epoch of a pure CTC student has.
CRITERIA = {
    "acc": ["valid", "acc", "max"],
    "of training": ["train", "acc", "max"],
    "cer": ["valid", "cer", "min"],
    "loss_att": ["valid", "loss_att", "min"],
    "a typing error": ["valid", "los_ctc", "min"],
    "another page's": ["valid", "loss_ctc_student", "min"],
    "no phase of ESPnet's": ["validation", "loss_ctc", "min"],
    "no mode": ["valid", "loss_ctc", "lowest"],
    "of validation alone": ["train", "cer_ctc", "min"],
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_a_criterion_that_no_epoch_has(corpus, teacher_dir, tmp_path, criterion):
    """With such a criterion no model would be chosen, and all but the last epoch's would be deleted."""
    options = ["--teacher", str(teacher_dir), "--kd_config", "kl", "--keep_nbest_models", "2"]
    with pytest.raises(UserError, match=rf"best_model_criterion.*{criterion[1]}"):
        asr_kd_train.main(corpus.options(tmp_path / "out", *options, max_epoch=2, best_model_criterion=[criterion]))
    assert not list((tmp_path / "out").glob("*epoch.pth"))


@pytest.mark.parametrize(
    "option, used",
    [
        (["--early_stopping_criterion", "valid", "acc", "max"], ["--patience", "2"]),
        (["--early_stopping_criterion", "valid", "loss", "lowest"], ["--patience", "2"]),
        (["--val_scheduler_criterion", "valid", "acc"], ["--scheduler", "reducelronplateau"]),
    ],
)
def test_other_criteria_that_no_epoch_has(corpus, tmp_path, option, used):
    """ESPnet would end with a traceback after the first epoch."""
    name = option[0].removeprefix("--")
    with pytest.raises(UserError, match=f"^{name}: (no epoch of this training has valid,acc |expected the phase)"):
        asr_kd_train.main(corpus.options(tmp_path / "out", *option, *used))
    assert not list((tmp_path / "out").glob("*epoch.pth"))


@pytest.mark.parametrize(
    "statistic, last",
    [
        ("acc", {"attention": {"weight": 0}}),
        ("loss_kd", {}),
        ("agreement", {"objectives": [{"objective": "inter_ctc"}]}),
    ],
)
def test_a_criterion_that_validation_has_not_at_the_end(corpus, teacher_dir, tmp_path, write_page, statistic, last):
    """Validation has the weights of the end: here without the attention branch, without KD, and without the teacher."""
    stages = [{"share": 0.5, "objectives": [{"objective": "kl"}]}, {"share": 0.5, **last}]
    options = ["--teacher", str(teacher_dir), "--kd_config", str(write_page({"stages": stages}))]
    options += ["--model_conf", "ctc_weight=0.3", "--decoder", "transformer", "--decoder_conf", "num_blocks=1"]
    criterion = [["valid", statistic, "max"]]
    with pytest.raises(UserError, match=f"best_model_criterion: no epoch of this training has valid,{statistic} "):
        asr_kd_train.main(corpus.options(tmp_path / "out", *options, best_model_criterion=criterion))


HYBRID = ["--model_conf", "ctc_weight=0.3", "--decoder", "transformer", "--decoder_conf", "num_blocks=1"]


@pytest.mark.parametrize(
    "option, more, statistic",
    [
        ("best_model_criterion", ["train,loss_softmax_l2,min"], "train,loss_softmax_l2"),
        ("best_model_criterion", ["valid,loss_ctc,min", "train,loss_kl,min"], "train,loss_kl"),
        ("best_model_criterion", ["train,loss,min", "valid,acc,max", "train,acc,max", *HYBRID], "train,acc"),
        ("early_stopping_criterion", ["train", "loss_kl", "min", "--patience", "2"], "train,loss_kl"),
        ("val_scheduler_criterion", ["train", "loss_kl", "--scheduler", "reducelronplateau"], "train,loss_kl"),
    ],
)
def test_a_criterion_that_only_some_epochs_have(corpus, teacher_dir, tmp_path, write_page, option, more, statistic):
    """ESPnet ends with a KeyError where it first meets the statistic, or first misses it; so does every resume."""
    stages = [
        {"share": 0.5, "ctc": {"weight": 0.0}, "objectives": [{"objective": "kl"}]},
        {"share": 0.5, "objectives": [{"objective": "softmax_l2"}]},
    ]
    options = ["--teacher", str(teacher_dir), "--kd_config", str(write_page({"stages": stages}))]
    with pytest.raises(UserError, match=f"^{option}: only some epochs of this training have {statistic},"):
        asr_kd_train.main(corpus.options(tmp_path / "out", *options, f"--{option}", *more, max_epoch=2))
    assert not list((tmp_path / "out").glob("*epoch.pth"))


def test_a_criterion_of_training_that_every_epoch_has(corpus, teacher_dir, tmp_path, write_page):
    """Its objective begins within the first epoch, and fades within the last one."""
    kl, fading = {"objective": "kl"}, {"objective": "kl", "weight": {"start": 1.0, "end": 0.0}}
    stages = [{"share": 0.1}, {"share": 0.3, "objectives": [kl]}, {"share": 0.6, "objectives": [fading]}]
    options = ["--teacher", str(teacher_dir), "--kd_config", str(write_page({"stages": stages}))]
    options += ["--use_tensorboard", "false", "--best_model_criterion", "train,loss_kl,min"]
    asr_kd_train.main(corpus.options(tmp_path / "out", *options, max_epoch=2))
    assert (tmp_path / "out/train.loss_kl.ave.pth").is_file()


@pytest.fixture
def long_texts(corpus, tmp_path):
    """Function that makes ``count`` transcripts of a part longer than their frames and returns training options."""

    def make(part, count):
        copy = tmp_path / "corpus"
        shutil.copytree(corpus.dir, copy)
        lines = (copy / part / "text").read_text().splitlines()
        pairs = [line.split(" ", 1) for line in lines]
        texts = {u: "abcdefghij" * 12 if i < count else t for i, (u, t) in enumerate(pairs)}
        (copy / part / "text").write_text("".join(f"{u} {t}\n" for u, t in texts.items()))
        shapes = "".join(f"{u} {len(t)},{len(tiny_kd.TOKENS)}\n" for u, t in texts.items())
        (copy / part / "text_shape.char").write_text(shapes)
        options = corpus.options(tmp_path / "out", "--max_epoch", "1")
        return [o.replace(f"{corpus.dir}/{part}", f"{copy}/{part}") for o in options]

    return make


@pytest.mark.parametrize("part", ["train", "valid"])
@pytest.mark.parametrize("count", [1, 3])
def test_transcripts_longer_than_their_frames_are_counted_and_named(long_texts, caplog, part, count):
    """The CTC loss of such utterances is 0, in training and in the criterion that chooses the model."""
    options = long_texts(part, count)
    with caplog.at_level("WARNING"):
        try:
            asr_kd_train.main(options)
            said = caplog.text
        except UserError as e:
            said = str(e)
    assert f"{part}0" in said and f" {count} of " in said and "frames" in said


def test_all_transcripts_longer_than_their_frames_are_refused(long_texts):
    with pytest.raises(UserError, match="frames"):
        asr_kd_train.main(long_texts("train", 9))


@pytest.mark.parametrize("kept", [False, True], ids=["online", "cache"])
def test_a_teacher_that_recognises_nothing_is_refused_before_training(corpus, tmp_path, kept):
    """The teacher outputs blank on all frames. With --blank_teacher it is accepted."""
    exp, out = tiny_kd.save_teacher(tmp_path / "blank"), tmp_path / "out"
    state = torch.load(exp / "valid.loss.ave.pth", weights_only=True)
    state["ctc.ctc_lo.bias"][0] += 1e3
    torch.save(state, exp / "valid.loss.ave.pth")
    source = ["--teacher", str(exp)]
    if kept:
        from espnet_kd.bin import asr_kd_cache

        data = [str(corpus.dir / part) for part in ("train", "valid")]
        cache = str(tmp_path / "cache")
        asr_kd_cache.main(["--teacher", str(exp), "--kd_config", "kl", "--output", cache, "--data_dir", *data])
        source = ["--target_cache", cache]
    command = corpus.options(out, *source, "--kd_config", "kl", "--max_epoch", "1")
    with pytest.raises(UserError, match=r"teacher .*blank.* is blank on 100.0 % of the frames of 9 training .*--bla"):
        asr_kd_train.main(command)
    assert not (out / "checkpoint.pth").exists()
    asr_kd_train.main([*command, "--blank_teacher", "true"])
    assert (out / "student.pth").exists()
