"""Kills, damage, simultaneous runs, other teachers, targets that were not kept: a cache never gives wrong targets."""

import json
import os
import pickle
import random
import shutil

import kaldiio
import pytest
import tiny_kd
import torch
from killing import run_forked
from tiny_cache import assert_equal, command

from espnet_kd.bin import asr_kd_cache, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.files import locked
from espnet_kd.targets.cache import read_index, shard_dir
from espnet_kd.targets.cache_writer import holding
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.teacher import Needs


@pytest.fixture
def cache(unbroken, tmp_path):
    """A copy for a test to damage."""
    return shutil.copytree(unbroken, tmp_path / "targets")


def test_teacher_that_gives_nan_is_refused(corpus, teacher_dir, tmp_path):
    broken = shutil.copytree(teacher_dir, tmp_path / "broken")
    for path in broken.glob("*.pth"):
        state = torch.load(path, weights_only=True)
        state["ctc.ctc_lo.bias"][2] = torch.nan
        torch.save(state, path)
    with pytest.raises(UserError, match="broken gives NaN"):
        asr_kd_cache.main(command(broken, corpus, tmp_path / "targets"))


def test_force_removes_a_cache_and_nothing_else(corpus, teacher_dir, unbroken, cache, tmp_path):
    other = shutil.copytree(teacher_dir, tmp_path / "other")
    before = sorted(other.iterdir())
    for more in ([], ["--force"]):
        with pytest.raises(UserError, match="no part of a target cache"):
            asr_kd_cache.main(command(teacher_dir, corpus, other, *more))
    assert sorted(other.iterdir()) == before
    with pytest.raises(UserError, match="what other jobs wrote"):
        asr_kd_cache.main(command(teacher_dir, corpus, cache, "--force", "--job", "1/2"))
    asr_kd_cache.main(command(teacher_dir, corpus, cache, "--force"))
    assert_equal(cache, unbroken)


def test_output_that_is_a_file_is_refused(corpus, teacher_dir, tmp_path):
    (tmp_path / "file").write_text("")
    for more in ([], ["--force"]):
        with pytest.raises(UserError, match="is a file"):
            asr_kd_cache.main(command(teacher_dir, corpus, tmp_path / "file", *more))


@pytest.mark.faults("kill -9 of a target cache being made")
def test_killed_at_any_event(corpus, teacher_dir, unbroken, tmp_path, record_property):
    """After 20 kills, each followed by the same command, the cache equals one that was made without a kill."""
    cache, draw = tmp_path / "targets", random.Random(0)

    def make(out):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        asr_kd_cache.main(command(teacher_dir, corpus, out))

    events = run_forked(lambda: make(tmp_path / "whole"), None)
    kills = 0
    while kills < 20:
        if (cache / "manifest.json").exists():
            # Otherwise the next command would find a finished cache and have nothing to do.
            shutil.rmtree(shard_dir(cache, draw.randrange(4)), ignore_errors=True)
        kills += run_forked(lambda: make(cache), draw.randint(1, events)) == -1
    record_property("faults", kills)
    asr_kd_cache.main(command(teacher_dir, corpus, cache))
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


def move_far(path):
    path.write_text(path.read_text().replace(":", ":9999999"))


def swap_offsets(path):
    lines = [line.split() for line in path.read_text().splitlines()]
    lines[0][1], lines[1][1] = lines[1][1], lines[0][1]
    path.write_text("".join(f"{a} {b}\n" for a, b in lines))


def pipe(path):
    path.write_text(path.read_text().replace("targets/", "x | cat targets/"))


def unlink(path):
    path.unlink()


def empty(path):
    path.write_text("")


