"""Training by the main method, in this process: three KD stages, an epoch each; then export and stock ESPnet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from espnet_kd.bin import asr_kd_export, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.checkpoints import read_checkpoint
from espnet_kd.distill.export import KD_OPTIONS
from espnet_kd.targets.experiment import find_experiment, load_model, load_state

STAGES = {1: "kd_stage1", 2: "kd_stage2", 3: ""}
each_stage = pytest.mark.parametrize("stage", STAGES)


def stats(directory, phase="train", epoch=1):
    return read_checkpoint(directory / "checkpoint.pth")["reporter"]["stats"][epoch][phase]


@each_stage
def test_each_stage_is_an_ordinary_espnet_run(trained, stage):
    directory = trained / STAGES[stage]
    record = json.loads((directory / "kd_stage.json").read_text())
    assert record["finished"] and (record["kd_stage"], record["epochs"]) == (stage, 1)
    for name in ("config.yaml", "checkpoint.pth", "1epoch.pth", "student.pth", "train.log"):
        assert (directory / name).is_file() or name == "train.log"
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["model"] == "espnet" and config["kd_stage"] == stage and config["max_epoch"] == 1
    criterion = "loss_kd" if stage < 3 else "loss_ctc"
    assert [list(c) for c in config["best_model_criterion"]] == [["valid", criterion, "min"]]
    assert (directory / f"valid.{criterion}.best.pth").exists()
    assert find_experiment(directory)[1].name.startswith(f"valid.{criterion}.")


@each_stage
@pytest.mark.parametrize("phase", ["train", "valid"])
def test_statistics_are_kept(trained, stage, phase):
    kept = stats(trained / STAGES[stage], phase)
    own = [{"blank_kl"}, {"blank_kl", "factorized_representation"}, {"factorized_kl"}][stage - 1]
    wanted = {"loss", "loss_ctc", "loss_kd", "nonblank_share", "agreement"} | {f"loss_{o}" for o in own}
    assert wanted <= set(kept)
    assert 0 < kept["nonblank_share"] < 1 and 0 <= kept["agreement"] <= 1
    assert all(np.isfinite(kept[k]) and kept[k] > 0 for k in wanted - {"agreement"})


def test_statistics_are_in_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard" / "valid"))
    events.Reload()
    tags = " ".join(events.Tags()["scalars"])
    for key in ("loss_ctc", "loss_factorized_kl", "loss_kd", "nonblank_share", "agreement"):
        assert key in tags


@each_stage
def test_what_goes_on_is_the_plain_student(trained, stage):
    directory = trained / STAGES[stage]
    student = load_state(directory / "student.pth")
    model = read_checkpoint(directory / "checkpoint.pth")["model"]
    heads = {k for k in model if k.startswith("kd_heads.")}
    assert bool(heads) == (stage == 2)
    assert set(model) - heads == set(student)
    assert all(torch.equal(student[k], model[k]) for k in student)
    load_model(directory / "config.yaml", directory / "student.pth")  # every key, no more


def test_each_stage_starts_from_the_one_before(trained, corpus, teacher_dir, tmp_path, monkeypatch):
    """With learning rate 0 a KD stage ends where it started."""
    out = tmp_path / "student"
    out.mkdir()
    os.symlink(trained / "kd_stage1", out / "kd_stage1")
    more = ["--teacher", str(teacher_dir), "--kd_config", "progressive_fkl", "--kd_stage", "2"]
    asr_kd_train.main(corpus.options(out, *more, "--optim_conf", "lr=0.0"))
    before, after = (load_state(out / f"kd_stage{k}" / "student.pth") for k in (1, 2))
    moving = ("running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(before[k], after[k]) for k in before if not k.endswith(moving))
    # And stage 1 itself did train.
    assert not torch.equal(before["ctc.ctc_lo.bias"], load_state(trained / "student.pth")["ctc.ctc_lo.bias"])


def test_a_finished_run_is_skipped(trained, corpus, teacher_dir, monkeypatch, caplog):
    monkeypatch.setattr("espnet_kd.tasks.asr_kd.ASRKDTask.main", lambda cmd: pytest.fail("trained again"))
    with caplog.at_level("INFO"):
        asr_kd_train.main(corpus.options(trained, "--teacher", str(teacher_dir), "--kd_config", "progressive_fkl"))
    assert caplog.text.count("is finished in") == 3


@pytest.mark.parametrize(
    "more, what",
    [
        (["--seed", "5"], "seed: 0 there, 5 now"),
        (["--max_epoch", "8"], "epochs: 1 there, 6 now"),
        (["--kd_stages", "1", "2"], "kd_stage: 3 there, 2 now"),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(trained, corpus, teacher_dir, more, what):
    before = (trained / "kd_stage.json").read_text()
    base = ["--teacher", str(teacher_dir), "--kd_config", "progressive_fkl"]
    with pytest.raises(UserError, match=f"other settings.*{what}.*choose another --output_dir"):
        asr_kd_train.main(corpus.options(trained, *base, *more))
    assert (trained / "kd_stage.json").read_text() == before


def test_two_stages_and_no_labels(corpus, teacher_dir, tmp_path, write_page):
    """--kd_stages leaves one out; a page without CTC trains on audio alone."""
    stage = {"share": 0.5, "ctc": {"weight": 0.0}, "objectives": [{"objective": "kl"}]}
    stage["train"] = {"best_model_criterion": [["valid", "loss_kd", "min"]]}
    page = {"init_from": "best", "stages": [stage, {**stage, "name": "left out"}]}
    more = ["--teacher", str(teacher_dir), "--kd_config", str(write_page(page)), "--kd_stages", "1", "--max_epoch", "2"]
    asr_kd_train.main(corpus.options(tmp_path / "out", *more, text=False))
    kept = stats(tmp_path / "out", epoch=2)
    assert "loss_ctc" not in kept and kept["loss"] == pytest.approx(kept["loss_kl"])
    assert not (tmp_path / "out" / "kd_stage1").exists()
    best = load_state(find_experiment(tmp_path / "out")[1])
    student = load_state(tmp_path / "out" / "student.pth")
    assert all(torch.equal(best[k], student[k]) for k in student)


def test_without_a_page_it_is_espnets_training(corpus, tmp_path):
    asr_kd_train.main(corpus.options(tmp_path / "out", "--max_epoch", "1"))
    assert (tmp_path / "out" / "1epoch.pth").is_file() and not (tmp_path / "out" / "kd_stage.json").exists()
    assert "loss_kd" not in stats(tmp_path / "out")


@pytest.fixture(scope="module")
def exported(trained):
    asr_kd_export.main(["--expdir", str(trained)])
    return trained / "export"


def test_export(exported, trained, corpus):
    from espnet_kd.offline import ASRTask

    assert sorted(p.name for p in exported.iterdir()) == ["config.yaml", "feats_stats.npz", "model.pth"]
    config = yaml.safe_load((exported / "config.yaml").read_text())
    assert not set(KD_OPTIONS) & set(config)
    assert config["normalize_conf"]["stats_file"] == str(exported / "feats_stats.npz")
    model, _ = ASRTask.build_model_from_file(str(exported / "config.yaml"), str(exported / "model.pth"), "cpu")
    state = load_state(find_experiment(trained)[1])
    assert model.state_dict().keys() == state.keys() == load_state(exported / "model.pth").keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert find_experiment(exported)[1] == exported / "model.pth"
    # Again, and from a stage with heads: whole, without them, nothing left over.
    asr_kd_export.main(["--expdir", str(trained), "--output_dir", str(exported)])
    out = exported.parent / "export2"
    asr_kd_export.main(["--expdir", str(trained / "kd_stage2" / "1epoch.pth"), "--output_dir", str(out)])
    assert not [k for k in load_state(out / "model.pth") if k.startswith("kd_heads")]
    assert not [p.name for p in trained.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_export_replaces_nothing_but_an_export(trained, tmp_path):
    """The experiment itself, given for where to write, would be gone."""
    before = sorted(trained.iterdir())
    with pytest.raises(UserError, match="student holds .*, which is no part of an export; give another --output_dir"):
        asr_kd_export.main(["--expdir", str(trained), "--output_dir", str(trained)])
    assert sorted(trained.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        asr_kd_export.main(["--expdir", str(trained), "--output_dir", str(tmp_path / "file")])


def test_export_says_what_is_missing(trained, tmp_path):
    for name in ("config.yaml", "1epoch.pth"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["normalize_conf"]["stats_file"] = "gone.npz"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="gone.npz, .*config.yaml.*, is missing"):
        asr_kd_export.main(["--expdir", str(tmp_path / "1epoch.pth")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1epoch.pth", "config.yaml"]


STOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "espnet_kd":
            raise ImportError("espnet_kd is not installed here")
sys.meta_path.insert(0, Blocker())
import nltk
nltk.download = lambda *a, **k: False
import numpy, soundfile, torch
from espnet2.bin.asr_inference import Speech2Text
export, wav, out = sys.argv[1:]
decode = Speech2Text(f"{export}/config.yaml", f"{export}/model.pth", ctc_weight=1.0, beam_size=2)
speech = soundfile.read(wav)[0].astype("float32")
text, tokens, *_ = decode(speech)[0]
assert isinstance(text, str)
with torch.no_grad():
    encoded, _ = decode.asr_model.encode(torch.from_numpy(speech)[None], torch.tensor([len(speech)]))
    numpy.save(out, decode.asr_model.ctc.ctc_lo(encoded).numpy())
assert not [m for m in sys.modules if m.startswith("espnet_kd")]
"""


def test_stock_espnet_decodes_the_export_without_this_package(exported, corpus, tmp_path):
    wav = corpus.dir / "valid" / "valid0.wav"
    command = [sys.executable, "-c", STOCK, str(exported), str(wav), str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    import soundfile

    model, _ = load_model(*find_experiment(exported.parent))
    speech = torch.from_numpy(soundfile.read(wav)[0].astype("float32"))[None]
    with torch.no_grad():
        ours = model.ctc.ctc_lo(model.encode(speech, torch.tensor([speech.size(1)]))[0])
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), ours.numpy(), atol=1e-5)
