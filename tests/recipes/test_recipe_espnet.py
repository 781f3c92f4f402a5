"""A recipe that uses the dump of an ESPnet recipe, and its experiment as the teacher: --espnet_data to the results."""

import json

import soundfile
import tiny_asr
import tiny_espnet
import yaml
from recipe import TINY, Recipe

from espnet_kd.data.tokens import make_token_list


def make_espnet_recipe(directory):
    """Imitate the output of asr.sh: data sets of each kind, a BPE model, and a teacher with a relative path to it."""
    for name, kind, number in (("train_nodev", "flac.ark", 10), ("train_dev", "flac", 3), ("eval", "pipe", 3)):
        tiny_espnet.add_set(directory, name, kind, [0.8 + 0.1 * i for i in range(number)])
    bpe = directory / "data/token_list/bpe_unigram11"
    tokens = make_token_list([directory / "dump/raw/train_nodev/text"], bpe, "bpe", 11).read_text().splitlines()
    conf = {**tiny_asr.config(output_size=24), "token_list": tokens, "token_type": "bpe"}
    conf["bpemodel"] = "data/token_list/bpe_unigram11/bpe.model"
    tiny_asr.save(tiny_asr.build(conf, sharpen=4.0), conf, directory / "exp/asr_train_raw_bpe11")
    return tokens


def test_from_an_espnet_recipe(egs2, tmp_path):
    espnet = tmp_path / "espnet/egs2/some/asr1"
    tokens = make_espnet_recipe(espnet)
    recipe = Recipe(egs2, "mini")
    options = ["--espnet_data", str(espnet), "--train_set", "train_nodev", "--valid_set", "train_dev", "--test_sets"]
    options += ["eval", "--teacher", str(espnet / "exp/asr_train_raw_bpe11"), "--token_type", "bpe", "--nj", "1"]
    options += ["--method", "kl", "--accum_grad", "1", "--train_args", f"{TINY} --max_epoch 1"]
    done = recipe.run(*options, "--stop_stage", "4")
    assert "whose audio stays there" in done.stdout and "10 entries of" in done.stdout
    places = {"train_nodev": (10, "data/train_nodev/audio/"), "eval": (3, "data/eval/audio/")}
    for name, (number, place) in {**places, "train_dev": (3, f"{espnet}/dump/raw/train_dev/data/")}.items():
        paths = [line.split()[1] for line in (recipe.dir / f"dump/raw/{name}/wav.scp").read_text().splitlines()]
        assert len(paths) == number and all(path.startswith(place) for path in paths)
        assert {soundfile.info(str(recipe.dir / path)).samplerate for path in paths} == {16000}
    (token_dir,) = recipe.dir.glob("data/token_list/teacher_asr_train_raw_bpe11_*")
    assert (token_dir / "tokens.txt").read_text().splitlines() == tokens

    done = recipe.run(*options, "--stage", "8")
    assert "nothing is trained in exp/student_plain" in done.stdout
    rows = {row["role"]: row for row in json.loads((recipe.dir / "exp/results.json").read_text())}
    assert set(rows) == {"teacher", "student"} and all(row["testset"] == "eval" for row in rows.values())
    config = yaml.safe_load((recipe.dir / "exp/student_kl/config.yaml").read_text())
    assert config["token_list"] == tokens and config["accum_grad"] == 1
    # Nothing was written into the teacher's directory.
    assert {p.name for p in (espnet / "exp/asr_train_raw_bpe11").iterdir()} == {"config.yaml", "valid.loss.ave.pth"}
