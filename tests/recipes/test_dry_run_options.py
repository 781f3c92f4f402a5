"""What run.sh gives to its commands, as --dry_run shows it: token lists, KD stages, the student of the ceiling."""

import pytest
from recipe import Recipe
from test_dry_run import commands, words_after

from espnet_kd.runs.options import Job, read_run_settings
from espnet_kd.runs.plan import token_dir


@pytest.mark.parametrize("options", ["", "--dumpdir d2 --train_set tr", "--token_type bpe --nbpe 70"])
def test_run_all_knows_where_the_token_lists_are(egs2, options):
    """It copies the list of the training set for methods without labels, whose training set has another name."""
    recipe = Recipe(egs2, "librispeech")
    settings = read_run_settings(recipe.dir / "run.sh", options.split())
    job = Job(egs2.parent, recipe.dir, (), settings, "", (), 1)
    for name in (settings["train_set"], f"{settings['train_set']}_without_text"):
        done = recipe.run(*options.split(), "--train_set", name, "--stage", "4", "--stop_stage", "4", "--dry_run")
        found = words_after("--token_list", commands(done.stdout), "--token_list")
        assert set(found) == {f"{token_dir(job, name)}/tokens.txt"}


@pytest.mark.parametrize(
    "kd_stages, stages, trained, left_out",
    [
        ("1 2", (8, 13), "2", [10]),
        ("1", (8, 10), "1", [9, 10]),
        ("1 3", (8, 9), "1", [9]),
        ("1 3", (9, 9), None, [9]),
        ("2 3", (8, 13), "3", [8]),
        ("", (8, 13), "3", []),
    ],
)
def test_stages_train_the_kd_stages_that_are_used(egs2, kd_stages, stages, trained, left_out):
    """One training goes up to the last KD stage that is used, of those whose stages are run."""
    first, last = map(str, stages)
    options = ["--stage", first, "--stop_stage", last, *(["--kd_stages", kd_stages] if kd_stages else [])]
    done = Recipe(egs2, "mini").run(*options, "--dry_run")
    assert words_after("--kd_stage", commands(done.stdout), "--kd_stage") == ([trained] if trained else [])
    for stage in range(8, 11):
        left = f"# stage {stage}: nothing to do, --kd_stages {kd_stages} leaves out KD stage {stage - 7}" in done.stdout
        assert left == (stage in left_out)


def test_the_ceiling_is_that_of_the_student_that_is_trained(egs2):
    options = ["--teacher", "hf:/models/x", "--stage", "4", "--stop_stage", "4", "--dry_run"]
    narrow = ["--train_args", "--max_epoch 3", "--fs", "8000"]
    for given, expected in (([], None), (narrow, "--student_args=--frontend_conf fs=8000 --max_epoch 3")):
        said = commands(Recipe(egs2, "foundation").run(*options, *given).stdout)
        ceiling = next(words for words in said if "espnet_kd.bin.asr_kd_ceiling" in words)
        assert next((word for word in ceiling if "--student_args" in word), None) == expected
