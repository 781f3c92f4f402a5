"""The steps of a job and the command line of run_all.sh. The tests of recipes run whole jobs."""

import subprocess
import sys
from collections import defaultdict

import pytest

from espnet_kd.runs import plan
from espnet_kd.runs.options import Job, WrongOption, pairs, parse

SETTINGS = {"expdir": "exp", "dumpdir": "dump", "train_set": "train", "ngpu": "0", "dry_run": "false", "seed": "0"}
SETTINGS |= {"teacher_config": "conf/teacher.yaml", "student_config": "conf/student.yaml", "method": "kl"}


@pytest.fixture
def job(tmp_path):
    recipe = tmp_path / "egs2/mini/asr_kd1"
    (recipe / "conf").mkdir(parents=True)
    (recipe / "conf/teacher.yaml").write_text("max_epoch: 7\n")
    (recipe / "conf/student.yaml").write_text("encoder: conformer\nmax_epoch: 5\n")

    def make(methods="", seeds=("0",), **settings):
        return Job(tmp_path, recipe, (), defaultdict(str, SETTINGS | settings), methods, seeds, 2)

    return make


@pytest.mark.parametrize(
    "options, epochs",
    [("", 5), ("--max_epoch 3", 3), ("--max_epoch=3 --max_epoch 4", 4), ("--no_max_epoch 3", 5), ("--seed 1", 5)],
)
def test_epochs_of_a_training(tmp_path, options, epochs):
    (tmp_path / "a.yaml").write_text("max_epoch: 5\n")
    assert plan.epochs_in(tmp_path / "a.yaml", options) == epochs
    assert plan.epochs_in(tmp_path / "gone.yaml", options) == (epochs if epochs < 5 else 0)


def test_the_steps_of_one_method(job):
    data, teacher, plain, last = plan.one_method(job(tag="", kd_stages="1 3", untranscribed="more", seed="2"))
    assert [s.epochs for s in (data, teacher, plain, last)] == [0, 7, 5, 5]
    assert teacher.needs == plain.needs == (data.name,) and last.needs == (teacher.name, plain.name)
    assert [s.directory.name for s in (teacher, plain, last)] == [
        "teacher", "student_plain_seed2", "student_kl_13_untranscribed_seed2"
    ]  # fmt: skip
    assert plan.one_method(job(teacher="exp/big"))[1].epochs == 0  # a given teacher is not trained


def test_the_directories_of_students_with_pseudo_labels(job):
    _, _, plain, last = plan.one_method(job(pseudo="data/pseudo", untranscribed="more", tag="a"))
    assert [s.directory.name for s in (plain, last)] == ["student_plain_pseudo_a", "student_kl_pseudo_untranscribed_a"]


@pytest.mark.parametrize("settings", [{"token_type": "char"}, {"token_type": "bpe", "nbpe": "70", "dumpdir": "d"}])
def test_methods_without_labels_get_the_token_list_too(job, settings):
    """run.sh has a token list for each training set, and stage 3 cannot make one of data without text."""
    one = job(**settings)
    raw, home = ("dump/raw", "data") if "nbpe" not in settings else ("d/raw", "d")
    kind = {"char": "char", "bpe": "bpe_unigram70"}[settings["token_type"]]
    texts = (f"{raw}/train/text", f"{raw}/train/text.before_fit")
    for name in (f"{raw}/train/wav.scp", *texts, f"{home}/token_list/{kind}/tokens.txt"):
        (one.recipe / name).parent.mkdir(parents=True, exist_ok=True)
        (one.recipe / name).write_text(name)
    for _ in range(2):  # a second run replaces the files
        plan.copy_without_text(one)
        copy = one.recipe / home / f"token_list/{kind}_train_without_text"
        assert {p.name: p.read_text() for p in copy.iterdir()} == {"tokens.txt": f"{home}/token_list/{kind}/tokens.txt"}
        assert [p.name for p in (one.recipe / raw / "train_without_text").iterdir()] == ["wav.scp"]