#: Damage → (file, function, message). The damages after the line are found only when the utterance is read.
DAMAGES = {
    "cut ark": ("blank.ark", cut, "blank.ark has [0-9]+ bytes, not [0-9]+"),
    "cut tokens": ("tokens.ark", cut, "tokens.ark has"),
    "cut log-probabilities": ("log_probs.ark", cut, "log_probs.ark has"),
    "cut hidden states": ("encoder.ark", cut, "encoder.ark has"),
    "missing ark": ("tokens.ark", unlink, "tokens.ark: No such file"),
    "offset outside": ("blank.scp", move_far, "offset < "),
    "pipe in scp": ("blank.scp", pipe, "expected 'utterance"),
    "cut scp": ("blank.scp", cut, "expected 'utterance|lacks utterance"),
    "missing scp": ("encoder.scp", unlink, "encoder.scp is missing"),
    "cut index": ("utterances", cut, "utterances:[0-9]+ is damaged"),
    "empty index": ("utterances", empty, "is damaged"),
    "missing index": ("utterances", unlink, "utterances is missing"),
    "missing shard": (".", shutil.rmtree, "is missing"),
    # ---
    "flipped bit": ("tokens.ark", flip, "train[0-9]' .*(damaged|cannot be read)"),
    "wrong offset": ("blank.scp", move_offset, "train[0-9]' .*(damaged|cannot be read)"),
    "another utterance's offset": ("blank.scp", swap_offsets, "train[0-9]' .*damaged"),
}
UNSEEN = list(DAMAGES)[-3:]


@pytest.mark.faults("damaged and foreign target caches")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_mended(damage, corpus, teacher_dir, cache, unbroken):
    name, do, words = DAMAGES[damage]
    do(shard_dir(cache, 1) / name)
    with pytest.raises(UserError, match=f"{words}.*the same asr_kd_cache command"):
        cached = CachedTeacher(cache)
        assert damage in UNSEEN
        for entry in read_index(shard_dir(unbroken, 1), cached.manifest):
            cached.targets([entry.utt_id], None, None)
    asr_kd_cache.main(command(teacher_dir, corpus, cache))
    assert_equal(cache, unbroken)


