"""The task: its options, and the settings that it refuses before training."""

import multiprocessing
import os
import time
from argparse import Namespace
from contextlib import nullcontext

import psutil
import pytest
import tiny_kd
import torch
import yaml
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.train.distributed_utils import resolve_distributed_mode

from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.model import ESPnetASRKDModel
from espnet_kd.distill.options import KD_OPTIONS
from espnet_kd.distill.page import load_page
from espnet_kd.distill.train_options import to_options
from espnet_kd.files import locked
from espnet_kd.offline import ASRTask
from espnet_kd.tasks.asr_kd import ASRKDTask, check_data, check_utterances

AUGMENTED = ["--preprocessor_conf", "data_aug_effects=[[1.0, lowpass, {}]]", "--preprocessor_conf", "data_aug_prob=0.5"]
ATTENTION_ONLY = ["--decoder", "transformer", "--model_conf", "ctc_weight=0.0"]
LABEL_FREE = {"stages": [{"share": 1.0, "ctc": {"weight": 0.0}, "objectives": [{"objective": "kl"}]}]}


def options_of(task):
    return {a.dest for a in task.get_parser()._actions}


def test_kd_options_are_those_that_export_drops():
    assert options_of(ASRKDTask) - options_of(ASRTask) == set(KD_OPTIONS)
    assert options_of(ASRTask) <= options_of(ASRKDTask)


def test_print_config_goes_in_again(corpus, teacher_dir, tmp_path):
    """The output of --print_config is a valid configuration, as in ESPnet's tasks.

    Its options of augmentation are present but off, which must not count as augmentation.
    """
    with pytest.raises(SystemExit) as e:
        asr_kd_train.main(["--print_config"])
    assert e.value.code == 0
    with open(tmp_path / "printed.yaml", "w") as f:
        ASRKDTask.print_config(file=f)
    content = yaml.safe_load((tmp_path / "printed.yaml").read_text())
    assert set(KD_OPTIONS) <= set(content) and "data_aug_effects" in content["preprocessor_conf"]
    args = ASRKDTask.get_parser().parse_args(["--config", str(tmp_path / "printed.yaml")])
    assert args.teacher == [] and args.kd_config is None
    args.teacher = [str(teacher_dir)]
    assert ASRKDTask._teacher(args, load_page("kl")) is not None


def parsed(corpus, tmp_path, *more, **changes):
    return ASRKDTask.get_parser().parse_args(corpus.options(tmp_path / "out", *more, **changes))


def test_builds_the_kd_model(corpus, teacher_dir, tmp_path):
    args = parsed(corpus, tmp_path, "--teacher", str(teacher_dir), "--kd_config", "progressive_fkl", "--kd_stage", "3")
    model = ASRKDTask.build_model(args)
    assert type(model) is ESPnetASRKDModel
    assert (model.plan.numbers, model.progress.max_epoch) == ([1, 2, 3], 3)
    assert model.plan is ASRKDTask.plan
    assert model.progress is ASRKDTask.progress
    # The saved configuration is that of a plain ESPnet model, with its tokens.
    assert args.model == "espnet" and args.token_list == tiny_kd.TOKENS


@pytest.mark.parametrize("more", [[], ["--kd_config", "progressive_fkl", "--collect_stats", "true", "--teacher", "no"]])
def test_plain_and_statistics_load_no_teacher(corpus, tmp_path, more):
    model = ASRKDTask.build_model(parsed(corpus, tmp_path, *more))
    assert isinstance(model, ESPnetASRModel) and not isinstance(model, ESPnetASRKDModel)


def test_statistics_after_a_training_in_the_same_process(corpus, teacher_dir, tmp_path):
    """In a notebook, the statistics of the next student know nothing of the last one's KD stages."""
    ASRKDTask.build_model(parsed(corpus, tmp_path, "--teacher", str(teacher_dir), "--kd_config", "kl"))
    args = parsed(corpus, tmp_path, "--collect_stats", "true", "--kd_stage", "2", max_epoch=5)
    ASRKDTask.build_optimizers(args, ASRKDTask.build_model(args))
    assert args.max_epoch == 5


