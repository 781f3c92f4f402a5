"""Training with the main method in this process, one epoch per KD stage; then export and decoding by stock ESPnet."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from espnet_kd.bin import asr_kd_export, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.options import KD_OPTIONS
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.experiments.models import find_experiment, load_model, load_state, student_only
from espnet_kd.tasks.asr_kd import ASRKDTask

each_stage = pytest.mark.parametrize("stage", [1, 2, 3])


def stats(directory, phase="train", epoch=1):
    return read_checkpoint(directory / "checkpoint.pth")["reporter"]["stats"][epoch][phase]


def test_it_is_an_ordinary_espnet_run(trained):
    record = json.loads((trained / "kd_stage.json").read_text())
    assert record["finished"] and (record["finished_kd_stage"], record["epochs"]) == (3, 3)
    assert [(s["kd_stage"], s["epochs"]) for s in record["stages"]] == [(1, [1, 1]), (2, [2, 2]), (3, [3, 3])]
    for name in ("config.yaml", "checkpoint.pth", "3epoch.pth", "student.pth", "experiment.json"):
        assert (trained / name).is_file()
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"] == "espnet" and config["kd_stage"] == 3 and config["max_epoch"] == 3
    assert [list(c) for c in config["best_model_criterion"]] == [["valid", "loss_ctc", "min"]]
    assert (trained / "valid.loss_ctc.best.pth").exists()
    assert find_experiment(trained)[1].name.startswith("valid.loss_ctc.")


@each_stage
@pytest.mark.parametrize("phase", ["train", "valid"])
def test_statistics_are_kept(trained, stage, phase):
    """Training has the losses of its KD stage; validation has those of the last KD stage in every epoch."""
    kept = stats(trained, phase, stage)
    trained_with = [
        {"blank_kl"},
        {"blank_kl", "factorized_representation"},
        {"blank_kl", "factorized_representation", "factorized_kl"},  # blank_kl is ramped to 0
    ]
    own = trained_with[2 if phase == "valid" else stage - 1]
    names = {k for k in kept if k.startswith("loss_")} - {"loss_scale"}  # loss_scale is ESPnet's
    assert names == {f"loss_{o}" for o in own} | {"loss_ctc", "loss_kd"}
    assert 0 < kept["nonblank_share"] < 1 and 0 <= kept["agreement"] <= 1
    assert all(np.isfinite(v) and v > 0 for k, v in kept.items() if k.startswith("loss"))


def test_statistics_are_in_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard" / "valid"))
    events.Reload()
    tags = " ".join(events.Tags()["scalars"])
    for key in ("loss_ctc", "loss_factorized_kl", "loss_kd", "nonblank_share", "agreement"):
        assert key in tags


@each_stage
def test_what_a_kd_stage_ends_with_is_a_plain_student(trained, stage):
    directory = trained if stage == 3 else trained / f"kd_stage{stage}"
    student = load_state(directory / "student.pth")
    model = read_checkpoint(trained / "checkpoint.pth")["model"]
    heads = {k for k in model if k.startswith("kd_heads.")}
    assert heads and set(model) - heads == set(student)
    assert all(torch.equal(student[k], model[k]) for k in student) == (stage == 3)
    assert (directory / "config.yaml").read_text() == (trained / "config.yaml").read_text()
    load_model(directory / "config.yaml", directory / "student.pth")  # fails on missing or additional keys
    if stage < 3:
        assert sorted(p.name for p in directory.iterdir()) == ["config.yaml", "student.pth"]
        assert find_experiment(directory)[1] == directory / "student.pth"


def test_each_stage_did_train(trained):
    students = [load_state(trained / d / "student.pth")["ctc.ctc_lo.bias"] for d in ("kd_stage1", "kd_stage2", ".")]
    assert not any(torch.equal(students[a], students[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_finished_run_is_skipped(trained, corpus, teacher_dir, thirds, monkeypatch, caplog):
    monkeypatch.setattr("espnet_kd.tasks.asr_kd.ASRKDTask.main", lambda cmd: pytest.fail("trained again"))
    with caplog.at_level("INFO"):
        asr_kd_train.main(corpus.options(trained, "--teacher", str(teacher_dir), "--kd_config", str(thirds)))
    assert "KD stage 3 is finished in" in caplog.text


@pytest.mark.parametrize(
    "more, what",
    [
        (["--seed", "5"], "seed: 0 → 5"),
        (["--max_epoch", "8"], "epochs: 3 → 8"),
        (["--kd_stages", "1", "2"], r"kd_stages: .1, 2, 3. → .1, 2."),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(trained, corpus, teacher_dir, thirds, more, what):
    before = (trained / "kd_stage.json").read_text()
    base = ["--teacher", str(teacher_dir), "--kd_config", str(thirds)]
    with pytest.raises(UserError, match=f"other settings.*{what}.*choose another --output_dir"):
        asr_kd_train.main(corpus.options(trained, *base, *more))
    assert (trained / "kd_stage.json").read_text() == before


def test_two_stages_and_no_labels(corpus, teacher_dir, tmp_path, write_page):
    """--kd_stages leaves out a KD stage, and a page without CTC trains on audio alone."""
    stage = {"share": 0.5, "ctc": {"weight": 0.0}, "objectives": [{"objective": "kl"}]}
    page = {"stages": [stage, {**stage, "name": "left out"}]}
    more = ["--teacher", str(teacher_dir), "--kd_config", str(write_page(page)), "--kd_stages", "1", "--max_epoch", "2"]
    asr_kd_train.main(corpus.options(tmp_path / "out", *more, text=False))
    kept = stats(tmp_path / "out", epoch=2)
    assert "loss_ctc" not in kept and kept["loss"] == pytest.approx(kept["loss_kl"])
    assert not (tmp_path / "out" / "kd_stage1").exists()
    assert (tmp_path / "out" / "valid.loss_kd.best.pth").exists()
    last = load_state(tmp_path / "out" / "2epoch.pth")
    student = load_state(tmp_path / "out" / "student.pth")
    assert all(torch.equal(last[k], student[k]) for k in student)


def test_the_optimizer_is_freed_at_the_end(corpus, teacher_dir, tmp_path, monkeypatch):
    """Its moments are twice the size of the student, and a notebook goes on after a training."""
    kept, build = [], ASRKDTask.build_optimizers.__func__

    def remembered(cls, args, model):
        optimizers = build(cls, args, model)
        kept.extend(map(weakref.ref, optimizers))
        return optimizers

    monkeypatch.setattr(ASRKDTask, "build_optimizers", classmethod(remembered))
    options = ["--teacher", str(teacher_dir), "--kd_config", "kl", "--use_tensorboard", "false"]
    asr_kd_train.main(corpus.options(tmp_path / "out", *options, max_epoch=1))
    gc.collect()
    assert kept and all(ref() is None for ref in kept)


def test_a_dry_run_leaves_the_directory_as_it_was(corpus, teacher_dir, tmp_path):
    """It has the options of the page, such as the criterion, which without transcripts cannot be CTC's."""
    kd = ["--teacher", str(teacher_dir), "--kd_config", "label_free"]
    for more, text in (([], True), (kd, False)):
        out = tmp_path / f"out{len(more)}"
        command = corpus.options(out, *more, "--max_epoch", "1", text=text)
        asr_kd_train.main([*command, "--dry_run", "true"])
        assert [p.name for p in out.iterdir()] == [".lock"]
        asr_kd_train.main(command)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        asr_kd_train.main([*command, "--dry_run", "true", "--num_workers", "1"])
        assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_without_a_page_it_is_espnets_training(corpus, tmp_path):
    asr_kd_train.main(corpus.options(tmp_path / "out", "--max_epoch", "1"))
    assert (tmp_path / "out" / "1epoch.pth").is_file() and not (tmp_path / "out" / "kd_stage.json").exists()
    assert "loss_kd" not in stats(tmp_path / "out")


