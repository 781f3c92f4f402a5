"""The target cache: what it holds is what the teacher says; kills, damage and other teachers never teach wrongly."""

import json
import os
import pickle
import random
import shutil
import signal
import time

import kaldiio
import numpy as np
import pytest
import tiny_asr
import tiny_kd
import torch

from espnet_kd.bin import asr_kd_cache, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.checkpoints import read_checkpoint
from espnet_kd.frames import valid
from espnet_kd.targets.cache import CachedTeacher, Policy, read_arrays, read_index, shard_dir
from espnet_kd.targets.online import OnlineTeacher
from espnet_kd.targets.teacher import Needs

TOP_K = 4


def command(teacher, corpus, output, *more):
    data = [str(corpus.dir / name) for name in ("train", "valid")]
    return ["--teacher", str(teacher), "--data_dir", *data, "--output", str(output), "--top_k", str(TOP_K),
            "--shard_size", "3", "--batch_seconds", "3", "--kd_config", "progressive_fkl", *more]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_kd.Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_kd.save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def unbroken(corpus, teacher, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "targets"
    asr_kd_cache.main(command(teacher, corpus, cache))
    return cache


@pytest.fixture
def cache(unbroken, tmp_path):
    """A copy to damage."""
    return shutil.copytree(unbroken, tmp_path / "targets")


def contents(cache):
    """Every array of a cache by utterance, and its manifest."""
    manifest = json.loads((cache / "manifest.json").read_text())
    policy = CachedTeacher(cache).policy
    arrays = {}
    for number in range(manifest["shards"]):
        shard = shard_dir(cache, number)
        for entry in read_index(shard, policy):
            arrays[entry.utt_id] = read_arrays(shard, policy, entry)
    return manifest, arrays


def assert_equal(cache, other):
    (manifest, arrays), (other_manifest, others) = contents(cache), contents(other)
    assert manifest == other_manifest and list(arrays) == list(others)
    for utt_id in arrays:
        for x, y in zip(arrays[utt_id], others[utt_id]):
            np.testing.assert_array_equal(x, y)
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]


def speech_of(corpus, name):
    import soundfile

    for line in (corpus.dir / name / "wav.scp").read_text().splitlines():
        utt_id, path = line.split()
        x = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        yield utt_id, x[None], torch.tensor([len(x)])


def test_holds_what_the_teacher_says(corpus, teacher, unbroken):
    online, cached = OnlineTeacher(teacher), CachedTeacher(unbroken)
    assert cached.token_list == online.token_list and cached.frame_shift == online.frame_shift
    assert cached.hidden_size == online.hidden_size
    for utt_id, speech, lengths in [*speech_of(corpus, "train"), *speech_of(corpus, "valid")]:
        expected = online.targets([utt_id], speech, lengths, ["encoder"])
        got = cached.targets([utt_id], speech, lengths, ["encoder"])
        assert got.lengths.tolist() == expected.lengths.tolist()
        log_probs = expected.logits.log_softmax(-1)
        torch.testing.assert_close(got.logits.log_blank, log_probs[..., 0], atol=1e-5, rtol=1e-4)
        best = expected.logits.argmax(-1)
        torch.testing.assert_close(got.logits.argmax(-1), best)
        spoken = best != 0
        assert spoken.any() and not spoken.all()
        values = log_probs[..., 1:].topk(TOP_K, -1).values
        torch.testing.assert_close(got.logits.log_probs[spoken], values[spoken], atol=1e-5, rtol=1e-4)
        assert (got.logits.log_probs[~spoken] == -torch.inf).all()
        span = expected.hidden["encoder"].amax() - expected.hidden["encoder"].amin()
        error = (got.hidden["encoder"] - expected.hidden["encoder"]).abs().max()
        assert 0 < error < 0.02 * span  # a byte a number


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
        assert kaldiio.load_mat(place).ndim == 1


def test_jobs_together_write_the_same(corpus, teacher, unbroken, tmp_path):
    cache = tmp_path / "targets"
    for job in ("2/2", "1/2"):
        asr_kd_cache.main(command(teacher, corpus, cache, "--job", job))
        with pytest.raises(UserError, match="not finished"):
            CachedTeacher(cache)
    asr_kd_cache.main(command(teacher, corpus, cache, "--nj", "2"))
    assert_equal(cache, unbroken)


