"""The target cache holds the teacher's outputs, and a student learns from it as from the teacher."""

import json
import os
import shutil
import tracemalloc
from dataclasses import replace

import kaldiio
import pytest
import tiny_asr
import tiny_kd
import torch
from tiny_cache import TOP_K, assert_equal, command

from espnet_kd.bin import asr_kd_cache, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.checks.pairs import check_rates
from espnet_kd.distill.model import ESPnetASRKDModel
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.frames import valid
from espnet_kd.inference import encode
from espnet_kd.inference.encode import measure_frame_shift
from espnet_kd.targets.cache import Manifest, ark_names, read_manifest, shard_dir
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.online import OnlineTeacher


def speech_of(corpus, name):
    import soundfile

    for line in (corpus.dir / name / "wav.scp").read_text().splitlines():
        utt_id, path = line.split()
        x = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        yield utt_id, x[None], torch.tensor([len(x)])


def test_holds_what_the_teacher_says(corpus, teacher_dir, unbroken):
    online, cached = OnlineTeacher(teacher_dir), CachedTeacher(unbroken)
    assert cached.token_list == online.token_list and cached.frame_shift == online.frame_shift
    assert cached.hidden_size == online.hidden_size
    for utt_id, speech, lengths in [*speech_of(corpus, "train"), *speech_of(corpus, "valid")]:
        expected = online.targets([utt_id], speech, lengths, ["encoder"])
        got = cached.targets([utt_id], speech, lengths, ["encoder"])
        assert got.lengths.tolist() == expected.lengths.tolist()
        log_probs = expected.logits.log_softmax(-1)
        odds, kept_odds = (x.logit() for x in (log_probs[..., 0].exp(), got.logits.log_blank.exp()))
        torch.testing.assert_close(kept_odds, odds, atol=1e-3, rtol=1e-3)
        best = expected.logits.argmax(-1)
        torch.testing.assert_close(got.logits.argmax(-1), best)
        spoken = best != 0
        assert spoken.any() and not spoken.all()
        assert (got.logits.log_probs[spoken] > -torch.inf).sum(-1).eq(TOP_K).all()  # top_k, as this teacher is unsure
        kept = log_probs.gather(-1, got.logits.tokens)[spoken][:, :TOP_K]
        assert (kept.amin(-1) >= log_probs[..., 1:].topk(TOP_K, -1).values[spoken].amin(-1) - 1e-6).all()
        torch.testing.assert_close(got.logits.log_probs[spoken][:, :TOP_K].exp(), kept.exp(), atol=6e-3, rtol=0)
        assert (got.logits.log_probs[~spoken] == -torch.inf).all()
        assert (got.logits.log_probs[..., TOP_K:] == -torch.inf).all()
        span = expected.hidden["encoder"].amax() - expected.hidden["encoder"].amin()
        error = (got.hidden["encoder"] - expected.hidden["encoder"]).abs().max()
        assert 0 < error < 0.02 * span  # one byte per number


def test_batches_may_be_shuffled(corpus, unbroken):
    cached = CachedTeacher(unbroken)
    ids = ["valid2", "train0", "train4"]
    together = cached.targets(ids, None, None, ["encoder"])
    assert together.logits.size(0) == 3 and together.logits.size(-1) == len(tiny_kd.TOKENS)
    for i, utt_id in enumerate(ids):
        alone = cached.targets([utt_id], None, None, ["encoder"])
        n = int(alone.lengths)
        assert int(together.lengths[i]) == n
        torch.testing.assert_close(together.logits.log_probs[i, :n], alone.logits.log_probs[0], rtol=0, atol=0)
        torch.testing.assert_close(together.hidden["encoder"][i, :n], alone.hidden["encoder"][0], rtol=0, atol=0)


def test_other_tools_read_the_arks(unbroken):
    scp = dict(line.split() for line in (shard_dir(unbroken, 0) / "blank.scp").read_text().splitlines())
    for place in scp.values():
        assert kaldiio.load_mat(place).ndim == 2


def test_jobs_together_write_the_same(corpus, teacher_dir, unbroken, tmp_path):
    cache = tmp_path / "targets"
    for job in ("2/2", "1/2"):
        asr_kd_cache.main(command(teacher_dir, corpus, cache, "--job", job))
        with pytest.raises(UserError, match="not finished"):
            CachedTeacher(cache)
    asr_kd_cache.main(command(teacher_dir, corpus, cache, "--nj", "2"))
    assert_equal(cache, unbroken)


