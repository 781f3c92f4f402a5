"""Finding and loading an experiment, and refusing what is not one."""

import pickle
import re

import numpy as np
import pytest
import tiny_asr
import torch
import yaml

from espnet_kd.cli import UserError
from espnet_kd.targets.experiment import find_experiment, load_model, load_state, student_only

AVE, AVE_N, BEST = "valid.loss.ave.pth", "valid.loss.ave_10best.pth", "valid.loss.best.pth"
SECOND, LATEST, MODEL = "train.acc.ave.pth", "latest.pth", "model.pth"
ORDER = [MODEL, AVE, AVE_N, BEST, SECOND, LATEST]


def experiment(directory, files, criteria=(("valid", "loss", "min"), ("train", "acc", "max"))):
    directory.mkdir(exist_ok=True)
    content = {"best_model_criterion": [list(c) for c in criteria]} if criteria else {"encoder": "conformer"}
    (directory / "config.yaml").write_text(yaml.safe_dump(content))
    for name in files:
        (directory / name).touch()
    return directory


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_order_of_the_default_file(tmp_path, first):
    experiment(tmp_path, ORDER[first:] + ["3epoch.pth", "checkpoint.pth", "student.pth"])
    assert find_experiment(tmp_path) == (tmp_path / "config.yaml", tmp_path / ORDER[first])
    assert find_experiment(str(tmp_path))[1].name == ORDER[first]


def test_an_explicit_file(tmp_path):
    experiment(tmp_path, ORDER + ["3epoch.pth"])
    assert find_experiment(tmp_path / "3epoch.pth") == (tmp_path / "config.yaml", tmp_path / "3epoch.pth")


def test_without_criteria_the_latest(tmp_path):
    experiment(tmp_path, [LATEST], criteria=())
    assert find_experiment(tmp_path)[1].name == LATEST


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=f"no experiment at {tmp_path / 'nowhere'}"):
        find_experiment(tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.yaml is missing"):
        find_experiment(tmp_path)
    with pytest.raises(UserError, match="config.yaml is missing"):
        find_experiment(tmp_path / "x.pth")
    experiment(tmp_path, ["3epoch.pth"])
    with pytest.raises(UserError, match="no finished model.*valid.loss.ave.pth|no finished model.*model.pth"):
        find_experiment(tmp_path)
    with pytest.raises(UserError, match="4epoch.pth"):
        find_experiment(tmp_path / "4epoch.pth")


@pytest.mark.parametrize("content", ["a: [", "- a\n- b\n", "just words"])
def test_an_unreadable_config(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / LATEST).touch()
    with pytest.raises(UserError, match="config.yaml"):
        find_experiment(tmp_path)


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1), "b": Malicious(mark)}, file)
    with pytest.raises(UserError, match="x.pth holds more than tensors .*could run code.*ESPNET_KD_TRUST_PICKLE=1"):
        load_state(file)
    file.write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(UserError, match="cannot load.*x.pth"):
        load_state(file)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_damaged_file_is_refused(tmp_path, keep):
    file = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1000)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match="cannot load.*x.pth"):
        load_state(file)


def test_files_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match="cannot load"):
        load_state(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    with pytest.raises(UserError, match="cannot load"):
        load_state(tmp_path / "text.pth")
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="is not a model"):
        load_state(tmp_path / "checkpoint.pth")


def test_student_only():
    assert list(student_only({"kd_heads.x.weight": 1, "encoder.a": 2, "encoder.kd_heads.a": 3})) == [
        "encoder.a",
        "encoder.kd_heads.a",
    ]


@pytest.fixture
def saved(tmp_path):
    conf = tiny_asr.config()
    model = tiny_asr.build(conf)
    return model, tiny_asr.save(model, conf, tmp_path / "exp")


def change(directory, edit):
    file = directory / AVE
    state = torch.load(file)
    edit(state)
    torch.save(state, file)


def test_load_model(saved):
    model, directory = saved
    change(directory, lambda s: s.update({"kd_heads.a.weight": torch.zeros(2)}))
    loaded, args = load_model(*find_experiment(directory))
    assert not loaded.training and args.token_list == tiny_asr.TOKENS
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.pop("ctc.ctc_lo.bias"), "Missing key.*ctc.ctc_lo.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
        (lambda s: s.update({"ctc.ctc_lo.bias": torch.zeros(3)}), "size mismatch.*ctc.ctc_lo.bias"),
    ],
)
def test_keys_must_match(saved, edit, message):
    change(saved[1], edit)
    with pytest.raises(UserError) as e:
        load_model(*find_experiment(saved[1]))
    assert re.search(f"does not fit.*{message}", str(e.value), flags=re.DOTALL)


def test_a_config_that_builds_nothing(saved):
    config = saved[1] / "config.yaml"
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "encoder": "conformr"}))
    with pytest.raises(UserError, match="cannot build the model of .*conformr"):
        load_model(*find_experiment(saved[1]))


@pytest.mark.parametrize("beside", [True, False])
def test_statistics_of_a_recipe_that_lies_elsewhere(tmp_path, monkeypatch, beside):
    """config.yaml names them relative to a directory this is not: the file beside it serves, or the model's values."""
    stats = tmp_path / "stats" / "feats_stats.npz"
    stats.parent.mkdir()
    rng = np.random.default_rng(0)
    total = rng.normal(size=40)
    np.savez(stats, count=4, sum=total, sum_square=total**2 + 1.0)
    conf = tiny_asr.config()
    conf.update(normalize="global_mvn", normalize_conf={"stats_file": str(stats)})
    model = tiny_asr.build(conf)
    elsewhere = tmp_path / "elsewhere"
    tiny_asr.save(model, {**conf, "normalize_conf": {"stats_file": "gone/feats_stats.npz"}}, elsewhere)
    if beside:
        (elsewhere / stats.name).write_bytes(stats.read_bytes())
    monkeypatch.chdir(tmp_path)
    loaded, args = load_model(*find_experiment(elsewhere))
    assert torch.equal(loaded.normalize.mean, model.normalize.mean)
    assert torch.equal(loaded.normalize.std, model.normalize.std)
    assert args.normalize_conf["stats_file"] == "gone/feats_stats.npz"
