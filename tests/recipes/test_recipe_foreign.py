"""run.sh with teachers of other toolkits: stages 2 to 13 with hf: and onnx:, and a changed source is refused."""

import json
import shutil

import pytest
import soundfile
import tiny_asr
import yaml
from recipe import TINY, Recipe

pytest.importorskip("transformers", reason="needs the extra: pip install 'espnet_kd[foundation]'")
pytest.importorskip("onnx", reason="makes the file that is tried")

import tiny_hf  # noqa: E402
import tiny_onnx  # noqa: E402

from espnet_kd.bin import asr_kd_data, asr_kd_pseudo  # noqa: E402

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
    assert "|teacher_given|teacher|" in results
    # A second run imports and trains nothing.
    again = mini.run("--stage", "3", "--stop_stage", "8", "--teacher", source, "--method", "progressive_fkl", *SMALL)
    assert "is imported already" in again.stdout and "loses" not in again.stdout
    # N-best and target cache work as with any teacher.
    options = ["--stage", "7", "--teacher", source, *SMALL, "--method"]
    mini.run(*options, "kl", "--stop_stage", "9", "--target_cache", "true")
    mini.run(*options, "sequence_kd", "--stop_stage", "7")
    other = tiny_hf.save(tmp_path_factory.mktemp("other") / "m", "wav2vec2", seed=1, letters=LETTERS)
    shutil.copy(other / "model.safetensors", directory)
    refused = mini.run("--stage", "8", "--teacher", source, "--method", "kl", *SMALL, check=False)
    assert refused.returncode == 1 and "model.safetensors" in refused.stdout.splitlines()[-1]


def test_hugging_face_with_pieces(mini, tmp_path_factory):
    """With a SentencePiece vocabulary, the recipe takes the token type and bpe.model from the teacher."""
    texts = [line.partition(" ")[2].upper() for line in (mini.dir / "data/train/text").read_text().splitlines()]
    tokenizer = tiny_hf.tokenizer_of(tiny_hf.pieces_of("bpe", 60, [*texts, LETTERS]), "bpe")
    home = tmp_path_factory.mktemp("hf") / "pieces"
    directory = tiny_hf.save_with_pieces(home, "wav2vec2", "bpe", tokenizer=tokenizer)
    options = ["--teacher", f"hf:{directory}", "--dumpdir", "dump_pieces", "--expdir", "exp_pieces", "--method", "kl"]
    done = mini.run("--stage", "2", *options, *SMALL[:2], *SMALL[4:])
    assert "its token error rate" in done.stdout  # references are split into its pieces
    exp = mini.dir / "exp_pieces"
    conf = yaml.safe_load((exp / "student_kl/export/config.yaml").read_text())
    assert conf["token_type"] == "bpe" and (exp / "student_kl/export/bpe.model").is_file()
    assert conf["token_list"] == yaml.safe_load((exp / "imported_pieces/config.yaml").read_text())["token_list"]
    text = (mini.dir / "dump_pieces/raw/train/text").read_text()
    assert not any(c.islower() for line in text.splitlines() for c in line.partition(" ")[2])
    results = json.loads((exp / "results.json").read_text())
    assert {r["role"] for r in results} == {"teacher", "plain", "student"} and all(r["wer"] for r in results)
    refused = mini.run("--stage", "3", *options, *SMALL[:2], "--token_type", "char", check=False)
    assert refused.returncode == 1 and "give --token_type bpe" in refused.stdout.splitlines()[-1]


def test_a_model_of_8_khz_is_refused_before_any_stage(mini, tmp_path_factory):
    directory = tiny_hf.save(tmp_path_factory.mktemp("hf") / "narrow", "wav2vec2", letters=LETTERS)
    conf = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").write_text(json.dumps({**conf, "sampling_rate": 8000}))
    options = ["--teacher", f"hf:{directory}", "--dumpdir", "dump_8k", "--expdir", "exp_8k", "--method", "kl"]
    refused = mini.run("--stage", "2", *options, check=False)
    assert refused.returncode == 1 and "--fs 8000" in refused.stdout.splitlines()[-1]
    assert not (mini.dir / "dump_8k").exists()
    # The command that the message advises works; stage 4 compares the frames of teacher and student.
    done = mini.run("--stage", "2", "--stop_stage", "4", *options, "--fs", "8000", *SMALL)
    assert "loses" in done.stdout