def test_batches_at_the_same_time_keep_their_own_hidden_states(corpus, teacher_dir, tmp_path):
    """If threads shared one model, its hooks and attention state could mix up batches and give wrong targets."""
    waves = {f"utt{i:02}": tiny_asr.audio(0.7 + 0.05 * (i % 9), i) for i in range(36)}
    data = tiny_asr.data_dir(tmp_path / "data", waves)
    page = tmp_path / "page.yaml"
    taps = "[[encoder, encoder], [encoder, encoder.1]]"
    page.write_text(f"stages: [{{objectives: [{{objective: factorized_representation, taps: {taps}}}]}}]\n")
    run = ["--teacher", str(teacher_dir), "--data_dir", str(data), "--kd_config", str(page), "--batch_seconds", "3"]
    for nj in ("1", "4"):
        asr_kd_cache.main([*run, "--output", str(tmp_path / nj), "--nj", nj])
    torch.set_num_threads(1)
    assert_equal(tmp_path / "4", tmp_path / "1")


def test_too_short_for_the_encoder(teacher_dir, tmp_path):
    """Such an utterance has no frames, whether it was alone in its batch or not, and can be read beside others."""
    waves = {"a": tiny_asr.audio(1.0, 1), "b": tiny_asr.audio(0.9, 2), "short": tiny_asr.audio(0.1, 3)[:400]}
    data = tiny_asr.data_dir(tmp_path / "data", waves)
    for size in ("2", "3"):
        cache = tmp_path / size
        run = ["--teacher", str(teacher_dir), "--data_dir", str(data), "--kd_config", "progressive_fkl"]
        asr_kd_cache.main([*run, "--output", str(cache), "--shard_size", size])
        got = CachedTeacher(cache).targets(["short", "a"], None, None, ["encoder"])
        assert int(got.lengths[0]) == 0 < int(got.lengths[1])
        assert got.hidden["encoder"].shape == (2, int(got.lengths[1]), CachedTeacher(cache).hidden_size)


def test_teacher_with_inter_ctc(corpus, unbroken, tmp_path):
    """The encoder of such a teacher returns the outputs of inner layers too, which the cache must ignore."""
    encoder = {"output_size": 24, "num_blocks": 3, "interctc_layer_idx": [1], "interctc_use_conditioning": True}
    conf = tiny_asr.config("conformer", **encoder)
    conf["model_conf"] = {"ctc_weight": 1.0, "interctc_weight": 0.3}
    teacher = tiny_asr.save(tiny_asr.build(conf, seed=1), conf, tmp_path / "teacher")
    asr_kd_cache.main(command(teacher, corpus, tmp_path / "targets"))
    utt_id, speech, lengths = next(speech_of(corpus, "train"))
    expected = OnlineTeacher(teacher).targets([utt_id], speech, lengths, ["encoder"]).hidden["encoder"]
    got = CachedTeacher(tmp_path / "targets").targets([utt_id], None, None, ["encoder"]).hidden["encoder"]
    assert (got - expected).abs().max() < 0.02 * (expected.amax() - expected.amin())


def test_half_precision_where_the_device_has_it(corpus, teacher_dir, unbroken, tmp_path, monkeypatch):
    """As with an online teacher (test_online.py), the targets are close to those in float32, but not equal."""
    monkeypatch.setattr(encode, "has_bf16", lambda device: True)
    asr_kd_cache.main(command(teacher_dir, corpus, tmp_path / "targets"))
    ids = ["train0", "train1"]
    got, expected = (CachedTeacher(x).targets(ids, None, None, ["encoder"]) for x in (tmp_path / "targets", unbroken))
    for x, y in (
        (got.logits.log_blank, expected.logits.log_blank),
        (got.hidden["encoder"], expected.hidden["encoder"]),
    ):
        assert not torch.equal(x, y) and (x - y).abs().mean() < 0.03 * y.abs().mean()


def test_utterance_ids_with_other_blanks(teacher_dir, tmp_path):
    names = ["no\u00a0break", "wide\u3000blank", "é:|x"]
    data = tiny_asr.data_dir(tmp_path / "data", {name: tiny_asr.audio(0.8, i) for i, name in enumerate(names)})
    run = ["--teacher", str(teacher_dir), "--data_dir", str(data), "--kd_config", "progressive_fkl"]
    asr_kd_cache.main([*run, "--output", str(tmp_path / "targets")])
    assert CachedTeacher(tmp_path / "targets").targets(names, None, None).lengths.all()


def test_others_may_read_what_the_umask_lets_them(unbroken):
    umask = os.umask(0)
    os.umask(umask)
    assert (shard_dir(unbroken, 0).stat().st_mode & 0o777) == 0o777 & ~umask


