"""What run.sh gives to its commands, as --dry_run shows it: data sets, token lists, KD stages, the student of the
ceiling."""

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


@pytest.mark.parametrize("test_sets", ["valid test", "test valid", "valid"])
def test_the_validation_set_as_a_test_set(egs2, test_sets):
    """It is formatted a second time with all its utterances, and this copy is decoded."""
    said = commands(Recipe(egs2, "mini").run("--test_sets", test_sets, "--dry_run").stdout)
    formats = [words for words in said if "format" in words]
    whole = [words for words in formats if "dump/raw/whole/valid" in words]
    assert len(whole) == 1 and "--drop_out_of_range" not in whole[0] and "data/valid" in whole[0]
    assert len(formats) == 3 + ("test" in test_sets)
    places = {"valid": "dump/raw/whole/valid", "test": "dump/raw/test"}
    for verb in ("inference", "score"):
        words = next(words for words in said if f"espnet_kd.bin.asr_kd_{verb}" in words)
        at = words.index("--data_dir") + 1
        assert words[at : at + len(test_sets.split())] == [places[name] for name in test_sets.split()]
    given = ["--espnet_data", "/e", "--test_sets", test_sets, "--stop_stage", "1", "--dry_run"]
    (taken,) = commands(Recipe(egs2, "mini").run(*given).stdout)
    assert sorted(taken[taken.index("--sets") + 1 :]) == sorted({"train", "valid", *test_sets.split()})


def test_a_validation_set_without_transcripts_as_a_test_set(egs2):
    """As for other test sets, the text of a given teacher is the reference then."""
    options = ["--teacher", "exp/t", "--test_sets", "valid test", "--stage", "2", "--stop_stage", "2", "--dry_run"]
    for words in commands(Recipe(egs2, "mini").run(*options).stdout):
        assert "format" not in words or words[words.index("--text") + 1] == "optional"


def test_all_texts_get_the_characters_of_an_imported_teacher(egs2):
    """Beside untranscribed audio, the plain student is trained on the transcribed part, which has texts of its own."""
    options = ["--teacher", "hf:/m", "--untranscribed", "data/more", "--token_type", "char", "--dry_run"]
    [words] = [w for w in commands(Recipe(egs2, "mini").run(*options).stdout) if "fit_text" in w]
    parts = ("train", "train_and_untranscribed", "valid", "test")
    assert [w for w in words if w.startswith("dump/")] == [f"dump/raw/{part}" for part in parts]


def test_a_token_list_belongs_to_what_it_was_made_of(egs2):
    """Another training set or dumpdir has its own list, so that the list of finished experiments is not overwritten."""
    recipe, places = Recipe(egs2, "an4"), []
    own = ("", "--train_set tr", "--dumpdir d2", "--dumpdir d2 --train_set tr", "--token_type bpe")
    for options in (*own, "--teacher exp/t", "--teacher exp/t --dumpdir d2"):
        done = recipe.run(*options.split(), "--stage", "3", "--stop_stage", "6", "--dry_run")
        said = commands(done.stdout)
        (place,) = words_after("--out", said, "tokens")
        assert set(words_after("--token_list", said, "--token_list")) == {f"{place}/tokens.txt"}
        places.append(place)
    assert places[0] == "data/token_list/char" and len(set(places)) == len(places)


def test_texts_in_an_imported_teachers_characters_are_not_taken_for_the_own_ones(egs2, tmp_path):
    """They would change the token list, the training and the references of a run without that teacher."""
    recipe = Recipe(egs2, "mini")
    raw = tmp_path / "d/raw"
    (raw / "valid").mkdir(parents=True)
    (raw / "valid/text.before_fit").write_text("u a\n")
    options = ["--dumpdir", str(tmp_path / "d"), "--dry_run"]
    for stage in ("2", "3"):
        done = commands(recipe.run(*options, "--stage", stage, "--stop_stage", stage).stdout)
        assert [w[-2:] for w in done if "fit_text" in w] == [["--undo", str(raw / "valid")]]
    for stage in ("5", "13"):
        refused = recipe.run("--dumpdir", str(tmp_path / "d"), "--stage", stage, check=False)
        assert refused.returncode == 1 and f"{raw}/valid/text " in refused.stdout, refused.stdout
        assert "./run.sh --stage 2 --stop_stage 3 --dumpdir" in refused.stdout
    given = [*options, "--teacher", "exp/t", "--stage", "2", "--stop_stage", "8"]
    assert not any("fit_text" in w for w in commands(recipe.run(*given).stdout))


def test_a_later_stage_with_an_imported_teacher_gets_its_characters(egs2, tmp_path):
    """Meanwhile a run with another teacher, or without one, may have changed the texts."""
    recipe, teacher, dump = Recipe(egs2, "mini"), tmp_path / "exp/imported_a", tmp_path / "d"
    tokens = dump / "token_list/teacher_imported_a/tokens.txt"
    for path in (teacher / "config.yaml", tokens, dump / "raw/valid/text", dump / "raw/train/wav.scp"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("token_type: char\nforeign: x\n")
    options = ["--dumpdir", str(dump), "--expdir", str(tmp_path / "exp"), "--teacher", str(teacher), "--dry_run"]
    for first, last in (("4", "4"), ("13", "13"), ("1", "4")):
        done = commands(recipe.run(*options, "--stage", first, "--stop_stage", last).stdout)
        expected = [] if first == "1" else [[str(tokens), "--token_type", "char", str(dump / "raw/valid")]]
        found = [w[w.index("--token_list") + 1 :] for w in done if "fit_text" in w]
        assert [w[:4] for w in found] == expected and not any(str(dump / "raw/train") in w for w in found)
