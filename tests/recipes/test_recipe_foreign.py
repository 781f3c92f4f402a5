"""run.sh with teachers of other makers: stages 2 to 13 from hf: and from onnx:, and a changed source refused."""

import shutil

import pytest
import soundfile
import tiny_asr
from recipe import TINY, Recipe

pytest.importorskip("transformers", reason="needs the extra: pip install 'espnet_kd[foundation]'")
pytest.importorskip("onnx", reason="makes the file that is tried")

import tiny_hf  # noqa: E402
import tiny_onnx  # noqa: E402

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
SIZES = "--train 12 --valid 4 --test 4"
SMALL = ["--nj", "1", "--token_type", "char", "--train_args", f"{TINY} --num_workers 0 --max_epoch 2"]


@pytest.fixture(scope="module")
def mini(egs2):
    recipe = Recipe(egs2, "mini")
    recipe.run("--stop_stage", "1", "--local_data_opts", SIZES)
    return recipe


def test_hugging_face(mini, tmp_path_factory):
    directory = tiny_hf.save(tmp_path_factory.mktemp("hf") / "tiny model", "wav2vec2", letters=LETTERS)
    source = f"hf:{directory}".replace(" ", "\\ ")
    done = mini.run("--stage", "2", "--teacher", source, "--method", "progressive_fkl", *SMALL)
    exp = mini.dir / "exp"
    tokens = (mini.dir / "data/token_list/teacher_imported_tiny_model/tokens.txt").read_text().split()
    assert tokens[:3] == ["<blank>", "<unk>", "<space>"] and "A" in tokens
    text = (mini.dir / "dump/raw/train/text").read_text()
    assert text.upper().split()[1:] and all(w.isupper() for line in text.splitlines() for w in line.split()[1:])
    assert "texts changed" in done.stdout and "loses" in done.stdout
    assert (exp / "student_progressive_fkl/export/model.pth").is_file()
    results = (exp / "RESULTS.md").read_text()
    assert "imported_tiny_model" in results or "teacher" in results
    # Again: nothing is imported or trained anew.
    again = mini.run("--stage", "3", "--stop_stage", "8", "--teacher", source, "--method", "progressive_fkl", *SMALL)
    assert "is imported already" in again.stdout and "loses" not in again.stdout
    # The N-best and the cache are made of it like of any teacher.
    options = ["--stage", "7", "--teacher", source, *SMALL, "--method"]
    mini.run(*options, "kl", "--stop_stage", "9", "--target_cache", "true")
    mini.run(*options, "sequence_kd", "--stop_stage", "7")
    other = tiny_hf.save(tmp_path_factory.mktemp("other") / "m", "wav2vec2", seed=1, letters=LETTERS)
    shutil.copy(other / "model.safetensors", directory)
    refused = mini.run("--stage", "8", "--teacher", source, "--method", "kl", *SMALL, check=False)
    assert refused.returncode == 1 and "model.safetensors" in refused.stdout.splitlines()[-1]


def test_onnx(mini, tmp_path_factory):
    tokens = [*"abcdefghijklmnopqrstuvwxyz'", "|", "<unk>", "<blank>"]
    model, names = tiny_onnx.save(tmp_path_factory.mktemp("onnx"), tokens)
    options = ["--teacher", f"onnx:{model}", "--import_args", f"--tokens {names}", "--method", "kl"]
    mini.run("--stage", "2", "--dumpdir", "dump_onnx", "--expdir", "exp_onnx", *options, *SMALL)
    assert (mini.dir / "exp_onnx/student_kl/export/model.pth").is_file()
    assert (mini.dir / "exp_onnx/RESULTS.md").is_file()


def test_audio_without_transcripts(egs2, tmp_path_factory):
    """egs2/foundation: a directory of audio and a teacher of another maker, one command."""
    home = tmp_path_factory.mktemp("audio")
    for i in range(20):
        soundfile.write(home / f"{i}.flac", tiny_asr.audio(1.0 + 0.1 * (i % 5), i), 16000)
    directory = tiny_hf.save(home / "hf", "hubert")
    recipe = Recipe(egs2, "foundation")
    small = ["--nj", "1", "--train_args", f"{TINY} --num_workers 0 --max_epoch 1"]
    recipe.run("--audio", str(home), "--teacher", f"hf:{directory}", *small)
    results = (recipe.dir / "exp/RESULTS.md").read_text()
    assert "reference: teacher" in results
    assert (recipe.dir / "exp/student_label_free/export/model.pth").is_file()
    assert not (recipe.dir / "dump/raw/test/text").exists()
