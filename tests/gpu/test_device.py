"""Training, cache and decoding on a GPU, or on a CPU with ESPNET_KD_TEST_DEVICE=cpu; run by tests/gpu/run.sh."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import far_device
import pytest
import tiny_kd
import torch
from espnet2.train import trainer
from test_model import in_stage
from test_pages_end_to_end import directory, nbest, options  # noqa: F401 (fixtures)
from tiny_student import deeper

from espnet_kd.bin import asr_kd_cache, asr_kd_inference, asr_kd_train
from espnet_kd.distill.page import list_pages, load_page
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.loading import BROUGHT
from espnet_kd.targets.online import OnlineTeacher

CPU = os.environ.get("ESPNET_KD_TEST_DEVICE") == "cpu"
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CPU and not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"
    ),
]
needs_cuda = pytest.mark.skipif(CPU, reason="needs CUDA: left out with --cpu")
NGPU = ["--ngpu", "0" if CPU else "1"]
AMP = [] if CPU else ["--use_amp", "true"]


def finite(out):
    """Check that the training in ``out`` is finished, and its weights and losses are finite; return the weights."""
    assert json.loads((out / "kd_stage.json").read_text())["finished"]
    state = torch.load(out / "student.pth", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state.values())
    for epoch in read_checkpoint(out / "checkpoint.pth")["reporter"]["stats"].values():
        assert torch.tensor([v for k, v in epoch["train"].items() if k.startswith("loss")]).isfinite().all()
    return state


@pytest.mark.parametrize("page", list_pages())
def test_training_by_every_page(corpus, directory, teacher_dir, nbest, page):  # noqa: F811
    """Each KD stage is an epoch of two steps, in bf16 if the GPU has it, in float32 on a CPU."""
    command = options(corpus, directory, page, teacher_dir, nbest)
    command[command.index("--max_epoch") + 1] = str(len(load_page(page).stages))
    asr_kd_train.main([*command, *NGPU, *AMP])
    finite(directory / page)


@needs_cuda
def test_training_in_fp16(corpus, tmp_path, teacher_dir, nbest, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer, "autocast_args", {"dtype": torch.float16})
    asr_kd_train.main([*options(corpus, tmp_path, "progressive_fkl", teacher_dir, nbest), *NGPU, *AMP])
    finite(tmp_path / "progressive_fkl")


def test_cache_is_written_and_trained_from(corpus, tmp_path, teacher_dir, thirds):
    data = [str(corpus.dir / name) for name in ("train", "valid")]
    command = ["--teacher", str(teacher_dir), "--data_dir", *data, "--kd_config", str(thirds), "--top_k", "9"]
    targets = []
    for name, device in (("targets", NGPU), ("on_cpu", ["--ngpu", "0"])):
        asr_kd_cache.main([*command, "--output", str(tmp_path / name), *device])
        targets.append(CachedTeacher(tmp_path / name).targets(["train0", "valid0"], None, None).logits.log_blank.exp())
    assert (targets[0] - targets[1]).abs().mean() < 0.01  # on a GPU the encoder is in bf16
    for workers in ("0", "2"):
        out = tmp_path / workers
        more = ["--target_cache", str(tmp_path / "targets"), "--kd_config", str(thirds), "--num_workers", workers]
        asr_kd_train.main([*corpus.options(out, *more), *NGPU, *AMP])
        finite(out)


def test_killed_and_gone_on(corpus, tmp_path, teacher_dir, thirds):
    out = tmp_path / "exp"
    command = [*corpus.options(out, "--teacher", str(teacher_dir), "--kd_config", str(thirds), max_epoch=30), *NGPU]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "espnet_kd.bin.asr_kd_train", *command], stdout=log, stderr=log, env=environment
        )
        deadline = time.monotonic() + 200
        while not (out / "2epoch.pth").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert not (out / "30epoch.pth").exists()
    asr_kd_train.main(command)
    finite(out)


@pytest.mark.parametrize("beam", [1, 5], ids=["greedy", "beam"])
def test_decoding(corpus, tmp_path, teacher_dir, beam):
    """The texts are the same as on a CPU."""
    common = ["--expdir", str(teacher_dir), "--data_dir", str(corpus.dir / "valid"), "--beam_size", str(beam)]
    found = []
    for name, more in (("device", [*NGPU, "--nj", "2"]), ("cpu", ["--ngpu", "0"])):
        asr_kd_inference.main([*common, "--output_dir", str(tmp_path / name), *more])
        found.append((tmp_path / name / "1best_recog" / "text").read_text())
    assert found[0] == found[1] and len(found[0].split()) > 3


@contextlib.contextmanager
def waits():
    """Collect the host's waits for the GPU, as torch reports them, each with its owner."""
    found = []

    def note(message, *args, **kwargs):
        if "synchronizing CUDA operation" in str(message):
            found.append(far_device.FarDevice._wait(message, "ctc" if "ctc_loss" in stack() else ""))

    def stack():
        return {frame.name for frame in traceback.extract_stack()}

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_a_wait_is_seen():
    """Without this the next test could pass because nothing is noted."""
    with waits() as noted:
        torch.ones(1, device="cuda").item()
    assert noted


@needs_cuda
@pytest.mark.parametrize("name", list_pages())
def test_no_wait_of_ours_in_a_step(name, teacher_dir, tmp_path):
    """The check covers a whole step, as tests/distill/test_waits.py does on a stand-in for a device."""
    page = load_page(name)
    if name == "layer_pruning":
        teacher_dir = tiny_kd.save_teacher(tmp_path / "teacher", output_size=16, num_blocks=6)
    for stage in page.stages:
        teacher = OnlineTeacher(teacher_dir, 1e9) if page.teacher == "required" else None
        batch = tiny_kd.batch()
        found = {utt_id: [(-1.0, (2, 3)), (-2.0, (2, 4, 3))] for utt_id in batch["utt_id"]}
        model = in_stage(page, stage.number, teacher, conf=deeper(), nbest=found).cuda()
        batch[BROUGHT] = {"text_lengths": batch["text_lengths"].tolist()}
        batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for number in range(3):  # the first two compile, and fill the teacher's memory
            with waits() if number == 2 else contextlib.nullcontext([]) as noted:
                loss = model(**batch)[0]
                loss.sum().backward()
        assert not [w for w in noted if w.owner == "espnet_kd"], noted
