"""ESPnet builds only those components of a teacher that load nothing, unless the user trusts the teacher's maker."""

import argparse
import inspect
import pickle
import re
import socket
import sys

import pytest
import tiny_asr
import torch
import yaml

from espnet_kd.bin import asr_kd_cache, asr_kd_export, asr_kd_inference, asr_kd_nbest, asr_kd_transcribe
from espnet_kd.cli import UserError
from espnet_kd.experiments import trust
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.offline import ASRTask
from espnet_kd.targets.online import OnlineTeacher

CHOICES = {c.name: c.classes for c in ASRTask.class_choices_list}
REFUSED = [
    (option, name)
    for option, names in {**CHOICES, **{k: trust._choices()[k] for k in ("adapter", "token_type")}}.items()
    for name in names
    if option in trust.LOADS_NOTHING and name.lower() not in trust.LOADS_NOTHING[option]
]
CONNECT = socket.socket.connect
#: Calls in the source of a component that loads, downloads or imports by name.
SUSPECT = (
    r"torch\.load|torch\.hub|from_pretrained|download|load_model|import_module|__import__|pickle|(?<![.\w])eval\(|urlopen"
)


def edited(directory, **changes):
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **changes}))


@pytest.fixture
def teacher_of(tmp_path):
    """A teacher whose config.yaml has been changed by hand."""

    def make(**changes):
        conf = tiny_asr.config()
        exp = tiny_asr.save(tiny_asr.build(conf), conf, tmp_path / "exp")
        edited(exp, **changes)
        return exp

    return make


@pytest.mark.parametrize("option, name", REFUSED)
def test_every_component_that_is_not_known_to_load_nothing_is_refused(teacher_of, option, name, monkeypatch):
    """All of ESPnet's components are tried, so that a new one of a later version is refused as well."""
    exp = teacher_of(**{option: name}, use_adapter=option == "adapter")
    monkeypatch.setattr(ASRTask, "build_model", lambda args: pytest.fail("it was built"))
    with pytest.raises(UserError, match=rf"config.yaml: .*{name}") as e:
        load_model(*find_experiment(exp))
    assert "ESPNET_KD_TRUST_PICKLE=1" in str(e.value) or "is not supported" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "option, name",
    [(o, n) for o, names in trust.LOADS_NOTHING.items() if o in CHOICES for n in names if n in CHOICES[o]
     and n not in ("global_mvn", "fused", "lora")],  # own statistics; the parts of "fused" are checked one by one
)
def test_what_is_taken_for_harmless_has_nothing_suspect_in_its_source(option, name):
    """A later version of ESPnet may change a component; if this test fails, its new source must be read."""
    source = inspect.getsource(CHOICES[option][name])
    assert not re.search(SUSPECT, source), (option, name)


def test_parts_of_a_fused_frontend_are_looked_at(teacher_of):
    parts = [{"frontend_type": "default"}, {"frontend_type": "s3prl", "frontend_conf": {"upstream": "x"}}]
    with pytest.raises(UserError, match=r"frontends\[1\].frontend_type: s3prl .*ESPNET_KD_TRUST_PICKLE=1"):
        load_model(*find_experiment(teacher_of(frontend="fused", frontend_conf={"frontends": parts})))


@pytest.mark.parametrize("value", [["s3prl"], {"a": 1}, 3])
def test_a_component_that_is_no_name(teacher_of, value):
    with pytest.raises(UserError, match="config.yaml: frontend: expected a name"):
        load_model(*find_experiment(teacher_of(frontend=value)))


@pytest.mark.parametrize("name", ["ESPNET_SSL", "Espnet_Ssl"])
def test_espnet_compares_names_in_lower_case_and_so_do_we(teacher_of, name):
    with pytest.raises(UserError, match="ESPNET_KD_TRUST_PICKLE=1"):
        load_model(*find_experiment(teacher_of(frontend=name)))


class Marking:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def marking(teacher_of, tmp_path):
    """A teacher that names a pickle of its own, which creates a file when it is loaded."""
    exp = teacher_of(frontend="espnet_ssl", frontend_conf={"frontend_conf": {"path_or_url": str(tmp_path / "ssl.pth")}})
    torch.save({"a": Marking(tmp_path / "ran")}, tmp_path / "ssl.pth")
    (tmp_path / "config.yaml").write_text("encoder: transformer\n")
    return exp


COMMANDS = {
    "inference": (asr_kd_inference, lambda e, d, o: ["--expdir", e, "--data_dir", d, "--output_dir", o]),
    "cache": (asr_kd_cache, lambda e, d, o: ["--teacher", e, "--data_dir", d, "--kd_config", "kl", "--output", o]),
    "nbest": (asr_kd_nbest, lambda e, d, o: ["--teacher", e, "--data_dir", d, "--output", o]),
    "export": (asr_kd_export, lambda e, d, o: ["--expdir", e, "--output_dir", o]),
    "export to onnx": (asr_kd_export, lambda e, d, o: ["--expdir", e, "--format", "onnx", "--output_dir", o]),
    "transcribe": (asr_kd_transcribe, lambda e, d, o: ["--model", e, "a.wav", "--output_dir", o]),
    "stream": (asr_kd_transcribe, lambda e, d, o: ["--model", e, "a.wav", "--streaming"]),
}


