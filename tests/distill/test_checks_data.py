"""Checks of data and disk space before training begins."""

import shutil
from collections import namedtuple

import pytest

from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.checks import training as checks
from espnet_kd.distill.checks.data import check_files
from espnet_kd.distill.checks.options import check_ranges
from espnet_kd.tasks.asr_kd import ASRKDTask

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def own(corpus, tmp_path):
    """A copy of the tiny corpus, which a test may damage, and the command line of a training on it."""
    copy = tmp_path / "corpus"
    shutil.copytree(corpus.dir, copy)
    text = (copy / "train" / "wav.scp").read_text()
    (copy / "train" / "wav.scp").write_text(text.replace(str(corpus.dir), str(copy)))
    options = corpus.options(tmp_path / "out")
    return copy, [o.replace(f"{corpus.dir}/train", f"{copy}/train") for o in options]


def without(path, number):
    lines = path.read_text().splitlines(keepends=True)
    del lines[number]
    path.write_text("".join(lines))


BREAK = {
    "no file": (lambda d: (d / "train/text").unlink(), "train/text: no such file"),
    "no shapes": (lambda d: (d / "train/speech_shape").write_text(""), "train/speech_shape is empty"),
    "text lacks one": (lambda d: without(d / "train/text", 3), r"train/text lacks 1 .*speech_shape \(train3 …\)"),
    "wav.scp lacks one": (lambda d: without(d / "train/wav.scp", 0), r"wav.scp lacks 1 .*speech_shape \(train0"),
    "shapes differ": (lambda d: without(d / "train/speech_shape", 1), r"speech_shape lacks 1 .*_shape.char \(train1"),
    "no audio": (lambda d: (d / "train/train5.wav").unlink(), "utterance train5: no such audio file: .*train5.wav"),
}


@pytest.mark.faults("data that do not fit, seen before training")
@pytest.mark.parametrize("harm, message", BREAK.values(), ids=BREAK)
def test_data_that_do_not_fit_each_other(own, harm, message):
    directory, options = own
    harm(directory)
    with pytest.raises(UserError, match=message):
        asr_kd_train.main(options)


def test_data_files_may_hold_more_than_is_trained_on(own):
    directory, options = own
    for name in ("speech_shape", "text_shape.char"):
        without(directory / "train" / name, 2)
    check_files(ASRKDTask.get_parser().parse_args(options))


@pytest.mark.faults("data that do not fit, seen before training")
def test_without_statistics(own):
    _, options = own
    at = [i for i, o in enumerate(options) if o == "--train_shape_file"]
    options = [o for i, o in enumerate(options) if i not in at and i - 1 not in at]
    with pytest.raises(UserError, match="no --train_shape_file: make statistics first"):
        asr_kd_train.main(options)


@pytest.mark.faults("data that do not fit, seen before training")
def test_without_audio(own):
    _, options = own
    at = [i for i, o in enumerate(options) if o.endswith("train/wav.scp,speech,sound")]
    options = [o for i, o in enumerate(options) if i not in at and i + 1 not in at]
    with pytest.raises(UserError, match="names no speech: give it .*/train/wav.scp,speech,sound"):
        asr_kd_train.main(options)


@pytest.mark.faults("data that do not fit, seen before training")
@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_directory_in_place_of_a_file(own, part):
    _, options = own
    options = [o.replace("/wav.scp,speech", ",speech") if f"/{part}/" in o else o for o in options]
    option = f"--{part}_data_path_and_name_and_type"
    with pytest.raises(UserError, match=f"{option}: .*/{part} is a directory; give .*/{part}/wav.scp,speech,sound"):
        asr_kd_train.main(options)


@pytest.mark.faults("data that do not fit, seen before training")
def test_data_in_parts_is_refused(own):
    """KD stages and ramps count the steps of an epoch, which begin again with each part."""
    _, options = own
    with pytest.raises(UserError, match="--multiple_iterator true .*give undivided files"):
        asr_kd_train.main([*options, "--multiple_iterator", "true"])


@pytest.mark.faults("data that do not fit, seen before training")
@pytest.mark.parametrize("option", ["iterator_type", "valid_iterator_type"])
@pytest.mark.parametrize(
    "kind, message",
    [
        ("chunk", "cuts audio into parts, which have no transcripts and lengths; .*sequence or category"),
        ("task", "reads nothing; .*sequence or category"),
        ("none", "reads nothing; .*sequence or category"),
        ("category", "needs .*/{part}/category2utt"),
    ],
)
def test_iterators_that_cannot_read_the_data(own, option, kind, message):
    _, options = own
    message = message.format(part="valid" if option.startswith("valid") else "train")
    with pytest.raises(UserError, match=f"^{option}: {kind} {message}"):
        asr_kd_train.main([*options, f"--{option}", kind])


def test_an_iterator_of_a_page(own, write_page, teacher_dir):
    _, options = own
    page = write_page({"train": {"iterator_type": "chunk"}, "stages": [{"objectives": [{"objective": "kl"}]}]})
    with pytest.raises(UserError, match="^iterator_type: chunk cuts audio"):
        asr_kd_train.main([*options, "--teacher", str(teacher_dir), "--kd_config", str(page)])


def test_a_category_iterator_with_its_files(corpus, own):
    directory, options = own
    options = [o.replace(f"{corpus.dir}/valid", f"{directory}/valid") for o in options]
    for part in ("train", "valid"):
        ids = [line.split()[0] for line in (directory / part / "text").read_text().splitlines()]
        (directory / part / "category2utt").write_text(f"one {' '.join(ids)}\n")
    check_ranges(ASRKDTask.get_parser().parse_args([*options, "--iterator_type", "category"]))


@pytest.mark.faults("a full disk")
def test_a_full_disk_is_refused_before_training(corpus, teacher_dir, tmp_path, monkeypatch):
    options = corpus.options(tmp_path / "out", "--teacher", str(teacher_dir), "--kd_config", "progressive_fkl")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(UserError, match="out: checkpoints and models take about 0.0 GiB, and 0.0 GiB are free"):
        asr_kd_train.main(options)
    assert not list(tmp_path.glob("out/**/*.pth"))


def test_room_is_counted_as_it_is_taken(corpus, tmp_path, monkeypatch):
    """The required disk space is at least what training writes, and at most three times that; a resume needs less."""
    options = corpus.options(tmp_path / "out", "--use_tensorboard", "false", max_epoch=2)
    args = ASRKDTask.get_parser().parse_args(options)
    model = ASRKDTask.build_model(args)

    def enough(free):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Usage(0, 0, free))
        try:
            checks.check_disk(args, model)
        except UserError:
            return False
        return True

    def needed(low=0, high=10**9):
        while high - low > 1000:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    before = needed()
    monkeypatch.undo()
    asr_kd_train.main(options)
    left = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.pth") if not p.is_symlink())
    assert left < before < 3 * left
    assert needed() == pytest.approx(before - left, abs=3000)
