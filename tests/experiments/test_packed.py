"""A zip of espnet2.bin.pack can be given in place of its experiment."""

import zipfile

import numpy as np
import pytest
import tiny_asr
import torch
import yaml

from espnet_kd.cli import UserError
from espnet_kd.decode.decodings import decode_dir
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.targets.online import OnlineTeacher


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/espnet_kd"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive that was packed in a recipe's directory, whose relative paths no longer exist."""
    from espnet2.main_funcs.pack_funcs import pack

    (tmp_path / "recipe").mkdir()
    monkeypatch.chdir(tmp_path / "recipe")
    stats = tmp_path / "recipe/exp/stats/feats_stats.npz"
    stats.parent.mkdir(parents=True)
    np.savez(stats, count=9, sum=np.zeros(40), sum_square=np.ones(40))
    conf = {**tiny_asr.config(), "normalize": "global_mvn"}
    conf["normalize_conf"] = {"stats_file": "exp/stats/feats_stats.npz"}
    tiny_asr.save(tiny_asr.build(conf), conf, tmp_path / "recipe/exp/asr")
    pack(
        {"asr_model_file": "exp/asr/valid.loss.ave.pth"},
        {"asr_train_config": "exp/asr/config.yaml"},
        tmp_path / "big.zip",
        ["exp/stats/feats_stats.npz"],
    )
    (tmp_path / "recipe/exp").rename(tmp_path / "kept")
    return tmp_path / "big.zip"


def test_the_same_model(archive, tmp_path, cache):
    state = torch.load(tmp_path / "kept/asr/valid.loss.ave.pth", weights_only=True)
    config, model_file = find_experiment(archive)
    assert {p.name for p in config.parent.iterdir()} == {"config.yaml", "model.pth", "feats_stats.npz"}
    loaded = load_model(config, model_file)[0].state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
    assert OnlineTeacher(archive).frame_shift == pytest.approx(0.04)
    # The archive is unpacked once, and no unfinished directory is left.
    model_file.touch()
    before = model_file.stat().st_mtime_ns
    assert find_experiment(str(archive)) == (config, model_file) and model_file.stat().st_mtime_ns == before
    assert [p.name for p in cache.iterdir()] == [config.parent.name]
    assert decode_dir("exp/teacher_given/packed.zip", "dump/raw/test").as_posix() == "exp/teacher_given/decode_test"


def test_another_archive_of_the_same_name_is_another_model(archive):
    first = find_experiment(archive)
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("more.txt", "")
    assert find_experiment(archive) != first


def write(path, members):
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)


META = {"yaml_files": {"asr_train_config": "exp/config.yaml"}, "files": {"asr_model_file": "exp/m.pth"}}


def test_names_that_lead_elsewhere_stay_inside(tmp_path, cache):
    members = {"meta.yaml": yaml.safe_dump(META), "exp/config.yaml": "a: 1", "exp/m.pth": "", "../../evil.txt": "x"}
    write(tmp_path / "a.zip", members)
    config, _ = find_experiment(tmp_path / "a.zip")
    assert (config.parent / "evil.txt").read_text() == "x" and not list(tmp_path.rglob("evil.txt"))[1:]


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"meta.yaml": "[1"},
        {"meta.yaml": "- 1"},
        {"meta.yaml": yaml.safe_dump({"yaml_files": {"enh_train_config": "a"}, "files": {}})},
        {"meta.yaml": yaml.safe_dump(META), "exp/config.yaml": "a: 1"},
    ],
)
def test_another_zip_is_refused(tmp_path, cache, members):
    write(tmp_path / "a.zip", members)
    with pytest.raises(UserError, match="a.zip is no ASR model packed by espnet2.bin.pack"):
        find_experiment(tmp_path / "a.zip")
    assert not cache.exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"zeros.bin": bytes(300_000_000)}, "a.zip has 0.3 MB and unpacks to 300 MB in 4 files"),
        ({f"{i}.txt": "" for i in range(10_001)}, "a.zip has .* in 10004 files"),
    ],
    ids=["a large file", "many files"],
)
def test_a_zip_that_unpacks_to_far_more_than_a_model(tmp_path, cache, more, message):
    members = {"meta.yaml": yaml.safe_dump(META), "exp/config.yaml": "a: 1", "exp/m.pth": "", **more}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    with pytest.raises(UserError, match=message):
        find_experiment(tmp_path / "a.zip")
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("meta", ["[" * 5000, "a: &a [" + "x, " * 99 + "x]\n", "#" * 2_000_000])
def test_a_zip_whose_meta_is_beyond_the_bounds(tmp_path, cache, meta):
    write(tmp_path / "a.zip", {"meta.yaml": meta})
    with pytest.raises(UserError, match="a.zip is no ASR model packed by espnet2.bin.pack"):
        find_experiment(tmp_path / "a.zip")


def test_damage_and_absence_are_told(archive, tmp_path, cache):
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as packed:
        start = packed.getinfo("exp/asr/valid.loss.ave.pth").header_offset
    content[start + 400] ^= 0xFF
    (tmp_path / "bad.zip").write_bytes(content)
    for name, words in (("bad.zip", "bad.zip is damaged, or no zip"), ("nowhere.zip", "cannot read .*nowhere.zip: No")):
        with pytest.raises(UserError, match=words):
            find_experiment(tmp_path / name)
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(UserError, match="text.zip is damaged, or no zip file"):
        find_experiment(tmp_path / "text.zip")
    assert not cache.exists() or not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_told(archive, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(archive))
    with pytest.raises(UserError, match="cannot unpack .*Not a directory; set XDG_CACHE_HOME"):
        find_experiment(archive)