@pytest.mark.parametrize(
    "more, message",
    [
        (["--kd_config", "progressive_fkl"], "needs a teacher: give --teacher"),
        (["--kd_config", "progressive_fkl", "--teacher", "nowhere/exp"], "no experiment at nowhere/exp"),
        (["--kd_config", "progressive_fk", "--teacher", "{teacher}"], "did you mean 'progressive_fkl'"),
        (
            ["--kd_config", "progressive_fkl", "--teacher", "{teacher}", "--kd_stage", "4"],
            r"--kd_stage 4: .* \[1, 2, 3\]",
        ),
        (
            ["--kd_config", "progressive_fkl", "--teacher", "{teacher}", "--kd_stage", "0"],
            r"--kd_stage 0: .* \[1, 2, 3\]",
        ),
        (
            ["--kd_config", "progressive_fkl", "--teacher", "{teacher}", "--rir_scp", "rirs.scp"],
            "rir_scp act before the model.*--augmented_teacher true",
        ),
        (["--kd_config", "progressive_fkl", "--teacher", "{teacher}", "--noise_scp", "n.scp"], "noise_scp act before"),
        (
            ["--kd_config", "progressive_fkl", "--teacher", "{teacher}", *AUGMENTED],
            "preprocessor_conf: data_aug_effects act before",
        ),
        (
            ["--kd_config", "progressive_fkl", "--teacher", "{teacher}", *ATTENTION_ONLY],
            "no CTC branch",
        ),
    ],
)
def test_refused(corpus, teacher_dir, tmp_path, more, message):
    more = [str(teacher_dir) if m == "{teacher}" else m for m in more]
    with pytest.raises(UserError, match=message):
        ASRKDTask.build_model(parsed(corpus, tmp_path, *more))


def test_an_augmented_teacher_on_request(corpus, teacher_dir, tmp_path):
    more = ["--kd_config", "progressive_fkl", "--teacher", str(teacher_dir), "--rir_scp", "rirs.scp"]
    ASRKDTask.build_model(parsed(corpus, tmp_path, *more, "--augmented_teacher", "true"))


def test_ctc_needs_text(corpus, teacher_dir, tmp_path, write_page):
    common = ["--teacher", str(teacher_dir)]

    def build(page, *more):
        criterion = ["--best_model_criterion", "valid,loss_kd,min"]
        args = corpus.options(tmp_path, *common, "--kd_config", str(page), *criterion, *more, text=False)
        return ASRKDTask.build_model(ASRKDTask.get_parser().parse_args(args))

    with pytest.raises(UserError, match="has no text"):
        build("progressive_fkl", "--kd_stage", "3")
    silent = {"share": 0.3, "ctc": {"weight": 0.0}, "objectives": [{"objective": "kl"}]}
    page = write_page({"stages": [silent, silent, {"share": 0.4}]}, "late.yaml")
    with pytest.raises(UserError, match=r"KD stage 3 .* has no text"):  # before KD stages 1 and 2 are trained
        build(page, "--kd_stage", "1")
    build(page, "--kd_stage", "1", "--kd_stages", "1", "2")
    build(write_page(LABEL_FREE))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--kd_stages", "1", "4"], "--kd_stages .1, 4.: .*has KD stages 1 to 3"),
        (["--kd_stages", "0"], "has KD stages 1 to 3"),
        (["--kd_stage", "0"], "--kd_stage is 0; it must be 1 or more"),
        (["--kd_config", "nowhere.yaml"], "cannot read the method page"),
    ],
)
def test_the_command_refuses(corpus, teacher_dir, tmp_path, more, message):
    base = ["--teacher", str(teacher_dir), "--kd_config", "progressive_fkl"]
    with pytest.raises(UserError, match=message):
        asr_kd_train.main(corpus.options(tmp_path / "out", *base, *more))


def test_a_stage_left_out_has_nothing_to_do(corpus, teacher_dir, tmp_path, caplog):
    base = ["--teacher", str(teacher_dir), "--kd_config", "progressive_fkl", "--kd_stages", "1", "3", "--kd_stage", "2"]
    with caplog.at_level("INFO"):
        asr_kd_train.main(corpus.options(tmp_path / "out", *base))
    assert "KD stage 2: nothing to do" in caplog.text
    assert not list((tmp_path / "out").glob("[!.]*"))  # only the lock is there


@pytest.mark.faults("two runs at once")
def test_two_runs_in_one_directory_are_refused(corpus, teacher_dir, tmp_path):
    options = corpus.options(tmp_path / "out", "--teacher", str(teacher_dir), "--kd_config", "progressive_fkl")
    with locked(tmp_path / "out"), pytest.raises(UserError, match="in use by another run"):
        asr_kd_train.main(options)