@pytest.mark.parametrize("command, options", COMMANDS.values(), ids=COMMANDS)
def test_no_command_runs_what_a_teacher_names(marking, corpus, tmp_path, command, options):
    argv = options(str(marking), str(corpus.dir / "valid"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="frontend: espnet_ssl .*ESPNET_KD_TRUST_PICKLE=1"):
        command.main(argv)
    assert not (tmp_path / "ran").exists()


def test_training_and_stock_decoding_do_not_either(marking, corpus, tmp_path):
    from espnet_kd.decode.stock import StockRecogniser

    with pytest.raises(UserError, match="ESPNET_KD_TRUST_PICKLE=1"):
        OnlineTeacher(marking)
    with pytest.raises(UserError, match="ESPNET_KD_TRUST_PICKLE=1"):
        StockRecogniser(*find_experiment(marking), ctc_weight=0.5)
    assert not (tmp_path / "ran").exists()


def test_trusted_it_is_espnets_to_load(marking, tmp_path, monkeypatch):
    monkeypatch.setenv("ESPNET_KD_TRUST_PICKLE", "1")
    with pytest.raises(UserError, match="cannot build the model"):
        load_model(*find_experiment(marking))
    # The configuration is not a valid SSL model, so ESPnet fails; the test shows that ESPnet was allowed to try.


def test_a_load_inside_build_model_takes_tensors_alone(tmp_path, monkeypatch):
    """This is the second line of defence, for a component that is wrongly taken for harmless."""
    torch.save({"a": Marking(tmp_path / "ran")}, tmp_path / "x.pth")
    with trust.guarded(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=False)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("ESPNET_KD_TRUST_PICKLE", "1")
    with trust.guarded():
        torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_nothing_is_downloaded_unless_asked_for(monkeypatch, trusted):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        if trusted:
            monkeypatch.setenv("ESPNET_KD_TRUST_PICKLE", "1")  # trust does not include the network
        with trust.guarded(), pytest.raises(UserError, match="would connect to .*ESPNET_KD_ALLOW_NETWORK=1"):
            socket.create_connection(address)
        monkeypatch.setenv("ESPNET_KD_ALLOW_NETWORK", "1")
        with trust.guarded():
            socket.create_connection(address).close()
    assert socket.socket.connect is CONNECT


OTHERS = {
    "OWSM-CTC": (dict(model="espnet_ctc", encoder="e_branchformer_ctc", preprocessor="s2t_ctc"), "s2t_train"),
    "OWSM": (dict(preprocessor="s2t"), "s2t_train"),
    "transducer task": (dict(encoder=None, joint_network_conf={}), "asr_transducer_train"),
    "enhancement": (dict(subtask_series=["enh", "asr"]), "enh_s2t_train"),
    "translation": (dict(src_token_list=["a"]), "st_train"),
    "several speakers": (dict(model="pit_espnet"), "model: pit_espnet"),
    "several speakers' encoder": (dict(encoder="transformer_multispkr"), "encoder: transformer_multispkr"),
    "no encoder": (dict(encoder=None), "without encoder"),
}


@pytest.mark.parametrize("changes, words", OTHERS.values(), ids=OTHERS)
def test_models_of_other_tasks_are_refused_in_one_line(teacher_of, changes, words):
    with pytest.raises(UserError, match=f"config.yaml: a model .*{words}.* is not supported; known are") as e:
        OnlineTeacher(teacher_of(**changes))
    assert "\n" not in str(e.value)


def test_a_language_model_is_no_teacher(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"lm": "transformer", "lm_conf": {}, "model": "lm"}))
    torch.save({"lm.x": torch.zeros(1)}, tmp_path / "latest.pth")
    with pytest.raises(UserError, match="a model without encoder or token_list is not supported"):
        load_model(*find_experiment(tmp_path))


def test_a_config_beyond_the_bounds_is_refused(teacher_of):
    exp = teacher_of()
    (exp / "config.yaml").write_text("a: " + "[" * 500 + "]" * 500)
    with pytest.raises(UserError, match="config.yaml, line 1: nested deeper"):
        find_experiment(exp)


def test_components_that_are_switched_off_are_no_components():
    args = argparse.Namespace(frontend=None, specaug="none", preencoder="null", encoder="rnn", token_list=["a"],
                              use_adapter=False, adapter="houlsby", model="espnet")  # fmt: skip
    trust.check_components(args, "x")
    assert "nltk" in sys.modules  # imported without its downloads (espnet_kd.offline)
