"""Shared by the tests of the target cache: the command that makes a cache, and its contents."""

import json

import numpy as np

from espnet_kd.targets.cache import read_arrays, read_index, shard_dir
from espnet_kd.targets.cached import CachedTeacher

TOP_K = 4


def command(teacher, corpus, output, *more):
    data = [str(corpus.dir / name) for name in ("train", "valid")]
    return ["--teacher", str(teacher), "--data_dir", *data, "--output", str(output), "--top_k", str(TOP_K),
            "--shard_size", "3", "--batch_seconds", "3", "--kd_config", "progressive_fkl", *more]  # fmt: skip


def contents(cache):
    """Every array of a cache by utterance, and its manifest."""
    manifest = CachedTeacher(cache).manifest
    arrays = {}
    for number in range(manifest.shards):
        shard = shard_dir(cache, number)
        for entry in read_index(shard, manifest):
            arrays[entry.utt_id] = read_arrays(shard, manifest.policy, entry)
    return json.loads((cache / "manifest.json").read_text()), arrays


def assert_equal(cache, other):
    (manifest, arrays), (other_manifest, others) = contents(cache), contents(other)
    assert manifest == other_manifest and list(arrays) == list(others)
    for utt_id in arrays:
        for x, y in zip(arrays[utt_id], others[utt_id]):
            np.testing.assert_array_equal(x, y)
    assert [p.name for p in cache.iterdir() if p.name.startswith(".")] == [".lock"]
