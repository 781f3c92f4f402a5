"""The teacher that runs beside the student."""

import pytest
import tiny_asr
import tiny_kd
import torch

from espnet_kd.cli import UserError
from espnet_kd.targets.online import OnlineTeacher, sampling_rate


def test_targets_are_what_the_model_says(teacher_dir):
    from espnet_kd.targets.experiment import find_experiment, load_model

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
    assert (teacher.hidden_size, teacher.blank_id, teacher.sampling_rate) == (24, 0, 16000)
    assert teacher.token_list == tiny_asr.TOKENS
    # Usable in a graph, without being part of one.
    assert not got.logits.requires_grad and not got.logits.is_inference()


def test_dropout_and_batch_normalisation_stay_off(tmp_path):
    conf = tiny_asr.config(dropout_rate=0.5)
    teacher = OnlineTeacher(tiny_asr.save(tiny_asr.build(conf), conf, tmp_path))
    batch = tiny_kd.batch()
    say = lambda: teacher.targets((), batch["speech"], batch["speech_lengths"]).logits  # noqa: E731
    first = say()
    teacher._model.train()
    assert torch.equal(say(), first)


def test_a_teacher_without_ctc_is_refused(tmp_path):
    conf = tiny_asr.config()
    conf["model_conf"] = {"ctc_weight": 0.0}
    import argparse

    from espnet_kd.offline import ASRTask

    model = ASRTask.build_model(argparse.Namespace(**conf))
    with pytest.raises(UserError, match="no CTC head"):
        OnlineTeacher(tiny_asr.save(model, conf, tmp_path))


def test_unknown_tap_is_refused(teacher):
    teacher.check_taps(["encoder", "encoder.3"])
    with pytest.raises(UserError, match="the teacher .* no tap 'encoder.4'; it has: encoder, encoder.1, .*encoder.3$"):
        teacher.check_taps(["encoder.4"])


@pytest.mark.parametrize("fs, hz", [(16000, 16000), ("16k", 16000), ("8k", 8000), ("22050", 22050), (None, 16000)])
def test_sampling_rate(fs, hz):
    import argparse

    conf = {} if fs is None else {"fs": fs}
    assert sampling_rate(argparse.Namespace(frontend_conf=conf)) == hz