def test_batches_at_the_same_time_keep_their_own_hidden_states(corpus, teacher, tmp_path):
    """Hooks on one model, and its attention's own memory, would mix up what threads compute: wrong targets, unseen."""
    waves = {f"utt{i:02}": tiny_asr.audio(0.7 + 0.05 * (i % 9), i) for i in range(36)}
    data = tiny_asr.data_dir(tmp_path / "data", waves)
    page = tmp_path / "page.yaml"
    taps = "[[encoder, encoder], [encoder, encoder.1]]"
    page.write_text(f"stages: [{{objectives: [{{objective: factorized_representation, taps: {taps}}}]}}]\n")
    run = ["--teacher", str(teacher), "--data_dir", str(data), "--kd_config", str(page), "--batch_seconds", "3"]
    for nj in ("1", "4"):
        asr_kd_cache.main([*run, "--output", str(tmp_path / nj), "--nj", nj])
    torch.set_num_threads(1)
    assert_equal(tmp_path / "4", tmp_path / "1")


def test_too_short_for_the_encoder(teacher, tmp_path):
    """Alone in its batch, and read beside one that is not: no frames, and no width of its own."""
    waves = {"a": tiny_asr.audio(1.0, 1), "b": tiny_asr.audio(0.9, 2), "short": tiny_asr.audio(0.1, 3)[:400]}
    data = tiny_asr.data_dir(tmp_path / "data", waves)
    for size in ("2", "3"):
        cache = tmp_path / size
        run = ["--teacher", str(teacher), "--data_dir", str(data), "--kd_config", "progressive_fkl"]
        asr_kd_cache.main([*run, "--output", str(cache), "--shard_size", size])
        got = CachedTeacher(cache).targets(["short", "a"], None, None, ["encoder"])
        assert int(got.lengths[0]) == 0 < int(got.lengths[1])
        assert got.hidden["encoder"].shape == (2, int(got.lengths[1]), CachedTeacher(cache).hidden_size)


def test_teacher_with_inter_ctc(corpus, unbroken, tmp_path):
    """Its encoder gives the inner layers' outputs along with the last one's."""
    encoder = {"output_size": 24, "num_blocks": 3, "interctc_layer_idx": [1], "interctc_use_conditioning": True}
    conf = tiny_asr.config("conformer", **encoder)
    conf["model_conf"] = {"ctc_weight": 1.0, "interctc_weight": 0.3}
    teacher = tiny_asr.save(tiny_asr.build(conf, seed=1), conf, tmp_path / "teacher")
    asr_kd_cache.main(command(teacher, corpus, tmp_path / "targets"))
    utt_id, speech, lengths = next(speech_of(corpus, "train"))
    expected = OnlineTeacher(teacher).targets([utt_id], speech, lengths, ["encoder"]).hidden["encoder"]
    got = CachedTeacher(tmp_path / "targets").targets([utt_id], None, None, ["encoder"]).hidden["encoder"]
    assert (got - expected).abs().max() < 0.02 * (expected.amax() - expected.amin())


def test_teacher_that_gives_nan_is_refused(corpus, teacher, tmp_path):
    broken = shutil.copytree(teacher, tmp_path / "broken")
    for path in broken.glob("*.pth"):
        state = torch.load(path, weights_only=True)
        state["ctc.ctc_lo.bias"][2] = torch.nan
        torch.save(state, path)
    with pytest.raises(UserError, match="broken gives NaN"):
        asr_kd_cache.main(command(broken, corpus, tmp_path / "targets"))


def test_utterance_ids_with_other_blanks(teacher, tmp_path):
    names = ["no\u00a0break", "wide\u3000blank", "é:|x"]
    data = tiny_asr.data_dir(tmp_path / "data", {name: tiny_asr.audio(0.8, i) for i, name in enumerate(names)})
    run = ["--teacher", str(teacher), "--data_dir", str(data), "--kd_config", "progressive_fkl"]
    asr_kd_cache.main([*run, "--output", str(tmp_path / "targets")])
    assert CachedTeacher(tmp_path / "targets").targets(names, None, None).lengths.all()


def test_force_removes_a_cache_and_nothing_else(corpus, teacher, unbroken, cache, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "other")
    before = sorted(other.iterdir())
    for more in ([], ["--force"]):
        with pytest.raises(UserError, match="no part of a target cache"):
            asr_kd_cache.main(command(teacher, corpus, other, *more))
    assert sorted(other.iterdir()) == before
    with pytest.raises(UserError, match="what other jobs wrote"):
        asr_kd_cache.main(command(teacher, corpus, cache, "--force", "--job", "1/2"))
    asr_kd_cache.main(command(teacher, corpus, cache, "--force"))
    assert_equal(cache, unbroken)


def test_output_that_is_a_file_is_refused(corpus, teacher, tmp_path):
    (tmp_path / "file").write_text("")
    for more in ([], ["--force"]):
        with pytest.raises(UserError, match="is a file"):
            asr_kd_cache.main(command(teacher, corpus, tmp_path / "file", *more))