@pytest.mark.parametrize("page", [None, "kl"])
def test_statistics_of_other_features_are_refused_by_name(corpus, teacher_dir, tmp_path, page):
    """ESPnet would fail in the first step, with an error about tensor sizes."""
    more = ["--kd_config", page, "--teacher", str(teacher_dir)] if page else []
    with pytest.raises(UserError, match=r"feats_stats.npz has statistics of 40 .* makes 32 .*n_mels") as caught:
        asr_kd_train.main(corpus.options(tmp_path / "exp", *more, "--frontend_conf", "n_mels=32"))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def exported(trained):
    asr_kd_export.main(["--expdir", str(trained)])
    return trained / "export"


def test_export(exported, trained, corpus):
    from espnet_kd.offline import ASRTask

    files = ["README.md", "config.yaml", "decode.yaml", "feats_stats.npz", "model.pth"]
    assert sorted(p.name for p in exported.iterdir()) == files
    config = yaml.safe_load((exported / "config.yaml").read_text())
    assert not set(KD_OPTIONS) & set(config)
    state = student_only(load_state(find_experiment(trained)[1]))
    # In stock ESPnet the normalisation is a layer before the encoder; load_model gives the original student again.
    stock, _ = ASRTask.build_model_from_file(str(exported / "config.yaml"), str(exported / "model.pth"), "cpu")
    model, _ = load_model(exported / "config.yaml", exported / "model.pth")
    kept = {k for k in state if not k.startswith("normalize.")}
    assert stock.state_dict().keys() == kept | {f"preencoder.linear_out.{name}" for name in ("weight", "bias")}
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for m in (stock, model) for k, v in m.state_dict().items() if k in state)
    assert find_experiment(exported)[1] == exported / "model.pth"
    # A second export, exports of a model with heads and of the student of KD stage 2: complete, without heads, and no
    # temporary files are left.
    asr_kd_export.main(["--expdir", str(trained), "--output_dir", str(exported)])
    out = exported.parent / "export2"
    assert any(k.startswith("kd_heads") for k in load_state(trained / "3epoch.pth"))
    for model in ("3epoch.pth", "kd_stage2"):
        asr_kd_export.main(["--expdir", str(trained / model), "--output_dir", str(out)])
    assert load_state(out / "model.pth").keys() == load_state(exported / "model.pth").keys()
    assert not [k for k in load_state(out / "model.pth") if k.startswith("kd_heads")]
    assert not [p.name for p in trained.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_export_replaces_nothing_but_an_export(trained, tmp_path):
    """If the output directory is the experiment itself, replacing it would delete the experiment."""
    before = sorted(trained.iterdir())
    with pytest.raises(UserError, match="student holds .*, which is no part of an export; give another --output_dir"):
        asr_kd_export.main(["--expdir", str(trained), "--output_dir", str(trained)])
    assert sorted(trained.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        asr_kd_export.main(["--expdir", str(trained), "--output_dir", str(tmp_path / "file")])


def test_export_says_what_is_missing(trained, tmp_path):
    for name in ("config.yaml", "student.pth"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config.update(token_type="bpe", bpemodel="gone/bpe.model")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="gone/bpe.model of .*config.yaml does not exist; lay it beside config.yaml"):
        asr_kd_export.main(["--expdir", str(tmp_path / "student.pth")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "student.pth"]


STOCK = """
import sys
import weakref
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
