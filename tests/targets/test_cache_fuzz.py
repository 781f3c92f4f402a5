"""Damaged target caches are read and made again; fuzzing.py lists the allowed outcomes."""

from __future__ import annotations

import copy
import functools
import json
import operator
import shutil
from pathlib import Path
from typing import List

import numpy as np
import pytest
import tiny_kd
from fuzzing import NUMBERS, contents, damage_file, damaged_trees, examples, places, survives
from hypothesis import given
from hypothesis import strategies as st

from espnet_kd.bin import asr_kd_cache
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.teacher import Needs

pytestmark = pytest.mark.usefixtures("elsewhere")

PLACES = ["", "nan", "-1", "0", "1", "99999999999999999999", "x", "é", "\0", "train0", "a.ark:0", "x |", "blank.ark:-3"]
PLACES += ["/dev/zero:0", "tokens.ark:5", "blank.ark:99999999", "inf"]


def make_cache(teacher_dir: Path, corpus: tiny_kd.Corpus, output: Path) -> None:
    data = [str(corpus.dir / name) for name in ("train", "valid")]
    own = ["--teacher", str(teacher_dir), "--data_dir", *data, "--output", str(output), "--top_k", "4"]
    asr_kd_cache.main([*own, "--shard_size", "6", "--batch_seconds", "9", "--kd_config", "progressive_fkl"])


def read_cache(cache: Path, ids: List[str]) -> List[np.ndarray]:
    """The targets of each utterance, as arrays."""
    teacher = CachedTeacher(cache)
    teacher.check(Needs(taps=("encoder",)))
    said = []
    for utt_id in ids:
        x = teacher.targets([utt_id], None, None, ["encoder"])
        said += [x.logits.log_blank, x.logits.tokens, x.logits.log_probs, x.hidden["encoder"]]
    return [np.array(x) for x in said]


@pytest.mark.trains
@pytest.mark.faults("odd target caches (fuzz)")
@pytest.mark.parametrize("what", ["read", "made again"])
def test_caches(what, teacher_dir, corpus, tmp_path, record_property):
    base, cache = tmp_path / "base", tmp_path / "targets"
    make_cache(teacher_dir, corpus, cache)
    ids = [f"{name}{i}" for name, number in (("train", 9), ("valid", 3)) for i in range(number)]
    want = read_cache(cache, ids)
    shutil.move(cache, base)
    names = [str(p.relative_to(base)) for p in sorted(base.rglob("*")) if p.is_file() and p.stat().st_size]
    counts = [0, 0]

    def check(same: bool) -> None:
        """Read the cache and count the outcome. With ``same``, any targets must equal those before the damage."""
        before = contents(tmp_path)
        said: List[np.ndarray] = []
        if what == "made again":
            survives(lambda: make_cache(teacher_dir, corpus, cache))
        done = survives(lambda: said.extend(read_cache(cache, ids)))
        counts[done] += 1
        if done and (same or what == "made again"):
            assert all(np.array_equal(x, y) for x, y in zip(want, said))
        if what == "read":
            assert contents(tmp_path) == before

    @examples(200 if what == "read" else 30)
    @given(st.data())
    def damaged(data):
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(base, cache)
        name = data.draw(st.sampled_from(names))
        if name == "manifest.json" and data.draw(st.booleans()):
            tree = data.draw(damaged_trees([json.loads((base / name).read_text())]))
            (cache / name).write_text(json.dumps(tree, skipkeys=True))
        else:
            damage_file(data.draw, cache / name, [x.encode() for x in PLACES], not name.endswith(".ark"))
        check(same=name != "manifest.json")

    damaged()
    if what == "read":  # every entry of the manifest with every odd value
        shutil.rmtree(cache)
        shutil.copytree(base, cache)
        manifest = json.loads((base / "manifest.json").read_text())
        for *above, key in places(manifest):
            for value in (*NUMBERS, "", "x", None, True, [], {}):
                tree = copy.deepcopy(manifest)
                functools.reduce(operator.getitem, above, tree)[key] = value
                (cache / "manifest.json").write_text(json.dumps(tree))
                check(same=False)
    record_property("faults", sum(counts))
    assert sum(counts) >= 25 and counts[what == "made again"] > 10, counts
