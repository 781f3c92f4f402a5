"""Many methods in one command: run_all.sh --methods, and the student configurations that some methods need."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from recipe import ROOT, TINY, Recipe, sleepers

SMALL = ["--local_data_opts", "--train 16 --valid 4 --test 6", "--nj", "1"]
SMALL += ["--teacher_args", f"{TINY} --max_epoch 1", "--train_args", f"{TINY} --max_epoch 1"]


def run_all(egs2, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(egs2.parent / "run_all.sh"), *options],
        env=Recipe(egs2, "mini").env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


def test_one_table_compares_methods(egs2):
    methods = ("kl", "cr_ctc", "label_free")  # the last one trains on a copy of the data without text
    done = run_all(egs2, "--methods", " ".join(methods), "--seeds", "1", *SMALL)
    assert done.returncode == 0, done.stdout[-6000:]
    for number, name in ((2, "plain, seed 1"), (6, "kl, seed 1")):  # one line for each finished run
        assert f"{number} of 6: " in done.stdout and f" of 6: {name}, " in done.stdout
    exp = egs2 / "mini/asr_kd1/exp"
    rows = json.loads((exp / "results.json").read_text())
    students = {("student", m, 1) for m in methods}
    assert {(r["role"], r["method"], r["seed"]) for r in rows} == {("teacher", None, 0), ("plain", None, 1), *students}
    assert all(r["wer"] is not None and r["epochs"] == 1 for r in rows)
    assert len({r["params"] for r in rows if r["role"] != "teacher"}) == 1
    table = (exp / "RESULTS.md").read_text().split("## Comparison of methods")[1].split("##")[0]
    *lines, where, _ = [line for line in done.stdout.splitlines() if line]  # a verdict for each method, then the report
    assert where == f"The whole report: {exp.resolve() / 'report.html'}"
    assert {line.split(":")[0] for line in lines[-3:]} == set(methods)
    for method in methods:
        cells = next(line.split("|") for line in table.splitlines() if line.startswith(f"|{method}|"))
        assert cells[3] == "1" and cells[8][0] in "+-" and 0 < float(cells[9]) <= 1


#: The run.sh of a recipe that records its calls and trains nothing.
RUN = """#!/usr/bin/env bash
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "$1" = --show_options ]; then
    shift 2
    expdir=exp dumpdir=dump train_set=train ngpu=0 target_cache=false dry_run=false
    while [ $# -gt 0 ]; do printf -v "${1#--}" '%s' "$2"; shift 2; done
    for name in expdir dumpdir train_set ngpu target_cache dry_run; do echo "${name}=${!name}"; done
    exit
fi
echo "$*" >>calls
while read -r words; do
    [[ "$*" != *${words}* ]] || { echo "it is broken"; exit 1; }
done <broken
tag= seed=0
while [ $# -gt 0 ]; do printf -v "${1#--}" '%s' "$2"; shift 2; done
[ "${seed}" = 0 ] || tag=${tag:-seed${seed}}
case "${stage}" in
1) mkdir -p dump/raw/train/audio && touch dump/raw/train/{wav.scp,utt2spk,text,audio/u.flac}; exit ;;
5) sleep 0.5; touch trained; exit ;;
6) [ -e trained ] || touch beside_the_teacher; dir=exp/student_plain${tag:+_${tag}}; sleep "$(cat seconds)" & wait ;;
12) sleep "$(cat seconds_to_decode)" & wait; exit ;;
8) dir=exp/student_$(basename "${method}")${tag:+_${tag}}/export ;;
*) exit 0 ;;
esac
mkdir -p "${dir}"
touch "${dir}/config.yaml"
"""


@pytest.fixture
def stub(egs2):
    directory = egs2 / "stub/asr_kd1"
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "conf").mkdir(parents=True)
    files = {"run.sh": RUN, "broken": "", "calls": "", "seconds": "0", "seconds_to_decode": "0"}
    for name, content in files.items():
        (directory / name).write_text(content)
        (directory / name).chmod(0o755)
    return directory


def calls(stub) -> list:
    return (stub / "calls").read_text().splitlines()


def decoded(stub) -> list:
    """The experiments that the last call decodes, which must be the only call with stage 12."""
    (number,) = (i for i, c in enumerate(calls(stub)) if "--stage 12" in c)
    assert number == len(calls(stub)) - 1
    return calls(stub)[number].split("--stage 12 --experiments ")[1].split()


def test_every_method_runs_for_every_seed_beside_a_plain_student_like_it(egs2, stub):
    for method in ("self_kd", "layer_pruning"):
        (stub / f"conf/train_student_{method}.yaml").write_text("")
    methods = "kl self_kd layer_pruning label_free sequence_kd"
    done = run_all(egs2, "--recipe", "stub", "--methods", methods, "--seeds", "0 1", "--nj", "3")
    assert done.returncode == 0, done.stdout
    said = [c.removeprefix("--nj 3 ") for c in calls(stub)]
    own, without = "--student_config conf/train_student_", "--train_set train_without_text"
    assert said[0] == "--stage 1 --stop_stage 4"
    expected = {"--stage 5 --stop_stage 5", f"--stage 4 --stop_stage 4 {without}"}
    expected |= {"--stage 7 --stop_stage 7 --method sequence_kd"}
    for seed in ("0", "1"):
        plain, kd = f"--stage 6 --stop_stage 6 --seed {seed}", "--stage 8 --stop_stage 11 --method"
        tag = "layer_pruning" + ("" if seed == "0" else "_seed1")
        expected |= {plain, f"{plain} {own}layer_pruning.yaml --tag {tag}"}
        expected |= {f"{kd} self_kd --seed {seed} {own}self_kd.yaml"}
        expected |= {f"{kd} {m} --seed {seed}" for m in ("kl", "sequence_kd")}
        expected |= {f"{kd} layer_pruning --seed {seed} {own}layer_pruning.yaml"}
        expected |= {f"{kd} label_free --seed {seed} {without}"}
    assert set(said[1:-1]) == expected and len(said) == len(expected) + 2
    order = [said.index(f"--stage {k} --stop_stage {k}") for k in (5,)]
    order += [said.index("--stage 7 --stop_stage 7 --method sequence_kd")]
    order += [said.index(f"--stage 8 --stop_stage 11 --method sequence_kd --seed {seed}") for seed in (0, 1)]
    assert order == sorted(order)
    # The data without labels have no text and no second copy of the audio.
    assert {p.name for p in (stub / "dump/raw/train_without_text").iterdir()} == {"wav.scp", "utt2spk"}
    # The last call decodes all students.
    expected = set()
    for tag in ("", "_seed1"):
        expected |= {f"exp/student_plain{tag}", f"exp/student_plain_layer_pruning{tag}"}
        expected |= {f"exp/student_{m}{tag}/export" for m in methods.split()}
    assert set(decoded(stub)) == expected


def test_targets_on_disk_are_made_once_for_all_seeds(egs2, stub):
    done = run_all(egs2, "--recipe", "stub", "--methods", "kl cr_ctc", "--seeds", "0 1", "--target_cache", "true")
    assert done.returncode == 0, done.stdout
    assert [c for c in calls(stub) if "--stage 7" in c] == [
        "--target_cache true --stage 7 --stop_stage 7 --method kl"  # cr_ctc has no teacher
    ]


def test_what_needs_a_failed_stage_7_is_not_trained(egs2, stub):
    (stub / "broken").write_text("--stage 7\n")
    done = run_all(egs2, "--recipe", "stub", "--methods", "sequence_kd kl")
    assert done.returncode == 1
    assert "error: failed: stage 7 for sequence_kd; sequence_kd, seed 0; logs in" in done.stdout
    assert [c.split()[5] for c in calls(stub) if "--stage 8" in c] == ["kl"]


def test_a_forgotten_value_or_a_stage_is_refused(egs2, stub):
    stages = (["--stage", "5"], "--stage is for run.sh"), (["--show_options", "true"], "--show_options is for run.sh")
    for options, words in ((["--expdir"], "needs a value"), *stages):
        done = run_all(egs2, *options)
        assert done.returncode == 2 and words in done.stdout


def test_failed_runs_are_named_and_the_others_go_on(egs2, stub):
    (stub / "broken").write_text("--method kl --seed 0\n--stage 6 --stop_stage 6 --seed 1\n")
    done = run_all(egs2, "--recipe", "stub", "--methods", "kl cr_ctc", "--seeds", "0 1")
    assert done.returncode == 1
    assert "error: failed: kl, seed 0; plain, seed 1; logs in" in done.stdout
    assert "it is broken" in done.stdout and "7 of 7: " in done.stdout
    expected = ["exp/student_plain", "exp/student_cr_ctc/export"]
    assert sorted(decoded(stub)) == sorted(
        [*expected, "exp/student_cr_ctc_seed1/export", "exp/student_kl_seed1/export"]
    )


def test_without_a_teacher_only_what_needs_it_is_left_out(egs2, stub):
    (stub / "broken").write_text("--stage 5\n")
    done = run_all(egs2, "--recipe", "stub", "--methods", "kl cr_ctc")
    assert done.returncode == 1 and "error: failed: teacher; all methods that need the teacher; logs in" in done.stdout
    assert not [c for c in calls(stub) if "--method kl" in c]
    assert decoded(stub) == ["exp/student_plain", "exp/student_cr_ctc/export"]


def test_failed_decoding_is_named(egs2, stub):
    (stub / "broken").write_text("--stage 12\n")
    done = run_all(egs2, "--recipe", "stub", "--methods", "cr_ctc")
    assert done.returncode == 1 and "error: failed: decoding, scoring and results; logs in" in done.stdout


def test_a_given_teacher_is_decoded_beside_the_students(egs2, stub):
    done = run_all(egs2, "--recipe", "stub", "--methods", "kl", "--teacher", "exp/big")
    assert done.returncode == 0, done.stdout
    assert calls(stub)[-1].startswith("--teacher exp/big ")  # run.sh gets the teacher and decodes it too
    assert decoded(stub) == ["exp/student_plain", "exp/student_kl/export"]


def test_a_gpu_is_for_one_training(egs2, stub):
    done = run_all(egs2, "--recipe", "stub", "--ngpu", "1")
    assert done.returncode == 0, done.stdout
    assert [c.split("--stage ")[1].split()[0] for c in calls(stub)] == ["1", "5", "6", "7"]
    assert not (stub / "beside_the_teacher").exists()


def test_runs_may_share_a_gpu_where_that_is_asked_for(egs2, stub):
    (stub / "seconds").write_text("3")
    options = ["--methods", "cr_ctc", "--seeds", "0 1", "--ngpu", "1", "--jobs", "2"]
    done = run_all(egs2, "--recipe", "stub", *options)
    assert done.returncode == 0, done.stdout
    assert (stub / "beside_the_teacher").exists()


def test_a_distilled_student_starts_as_soon_as_its_teacher_is_there(egs2, stub):
    """Plain students use the free place while the teacher trains, but a distilled student does not wait for them."""
    (stub / "seconds").write_text("2")  # a plain student takes four times as long as the teacher
    done = run_all(egs2, "--recipe", "stub", "--methods", "kl", "--seeds", "0 1 2", "--jobs", "2")
    assert done.returncode == 0, done.stdout
    said = [c for c in calls(stub) if "--stage 6" in c or "--stage 8" in c]
    assert ["--stage 8" in c for c in said] == [False, True, False, True, False, True]


def test_the_console_is_short_and_names_the_logs(egs2, stub):
    (stub / "broken").write_text("--method kl\n")
    done = run_all(egs2, "--recipe", "stub", "--methods", "cr_ctc kl")
    logs = stub / "exp/run_all"
    assert f"logs in {logs}" in done.stdout
    assert f"kl, seed 0 FAILED; the end of {logs / 'kl_seed_0.log'}:" in done.stdout
    assert (logs / "kl_seed_0.log").read_text() == "it is broken\n"
    # Lines: the task, the data, the number of runs, four runs, the end of a log, decoding and the error.
    assert done.stdout.split("methods: cr_ctc kl; seeds: 0")[1].count("\n") == 10
    (stub / "broken").write_text("--stage 5\n")
    (stub / "calls").unlink()
    done = run_all(egs2, "--recipe", "stub")
    assert done.returncode == 1 and "of 4: teacher FAILED; the end of" in done.stdout
    assert calls(stub) and not [call for call in calls(stub) if "--stage 7" in call]


def test_a_gpu_that_is_not_there_is_missed_before_any_work(egs2, stub, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (stub / "cmd.sh").write_text('cuda_cmd="./run_local.sh" # here\n')
    done = run_all(egs2, "--recipe", "stub", "--ngpu", "2")
    assert done.returncode == 1 and "error: --ngpu 2: torch finds 0 usable GPUs" in done.stdout and not calls(stub)
    (stub / "cmd.sh").write_text('cuda_cmd="slurm.pl"\n')
    assert run_all(egs2, "--recipe", "stub", "--ngpu", "2").returncode == 0


def test_the_verdict_of_the_report_comes_last(egs2, stub):
    (stub / "exp/report").mkdir(parents=True)
    (stub / "exp/report/verdict.txt").write_text("kl: fewer errors\n\nThe whole report: there\n")
    for options in ([], ["--methods", "cr_ctc"]):
        done = run_all(egs2, "--recipe", "stub", *options)
        assert done.returncode == 0 and "\n\nkl: fewer errors\n\nThe whole report: there\n\n" in done.stdout
        assert done.stdout.splitlines()[-1].endswith(f"a shell after:  . {sys.prefix}/bin/activate")


def test_all_is_every_page_that_the_recipe_has_a_student_for(egs2, stub):
    (stub / "conf/train_student_delayed_kd.yaml").write_text("")
    done = run_all(egs2, "--recipe", "stub", "--methods", "all")
    assert done.returncode == 0, done.stdout
    ran = {c.split("--method ")[1].split()[0] for c in calls(stub) if "--stage 8 --stop_stage 11" in c}
    assert ran == {p.stem for p in (ROOT / "conf/methods").glob("*.yaml")} - {"self_kd", "layer_pruning"}
    assert "self_kd is left out: the recipe has no conf/train_student_self_kd.yaml" in done.stdout


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_run_side_by_side_and_end_with_the_script(egs2, stub, jobs):
    (stub / "seconds").write_text("987")
    run = subprocess.Popen(
        [str(egs2.parent / "run_all.sh"), *f"--recipe stub --methods cr_ctc --jobs {jobs}".split(), "--seeds", "0 1 2"],
        env=Recipe(egs2, "mini").env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.time() + 120
        while len(sleepers(stub, "987")) < jobs:
            assert time.time() < deadline and run.poll() is None
            time.sleep(0.2)
        time.sleep(2.5)
        assert len(sleepers(stub, "987")) == jobs
    finally:
        os.kill(run.pid, signal.SIGTERM)  # only the script, not its children
    assert run.wait(timeout=20) == 143
    time.sleep(0.5)
    assert not sleepers(stub, "987")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_while_decoding(egs2, stub, number, code):
    (stub / "seconds_to_decode").write_text("987")
    run = subprocess.Popen(
        [str(egs2.parent / "run_all.sh"), "--recipe", "stub", "--methods", "cr_ctc"],
        env=Recipe(egs2, "mini").env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True, text=True,
        # Tests that run in the background ignore Ctrl-C, and a child process would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.time() + 120
    try:
        while not sleepers(stub, "987"):
            assert time.time() < deadline and run.poll() is None
            time.sleep(0.2)
    finally:
        os.kill(run.pid, number)  # only the script, not its children
    _, said = run.communicate(timeout=20)
    assert run.returncode == code and not sleepers(stub, "987")
    assert said.splitlines()[-1] == "error: stopped; the same command continues where it stopped"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--methods", "kl", "--seed", "1"], "--seed cannot be given with --methods"),
        (["--methods", "kl", "--pseudo", "data/more"], "--pseudo cannot be given with --methods"),
        (["--methods", "kl", "--seeds", "0 one"], "--seeds must be whole numbers"),
        (["--methods", "kl", "--seeds", "1 0 1"], "--seeds names 1 twice"),
        (["--methods", "kl cr_ctc kl"], "--methods names kl twice"),
        (["--methods", "kl", "--dry_run", "true"], "--dry_run is for one method"),
        (["--methods", "kl", "--jobs", "0"], "--jobs must be a number above 0"),
        (["--methods"], "--methods needs a value"),
        (["--seeds", "0 1"], "go with --methods"),
        (["--recipe", "nowhere"], "--recipe nowhere: there is no recipe of that name; known: "),
        (["--methods", "kll"], "did you mean 'kl'"),
    ],
)
def test_mistakes_are_answered_before_anything_runs(egs2, options, words):
    done = run_all(egs2, *options)
    assert done.returncode in (1, 2) and words in done.stdout and "stage 1" not in done.stdout


ENCODER = ("encoder", "encoder_conf")


def read(recipe: str, name: str) -> dict:
    return yaml.safe_load((ROOT / f"egs2/{recipe}/asr_kd1/conf/{name}.yaml").read_text())


@pytest.mark.parametrize("recipe", ["mini", "an4"])
def test_a_methods_own_student_differs_in_its_encoder_alone(recipe):
    plain, teacher = read(recipe, "train_student"), read(recipe, "train_teacher")
    own = {m: read(recipe, f"train_student_{m}") for m in ("self_kd", "layer_pruning", "delayed_kd")}
    for conf in own.values():
        assert {k: v for k, v in conf.items() if k not in ENCODER} == {
            k: v for k, v in plain.items() if k not in ENCODER
        }
    assert [own["self_kd"][k] for k in ENCODER] == [teacher[k] for k in ENCODER]
    pruned = {**teacher["encoder_conf"], "num_blocks": 2}
    assert teacher["encoder_conf"]["num_blocks"] > 2
    assert (own["layer_pruning"]["encoder"], own["layer_pruning"]["encoder_conf"]) == (teacher["encoder"], pruned)


@pytest.mark.parametrize("recipe", ["mini", "an4"])
def test_the_streaming_student_learns_and_hears_little_of_what_comes(recipe):
    import tiny_asr
    import torch

    from espnet_kd.inference.encode import measure_frame_shift
    from espnet_kd.offline import ASRTask

    def build(name):
        conf = {k: v for k, v in read(recipe, name).items() if k in (*ENCODER, "model_conf", "specaug", "specaug_conf")}
        torch.manual_seed(0)
        return ASRTask.build_model(argparse.Namespace(**{**tiny_asr.config(), **conf}))

    model, plain = build("train_student_delayed_kd"), build("train_student")
    assert measure_frame_shift(model, 16000) == measure_frame_shift(plain, 16000) == 0.04
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.05
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    speech, lengths = torch.randn(2, 48000), torch.tensor([48000, 16000])
    labels, label_lengths = torch.tensor([[3, 4, 5], [6, 7, -1]]), torch.tensor([3, 2])
    model.train()
    losses = []
    for _ in range(3):
        loss = model(speech, lengths, labels, label_lengths)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    # Of five seconds, the last two do not change the outputs of the first two.
    model.eval()
    first, other = torch.randn(2, 1, 80000)
    other[:, :48000] = first[:, :48000]
    with torch.no_grad():
        feats = [model._extract_feats(x, torch.tensor([80000]))[0] for x in (first, other)]
        frames = [model.encoder(f, torch.tensor([f.size(1)]))[0][0, :50] for f in feats]
    torch.testing.assert_close(frames[0], frames[1])