@pytest.fixture(scope="module")
def trainings(corpus, teacher_dir, thirds, tmp_path_factory):
    """The same training with an online teacher and with a cache of all tokens.

    Batches have one utterance, because an online teacher also sees the padding of a batch, and a cache does not.
    """
    out = tmp_path_factory.mktemp("trainings")
    asr_kd_cache.main(command(teacher_dir, corpus, out / "targets", "--top_k", "1000", "--mass", "1"))
    runs = {"online": ["--teacher", str(teacher_dir)], "cached": ["--target_cache", str(out / "targets")]}
    adopt = ESPnetASRKDModel.adopt

    def adopt_with_seed(*args):
        torch.manual_seed(0)  # loading a teacher uses random numbers, but both trainings must have the same
        return adopt(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ESPnetASRKDModel, "adopt", adopt_with_seed)
        for name, run in runs.items():
            asr_kd_train.main(corpus.options(out / name, *run, "--kd_config", str(thirds), batch_size=1))
    return out


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_from_the_cache_is_training_with_the_teacher(trainings, stage):
    """The statistics agree, except for the rounding of targets to 8 and 16 bits. Each KD stage takes one epoch."""
    both = [
        read_checkpoint(trainings / name / "checkpoint.pth")["reporter"]["stats"][stage]
        for name in ("online", "cached")
    ]
    for phase in ("train", "valid"):
        online, cached = (x[phase] for x in both)
        assert set(online) == set(cached)
        assert cached["nonblank_share"] == pytest.approx(online["nonblank_share"], rel=1e-6)
        for key in online:
            if key.startswith("loss"):
                assert cached[key] == pytest.approx(online[key], rel=0.02), (phase, key)  # at most 0.008 so far


def test_finished_training_from_the_cache_is_skipped(corpus, teacher_dir, trainings, thirds, caplog):
    """The same command is skipped with any path of the teacher, or without it, because the cache identifies it."""
    out = trainings / "cached"
    run = ["--target_cache", str(trainings / "targets"), "--kd_config", str(thirds)]
    file = next(teacher_dir.glob("*.pth"))
    for teacher in ([], ["--teacher", str(teacher_dir)], ["--teacher", os.path.relpath(file)]):
        caplog.clear()
        with caplog.at_level("INFO"):
            asr_kd_train.main(corpus.options(out, *run, *teacher, batch_size=1))
        assert "KD stage 3 is finished in" in caplog.text


def test_record_names_the_cache(trainings):
    record = json.loads((trainings / "cached/kd_stage.json").read_text())
    assert record["target_cache"]["tokens_on"] == "nonblank" and record["target_cache"]["taps"] == ["encoder"]


def test_padding_of_cached_targets_is_inside_no_length(unbroken):
    targets = CachedTeacher(unbroken).targets(["train0", "train5"], None, None)
    assert valid(targets.lengths, targets.logits.size(1)).any(1).all()


def test_a_student_fed_with_features(corpus, unbroken):
    """Features have other units than the teacher's audio, but a cache is read by utterance id, so that it works."""
    conf = tiny_kd.student_config()
    conf.update(input_size=40, frontend=None, frontend_conf={}, normalize="global_mvn")
    conf["normalize_conf"] = {"stats_file": str(corpus.dir / "feats_stats.npz")}
    student = tiny_asr.build(conf)
    cached = CachedTeacher(unbroken)
    check_rates(student, measure_frame_shift(student, 16000.0), cached, 16000.0)
    assert cached.probe(torch.zeros(1, 300, 40), torch.tensor([300])).lengths.tolist() == [75]
    assert cached.probe(torch.zeros(1, 48000), torch.tensor([48000])).lengths.tolist() == [75]


def write_index(cache, manifest: Manifest, size=200):
    """Write a cache with an index of as many utterances as ``manifest`` has, and with empty arks."""
    cache.mkdir()
    names, utterances = ark_names(manifest.policy), manifest.counts["utterances"]
    manifest = replace(manifest, shards=utterances // size)
    (cache / "manifest.json").write_text(manifest.to_json())
    for number in range(manifest.shards):
        shard = shard_dir(cache, number)
        shard.mkdir()
        ids = [f"1234-123456-{i:08}" for i in range(number * size, (number + 1) * size)]
        for name in names:
            with open(shard / f"{name}.ark", "wb") as f:
                f.truncate(10**8)
            (shard / f"{name}.scp").write_text("".join(f"{x} {name}.ark:{1000 * i}\n" for i, x in enumerate(ids)))
        lines = [f"{manifest.identity}{len(names) * ' 100000000'}\n", *(f"{x} 300 100 4000000000\n" for x in ids)]
        (shard / "utterances").write_text("".join(lines))


def test_memory_of_a_large_index(unbroken, tmp_path):
    """Reading takes less than 200 bytes per utterance; tuples of Python numbers would take more than 400."""
    utterances = 10_000
    write_index(
        tmp_path / "large",
        replace(read_manifest(unbroken), counts={"utterances": utterances, "frames": 0, "rows": 0, "bytes": 0}),
    )
    shutil.copy(unbroken / "tokens.txt", tmp_path / "large")
    CachedTeacher(tmp_path / "large")  # fills pathlib's table of interned names, which would count below
    tracemalloc.start()
    cached = CachedTeacher(tmp_path / "large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"1234-123456-{utterances - 1:08}" in cached and "sp0.9-1234-123456-00000001" not in cached
    assert peak < 200 * utterances
