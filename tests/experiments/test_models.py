"""An experiment is found and loaded, and anything else is refused."""

import functools
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import tiny_asr
import torch
import yaml

from espnet_kd.cli import UserError
from espnet_kd.experiments.models import find_experiment, load_model, load_state, student_only

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


PHASES = [("train", "loss"), ("valid", "loss"), ("train", "acc"), ("valid", "acc")]  # ESPnet's default, in its order
FOUR = [("train", "loss", "min"), ("valid", "loss", "min"), ("train", "acc", "max"), ("valid", "acc", "max")]


@pytest.mark.parametrize("end", ["ave", "ave_10best", "best"])
def test_validation_chooses_before_training(tmp_path, end):
    """ESPnet's default criteria begin with the training loss, whose best model may be overfitted."""
    experiment(tmp_path, [f"{phase}.{key}.{end}.pth" for phase, key in PHASES], FOUR)
    assert find_experiment(tmp_path)[1].name == f"valid.loss.{end}.pth"
    for left in ("valid.acc", "train.loss", "train.acc"):
        find_experiment(tmp_path)[1].unlink()
        assert find_experiment(tmp_path)[1].name == f"{left}.{end}.pth"


@pytest.mark.parametrize("criteria", [3, "valid", [3], [["valid"]], {"valid": "loss"}])
def test_criteria_that_are_none(tmp_path, criteria):
    experiment(tmp_path, [LATEST])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"best_model_criterion": criteria}))
    with pytest.raises(UserError, match="config.yaml: best_model_criterion: expected a list"):
        find_experiment(tmp_path)


def test_a_criterion_names_no_other_directory(tmp_path):
    experiment(tmp_path / "exp", [LATEST], criteria=[["../valid", "loss", "min"], ["valid", "../../x", "min"]])
    (tmp_path / "valid.loss.ave.pth").touch()
    assert find_experiment(tmp_path / "exp")[1].name == LATEST


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
    """An object that calls ``call`` with ``args`` when it is unpickled."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


WRITERS = {
    "torch.save": lambda x, f: torch.save({"a": torch.zeros(1), "b": x}, f),
    "torch.save, old": lambda x, f: torch.save({"b": x}, f, _use_new_zipfile_serialization=False),
    "pickle": lambda x, f: f.write_bytes(pickle.dumps(x)),
    "pickle, protocol 0": lambda x, f: f.write_bytes(pickle.dumps(x, protocol=0)),
    "pickle, protocol 2": lambda x, f: f.write_bytes(pickle.dumps({"a": x}, protocol=2)),
}
CALLS = {
    "os.system": lambda mark: (os.system, f"touch {mark}"),  # torch blocks this module
    "open": lambda mark: (open, str(mark), "w"),
    "eval": lambda mark: (eval, f"open({str(mark)!r}, 'w')"),
    "partial": lambda mark: (functools.partial, open, str(mark), "w"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, write, call):
    """The message speaks of code and not of damage, and leaves out torch's advice on how to run the code."""
    mark, file = tmp_path / "ran", tmp_path / "x.pth"
    write(Malicious(*call(mark)), file)
    with pytest.raises(UserError, match="x.pth holds more than tensors.*could run code.*ESPNET_KD_TRUST_PICKLE=1") as e:
        load_state(file)
    assert not mark.exists()
    assert not any(word in str(e.value) for word in ("damaged", "weights_only", "safe_globals", "\n"))


def test_half_of_a_pickle_with_code_is_damaged(tmp_path):
    content = pickle.dumps(Malicious(open, str(tmp_path / "ran"), "w"))
    (tmp_path / "x.pth").write_bytes(content[:-4])
    with pytest.raises(UserError, match="cannot load .*x.pth: .*is the file damaged") as e:
        load_state(tmp_path / "x.pth")
    assert "weights_only" not in str(e.value)


def test_a_file_that_unpacks_to_many_times_its_size_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as f:
        f.writestr("x/data/0", bytes(200_000_000))
    with pytest.raises(UserError, match="x.pth has 0.2 MB and unpacks to 200 MB"):
        load_state(tmp_path / "x.pth")


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


@pytest.mark.parametrize("there", ["nothing", "beside", "another recipe's", "no statistics", "a directory"])
def test_the_values_in_the_model_are_the_statistics(tmp_path, monkeypatch, there):
    """config.yaml names a file relative to another directory. A file at that path in this one must not be opened."""
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
    gone = tmp_path / "gone/feats_stats.npz"
    gone.parent.mkdir()
    if there == "beside":
        np.savez(elsewhere / stats.name, count=1, sum=np.ones(80), sum_square=np.full(80, 9.0))
    elif there == "another recipe's":
        np.savez(gone, count=1, sum=np.ones(80), sum_square=np.full(80, 9.0))
    elif there == "no statistics":
        gone.write_text("root:x:0:0")
    elif there == "a directory":
        gone.mkdir()
    monkeypatch.chdir(tmp_path)
    loaded, args = load_model(*find_experiment(elsewhere))
    assert torch.equal(loaded.normalize.mean, model.normalize.mean)
    assert torch.equal(loaded.normalize.std, model.normalize.std)
    assert args.normalize_conf["stats_file"] == "gone/feats_stats.npz"


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_model_without_its_statistics(saved, tmp_path, name):
    directory = saved[1]
    config = directory / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content.update(normalize="global_mvn", normalize_conf={"stats_file": "x.npz"})
    config.write_text(yaml.safe_dump(content))
    values = {"normalize.mean": torch.zeros(40), "normalize.std": torch.ones(40)}
    del values[f"normalize.{name}"]
    change(directory, lambda s: s.update(values))
    with pytest.raises(UserError, match="does not fit .*config.yaml: normalize: global_mvn, but the file lacks"):
        load_model(*find_experiment(directory))


def test_a_file_of_deepspeed(saved):
    model, directory = saved
    torch.save({"module": model.state_dict(), "epoch": 3}, directory / AVE)
    loaded, _ = load_model(*find_experiment(directory))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("encoder", ["rnn", "vgg_rnn"])
def test_nothing_is_dropped_out_of_a_loaded_model(tmp_path, encoder):
    """ESPnet's RNNP applies dropout in eval mode too, so a teacher would give other posteriors at every call."""
    conf = tiny_asr.config()
    conf.update(encoder=encoder, encoder_conf=dict(num_layers=2, hidden_size=8, output_size=12, dropout=0.5))
    exp = tiny_asr.save(tiny_asr.build(conf, sharpen=5.0), conf, tmp_path)
    model, _ = load_model(*find_experiment(exp))
    speech, lengths = torch.from_numpy(tiny_asr.audio(1.0, 1))[None], torch.tensor([16000])
    first, second = (model.encode(speech.clone(), lengths)[0] for _ in range(2))
    assert torch.equal(first, second)
