"""Students and teachers with an attention decoder: KL on the decoder's posteriors, and every method on their CTC."""

import pytest
import tiny_asr
import tiny_kd
import torch
from test_model import in_stage
from tiny_student import HYBRID, adopt, deeper, page_of, run

from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.page import list_pages, load_page
from espnet_kd.targets.online import OnlineTeacher
from espnet_kd.targets.teacher import SeveralTeachers


def hybrid_teacher(directory, seed=1, memory=0.0):
    conf = {**tiny_asr.config("conformer", output_size=24, num_blocks=2), "model_conf": {"ctc_weight": 0.5}}
    return OnlineTeacher(tiny_asr.save(tiny_asr.build(conf, seed=seed, sharpen=4.0), conf, directory), memory)


@pytest.mark.parametrize("transcribed", ["all", "some", "none"])
def test_attention_kl(write_page, tmp_path, transcribed):
    teacher = hybrid_teacher(tmp_path / "teacher")
    entry = {"objective": "attention_kl", "weight": 2.0}
    page = page_of(write_page, entry, ctc={"weight": 1.0}, attention={"weight": 0.5})
    plain, model = adopt(page, teacher, tiny_kd.student_config(**HYBRID))
    batch = tiny_kd.batch()
    rows = {"all": [0, 1, 2], "some": [0, 2], "none": []}[transcribed]
    for row in set(range(3)) - set(rows):
        batch["text_lengths"][row] = 0
        batch["text"][row] = -1
    if not rows:
        batch["text"] = batch["text"][:, :0]
    loss, stats = run(model, batch)
    if not rows:
        assert stats["loss_attention_kl"] == 0 and loss == 0
        # Ranks of a parallel run must have the same statistics and a gradient for every parameter, even if the batch
        # of one rank has no transcript.
        full, wanted = tiny_kd.batch(), set()
        for which, keys in ((full, wanted), (batch, set())):
            model.zero_grad()
            loss, stats = run(model.train(), which)
            loss.backward()
            keys |= {k for k, v in stats.items() if v is not None}
            assert all(p.grad is not None for p in model.parameters())
        assert keys == wanted
        return
    kl, labels, attention = 0.0, 0, 0.0
    for row in rows:  # each utterance alone
        text, n = batch["text"][row : row + 1], batch["text_lengths"][row : row + 1]
        outs = []
        for m in (plain, teacher._model):
            out, lengths = m.encode(batch["speech"], batch["speech_lengths"])
            words = torch.cat([torch.tensor([[m.sos]]), text[:, : int(n)]], 1)
            outs.append(m.decoder(out[row : row + 1], lengths[row : row + 1], words, n + 1)[0])
        kl = kl + losses.kl(*outs, n + 1) * (int(n) + 1)
        out, lengths = plain.encode(batch["speech"], batch["speech_lengths"])
        attention += plain._calc_att_loss(out[row : row + 1], lengths[row : row + 1], text[:, : int(n)], n)[0] / 3
        labels += int(n) + 1
    expected = 0.7 * (2.0 * kl / 3 + 0.5 * attention) + 0.3 * stats["loss_ctc"]
    torch.testing.assert_close(loss, expected.squeeze(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memories", [(1e8,), (1e8, 1e8), (0.0, 1e8)])
def test_attention_kl_of_targets_in_memory(write_page, tmp_path, memories):
    """An utterance may come back in a batch of shorter texts than before, as with ``shuffle_within_batch``."""
    page = page_of(write_page, {"objective": "attention_kl"})
    batch, found = tiny_kd.batch(), []
    some = {k: v[1:] for k, v in batch.items()}
    some["text"] = some["text"][:, :3]
    for each in ([0.0] * len(memories), memories):
        teachers = [hybrid_teacher(tmp_path / f"{n}", seed=n, memory=m) for n, m in enumerate(each, 1)]
        teacher = teachers[0] if len(teachers) == 1 else SeveralTeachers(teachers)
        _, model = adopt(page, teacher, tiny_kd.student_config(**HYBRID))
        run(model, batch)
        found.append(run(model, some)[1]["loss_attention_kl"])
    # An encoder's outputs depend a little on the padding of the batch.
    torch.testing.assert_close(found[1], found[0], rtol=5e-3, atol=0)


def test_attention_kl_needs_decoders(write_page, teacher, tmp_path):
    page = page_of(write_page, {"objective": "attention_kl"})
    with pytest.raises(UserError, match="attention_kl: the student has no attention decoder"):
        adopt(page, hybrid_teacher(tmp_path / "t"))
    with pytest.raises(UserError, match="the teacher has no attention decoder"):
        adopt(page, teacher, tiny_kd.student_config(**HYBRID))


@pytest.mark.parametrize("method", [p for p in list_pages() if p not in ("layer_pruning", "delayed_kd")])
def test_every_method_works_on_the_ctc_branch_of_a_hybrid(method, tmp_path):
    """The loss is finite. It reaches the encoder always, and the decoder wherever the CTC weight is not 0."""
    page = load_page(method)
    batch = tiny_kd.batch()
    nbest = {u: [(-1.0, [3, 4])] for u in batch["utt_id"]}
    teacher = hybrid_teacher(tmp_path / "teacher") if page.teacher == "required" else None
    if method == "self_kd":  # the student starts as a copy of the teacher and needs the same encoder
        conf = deeper(**HYBRID)
        teacher = OnlineTeacher(tiny_asr.save(tiny_asr.build(conf, seed=1), conf, tmp_path / "like"))
    for stage in page.stages:
        model = in_stage(page, stage.number, teacher, deeper(**HYBRID), nbest=nbest)
        loss = run(model, batch)[0]
        loss.backward()
        assert torch.isfinite(loss)
        assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
        assert any(p.grad is not None for p in model.decoder.parameters()) == (stage.ctc_weight != 0)