class Trap:
    """An object that creates a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.faults("damaged and foreign target caches")
def test_nothing_is_unpickled(cache, tmp_path, monkeypatch):
    """kaldiio would unpickle an ark that begins with ``PKL``."""
    ark, trap = shard_dir(cache, 0) / "blank.ark", tmp_path / "trap"
    utt_id, place = (shard_dir(cache, 0) / "blank.scp").read_text().splitlines()[0].split()
    offset, size = int(place.rpartition(":")[2]), ark.stat().st_size
    ark.write_bytes((ark.read_bytes()[:offset] + b"PKL" + pickle.dumps(Trap("trap"))).ljust(size)[:size])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        CachedTeacher(cache).targets([utt_id], None, None)
    assert not trap.exists()


@pytest.mark.faults("a full disk")
def test_full_disk(corpus, teacher_dir, unbroken, tmp_path, monkeypatch):
    cache, real, calls = tmp_path / "targets", kaldiio.save_ark, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(kaldiio, "save_ark", save)
    with pytest.raises(UserError, match="cannot write .*shard.*No space left"):
        asr_kd_cache.main(command(teacher_dir, corpus, cache))
    with pytest.raises(UserError, match="not finished"):
        CachedTeacher(cache)
    asr_kd_cache.main(command(teacher_dir, corpus, cache))
    assert_equal(cache, unbroken)


@pytest.mark.faults("damaged and foreign target caches")
def test_a_shard_of_another_cache_is_refused_and_made_again(corpus, teacher_dir, cache, unbroken, tmp_path):
    """The shard is complete and has the same utterances, as may happen after somebody removed the manifest."""
    other = tmp_path / "other" / "targets"
    asr_kd_cache.main(command(tiny_kd.save_teacher(tmp_path / "teacher", seed=5), corpus, other))
    shutil.rmtree(shard_dir(cache, 2))
    shutil.copytree(shard_dir(other, 2), shard_dir(cache, 2))
    with pytest.raises(UserError, match="shard.00002 is damaged, or holds the targets of another cache"):
        CachedTeacher(cache)
    (cache / "manifest.json").unlink()
    asr_kd_cache.main(command(teacher_dir, corpus, cache))
    assert_equal(cache, unbroken)


@pytest.mark.faults("two runs at once")
def test_two_equal_commands_at_once(corpus, teacher_dir, cache, unbroken):
    with locked(cache), pytest.raises(UserError, match="targets is in use by another run; .*another --output$"):
        asr_kd_cache.main(command(teacher_dir, corpus, cache))
    with holding(cache, 1, 2):
        with pytest.raises(UserError, match="part 1 of .*targets is in use by another run"):
            asr_kd_cache.main(command(teacher_dir, corpus, cache, "--job", "1/2"))
        for more in ([], ["--force"]):
            with pytest.raises(UserError, match="targets is in use by another run"):
                asr_kd_cache.main(command(teacher_dir, corpus, cache, *more))
        asr_kd_cache.main(command(teacher_dir, corpus, cache, "--job", "2/2"))
    asr_kd_cache.main(command(teacher_dir, corpus, cache))
    assert_equal(cache, unbroken)


@pytest.mark.faults("two runs at once")
def test_jobs_of_another_number_of_parts(corpus, teacher_dir, unbroken, tmp_path):
    """Parts 1/2 and 2/3 share shards, so that one run would fail on a shard that the other has just written."""
    cache = tmp_path / "targets"
    with holding(cache, 1, 2):
        with pytest.raises(UserError, match="targets is being made in 2 parts, and this is --job I/3"):
            asr_kd_cache.main(command(teacher_dir, corpus, cache, "--job", "2/3"))
        asr_kd_cache.main(command(teacher_dir, corpus, cache, "--job", "2/2"))
    for job in ("1/3", "2/3", "3/3"):  # one after the other they are allowed
        asr_kd_cache.main(command(teacher_dir, corpus, cache, "--job", job))
    asr_kd_cache.main(command(teacher_dir, corpus, cache))
    assert_equal(cache, unbroken)


@pytest.mark.faults("a place that cannot be written")
def test_a_place_that_cannot_be_locked(corpus, teacher_dir, cache):
    (cache / ".lock").unlink()
    (cache / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot lock .*targets: Is a directory"):
        asr_kd_cache.main(command(teacher_dir, corpus, cache))


@pytest.mark.faults("damaged and foreign target caches")
def test_another_format_is_refused(corpus, teacher_dir, cache, unbroken):
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text.replace('"format": 3', '"format": 2'))
    for use in (lambda: CachedTeacher(cache), lambda: asr_kd_cache.main(command(teacher_dir, corpus, cache))):
        with pytest.raises(UserError, match="has format 2, not 3; make the cache again: asr_kd_cache --force"):
            use()
    asr_kd_cache.main(command(teacher_dir, corpus, cache, "--force"))
    assert_equal(cache, unbroken)


def test_a_teacher_with_another_configuration_is_another(corpus, teacher_dir, cache, tmp_path):
    """The same parameters give other outputs with other features."""
    other = shutil.copytree(teacher_dir, tmp_path / "other")
    path = other / "config.yaml"
    path.write_text(path.read_text().replace("hop_length: 160", "hop_length: 128"))
    with pytest.raises(UserError, match="with another config.yaml of the teacher"):
        asr_kd_cache.main(command(other, corpus, cache))
    run = ["--teacher", str(other), "--target_cache", str(cache), "--kd_config", "progressive_fkl"]
    with pytest.raises(UserError, match="differs from --teacher .*other in config.yaml"):
        asr_kd_train.main(corpus.options(tmp_path / "exp", *run))


def test_another_teacher_or_policy_is_refused(corpus, teacher_dir, unbroken, cache, tmp_path):
    other = tiny_kd.save_teacher(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="another teacher .*teacher.*other"):
        asr_kd_cache.main(command(other, corpus, cache))
    with pytest.raises(UserError, match="another policy"):
        asr_kd_cache.main(command(teacher_dir, corpus, cache, "--kd_config", "kl"))
    asr_kd_cache.main(command(other, corpus, cache, "--force"))
    run = ["--teacher", str(teacher_dir), "--target_cache", str(cache), "--kd_config", "progressive_fkl"]
    with pytest.raises(UserError, match="was made with .*other.*differs from --teacher .* in .*pth"):
        asr_kd_train.main(corpus.options(tmp_path / "exp", *run))


@pytest.mark.faults("damaged and foreign target caches")
@pytest.mark.parametrize("lost", [True, False])
def test_another_token_list_is_refused_and_mended(lost, corpus, teacher_dir, cache, unbroken):
    tokens = (cache / "tokens.txt").read_text().splitlines()
    (cache / "tokens.txt").write_text("\n".join([*tokens[:-1], "other"]) + "\n")
    if lost:
        (cache / "tokens.txt").unlink()
    with pytest.raises(UserError, match="tokens.txt is not the list"):
        CachedTeacher(cache)
    asr_kd_cache.main(command(teacher_dir, corpus, cache))
    assert_equal(cache, unbroken)


def test_what_was_not_kept_is_refused(unbroken):
    cached = CachedTeacher(unbroken)
    cached.check(Needs(taps=("encoder",)))
    for needs, words in (
        (Needs("all"), "no tokens on all frames"), (Needs(temperatures=(2.0,)), "no temperature 2"),
        (Needs(taps=("encoder.1",)), "no tap encoder.1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            cached.check(needs)
    with pytest.raises(UserError, match="has only its outputs; leave --target_cache out, and give --teacher"):
        cached.state_dict()


def test_missing_utterances_are_counted_and_named_before_training(corpus, teacher_dir, unbroken, tmp_path):
    more = tiny_kd.Corpus(tmp_path / "more")
    for name in ("wav.scp", "text", "speech_shape", "text_shape.char"):
        path = more.dir / "train" / name
        path.write_text(path.read_text().replace("train3 ", "sp0.9-train3 "))
    run = ["--target_cache", str(unbroken), "--kd_config", "progressive_fkl"]
    with pytest.raises(UserError, match=r"lacks 1 utterances of .*train/wav.scp \(sp0.9-train3 "):
        asr_kd_train.main(more.options(tmp_path / "exp", *run))


@pytest.mark.parametrize(
    "key, message",
    [
        ({"pool": "mean"}, "pool: mean needs whole posteriors"),
        ({"teacher_weights": [1, 2]}, "teacher_weights: a target cache has one teacher"),
    ],
)
def test_pages_that_need_the_teacher_itself(corpus, teacher_dir, unbroken, tmp_path, key, message):
    """The error comes before a cache is made and before training."""
    page = {**key, "stages": [{"share": 1.0, "objectives": [{"objective": "factorized_kl"}]}]}
    path = tiny_kd.write_yaml(tmp_path / "page.yaml", page)
    with pytest.raises(UserError, match=message):
        asr_kd_train.main(corpus.options(tmp_path / "exp", "--target_cache", str(unbroken), "--kd_config", str(path)))
    with pytest.raises(UserError, match=message):
        asr_kd_cache.main(command(teacher_dir, corpus, tmp_path / "targets", "--kd_config", str(path)))


def test_objective_that_does_not_say_what_it_reads(corpus, unbroken, tmp_path, monkeypatch):
    """An objective from outside may declare wrong needs. The error at the first batch is one line, not a traceback."""
    from espnet_kd.distill.objectives.posteriors import KL

    monkeypatch.setattr(KL, "nonblank_only", True)
    with pytest.raises(UserError, match="kl: the cached targets keep no tokens"):
        asr_kd_train.main(corpus.options(tmp_path / "exp", "--target_cache", str(unbroken), "--kd_config", "kl"))


VALUES = {
    "top_k": ["policy", 10**11, -1, 0, 14],
    "mass": ["policy", 0, -0.5, 1.5, float("nan")],
    "temperatures": ["policy", [0.0], [-1.0], [float("nan")], [float("inf")]],
    "tokens_on": ["policy", "some"],
    "taps": ["policy", ["../../secret"], ["/etc/passwd"], ["encoder.x"], ["decoder"]],
    "frame_shift": ["", 0, -0.04, float("nan"), float("inf"), 1e300],
    "sampling_rate": ["", 0, float("nan"), float("inf")],
    "num_tokens": ["", 0, -5, 1, 10**11],
    "hidden_size": ["", 0, -1, 10**11],
    "shards": ["", 0, -1, 10**11],
    "counts": ["", {"utterances": 1}, {"utterances": -1, "frames": 1, "rows": 1, "bytes": 1}],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, (_, *values) in VALUES.items() for v in values])
def test_a_manifest_with_values_that_no_cache_has(cache, name, value):
    content = json.loads((cache / "manifest.json").read_text())
    (content[VALUES[name][0]] if VALUES[name][0] else content)[name] = value
    (cache / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest.json is damaged \(ValueError: wrong values: .*make the cache again"):
        CachedTeacher(cache)


def test_a_manifest_of_nested_lists(cache):
    (cache / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="manifest.json is damaged .*make the cache again"):
        CachedTeacher(cache)