def test_others_may_read_what_the_umask_lets_them(unbroken):
    umask = os.umask(0)
    os.umask(umask)
    assert (shard_dir(unbroken, 0).stat().st_mode & 0o777) == 0o777 & ~umask


def test_killed_at_random_moments(corpus, teacher, unbroken, tmp_path):
    """20 kills, each followed by the same command; then bit-equal to an unbroken run's."""
    cache, draw = tmp_path / "targets", random.Random(0)
    started = time.monotonic()
    asr_kd_cache.main(command(teacher, corpus, tmp_path / "timed"))
    whole = time.monotonic() - started
    kills = 0
    for _ in range(20):
        if (cache / "manifest.json").exists() and draw.random() < 0.5:
            # Else the last kills would find a finished cache.
            shutil.rmtree(shard_dir(cache, draw.randrange(4)), ignore_errors=True)
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                asr_kd_cache.main(command(teacher, corpus, cache))
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 1.1 * whole))
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert kills >= 10
    asr_kd_cache.main(command(teacher, corpus, cache))
    assert_equal(cache, unbroken)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def move_offset(path):
    first, *rest = path.read_text().splitlines()
    place, _, offset = first.rpartition(":")
    path.write_text("\n".join([f"{place}:{int(offset) + 8}", *rest]) + "\n")


def swap_offsets(path):
    lines = [line.split() for line in path.read_text().splitlines()]
    lines[0][1], lines[1][1] = lines[1][1], lines[0][1]
    path.write_text("".join(f"{a} {b}\n" for a, b in lines))


def pipe(path):
    path.write_text(path.read_text().replace("targets/", "x | cat targets/"))


