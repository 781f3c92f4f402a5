"""--dry_run shows the commands of the stages without data and GPUs, also for several machines; and wrong options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from recipe import Recipe

from espnet_kd.bin.asr_kd_train import get_parser


def commands(text: str) -> list:
    """The commands of a dry run, as lists of words; the stages are comments between them."""
    return [shlex.split(line) for line in text.splitlines() if line[:1] not in ("", "#")]


def files(recipe: Recipe) -> set:
    return {str(p) for p in recipe.dir.rglob("*")}


@pytest.fixture(scope="module")
def cluster(egs2):
    """The output of ./run.sh --dry_run for two machines of a slurm cluster, the recipe and the options."""
    recipe = Recipe(egs2, "an4")
    cmd = recipe.dir / "cmd.sh"
    cmd.unlink()  # only the link, so that the other recipes keep the file
    cmd.write_text('train_cmd="slurm.pl --mem 4G"\ncuda_cmd="slurm.pl --config conf/slurm.conf"\n')
    before = files(recipe)
    scale = ["--use_amp", "true", "--batch_bins", "8000000", "--accum_grad", "2"]
    own = ["--max_epoch", "7"]
    done = recipe.run("--ngpu", "4", "--num_nodes", "2", *scale, "--train_args", " ".join(own), "--dry_run")
    assert files(recipe) == before, "a dry run writes nothing"
    return done.stdout, recipe, scale, own


def test_stages_and_commands(cluster):
    text, *_ = cluster
    for number in range(1, 14):
        assert f"# stage {number}: " in text
    said = commands(text)
    modules = [words[words.index("-m") + 1].rpartition(".")[2] for words in said if "-m" in words]
    data = ["asr_kd_data"] * 6
    end = ["asr_kd_export", "asr_kd_inference", "asr_kd_score", "asr_kd_report"]
    stats = ["asr_kd_train", "aggregate_stats_dirs", *["asr_kd_data"] * 2]
    assert modules == [*data, *stats, *["launch"] * 3, *end]
    assert said[0] == ["env", "nj=2", "python=python3", "local/data.sh"]
    assert said[-3][3:] == [
        *("--expdir", "exp/teacher", "exp/student_plain", "exp/student_progressive_fkl/export"),
        *("--data_dir", "dump/raw/test", "--ngpu", "1", "--nj", "2"),
    ]


def test_training_goes_through_the_launcher_with_options_that_espnet_takes(cluster, monkeypatch):
    text, recipe, scale, own = cluster
    launches = [words for words in commands(text) if "espnet2.bin.launch" in words]
    dirs = ["exp/teacher", "exp/student_plain", "exp/student_progressive_fkl"]
    monkeypatch.chdir(recipe.dir)
    parser = get_parser()
    for words, directory in zip(launches, dirs):
        at = words.index("--")
        launch = dict(zip(words[3:at:2], words[4:at:2]))
        assert launch["--cmd"] == f"slurm.pl --config conf/slurm.conf --name {Path(directory).name}"
        assert (launch["--ngpu"], launch["--num_nodes"]) == ("4", "2")
        assert launch["--init_file_prefix"].startswith(directory)
        args = parser.parse_args(words[at + 4 :])
        assert args.output_dir == directory
        # The options of scale hold for teacher and students. Options for one of them come later and win.
        assert (args.use_amp, args.batch_bins, args.accum_grad) == (True, 8000000, 2)
        assert (args.max_epoch == 7) == (directory != "exp/teacher")
    assert [parser.parse_args(w[w.index("--") + 4 :]).kd_stage for w in launches] == [None, None, 3]


def test_one_machine_and_an_espnet_recipe(egs2):
    recipe = Recipe(egs2, "mini")
    where = ["--espnet_data", "/espnet/asr1", "--train_set", "tr", "--valid_set", "dt", "--test_sets", "a b"]
    options = [*where, "--ngpu", "2", "--teacher", "/espnet/asr1/exp/asr", "--method", "sequence_kd"]
    done = recipe.run("--dry_run", "true", *options)
    said = commands(done.stdout)
    assert said[0][3:] == ["espnet", "--espnet_data", "/espnet/asr1", "--nj", "2", "--sets", "tr", "dt", "a", "b"]
    launches = [words for words in said if "espnet2.bin.launch" in words]
    assert len(launches) == 2  # the plain student and the only KD stage; no teacher
    nbest = launches[1][launches[1].index("--nbest") + 1]
    assert nbest.startswith("exp/nbest5_asr_") and nbest.endswith("_tr")
    assert "./run_local.sh --name student_plain" in launches[0]
    assert "exp/teacher_given/export" in said[-3]


@pytest.mark.parametrize(
    "options, sets",
    [
        ([], ["test_clean", "test_other"]),
        (["--split_by_speaker", "train-clean-5"], ["test"]),
        (["--split_by_speaker", "train-clean-5", "--test_parts", "test-clean"], ["test_clean"]),
        (["--test_parts", "test-clean", "--split_by_speaker", "train-clean-5"], ["test_clean"]),
        (["--test_parts", "test-clean", "--test_sets", "test"], ["test"]),
    ],
)
def test_what_librispeech_decodes(egs2, options, sets):
    # A dry run does not need the corpus.
    done = Recipe(egs2, "librispeech").run("--librispeech", "/no/such/place", *options, "--stage", "13", "--dry_run")
    said = commands(done.stdout)[0]
    assert said[said.index("--data_dir") + 1 :] == [f"dump/raw/{name}" for name in sets]


@pytest.mark.parametrize(
    "name, options, given",
    [
        ("an4", ["--an4", "corpus"], ["--an4", "{cwd}/corpus"]),
        ("aishell", ["--aishell", "/a/b"], ["--aishell", "/a/b"]),
        ("tedlium2", ["--tedlium2", ".."], ["--tedlium2", "{parent}"]),
        ("librispeech", ["--train_parts", "x y", "--test_parts", ""], ["--train_parts", "x y", "--test_parts", ""]),
        ("an4", [], []),
    ],
)
def test_the_corpus_is_where_the_caller_says(egs2, tmp_path, name, options, given):
    recipe = Recipe(egs2, name)
    command = [str(recipe.dir / "run.sh"), *options, "--stop_stage", "1", "--local_data_opts", "--nj 3", "--dry_run"]
    done = subprocess.run(command, cwd=tmp_path, env=recipe.env, capture_output=True, text=True, timeout=60)
    given = [g.format(cwd=tmp_path, parent=tmp_path.parent) for g in given]
    assert commands(done.stdout) == [["env", "nj=2", "python=python3", "local/data.sh", *given, "--nj", "3"]], (
        done.stderr
    )


NEVER_EMPTY = ["expdir", "dumpdir", "train_set", "valid_set", "method", "teacher_config", "student_config"]
NEVER_EMPTY += ["token_type", "feats_normalize", "min_seconds", "max_seconds", "python"]
NAMES = ["tag", "train_set", "valid_set", "test_sets"]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("an4", ["--an4"], "option --an4 needs a value"),
        ("an4", ["--an4", "--stage", "3"], "option --an4 needs a value"),
        ("an4", ["--nj"], "option --nj needs a value"),
        ("librispeech", ["--split_by_speaker"], "option --split_by_speaker needs a value"),
        ("mini", ["--an4", "x"], "unknown option --an4"),
        ("an4", ["--corpus_dirs", "x"], "unknown option --corpus_dirs"),
        ("mini", ["--valid_set", "train"], "--valid_set train is the --train_set"),
        ("mini", ["--train_set", "test"], "--train_set test is one of --test_sets"),
        ("mini", ["--expdir", "my exp"], "--expdir must be without blanks, not 'my exp'"),
        ("mini", ["--dumpdir", "my dump"], "--dumpdir must be without blanks"),
        ("mini", ["--student_config", "my conf.yaml"], "--student_config must be without blanks"),
        ("mini", ["--stage", "6", "--stop_stage", "5"], "--stage 6 lies after --stop_stage 5: nothing to run"),
        ("mini", ["--stage", "14"], "--stage 14 lies after --stop_stage 13"),
        ("mini", ["--nj", "0"], "--nj must be a whole number above 0, not '0'"),
        ("mini", ["--ngpu", "08"], "--ngpu must be a whole number, not '08'"),
        *(("mini", [f"--{name}", ""], f"--{name} is empty") for name in NEVER_EMPTY),
        ("mini", ["--dumpdir", " "], "--dumpdir is empty"),
        *(("mini", [f"--{name}", value], f"--{name} must be a name, not '{value}'")
          for name in NAMES for value in ("../../evil", "..", ".x", "-x")[: 4 if name == "train_set" else 1]),
        ("mini", ["--test_sets", "test ../x"], "--test_sets must be a name, not '../x'"),
        ("mini", ["--token_type", "phn"], "--token_type must be char, word or bpe, not 'phn'"),
        ("mini", ["--feats_normalize", "x"], "--feats_normalize must be global_mvn, utterance_mvn or none"),
        ("mini", ["--nlsyms", "gone.txt"], "--nlsyms: there is no file gone.txt"),
        ("mini", ["--nlsyms", "run.sh", "--teacher", "exp/x"], "--nlsyms: the symbols that stay whole are those of"),
        ("mini", ["--seed", "00"], "--seed must be a whole number, not '00'"),
    ],
)
def test_wrong_options_end_in_one_line(egs2, name, options, message):
    done = Recipe(egs2, name).run("--dry_run", "true", *options, check=False)
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and f"error: {message}" in done.stdout


def test_two_teachers_of_one_name_share_nothing(egs2):
    recipe = Recipe(egs2, "mini")
    places = set()
    for teacher in ("/a/asr", "/b/asr", "/b/asr/5epoch.pth", "exp/asr"):
        done = recipe.run("--teacher", teacher, "--stage", "3", "--stop_stage", "4", "--dry_run")
        words = next(words for words in commands(done.stdout) if "tokens" in words)
        places.add(words[words.index("--out") + 1])
    assert len(places) == 3 and "data/token_list/teacher_asr" in places


@pytest.mark.parametrize(
    "given, decoded", [("big", "export"), ("big/3epoch.pth", "export/3epoch.pth"), ("big.zip", "packed.zip")]
)
def test_a_given_teacher_is_decoded_where_the_results_lie(egs2, given, decoded):
    said = commands(Recipe(egs2, "mini").run("--stage", "12", "--teacher", f"exp/{given}", "--dry_run").stdout)
    words = said[0][said[0].index("--expdir") + 1 :]
    assert words[0] == f"exp/teacher_given/{decoded}"


def words_after(option: str, said: list, verb: str) -> list:
    """The value of an option in each command that contains ``verb``."""
    found = [words for words in said if verb in words]
    return [words[words.index(option) + 1] for words in found]


@pytest.mark.parametrize("escaped", [False, True])
def test_paths_with_blanks(egs2, tmp_path, escaped):
    """One existing path is used as it is; in a list of paths a backslash must precede a blank."""
    places = {}
    for name in ("my exp", "my data"):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        places[name] = str(path).replace(" ", r"\ ") + f" {tmp_path}" if escaped else str(path)
    options = ["--teacher", places["my exp"], "--untranscribed", places["my data"], "--method", "kl"]
    done = Recipe(egs2, "mini").run(*options, "--stop_stage", "8", "--dry_run")
    said = commands(done.stdout)
    assert words_after("--teacher", said, "tokens") == [f"{tmp_path}/my exp"]
    train = next(words for words in said if "--kd_config" in words and "--teacher" in words)
    at = train.index("--teacher")
    assert train[at + 1 : at + 2 + escaped] == [f"{tmp_path}/my exp", *[str(tmp_path)] * escaped]
    sources = next(words[words.index("--src") + 1 :] for words in said if f"{tmp_path}/my data" in words)
    assert sources[: 1 + escaped] == [f"{tmp_path}/my data", *[str(tmp_path)] * escaped]
    others = [word for words in said for word in words if str(tmp_path) not in word]
    assert not [word for word in others if " " in word and "=" not in word]


def test_without_test_sets_nothing_can_be_decoded(egs2):
    recipe = Recipe(egs2, "librispeech")
    done = recipe.run("--test_parts", "", "--dry_run", check=False)
    assert done.returncode == 2 and "error: no --test_sets" in done.stdout
    assert recipe.run("--test_parts", "", "--dry_run", "--stage", "11", "--stop_stage", "11").returncode == 0


@pytest.mark.parametrize("name, option", [("librispeech", "--split_by_speaker"), ("aishell", "--aishell DIR")])
def test_help_has_the_recipes_own_options(egs2, name, option):
    help_text = Recipe(egs2, name).run("--help").stdout
    assert option in help_text and "--stop_stage 13" in help_text and "set -euo" not in help_text


def test_help_has_the_recipes_own_defaults(egs2):
    help_text = Recipe(egs2, "librispeech").run("--help").stdout
    for option in ("--token_type bpe ", "--nbpe 5000 ", '--test_sets "test_clean test_other" ', "--max_seconds 30 "):
        assert option in help_text


def test_an_options_value_may_go_over_several_lines(egs2):
    options = ["--stage", "6", "--stop_stage", "6", "--train_args", "--max_epoch 3\n    --patience 2", "--dry_run"]
    (said,) = commands(Recipe(egs2, "mini").run(*options).stdout)
    assert said[-4:] == ["--max_epoch", "3", "--patience", "2"]


def test_decoding_goes_where_cmd_sh_sends_it(egs2):
    recipe = Recipe(egs2, "tedlium2")
    cmd = recipe.dir / "cmd.sh"
    cmd.unlink()  # only the link, so that the other recipes keep the file
    cmd.write_text('train_cmd=run.pl cuda_cmd=run.pl decode_cmd="slurm.pl --mem 8G"\n')
    said = commands(recipe.run("--stage", "7", "--method", "sequence_kd", "--ngpu", "2", "--dry_run").stdout)
    for words, log, verb in (
        (said[0], "exp/nbest5_teacher_train.log", "nbest"),
        (said[-3], "exp/decode.log", "inference"),
    ):
        assert words[:5] == ["slurm.pl", "--mem", "8G", "--gpu", "1"]
        assert words[5:9] == [log, "python3", "-m", f"espnet_kd.bin.asr_kd_{verb}"]
    assert said[-2][0] == "python3"


def test_experiments_of_ones_own_are_decoded_beside_the_teacher(egs2):
    options = ["--stage", "12", "--experiments", "exp/a exp/b/export", "--dry_run"]
    for words in commands(Recipe(egs2, "mini").run(*options).stdout)[:2]:
        assert words[3:8] == ["--expdir", "exp/teacher", "exp/a", "exp/b/export", "--data_dir"]


def test_a_machine_without_espnet_is_told_what_to_do(egs2, tmp_path):
    recipe = Recipe(egs2, "mini")
    bare = tmp_path / "python3"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    recipe.env["PATH"] = f"{tmp_path}:{recipe.env['PATH']}"
    done = recipe.run("--stop_stage", "1", check=False)
    assert done.returncode == 1 and done.stdout.count("\n") == 1
    assert "error: this python3 has no espnet2: run ./run_all.sh" in done.stdout


@pytest.fixture(scope="module")
def prepared(egs2):
    """The embedded recipe with fabricated results of stages 1 to 4."""
    recipe = Recipe(egs2, "mini")
    for name in ("dump/raw/train/wav.scp", "dump/raw/train/text", "dump/raw/valid/text", "exp/stats_train_word/.done"):
        path = recipe.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x y\n")
    tokens = recipe.dir / "data/token_list/word/tokens.txt"
    tokens.parent.mkdir(parents=True)
    tokens.write_text("x\n")
    return recipe


def test_several_machines_need_a_cluster(prepared):
    done = prepared.run("--stage", "6", "--stop_stage", "6", "--num_nodes", "2", check=False)
    assert done.returncode == 1 and "error: --num_nodes 2: cuda_cmd in cmd.sh" in done.stdout


def test_a_model_of_other_settings(prepared, tmp_path, monkeypatch):
    """Stage 6 refuses other data. Other options are checked by the training command, which names those that differ."""
    python = tmp_path / "python"  # a replacement for Python that trains nothing
    record = f'case "$*" in *asr_kd_record*) exec {sys.executable} "$@" ;; esac'
    python.write_text(f'#!/bin/sh\n{record}\nexit "${{CODE:-0}}"\n')
    python.chmod(0o755)
    options = ["--stage", "6", "--stop_stage", "6", "--tag", "trained", "--python", str(python)]
    prepared.run(*options)
    (prepared.dir / "exp/student_plain_trained/checkpoint.pth").touch()
    assert "the plain is trained" in prepared.run(*options).stdout
    for other in (["--feats_normalize", "utterance_mvn"], ["--train_args", "--max_epoch 9"], ["--seed", "2"]):
        monkeypatch.setitem(prepared.env, "CODE", "1")
        done = prepared.run(*options, *other, check=False)
        assert done.returncode == 1 and "is trained" not in done.stdout
    monkeypatch.delitem(prepared.env, "CODE")
    assert "the plain is trained" in prepared.run(*options).stdout  # the original options still work
    (prepared.dir / "dump/raw/train/wav.scp").write_text("x z\n")
    done = prepared.run(*options, check=False)
    (prepared.dir / "dump/raw/train/wav.scp").write_text("x y\n")
    assert done.returncode == 1
    assert re.search("error: exp/student_plain_trained holds a model of other tokens or audio .*wav.scp", done.stdout)


def test_without_transcripts_there_is_no_plain_student(prepared):
    """run_all.sh runs stage 6 alone, for a method that needs no transcripts too."""
    audio = prepared.dir / "dump/raw/audio/wav.scp"
    audio.parent.mkdir(exist_ok=True)
    audio.write_text("x y\n")
    options = ["--stage", "6", "--stop_stage", "6", "--train_set", "audio", "--tag", "audio", "--method"]
    assert "stage 6: skipped" in prepared.run(*options, "label_free").stdout
    done = prepared.run(*options, "kl", check=False)
    assert done.returncode == 1 and "error: the plain model needs transcripts, and dump/raw/audio" in done.stdout
    audio.unlink()
    done = prepared.run(*options, "label_free", check=False)
    assert done.returncode == 1 and "stage 4 makes it" in done.stdout


def test_advice_keeps_the_users_options(egs2):
    """The advised command can be pasted into a shell, and begins with the stage that makes the missing input."""
    options = ["--dumpdir", "none", "--expdir", "no_such", "--train_args", "--max_epoch 3"]
    done = Recipe(egs2, "mini").run(*options, "--stage", "11", "--stop_stage", "11", check=False)
    advice = done.stdout.split("stage 10 makes it: ")[1].splitlines()[0]
    assert done.returncode == 1 and "no_such/student_progressive_fkl/student.pth is missing" in done.stdout
    assert shlex.split(advice) == ["./run.sh", "--stage", "10", *options]
    done = Recipe(egs2, "mini").run(*options, "--kd_stages", "1", "--stage", "11", check=False)
    assert "stage 8 makes it: ./run.sh --stage 8 " in done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--kd_stages", "4"], "--kd_stages 4: progressive_fkl has the KD stages 1 to 3"),
        (["--kd_stages", "1 2", "--method", "kl"], "--kd_stages 1 2: kl has the KD stages 1 to 1"),
        (["--kd_stages", "0"], "--kd_stages 0: progressive_fkl"),
        (["--target_cache", "true", "--teacher", "conf run.sh"], "--target_cache true: it stores the outputs of one"),
        (["--ngpu", "1"], "--ngpu 1: torch finds 0 usable GPUs"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(egs2, options, message, monkeypatch):
    """The error appears once and before stage 1."""
    recipe = Recipe(egs2, "mini")
    recipe.env["CUDA_VISIBLE_DEVICES"] = ""
    done = recipe.run(*options, check=False)
    assert done.returncode == 1 and f"error: {message}" in done.stdout
    assert done.stdout.count("error:") == 1 and "stage 1" not in done.stdout


FAILING = ["bash", "-c", "echo 1epoch results; echo a line; echo error: $0; exit 1"]


def test_an_error_is_shown_once_and_an_earlier_one_is_not(egs2, tmp_path):
    """Tested with one job that continues its log, and with parallel jobs that fail with the same error."""
    run = str(egs2 / "TEMPLATE/asr_kd1/run_local.sh")

    def said(*arguments):
        done = subprocess.run([run, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        return done.stderr

    log = str(tmp_path / "train.log")
    first, second = said(log, *FAILING, "the first"), said(log, *FAILING, "the second")
    assert first.count("error: the first") == 1 and first.count("error:") == 1 and log in first
    assert second.count("error: the second") == 1 and "the first" not in second
    # A run without an error line shows the end of its own output.
    third = said(log, "bash", "-c", "echo Traceback; echo KeyError; exit 3")
    assert "the second" not in third and third.endswith("Traceback\nKeyError\n")
    assert third.count("error:") == 1 and "exit code 3" in third
    both = said("JOB=1:2", str(tmp_path / "stats.JOB.log"), *FAILING, "alike")
    assert both.count("error: alike") == 1 and both.count("the whole log is") == 2


@pytest.mark.parametrize(
    "options", [["--dry_run", "maybe"], ["--use_amp", "1"], ["--batch_bins", "2e6"], ["--accum_grad", "-1"]]
)
def test_wrong_values_are_refused(egs2, options):
    done = Recipe(egs2, "mini").run(*options, check=False)
    assert done.returncode == 2 and f"error: {options[0]} must be" in done.stdout


def test_forms_of_the_export(egs2):
    recipe = Recipe(egs2, "an4")
    options = ["--stage", "11", "--stop_stage", "11", "--dry_run"]
    forms = ["--export_formats", "onnx web", "--export_args", "--max_seconds 60", "--test_sets", "valid test"]
    plain, several = (commands(recipe.run(*options, *more).stdout) for more in ([], forms))
    assert [words[3:] for words in plain] == [["--expdir", "exp/student_progressive_fkl"]]
    assert [words[3:] for words in several] == [
        [
            *("--expdir", "exp/student_progressive_fkl", "--format", "espnet", "onnx", "web", "--card"),
            *("--measure", "dump/raw/whole/valid", "dump/raw/test", "--max_seconds", "60"),
        ]
    ]
