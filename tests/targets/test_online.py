"""The online teacher, which runs beside the student in training."""

import shutil

import pytest
import tiny_asr
import tiny_kd
import torch

from espnet_kd.cli import UserError
from espnet_kd.inference import encode
from espnet_kd.targets.online import OnlineTeacher, sampling_rate
from espnet_kd.targets.teacher import Needs


def test_targets_are_what_the_model_says(teacher_dir):
    from espnet_kd.experiments.models import find_experiment, load_model

    teacher = OnlineTeacher(teacher_dir)
    model, _ = load_model(*find_experiment(teacher_dir))
    batch = tiny_kd.batch()
    got = teacher.targets(batch["utt_id"], batch["speech"], batch["speech_lengths"], ["encoder", "encoder.2"])
    with torch.no_grad():
        out, lengths = model.encode(batch["speech"], batch["speech_lengths"])
    assert torch.equal(got.logits, model.ctc.ctc_lo(out))
    assert torch.equal(got.hidden["encoder"], out) and got.hidden["encoder.2"].shape == out.shape
    assert torch.equal(got.lengths, lengths)
    assert got.frame_shift == pytest.approx(0.04)
    assert (teacher.hidden_size, teacher.sampling_rate) == (24, 16000)
    assert teacher.token_list == tiny_asr.TOKENS
    # They can be used in a graph of autograd, but are not part of one.
    assert not got.logits.requires_grad and not got.logits.is_inference()


def test_dropout_and_batch_normalisation_stay_off(tmp_path):
    conf = tiny_asr.config(dropout_rate=0.5)
    teacher = OnlineTeacher(tiny_asr.save(tiny_asr.build(conf), conf, tmp_path))
    batch = tiny_kd.batch()
    say = lambda: teacher.targets((), batch["speech"], batch["speech_lengths"]).logits  # noqa: E731
    first = say()
    teacher._model.train()
    assert torch.equal(say(), first)


def counted(teacher):
    """A list that gets an entry each time the model itself runs."""
    runs = []
    teacher._model.encoder.register_forward_hook(lambda m, i, o: runs.append(1))
    return runs


def test_memory(teacher_dir):
    """The same batch is not computed again, but another batch, other taps or other audio are."""
    teacher = OnlineTeacher(teacher_dir, memory=1e8)
    plain = OnlineTeacher(teacher_dir)
    runs = counted(teacher)
    batch = tiny_kd.batch()
    args = (batch["utt_id"], batch["speech"], batch["speech_lengths"])
    first = teacher.targets(*args)
    again = teacher.targets(*args)
    assert len(runs) == 1 and torch.equal(first.logits, again.logits)
    assert "encoder" in teacher.targets(*args, ["encoder"]).hidden
    assert len(runs) == 2
    for other in (
        (batch["utt_id"][::-1], batch["speech"].flip(0), args[2].flip(0)),
        (args[0], batch["speech"] * 0.5, args[2]),
        (args[0], batch["speech"], args[2] - 2000),
        ((), *args[1:]),
    ):
        assert torch.equal(teacher.targets(*other).logits, plain.targets(*other).logits)
    teacher.move(lambda x: x)
    before = len(runs)
    teacher.targets(*args)
    assert len(runs) == before + 1


@pytest.mark.parametrize("memory, runs_of_four", [(0, 4), (10_000, 4), (1e8, 2)])
def test_memory_is_bounded(teacher_dir, memory, runs_of_four):
    teacher = OnlineTeacher(teacher_dir, memory)
    runs = counted(teacher)
    for _ in range(2):
        for seed in (0, 1):
            batch = tiny_kd.batch(seed=seed)
            ids = [f"{seed}{utt_id}" for utt_id in batch["utt_id"]]
            teacher.targets(ids, batch["speech"], batch["speech_lengths"], ["encoder"])
    assert len(runs) == runs_of_four


def test_a_teacher_without_ctc_is_refused(tmp_path):
    conf = tiny_asr.config()
    conf["model_conf"] = {"ctc_weight": 0.0}
    import argparse

    from espnet_kd.offline import ASRTask

    model = ASRTask.build_model(argparse.Namespace(**conf))
    with pytest.raises(UserError, match="no CTC head"):
        OnlineTeacher(tiny_asr.save(model, conf, tmp_path))


def test_a_teacher_of_nan_is_refused_before_training(teacher_dir, tmp_path):
    """The argmax of NaN is blank, so that a student would learn blank everywhere."""
    broken = shutil.copytree(teacher_dir, tmp_path / "broken")
    for path in broken.glob("*.pth"):
        state = torch.load(path, weights_only=True)
        state["encoder.after_norm.weight"][3] = torch.nan
        torch.save(state, path)
    with pytest.raises(UserError, match="teacher .*broken.* gives NaN .encoder.after_norm.weight has it"):
        OnlineTeacher(broken)


def test_unknown_tap_is_refused(teacher):
    teacher.check(Needs(taps=("encoder", "encoder.3")))
    with pytest.raises(UserError, match="the teacher .* no tap 'encoder.4'; it has: encoder, encoder.1, .*encoder.3$"):
        teacher.check(Needs(taps=("encoder.4",)))


@pytest.mark.parametrize("fs, hz", [(16000, 16000), ("16k", 16000), ("8k", 8000), ("22050", 22050), (None, 16000)])
def test_sampling_rate(fs, hz):
    import argparse

    conf = {} if fs is None else {"fs": fs}
    assert sampling_rate(argparse.Namespace(frontend_conf=conf)) == hz


def test_half_precision_where_the_device_has_it(teacher_dir, monkeypatch):
    """In bf16, here of the CPU instead of a GPU, the encoder computes, but the CTC head does not."""
    teacher, batch = OnlineTeacher(teacher_dir), tiny_kd.batch()
    kinds = {"encoder": set(), "head": set()}
    layer, head = teacher._model.encoder.encoders[0].feed_forward.w_1, teacher._model.ctc.ctc_lo
    for name, module in (("encoder", layer), ("head", head)):
        module.register_forward_hook(lambda m, i, o, name=name: kinds[name].add(o.dtype))
    say = lambda: teacher.targets((), batch["speech"], batch["speech_lengths"], ["encoder", "encoder.1"])  # noqa: E731
    expected = say()
    assert kinds == {"encoder": {torch.float32}, "head": {torch.float32}}
    monkeypatch.setattr(encode, "has_bf16", lambda device: True)
    got = say()
    with torch.autocast("cpu", torch.float16):  # as the trainer's AMP may do with the student
        say()
    assert kinds == {"encoder": {torch.float32, torch.bfloat16}, "head": {torch.float32}}
    for x, y in ((got.logits, expected.logits), *((got.hidden[k], expected.hidden[k]) for k in expected.hidden)):
        assert x.dtype == torch.float32 and not torch.equal(x, y)
        assert (x - y).abs().mean() < 0.02 * y.abs().mean()


def test_which_devices_have_half_precision(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert not encode.has_bf16(torch.device("cpu"))
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert encode.has_bf16(gpu) == has
