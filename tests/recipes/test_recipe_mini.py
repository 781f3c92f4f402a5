"""The embedded recipe end to end: the stages of the main job, a kill in the middle, stages that need earlier ones."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from recipe import TINY, Recipe

from espnet_kd.data.datadir import read_map
from espnet_kd.transcribe import Transcriber

SIZES = "--train 24 --valid 6 --test 8"
TEACHER = f"{TINY} --max_epoch 2"
STUDENT = f"{TINY} --max_epoch 6"
SMALL = ["--local_data_opts", SIZES, "--teacher_args", TEACHER, "--train_args", STUDENT]


@pytest.fixture(scope="module")
def finished(egs2):
    """The main job, run_all.sh, with tiny models."""
    recipe = Recipe(egs2, "mini")
    done = subprocess.run(
        [str(egs2.parent / "run_all.sh"), *SMALL],
        env=recipe.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    # ESPnet's warnings go to the logs only.
    assert not [w for w in ("Flash", "Set decoder", "Warning", "WARNING", "Traceback") if w in done.stdout], done.stdout
    return recipe


def rows(recipe: Recipe) -> dict:
    return {row["role"]: row for row in json.loads((recipe.dir / "exp/results.json").read_text())}


def test_results_table(finished):
    table = rows(finished)
    assert set(table) == {"teacher", "plain", "student"}
    student = table["student"]
    assert student["method"] == "progressive_fkl" and student["kd_stages"] == [1, 2, 3]
    assert student["epochs"] == table["plain"]["epochs"] == 6
    assert student["params"] == table["plain"]["params"] > 0
    for row in table.values():
        assert row["testset"] == "test" and row["wer_low"] <= row["wer"] <= row["wer_high"]
        assert row["rtf"] > 0 and row["train_seconds"] > 0
    exp = finished.dir / "exp"
    assert "progressive_fkl" in (exp / "RESULTS.md").read_text()
    assert (exp / "report/curves_1.png").stat().st_size > 10_000


def test_every_kd_stage_has_its_epochs_and_statistics(finished):
    """All KD stages are one training in one process, in which the first two end within epoch 1."""
    exp = finished.dir / "exp/student_progressive_fkl"
    record = json.loads((exp / "kd_stage.json").read_text())
    assert record["finished"] and record["epochs"] == 6
    assert [stage["epochs"] for stage in record["stages"]] == [[1, 1], [1, 1], [1, 6]]
    for sub in ("kd_stage1", "kd_stage2", "."):
        assert (exp / sub / "student.pth").is_file()
    log = (exp / "train.kd_stage3.log").read_text()
    found = re.findall(r" (\d+)epoch results: \[train\] (.*?), \[valid\] (.*)", log)
    assert [int(epoch) for epoch, *_ in found] == [1, 2, 3, 4, 5, 6]
    ends = ["loss_factorized_representation", "loss_factorized_kl"]
    for train, valid in [parts[1:] for parts in found]:
        for name in ("loss_ctc", "nonblank_share", "agreement", "loss_kd"):
            assert f"{name}=" in train and f"{name}=" in valid
        assert all(f"{name}=" in valid for name in ends)
    assert "loss_blank_kl=" in found[0][1] and all(f"{name}=" in found[-1][1] for name in ends)


def test_stage_11_writes_measures_and_reports_other_forms(finished):
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")
    finished.run("--stage", "11", "--stop_stage", "11", "--export_formats", "onnx", "--export_args", "--max_seconds 9")
    student = finished.dir / "exp/student_progressive_fkl"
    assert json.loads((student / "export_onnx/student.json").read_text())["max_seconds"] == 9
    shown = json.loads((student / "exports.json").read_text())
    assert [(row["format"], row["testset"], row["same_text"]) for row in shown] == [
        ("espnet", "test", 8), ("onnx", "test", 8),
    ]  # fmt: skip
    # The exported model gives the same text as the recipe's decoding.
    decoded = read_map(student / "decode_test/1best_recog/text")
    transcriber = Transcriber(student / "export_onnx")
    for utt_id, path in read_map(finished.dir / "dump/raw/test/wav.scp").items():
        assert transcriber(finished.dir / path).text.split() == decoded[utt_id].split()
    finished.run("--stage", "13")
    assert "## Exported forms" in (finished.dir / "exp/RESULTS.md").read_text()
    assert "- teacher: exp/teacher\n" in (student / "export_onnx/README.md").read_text()


def test_finished_stages_are_harmless(finished):
    before = (finished.dir / "exp/student_progressive_fkl/student.pth").stat().st_mtime_ns
    done = finished.run(*SMALL, "--stage", "1", "--stop_stage", "10")
    assert (finished.dir / "exp/student_progressive_fkl/student.pth").stat().st_mtime_ns == before
    assert "is finished in" in (finished.dir / "exp/student_progressive_fkl/train.kd_stage3.log").read_text()
    assert "is trained" in done.stdout


def test_a_model_of_other_settings_is_refused(finished):
    """The error is one line with the name of the option, for a plain and for a distilled student."""
    other = ["--train_args", f"{STUDENT} --encoder_conf num_blocks=3"]
    for stages in (["--stage", "6", "--stop_stage", "6"], ["--stage", "8", "--stop_stage", "10"]):
        done = finished.run(*SMALL, *stages, *other, check=False)
        assert done.returncode == 1 and done.stdout.count("error:") == 1
        assert "encoder_conf.num_blocks: 1 → 3" in done.stdout
    finished.run(*SMALL, "--stage", "6", "--stop_stage", "6")  # the model is unchanged and still accepted


def test_training_audio_that_was_made_again_under_its_names_is_refused(finished):
    """Statistics and models are of the earlier audio, and the test sets would be decoded again."""
    stage = [*SMALL, "--stage", "4", "--stop_stage", "4"]
    audio = finished.dir / next(iter(read_map(finished.dir / "dump/raw/train/wav.scp").values()))
    content, times = audio.read_bytes(), audio.stat()
    audio.write_bytes(content[:-2] + b"\1\1")
    done = finished.run(*stage, check=False)
    audio.write_bytes(content)
    os.utime(audio, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert done.returncode == 1 and done.stdout.count("error:") == 1
    assert re.search("error: .*dump/raw/train is not that of exp/stats_train_word.*student_plain", done.stdout)
    assert "statistics are there" in finished.run(*stage).stdout  # only the content counts


def test_a_stage_names_the_one_that_makes_its_input(egs2, finished):
    fresh = Recipe(egs2, "mini")
    for stage, text in ((2, "stage 1 makes it"), (6, "stage 4 makes it")):
        done = fresh.run(
            "--stage", str(stage), "--train_set", "absent", "--dumpdir", "none", "--expdir", "none", check=False
        )
        assert done.returncode == 1 and text in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize("arguments", [["--stge", "3"], ["--stage"], ["--stage", "two"], ["stray"]])
def test_wrong_options_are_refused(egs2, arguments):
    done = Recipe(egs2, "mini").run(*arguments, check=False)
    assert done.returncode == 2 and "error:" in done.stdout


@pytest.mark.faults("kill -9 of a stage of run.sh")
def test_kill_in_stage_10_and_half_a_checkpoint(finished):
    """After kill -9 in KD stage 3 and a truncated checkpoint, the same command resumes from the epoch before."""
    options = [*SMALL[:5], f"{TINY} --max_epoch 30", "--tag", "killed"]
    finished.run(*options, "--stage", "8", "--stop_stage", "9")
    directory = finished.dir / "exp/student_progressive_fkl_killed"
    previous = (directory / "checkpoint.prev.pth").stat().st_mtime_ns
    run = subprocess.Popen(
        finished.command(*options, "--stage", "10", "--stop_stage", "10"),
        cwd=finished.dir,
        env=finished.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 300
    while (directory / "checkpoint.prev.pth").stat().st_mtime_ns == previous:  # until an epoch of this run has ended
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    checkpoint = directory / "checkpoint.pth"
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)

    finished.run(*options, "--stage", "10", "--stop_stage", "13")
    text = (directory / "train.kd_stage3.log").read_text()
    assert "checkpoint.pth is damaged" in text and "going back to" in text
    record = json.loads((directory / "kd_stage.json").read_text())
    assert record["finished"] and record["epochs"] == 30
    assert len(json.loads((finished.dir / "exp/results.json").read_text())) == 4


@pytest.fixture
def without_text(finished):
    """data/silent is data/train without text, and every text of data/train is hidden."""
    silent, train = finished.dir / "data/silent", finished.dir / "data/train"
    silent.mkdir(exist_ok=True)
    for name in ("wav.scp", "utt2spk", "spk2utt"):
        shutil.copy(train / name, silent)
    texts = [train / "text", *finished.dir.glob("dump/raw/train*/text")]
    for text in texts:
        text.rename(text.with_name("hidden"))
    yield finished
    for text in texts:
        text.with_name("hidden").rename(text)


def test_training_without_a_transcript(without_text):
    recipe, silent = without_text, ["--train_set", "silent", "--tag", "silent"]
    done = recipe.run(*silent, "--stage", "2", "--stop_stage", "3", check=False)
    assert done.returncode == 1 and "error: data/silent has no text to make a token list from" in done.stdout
    for stage in ("5", "6"):
        done = recipe.run(*silent, "--stage", stage, "--stop_stage", stage, check=False)
        assert done.returncode == 1 and "needs transcripts, and dump/raw/silent has no text" in done.stdout

    options = [*silent, "--teacher", "exp/teacher", "--train_args", f"{TINY} --max_epoch 1"]
    done = recipe.run(*options, "--method", "progressive_fkl", "--stage", "3", "--stop_stage", "8", check=False)
    assert "stage 6: skipped" in done.stdout
    assert done.returncode == 1 and "progressive_fkl needs transcripts" in done.stdout
    own, teachers = (recipe.dir / f"data/token_list/{name}/tokens.txt" for name in ("word", "teacher_teacher"))
    assert teachers.read_bytes() == own.read_bytes()
    stats = recipe.dir / "exp/stats_silent_teacher_teacher"
    assert (stats / "valid/text_shape.word").exists() and not list(stats.glob("train/text_shape*"))

    done = recipe.run(*options, "--method", "label_free", "--stage", "7", "--stop_stage", "11")
    for stage in (7, 9, 10):
        assert f"stage {stage}: nothing to do" in done.stdout
    student = recipe.dir / "exp/student_label_free_silent"
    assert (student / "export/model.pth").exists()
    config = yaml.safe_load((student / "config.yaml").read_text())
    assert config["train_data_path_and_name_and_type"] == [["dump/raw/silent/wav.scp", "speech", "sound"]]
    assert [name for _, name, _ in config["valid_data_path_and_name_and_type"]] == ["speech", "text"]
    train, valid = (student / "train.kd_stage1.log").read_text().split("1epoch results: ")[1].split("[valid]")[:2]
    assert "loss_ctc" not in train and "loss_ctc" in valid


def test_untranscribed_audio_beside_transcribed(finished):
    extra = finished.dir / "data/extra"
    extra.mkdir()
    for name in ("wav.scp", "utt2spk"):
        lines = (finished.dir / "data/test" / name).read_text().splitlines()
        (extra / name).write_text("".join(f"x-{line}\n" for line in lines))
    (extra / "text").write_bytes(b"\xff\n")  # invalid UTF-8, because this file must not be read
    options = ["--untranscribed", "data/extra", "--kd_stages", "3", "--train_args", f"{TINY} --max_epoch 1"]
    finished.run(*options, "--stage", "2", "--stop_stage", "4")
    both = finished.dir / "dump/raw/train_and_untranscribed"
    texts = dict(line.partition(" ")[::2] for line in (both / "text").read_text().splitlines())
    assert len(texts) == 32 and {key for key, text in texts.items() if not text} == {k for k in texts if k[:2] == "x-"}
    shapes = finished.dir / "exp/stats_train_and_untranscribed_word/train/text_shape.word"
    tokens = len((finished.dir / "data/token_list/word/tokens.txt").read_text().splitlines())
    want = sorted(f"{key} {len(text.split())},{tokens}" for key, text in texts.items())
    assert sorted(shapes.read_text().splitlines()) == want

    done = finished.run(*options, "--stage", "8", "--stop_stage", "10")
    student = finished.dir / "exp/student_progressive_fkl_3_untranscribed"
    assert (student / "student.pth").exists(), done.stdout
    train = (student / "train.kd_stage3.log").read_text().split("1epoch results: ")[1].split("[valid]")[0]
    assert "loss_ctc=" in train and "nan" not in train and "inf" not in train
    # Teacher and plain student train on the transcribed part only, and therefore need no new training.
    done = finished.run(*SMALL, *options[:2], "--stage", "5", "--stop_stage", "6")
    assert done.stdout.count("is trained") == 2

    done = finished.run("--untranscribed", "data/train", "--stage", "2", "--stop_stage", "2", check=False)
    assert done.returncode == 1 and "is in dump/raw/train and in dump/raw/train_untranscribed" in done.stdout


def test_methods_with_nbest_and_without_teacher(finished):
    short = ["--train_args", f"{TINY} --max_epoch 1"]
    finished.run(*short, "--method", "sequence_kd", "--stage", "7", "--stop_stage", "8")
    nbest = finished.dir / "exp/nbest5_teacher_train"
    assert len({line.split()[0] for line in nbest.read_text().splitlines()}) == 24 + 6
    config = yaml.safe_load((finished.dir / "exp/student_sequence_kd/config.yaml").read_text())
    assert config["nbest"] == "exp/nbest5_teacher_train" and config["teacher"] == []

    alone = finished.dir / "exp_alone"
    alone.mkdir()
    (alone / "stats_train_word").symlink_to("../exp/stats_train_word")
    options = [*short, "--expdir", "exp_alone", "--stop_stage"]
    done = finished.run(*options, "5", "--stage", "5", "--method", "cr_ctc")
    assert "stage 5: skipped, cr_ctc has no teacher" in done.stdout
    done = finished.run(*options, "8", "--stage", "7", "--method", "sequence_kd", check=False)
    assert done.returncode == 1 and "exp_alone/teacher/.done is missing; stage 5 makes it" in done.stdout
    done = finished.run(*options, "13", "--stage", "7", "--method", "cr_ctc")
    assert "nothing is trained in exp_alone/teacher" in done.stdout
    table = json.loads((alone / "results.json").read_text())
    assert [(row["role"], row["method"]) for row in table] == [("student", "cr_ctc")]


@pytest.mark.skipif(not int(os.environ.get("ESPNET_KD_TEST_LONG", "0")), reason="full length: tests/run.sh --long")
def test_full_length(egs2):
    recipe = Recipe(egs2, "mini")
    recipe.run("--expdir", "exp_long", timeout=3600)
    table = json.loads((recipe.dir / "exp_long/results.json").read_text())
    wer = {row["role"]: row["wer"] for row in table}
    assert wer["teacher"] < wer["student"] < 0.9 * wer["plain"] < 50