def test_a_teacher_without_a_method_is_refused(corpus, teacher_dir, tmp_path):
    with pytest.raises(UserError, match="--teacher needs a method"):
        asr_kd_train.main(corpus.options(tmp_path / "out", "--teacher", str(teacher_dir)))


def test_a_pages_train_block_as_options():
    block = {
        "best_model_criterion": [["valid", "loss_kd", "min"], ["valid", "acc", "max"]], "unused_parameters": True,
        "freeze_param": ["encoder.embed", "frontend"], "optim_conf": {"lr": 0.5, "betas": [0.9, 0.99]},
        "accum_grad": 2,
    }  # fmt: skip
    args = ASRKDTask.get_parser().parse_args(to_options(block))
    assert [list(c) for c in args.best_model_criterion] == block["best_model_criterion"]
    assert args.unused_parameters is True and args.freeze_param == block["freeze_param"] and args.accum_grad == 2
    assert args.optim_conf == block["optim_conf"]
    # They come before the user's options, so that the user's win.
    cmd = [*to_options(block), "--accum_grad", "4", "--unused_parameters", "false"]
    args = ASRKDTask.get_parser().parse_args(cmd)
    assert args.accum_grad == 4 and args.unused_parameters is False


def test_an_n_best_of_other_utterances_is_refused(corpus, tmp_path):
    """A speed-perturbed copy is a separate utterance and must have its own hypotheses."""
    original = (corpus.dir / "train" / "wav.scp").read_text()
    (tmp_path / "wav.scp").write_text(original + original.replace("train0 ", "sp0.9-train0 ").splitlines()[0] + "\n")
    ids = {line.split()[0] for line in original.splitlines()}
    args = Namespace(
        nbest="nbest", train_data_path_and_name_and_type=[(str(tmp_path / "wav.scp"), "speech", "sound")],
        valid_data_path_and_name_and_type=None,
    )  # fmt: skip
    check_utterances(args, dict.fromkeys([*ids, "sp0.9-train0"]), "nbest", "asr_kd_nbest")
    with pytest.raises(UserError, match=r"nbest lacks 1 utterances of .*wav.scp \(sp0.9-train0 "):
        check_utterances(args, dict.fromkeys(ids), "nbest", "asr_kd_nbest")


@pytest.mark.parametrize("method, refused", [("kl", True), ("progressive_fkl", True), ("label_free", False)])
def test_data_without_text(corpus, method, refused):
    speech, text = ("wav.scp", "speech", "sound"), ("text", "text", "text")
    for without in ("train", "valid"):
        data = {f"{part}_data_path_and_name_and_type": [speech] if part == without else [speech, text]
                for part in ("train", "valid")}  # fmt: skip
        expected = pytest.raises(UserError, match=f"trains with transcripts, but --{without}_data.*label_free")
        with expected if refused else nullcontext():
            check_data(Namespace(**data), load_page(method).stages)


def in_a_process(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def test_a_process_per_gpu_tells_a_mistake_in_one_line(corpus, tmp_path, capfd):
    args = parsed(corpus, tmp_path, "--kd_config", "progressive_fkl", "--log_level", "ERROR")
    resolve_distributed_mode(args)
    process = in_a_process(ASRKDTask.main_worker, args)
    process.join(60)
    said = [line for line in capfd.readouterr().err.splitlines() if "WARNING" not in line]
    assert process.exitcode == 1 and len(said) == 1 and "needs a teacher: give --teacher" in said[0]


def test_and_the_one_that_started_it_adds_nothing(corpus, tmp_path, monkeypatch):
    def fail(cmd):
        raise torch.multiprocessing.ProcessExitedException("", error_index=0, error_pid=1, exit_code=1)

    monkeypatch.setattr(ASRKDTask, "main", fail)
    with pytest.raises(SystemExit) as e:
        asr_kd_train.main(corpus.options(tmp_path / "out"))
    assert e.value.code == 1


def test_a_process_per_gpu_ends_with_its_parent(tmp_path, monkeypatch):
    def worker():
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    def parent():
        monkeypatch.setattr(ASRTask, "main_worker", lambda args: worker())
        in_a_process(ASRKDTask.main_worker, None).join()

    process = in_a_process(parent)
    deadline = time.time() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.time() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()
    while psutil.pid_exists(int((tmp_path / "pid").read_text())):
        assert time.time() < deadline, "it goes on alone"
        time.sleep(0.05)