DAMAGES = {
    "cut ark": ("blank.ark", cut),
    "cut tokens": ("tokens.ark", cut),
    "cut hidden states": ("encoder.ark", cut),
    "flipped bit": ("tokens.ark", flip),
    "wrong offset": ("blank.scp", move_offset),
    "another utterance's offset": ("blank.scp", swap_offsets),
    "pipe in scp": ("blank.scp", pipe),
    "missing ark": ("tokens.ark", lambda path: path.unlink()),
    "cut index": ("utterances", cut),
    "missing index": ("utterances", lambda path: path.unlink()),
    "missing shard": (".", shutil.rmtree),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_mended(damage, corpus, teacher, cache, unbroken):
    name, do = DAMAGES[damage]
    do(shard_dir(cache, 1) / name)
    ids = [u.utt_id for u in read_index(shard_dir(unbroken, 1), Policy(TOP_K, taps=("encoder",)))]
    with pytest.raises(UserError, match="same asr_kd_cache command|expected 'utterance"):
        cached = CachedTeacher(cache)
        for utt_id in ids:
            cached.targets([utt_id], None, None)
    asr_kd_cache.main(command(teacher, corpus, cache))
    assert_equal(cache, unbroken)


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(cache, tmp_path):
    """kaldiio would, where an ark says so."""
    ark, trap = shard_dir(cache, 0) / "blank.ark", tmp_path / "trap"
    utt_id, place = (shard_dir(cache, 0) / "blank.scp").read_text().splitlines()[0].split()
    ark.write_bytes(ark.read_bytes()[: int(place.rpartition(":")[2])] + b"PKL" + pickle.dumps(Trap(str(trap))))
    with pytest.raises(UserError, match="cannot be read"):
        CachedTeacher(cache).targets([utt_id], None, None)
    assert not trap.exists()


def test_full_disk(corpus, teacher, unbroken, tmp_path, monkeypatch):
    cache, real, calls = tmp_path / "targets", kaldiio.save_ark, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(kaldiio, "save_ark", save)
    with pytest.raises(UserError, match="cannot write .*shard.*No space left"):
        asr_kd_cache.main(command(teacher, corpus, cache))
    with pytest.raises(UserError, match="not finished"):
        CachedTeacher(cache)
    asr_kd_cache.main(command(teacher, corpus, cache))
    assert_equal(cache, unbroken)


def test_another_teacher_or_policy_is_refused(corpus, teacher, unbroken, cache, tmp_path):
    other = tiny_kd.save_teacher(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="another teacher .*teacher.*other"):
        asr_kd_cache.main(command(other, corpus, cache))
    with pytest.raises(UserError, match="another policy"):
        asr_kd_cache.main(command(teacher, corpus, cache, "--kd_config", "kl"))
    asr_kd_cache.main(command(other, corpus, cache, "--force"))
    run = ["--teacher", str(teacher), "--target_cache", str(cache), "--kd_config", "progressive_fkl"]
    with pytest.raises(UserError, match="was made with .*other.*differs from --teacher"):
        asr_kd_train.main(corpus.options(tmp_path / "exp", *run))


def test_another_token_list_is_refused(cache):
    tokens = (cache / "tokens.txt").read_text().splitlines()
    (cache / "tokens.txt").write_text("\n".join([*tokens[:-1], "other"]) + "\n")
    with pytest.raises(UserError, match="tokens.txt is not the list"):
        CachedTeacher(cache)


def test_what_was_not_kept_is_refused(unbroken):
    cached = CachedTeacher(unbroken)
    cached.check(Needs(taps=("encoder",)))
    for needs, words in (
        (Needs("all"), "no tokens on all frames"), (Needs(temperatures=(2.0,)), "no temperature 2"),
        (Needs(taps=("encoder.1",)), "no tap encoder.1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            cached.check(needs)
    with pytest.raises(UserError, match="outputs alone"):
        cached.state_dict()


def test_missing_utterances_are_counted_and_named_before_training(corpus, teacher, unbroken, tmp_path):
    more = tiny_kd.Corpus(tmp_path / "more")
    for name in ("wav.scp", "text", "speech_shape", "text_shape.char"):
        path = more.dir / "train" / name
        path.write_text(path.read_text().replace("train3 ", "sp0.9-train3 "))
    run = ["--target_cache", str(unbroken), "--kd_config", "progressive_fkl"]
    with pytest.raises(UserError, match=r"lacks 1 utterances of .*train/wav.scp \(sp0.9-train3 "):
        asr_kd_train.main(more.options(tmp_path / "exp", *run))


@pytest.fixture(scope="module")
def trainings(corpus, teacher, tmp_path_factory):
    """The same run with the teacher beside it and with a cache of all tokens; without padding, which a cache lacks."""
    out = tmp_path_factory.mktemp("trainings")
    asr_kd_cache.main(command(teacher, corpus, out / "targets", "--top_k", "1000"))
    runs = {"online": ["--teacher", str(teacher)], "cached": ["--target_cache", str(out / "targets")]}
    for name, run in runs.items():
        asr_kd_train.main(corpus.options(out / name, *run, "--kd_config", "progressive_fkl", batch_size=1))
    return out


@pytest.mark.parametrize("stage", ["kd_stage1", "kd_stage2", ""])
def test_training_from_the_cache_is_training_with_the_teacher(trainings, stage):
    """The same statistics; losses differ by chance, as loading a teacher draws random numbers."""
    both = [
        read_checkpoint(trainings / name / stage / "checkpoint.pth")["reporter"]["stats"][1]
        for name in ("online", "cached")
    ]
    for phase in ("train", "valid"):
        online, cached = (x[phase] for x in both)
        assert set(online) == set(cached)
        assert cached["nonblank_share"] == pytest.approx(online["nonblank_share"], rel=1e-6)
        assert cached["loss_kd"] == pytest.approx(online["loss_kd"], rel=0.5)


def test_finished_training_from_the_cache_is_skipped(corpus, trainings, caplog):
    """The same command again: the record that it finds is its own."""
    out = trainings / "cached"
    run = ["--target_cache", str(trainings / "targets"), "--kd_config", "progressive_fkl"]
    with caplog.at_level("INFO"):
        asr_kd_train.main(corpus.options(out, *run, batch_size=1))
    assert f"is finished in {out}" in caplog.text


def test_record_names_the_cache(trainings):
    record = json.loads((trainings / "cached/kd_stage.json").read_text())
    assert record["target_cache"]["tokens_on"] == "nonblank" and record["target_cache"]["taps"] == ["encoder"]


def test_padding_of_cached_targets_is_inside_no_length(unbroken):
    targets = CachedTeacher(unbroken).targets(["train0", "train5"], None, None)
    assert valid(targets.lengths, targets.logits.size(1)).any(1).all()


def test_mean_pooling_needs_the_teacher(corpus, unbroken, tmp_path):
    page = {"pool": "mean", "stages": [{"share": 1.0, "objectives": [{"objective": "factorized_kl"}]}]}
    path = tiny_kd.write_yaml(tmp_path / "page.yaml", page)
    with pytest.raises(UserError, match="pool: mean needs whole posteriors"):
        asr_kd_train.main(corpus.options(tmp_path / "exp", "--target_cache", str(unbroken), "--kd_config", str(path)))


def test_objective_that_does_not_say_what_it_reads(corpus, unbroken, tmp_path, monkeypatch):
    """As one from outside may: it is told at the first batch, not in a traceback."""
    from espnet_kd.distill.objectives.posteriors import KL

    monkeypatch.setattr(KL, "nonblank_only", True)
    with pytest.raises(UserError, match="kl: the cached targets keep no tokens"):
        asr_kd_train.main(corpus.options(tmp_path / "exp", "--target_cache", str(unbroken), "--kd_config", "kl"))
