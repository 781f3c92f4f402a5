"""Errors in a student's or teacher's YAML are refused with their place in the file.

ESPnet would ignore them or fail later.
"""

from pathlib import Path

import pytest
import tiny_kd
import yaml

from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.checks.configuration import check_configuration

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted([*ROOT.glob("egs2/*/asr_kd1/conf/**/*.yaml"), *ROOT.glob("conf/models/*.yaml")])


@pytest.fixture
def check(tmp_path):
    def run(content, *more):
        file = tiny_kd.write_yaml(tmp_path / "s.yaml", content)
        return check_configuration(asr_kd_train.get_parser(), ["--config", str(file), *more])

    return run


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_shipped_configuration_is_good(file):
    assert check_configuration(asr_kd_train.get_parser(), ["--config", str(file)]).encoder


CONFORMER = {"encoder": "conformer", "encoder_conf": {"num_blocks": 2}}
REFUSED = {
    "option": ({"max_epohc": 3}, r"s.yaml: unknown key 'max_epohc'; did you mean 'max_epoch'\? "),
    "word for a number": ({"max_epoch": "six"}, "s.yaml: max_epoch: expected a whole number, found 'six'"),
    "share for a number": ({"max_epoch": 2.5}, "s.yaml: max_epoch: expected a whole number, found 2.5"),
    "nothing for a number": ({"max_epoch": None}, "max_epoch: expected a whole number, found None"),
    "list for a number": ({"grad_clip": [1]}, r"grad_clip: expected a number, found \[1\]"),
    "number for a flag": ({"use_amp": 2}, "use_amp: expected true or false, found 2"),
    "one of several": ({"keep_nbest_models": [1, "b"]}, "keep_nbest_models: expected a whole number, found 'b'"),
    "class": ({"encoder": "conformr"}, r"s.yaml: encoder: unknown 'conformr'; did you mean 'conformer'"),
    "choice": ({"token_type": "chars"}, "token_type: unknown 'chars'; did you mean 'char'"),
    "one criterion for a list": (
        {"best_model_criterion": ["valid", "acc", "max"]},
        r"best_model_criterion: expected a list of lists of three texts, found \['valid', ",
    ),
    "one file for a list": (
        {"train_data_path_and_name_and_type": ["wav.scp", "speech", "sound"]},
        r"s.yaml: train_data_path_and_name_and_type: expected a list of lists of three texts, found \['wav.scp'",
    ),
    "two texts for three": ({"best_model_criterion": [["valid", "acc"]]}, "best_model_criterion: expected a list of "),
    "no mapping": ({"encoder_conf": ["a"]}, "s.yaml: encoder_conf: expected a mapping"),
    "code": ({"optim_conf": "__import__('os')"}, "optim_conf: expected a mapping"),
    "code in a key": ({"optim_conf": {"lr=!!python/name:os.x #": 1}}, "optim_conf: unknown key 'lr=!!py"),
    "key": (
        {**CONFORMER, "encoder_conf": {"num_block": 2}},
        r"s.yaml: encoder_conf: unknown key 'num_block'; did you mean 'num_blocks'\? \(known:",
    ),
    "type": (
        {**CONFORMER, "encoder_conf": {"num_blocks": "six"}},
        "s.yaml: encoder_conf.num_blocks: expected a whole number, found 'six'",
    ),
    "another class's key": ({"encoder": "rnn", "encoder_conf": {"num_blocks": 2}}, "encoder_conf: unknown key 'num_bl"),
    "frontend": ({"frontend_conf": {"n_ftt": 512}}, "frontend_conf: unknown key 'n_ftt'; did you mean 'n_fft'"),
    "specaug": (
        {"specaug": "specaug", "specaug_conf": {"apply_time_mask": "yes"}},
        "specaug_conf.apply_time_mask: expected true or false, found 'yes'",
    ),
    "model": ({"model_conf": {"ctc_wieght": 1.0}}, "model_conf: unknown key 'ctc_wieght'; did you mean 'ctc_weight'"),
    "ctc": ({"ctc_conf": {"dropout": 0.1}}, "ctc_conf: unknown key 'dropout'; did you mean 'dropout_rate'"),
    "YAML's number": (
        {"optim": "adam", "optim_conf": {"lr": "1e-3"}},
        r"optim_conf.lr: expected .*, found '1e-3' \(YAML takes that for text: write 0.001\)",
    ),
    "optimizer": ({"optim": "adam", "optim_conf": {"lr": -1.0}}, "s.yaml: optim_conf: optim adam: .*-1.0"),
    "scheduler": ({"scheduler": "warmuplr", "scheduler_conf": {"warmup_step": 9}}, "did you mean 'warmup_steps'"),
    "lacking": ({"scheduler": "steplr"}, "scheduler_conf: scheduler steplr: .*step_size"),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_refused(check, content, message):
    with pytest.raises(UserError, match=message):
        check(content)


def test_taken(check):
    """Values in ESPnet's recipes that differ from the type in the signature are accepted."""
    args = check({
        "optim": "adam", "optim_conf": {"lr": 1, "betas": [0.9, 0.98]}, "frontend_conf": {"fs": "16k"},
        "max_epoch": "7", "grad_clip": "1e-1", "patience": "none", "keep_nbest_models": 5, "encoder": "Conformer",
        "specaug_conf": {"anything": 1}, "frontend": None, "fold_length": [80000, 150], "unused_parameters": True,
        "best_model_criterion": [["valid", "acc", "max"]], "noise_db_range": 1015,
    })  # fmt: skip
    assert (args.max_epoch, args.grad_clip, args.patience, args.encoder) == (7, 0.1, None, "conformer")


def test_the_command_line_is_named_where_it_is_at_fault(check):
    with pytest.raises(UserError, match="^--encoder_conf.num_blocks: expected a whole number, found 'x'"):
        check(CONFORMER, "--encoder_conf", "num_blocks=x")
    with pytest.raises(UserError, match="^--optim_conf: unknown key 'lrr'"):
        check(CONFORMER, "--optim_conf", "lrr=1")
    with pytest.raises(SystemExit) as e:
        check(CONFORMER, "--max_epoch", "six")
    assert e.value.code == 2


@pytest.mark.parametrize("content, message", [("a: [", "cannot read .*s.yaml"), ("- a", "is not a mapping")])
def test_no_configuration_at_all(tmp_path, content, message):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        check_configuration(asr_kd_train.get_parser(), ["--config", str(tmp_path / "s.yaml")])


@pytest.mark.parametrize(
    "train, message",
    [
        ({"max_epohc": 3}, "page.yaml: train: max_epohc cannot be set by a page"),
        ({"accum_grad": "two"}, "page.yaml: train.accum_grad: expected a whole number, found 'two'"),
        ({"optim_conf": "{}"}, "page.yaml: train.optim_conf: expected a mapping"),
        ({"optim_conf": {"beats": 1}}, "^--optim_conf: unknown key 'beats'; did you mean 'betas'"),
    ],
)
def test_a_mistake_in_a_pages_train_block_shows_at_once(corpus, teacher_dir, tmp_path, write_page, train, message):
    page = write_page({"stages": [{"share": 1.0, "objectives": [{"objective": "kl"}]}], "train": train})
    more = ["--teacher", str(teacher_dir), "--kd_config", str(page)]
    with pytest.raises(UserError, match=message):
        asr_kd_train.main(corpus.options(tmp_path / "out", *more))
    assert not list((tmp_path / "out").glob("**/*.pth"))


def test_what_a_class_refuses_is_one_line(corpus, tmp_path):
    options = corpus.options(tmp_path / "out", "--encoder_conf", "attention_heads=3")
    with pytest.raises(UserError, match="cannot build the model of .*student.yaml: AssertionError"):
        asr_kd_train.main(options)
    content = yaml.safe_load(corpus.config().read_text())
    assert content["encoder_conf"]["attention_heads"] == 2