def test_stage_7_is_run_once_for_each_method_and_one_after_the_other(job):
    methods = [plan.Method(name, True, True, 5) for name in ("a", "b")]
    methods += [plan.Method("c", False, False, 0)]
    steps = {step.name: step for step in plan.comparison(job(seeds=("0", "1")), methods)}
    assert steps["stage 7 for a"].needs == ("teacher",) and steps["stage 7 for a"].after == ()
    assert steps["stage 7 for b"].needs == ("teacher",) and steps["stage 7 for b"].after == ("stage 7 for a",)
    for seed in (0, 1):
        assert steps[f"b, seed {seed}"].needs == ("teacher", "stage 7 for b")
        assert steps[f"c, seed {seed}"].needs == (plan.WITHOUT_TEXT,) and steps[f"plain, seed {seed}"].needs == ()
    assert "stage 7 for c" not in steps and len(steps) == 1 + 2 + 1 + 2 * 4


def test_targets_on_disk_need_a_stage_7_only_of_what_has_a_teacher(job):
    methods = [plan.Method("kl", True, True, 0), plan.Method("cr_ctc", False, True, 0)]
    names = [step.name for step in plan.comparison(job(target_cache="true"), methods)]
    assert names == ["teacher", "stage 7 for kl", "plain, seed 0", "kl, seed 0", "cr_ctc, seed 0"]


def test_a_student_of_its_own_configuration_has_a_plain_one_like_it(job):
    one = job()
    (one.recipe / "conf/train_student_layer_pruning.yaml").write_text("max_epoch: 9\n")
    methods = [plan.Method(name, True, True, 0) for name in ("self_kd", "layer_pruning")]
    steps = {step.name: step for step in plan.comparison(one, methods)}
    # self_kd exports a student like that of layer_pruning, so that one plain student is enough for both.
    assert list(steps)[1:] == [
        "plain, seed 0", "plain like layer_pruning, seed 0", "self_kd, seed 0", "layer_pruning, seed 0"
    ]  # fmt: skip
    assert steps["plain like layer_pruning, seed 0"].epochs == steps["layer_pruning, seed 0"].epochs == 9
    assert steps["self_kd, seed 0"].epochs == 5


def test_options_may_stand_alone_where_run_sh_lets_them():
    words = ["--dry_run", "--seed", "1", "--train_args", "--max_epoch 3", "--dry_run", "true", "--dry_run"]
    expected = [("--dry_run",), ("--seed", "1"), ("--train_args", "--max_epoch 3"), ("--dry_run", "true")]
    assert list(pairs(words)) == [*expected, ("--dry_run",)]


def test_what_run_sh_refuses_has_its_exit_code(job):
    one = job()
    run = one.recipe / "run.sh"
    run.write_text("#!/bin/sh\necho ngpu=0\nexit 2\n")
    run.chmod(0o755)
    with pytest.raises(SystemExit) as ended:
        parse(one.root, ["--unknown", "x"])
    assert ended.value.code == 2
    run.write_text("#!/bin/sh\necho ngpu=2\necho expdir=a=b\n")
    parsed = parse(one.root, ["--methods", "kl", "--seeds", "0 3"])
    assert parsed.jobs == 1 and parsed.settings["expdir"] == "a=b" and parsed.settings["no_such"] == ""
    assert parsed.seeds == ("0", "3") and parsed.options == ()


def test_pages_by_path_are_found_from_the_recipe(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen, left_out = plan.choose_methods(job("kl my/page.yaml"), [])
    assert chosen == ["kl", str(tmp_path / "my/page.yaml")] and left_out == []
    with pytest.raises(WrongOption, match="--methods names kl twice"):
        plan.choose_methods(job("kl my/kl.yaml"), [])
    with pytest.raises(WrongOption, match="--methods names plain, .*student_plain"):
        plan.choose_methods(job("my/plain.yaml"), [])


@pytest.mark.parametrize("options", [["--methods", " "], ["--methods", "kl", "--seeds", " "], ["--recipe", ""]])
def test_a_list_without_a_name_is_refused(tmp_path, options):
    """As of a variable that is not set: no method, or seed 0, would run instead."""
    with pytest.raises(WrongOption, match=f"{options[-2]} needs a value"):
        parse(tmp_path, options)


def test_nothing_heavy_is_imported_before_the_first_step():
    script = "import sys, espnet_kd.runs.__main__ as m; m.page_module().load_page('kl'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
