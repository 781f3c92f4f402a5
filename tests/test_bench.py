"""The benchmark command: that what it compares is equal, and that its figures come out; not the figures."""

import json

import pytest
import torch

from espnet_kd.bench import loss, steps
from espnet_kd.bin import asr_kd_bench
from espnet_kd.cli import UserError
from espnet_kd.losses import factorized_kl

SMALL = (3, 20, 50, 5)


def gradient(function, step):
    student = torch.randn_like(step.teacher).requires_grad_()
    value = function(student, step.teacher, step.lengths)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("nonblank", [0.2, 0.5])
def test_both_ways_to_write_factorized_kl_are_equal(nonblank):
    """To 1e-5 relative in float32."""
    step = loss.Step("ctc", nonblank, SMALL)
    torch.manual_seed(1)
    ours = gradient(factorized_kl, step)
    torch.manual_seed(1)
    plain = gradient(loss.plain_factorized_kl, step)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-8)


def test_loss_part(monkeypatch, capsys):
    monkeypatch.setattr(loss, "SHAPE", SMALL)
    monkeypatch.setattr(loss.measure, "__defaults__", (SMALL,))
    asr_kd_bench.main(["--only", "loss", "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fkl_time"] == found["measured"][0]["fkl_time"] and found["machine"]["torch"] == torch.__version__
    assert set(found["measured"][0]) >= {"fkl_memory", "ours_bytes", "plain_bytes"}


def test_steps_part(capsys):
    found = steps.measure(30, 1, student=(1, 16), teacher=(1, 24), utts=2, seconds=1.0)
    assert found["cached_step"] > 0 and found["online_step"] > 0 and found["bytes_per_frame"] > 0
    found["cache_bytes"] = found.pop("bytes_per_frame")
    printed = asr_kd_bench.table([{"vocabulary": 30, **found}])
    assert "KD step from the cache / plain step | vocabulary = 30 |" in printed


def test_mistakes_are_told():
    with pytest.raises(UserError, match="--expdir and --data_dir"):
        asr_kd_bench.main(["--only", "decoding"])
    with pytest.raises(UserError, match="--rounds"):
        asr_kd_bench.main(["--rounds", "0"])
