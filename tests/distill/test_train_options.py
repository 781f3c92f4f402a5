"""The ``train:`` block of a page may set how a student is trained, but nothing that names a file."""

import pytest
import yaml

from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.page import METHODS_DIR
from espnet_kd.distill.train_options import ALLOWED, RESERVED, check_train_options

WHERE = "page.yaml: train"
ACTIONS = {a.dest: a for a in asr_kd_train.get_parser()._actions}


@pytest.mark.parametrize("option", sorted(ACTIONS))
def test_an_option_is_a_pages_or_refused(option):
    """The test covers all options of ESPnet's parser, so that a new option of a later version is refused."""
    if option in ALLOWED:
        assert check_train_options({option: 1}, WHERE) == {option: 1}
    else:
        with pytest.raises(UserError, match=rf"^page.yaml: train: {option} cannot be set by a page"):
            check_train_options({option: 1}, WHERE)


def test_every_option_that_is_allowed_exists():
    assert set(ALLOWED) <= set(ACTIONS) and set(RESERVED) <= set(ACTIONS) and not set(ALLOWED) & set(RESERVED)


#: Options that could make a training open, unpickle, download or write other files.
DANGEROUS = (
    *("init_param", "train_data_path_and_name_and_type", "valid_data_path_and_name_and_type", "train_shape_file"),
    *("valid_shape_file", "token_list", "bpemodel", "non_linguistic_symbols", "rir_scp", "noise_scp", "frontend"),
    *("encoder", "decoder", "preencoder", "postencoder", "normalize_conf", "preprocessor_conf", "g2p", "cleaner"),
    *("wandb_project", "use_wandb", "dist_init_method", "log_level", "write_collected_feats"),
    *("deepspeed_config", "pretrain_path", "adapter", "model_conf", "teacher", "target_cache", "nbest", "ngpu"),
)


@pytest.mark.parametrize("option", DANGEROUS)
def test_what_names_files_is_not_a_pages(option):
    with pytest.raises(UserError, match=f"train: {option} cannot be set by a page"):
        check_train_options({option: "x"}, WHERE)


@pytest.mark.parametrize("page", sorted(METHODS_DIR.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_page_of_the_package_holds_what_is_allowed(page):
    check_train_options(yaml.safe_load(page.read_text()).get("train", {}), WHERE)


def test_the_nearest_name_is_given():
    with pytest.raises(UserError, match="train: grad_clipp cannot be set by a page; did you mean 'grad_clip'"):
        check_train_options({"grad_clipp": 1}, WHERE)
    with pytest.raises(UserError, match="train: max_epoch cannot be set by a page; give it on the command line$"):
        check_train_options({"max_epoch": 1}, WHERE)


GOOD = {
    "best_model_criterion": [["valid", "loss_kd", "min"]],
    "optim": "adam",
    "optim_conf": {"lr": 0.001, "betas": [0.9, 0.98]},
    "unused_parameters": True,
    "patience": None,
    "specaug_conf": {"time_mask_width_ratio_range": [0.0, 0.05]},
    "freeze_param": ["encoder.embed", "ctc"],
}


def test_what_is_allowed_comes_back():
    assert check_train_options(GOOD, WHERE) == GOOD and check_train_options({}, WHERE) == {}


@pytest.mark.parametrize(
    "content, message",
    [
        ([], r"page.yaml: train: expected a mapping"),
        ({3: 1}, "train: 3 cannot be set by a page"),
        ({"optim": "/tmp/x.pth"}, r"train.optim: '/tmp/x.pth' looks like a path"),
        ({"freeze_param": ["encoder", "../x"]}, r"train.freeze_param\[1\]: '../x' looks like a path"),
        ({"freeze_param": ["--init_param", "x.pth"]}, r"freeze_param\[0\]: '--init_param' looks like"),
        ({"optim_conf": {"lr": {"a": {"b": {"c": 1}}}}}, r"train.optim_conf.lr.a: expected a word"),
        ({"optim_conf": {"lr": "a\nb"}}, "train.optim_conf.lr: .*looks like"),
        ({"grad_clip": b"x"}, "train.grad_clip: expected a word, a number or a list"),
    ],
)
def test_other_values_are_refused(content, message):
    with pytest.raises(UserError, match=message):
        check_train_options(content, WHERE)