def test_onnx(mini, tmp_path_factory):
    tokens = [*"abcdefghijklmnopqrstuvwxyz'", "|", "<unk>", "<blank>"]
    model, names = tiny_onnx.save(tmp_path_factory.mktemp("onnx"), tokens)
    options = ["--teacher", f"onnx:{model}", "--import_args", f"--tokens {names}", "--method", "kl"]
    mini.run("--stage", "2", "--dumpdir", "dump_onnx", "--expdir", "exp_onnx", *options, *SMALL)
    assert (mini.dir / "exp_onnx/student_kl/export/model.pth").is_file()
    assert (mini.dir / "exp_onnx/RESULTS.md").is_file()


def test_audio_without_transcripts(egs2, tmp_path_factory):
    """egs2/foundation needs one command for a directory of audio and a teacher of another toolkit."""
    home = tmp_path_factory.mktemp("audio")
    for i in range(20):
        soundfile.write(home / f"{i}.flac", tiny_asr.audio(1.0 + 0.1 * (i % 5), i), 16000)
    directory = tiny_hf.save(home / "hf", "hubert")
    recipe = Recipe(egs2, "foundation")
    small = ["--nj", "1", "--train_args", f"{TINY} --num_workers 0 --max_epoch 1"]
    recipe.run("--audio", str(home), "--teacher", f"hf:{directory}", *small)
    results = (recipe.dir / "exp/RESULTS.md").read_text()
    verdict = next(line for line in results.splitlines() if line.startswith("- label_free: "))
    assert "on test (reference: teacher)" in verdict and "Beside its teacher it is " in verdict, verdict
    assert "not scored yet" not in results
    assert (recipe.dir / "exp/student_label_free/export/model.pth").is_file()
    assert not (recipe.dir / "dump/raw/test/text").exists()


def test_a_student_with_pieces_of_a_teacher_with_characters(mini, tmp_path_factory):
    """With --student_tokens own, the N-best are converted by their text; a method that needs frames is refused."""
    directory = tiny_hf.save(tmp_path_factory.mktemp("hf") / "letters", "wav2vec2", letters=LETTERS)
    options = ["--teacher", f"hf:{directory}", "--student_tokens", "own", "--token_type", "bpe", "--nbpe", "50"]
    options += ["--dumpdir", "dump_own", "--expdir", "exp_own", *SMALL[:2], *SMALL[4:]]
    refused = mini.run("--stage", "2", *options, "--method", "kl", check=False)
    assert refused.returncode == 1 and not (mini.dir / "dump_own").exists()
    assert "--student_tokens own: kl" in refused.stdout and "sequence_kd" in refused.stdout
    done = mini.run("--stage", "2", *options, "--method", "sequence_kd")
    assert "by their text" in done.stdout
    pieces = (mini.dir / "dump_own/token_list/bpe_unigram50/tokens.txt").read_text().split()
    assert len(pieces) == 50 and not any(c.islower() for p in pieces[2:-1] for c in p)  # in the teacher's case
    nbest = (mini.dir / "exp_own/nbest5_imported_letters_train_bpe_unigram50").read_text().splitlines()
    assert nbest and all(set(line.split()[3:]) <= set(pieces) for line in nbest)
    assert (mini.dir / "exp_own/student_sequence_kd/export/bpe.model").is_file()
    assert "sequence_kd" in (mini.dir / "exp_own/RESULTS.md").read_text()


def test_a_recognisers_transcripts_beside_transcribed_audio(mini, monkeypatch):
    """asr_kd_pseudo and then --pseudo give one training set of both."""
    monkeypatch.chdir(mini.dir)  # the paths in its data dirs are relative to it
    text = (mini.dir / "data/train/text").read_text().splitlines()
    home = mini.dir / "data/extra_audio"
    home.mkdir()
    for name in ("wav.scp", "utt2spk"):
        rows = (mini.dir / "data/train" / name).read_text().splitlines()[:4]
        (home / name).write_text("".join(f"x{row}\n" for row in rows))
    asr_kd_data.main(["format", "--src", str(home), "--dst", str(mini.dir / "dump/raw/extra"), "--text", "none"])
    labels = mini.dir / "labels"
    labels.write_text("".join(f"x{row}\n" for row in text[:3]))
    out = mini.dir / "data/pseudo"
    asr_kd_pseudo.main(["--data_dir", str(mini.dir / "dump/raw/extra"), "--labels", str(labels), "--out", str(out)])
    options = ["--pseudo", "data/pseudo", "--expdir", "exp_pseudo", *SMALL]
    mini.run("--stage", "2", "--stop_stage", "6", *options)
    both = (mini.dir / "dump/raw/train_and_pseudo/text").read_text().splitlines()
    assert len(both) == len(text) + 3
    assert (mini.dir / "exp_pseudo/student_plain_pseudo/.done").is_file()
    missing = mini.run("--stage", "2", "--pseudo", "data/nowhere", check=False)
    assert missing.returncode == 1 and "--pseudo: data/nowhere" in missing.stdout
