"""``python -m espnet_kd`` in the place of ``python`` runs KD training instead of ESPnet's, and changes nothing else."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_kd
import yaml

from espnet_kd.__main__ import DECISIVE, KD_TRAINING, main, translate
from espnet_kd.bin import asr_kd_train
from espnet_kd.distill.options import KD_OPTIONS
from espnet_kd.experiments.models import find_experiment, load_model

ROOT = Path(__file__).resolve().parents[1]
RUN_LOCAL = ROOT / "egs2/TEMPLATE/asr_kd1/run_local.sh"
WRAPPER = [sys.executable, "-m", "espnet_kd"]
TRAIN = "espnet2.bin.asr_train"
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "args",
    [
        ["-m", TRAIN, "--config", "x.yaml", "--teacher", "exp/t", "--kd_config", "kl"],
        ["-m", TRAIN, "--teacher=exp/t", "--collect_stats", "true"],
        ["-m", TRAIN, "--kd_config", "inter_ctc"],
        ["-u", "-W", "-m", "-X", "utf8", "-m", TRAIN, "--kd_config", "kl"],
    ],
)
def test_kd_training(args):
    assert translate(args) == [KD_TRAINING if a == TRAIN else a for a in args]


@pytest.mark.parametrize(
    "args",
    [
        ["-m", TRAIN, "--config", "x.yaml"],
        ["-m", TRAIN, "--kd_configuration", "kl"],  # not our option, so ESPnet's parser must refuse it
        ["-m", "espnet2.bin.lm_train", "--teacher", "exp/t"],
        ["-m", "espnet2.bin.launch", "--", "python3", "-m", "espnet_kd", "-m", TRAIN, "--teacher", "exp/t"],
        ["script.py", "-m", TRAIN, "--teacher", "exp/t"],
        ["-c", "pass", "-m", TRAIN, "--teacher", "exp/t"],
        ["-", "-m", TRAIN, "--teacher", "exp/t"],
        ["-m"],
        ["-W", "-m"],
        ["-V"],
    ],
)
def test_all_else_is_handed_on(args):
    assert translate(args) == args


def test_the_names_are_those_of_the_training():
    assert asr_kd_train.__name__ == KD_TRAINING
    assert {option[2:] for option in DECISIVE} < set(KD_OPTIONS)


@pytest.mark.parametrize("args, code", [([], 2), (["-h"], 0), (["--help"], 0)])
def test_usage(args, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["espnet_kd", *args])
    with pytest.raises(SystemExit) as e:
        main()
    out, err = capsys.readouterr()
    assert e.value.code == code
    # Standard output may hold a recipe's data, so usage is written there only on request (--help).
    assert '--python "python3 -m espnet_kd"' in (err if code else out) and not (out if code else err)


def test_imports_nothing_of_weight():
    code = "import sys; old = set(sys.modules); import espnet_kd.__main__; print(*sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"__future__", "espnet_kd", "espnet_kd.__main__"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A directory with an ESPnet recipe's folders, each a package that must not be imported in place of ours."""
    directory = tmp_path_factory.mktemp("recipe")
    for name in ("bin", "conf", "data", "decode", "local", "pyscripts", "scripts", "steps", "tasks", "utils"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(f"raise ImportError('the recipe\\'s {name} was imported')\n")
    (directory / "script.py").write_text("import sys; print(sys.argv, sys.path[0]); sys.exit('no')\n")
    return directory


SHOW = "import os, sys; print(sys.argv, sys.path[0], sys.warnoptions, os.getcwd(), sys.stdin.read()); sys.exit(7)"
DIE = "import os, sys; print('x', flush=True); os.kill(os.getpid(), {})"


@pytest.mark.parametrize(
    "args, status",
    [
        (["-c", SHOW, "two words", "*", "", "--teacher", "é"], 7),
        (["-W", "error", "-c", SHOW], 7),
        (["-m", "json.tool", "--compact"], 0),
        (["-m", "no.such.module"], 1),
        (["script.py", "--teacher", "x"], 1),
        (["nothing.py"], 2),
        (["--no_such_option"], 2),
        (["-V"], 0),
        (["-c", DIE.format(int(signal.SIGKILL))], 137),
        (["-c", DIE.format(int(signal.SIGTERM))], 143),
    ],
)
def test_output_and_status_are_those_without_the_wrapper(recipe, tmp_path, args, status):
    def run(*python):
        shell = ["bash", "-c", '"$@" 2>"$0"; echo "status $?"', tmp_path / "stderr", *python, *args]
        done = subprocess.run(shell, cwd=recipe, env=ENV, input='{"a": "é"}\n', capture_output=True, text=True)
        return done.stdout, (tmp_path / "stderr").read_text()

    plain, wrapped = run(sys.executable), run(*WRAPPER)
    assert wrapped == plain
    assert plain[0].endswith(f"status {status}\n")


def test_options_of_the_interpreter_itself_are_kept(recipe):
    args = ["-c", "import sys; print(sys.orig_argv[1:])", "x"]
    command = [sys.executable, "-u", "-X", "dev", "-m", "espnet_kd", *args]
    done = subprocess.run(command, cwd=recipe, env=ENV, capture_output=True, text=True, check=True)
    assert done.stdout == f"{['-u', '-X', 'dev', *args]}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_what_runs(recipe, number):
    code = (
        f"import signal, sys, time; signal.signal({int(number)}, lambda n, frame: sys.exit(40 + n)); "
        "print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([*WRAPPER, "-c", code], cwd=recipe, env=ENV, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(30) == 40 + number


#: Statistics and training as an ESPnet recipe starts them: PYTHON and ARGS are unquoted, both get the same ARGS, and
#: ESPnet's launcher starts the training.
STAND_IN = r"""
set -euo pipefail
python=$1 run=$2 config=$3 data=$4 args=$5
tokens=${data}/tokens.txt stats=exp/stats
say="--config ${config} --use_preprocessor true --bpemodel none --token_type char --token_list ${tokens}
     --non_linguistic_symbols none --cleaner none --g2p none --frontend_conf fs=16k"
for part in train valid; do
    say+=" --${part}_data_path_and_name_and_type ${data}/${part}/wav.scp,speech,sound"
    say+=" --${part}_data_path_and_name_and_type ${data}/${part}/text,text,text"
done
mkdir -p "${stats}/log"
for part in train valid; do
    awk -v to="${stats}/log/${part}." '{print > (to (1 + NR % 2) ".scp")}' "${data}/${part}/wav.scp"
done
${run} JOB=1:2 "${stats}/log/stats.JOB.log" ${python} -m espnet2.bin.asr_train --collect_stats true ${say} \
    --train_shape_file "${stats}/log/train.JOB.scp" --valid_shape_file "${stats}/log/valid.JOB.scp" \
    --output_dir "${stats}/log/stats.JOB" ${args}
${python} -m espnet2.bin.aggregate_stats_dirs --input_dir "${stats}/log/stats.1" --input_dir "${stats}/log/stats.2" \
    --output_dir "${stats}"
for part in train valid; do
    sed "s/\$/,$(wc -l <"${tokens}")/" "${stats}/${part}/text_shape" >"${stats}/${part}/text_shape.char"
    say+=" --${part}_shape_file ${stats}/${part}/speech_shape --fold_length 80000"
    say+=" --${part}_shape_file ${stats}/${part}/text_shape.char --fold_length 150"
done
say+=" --normalize=global_mvn --normalize_conf stats_file=${stats}/train/feats_stats.npz --resume true"
${python} -m espnet2.bin.launch --cmd "${run} --name exp/student/train.log" --log exp/student/train.log --ngpu 0 \
    --num_nodes 1 --init_file_prefix exp/student/.dist_init_ --multiprocessing_distributed true -- \
    ${python} -m espnet2.bin.asr_train ${say} --ignore_init_mismatch false --output_dir exp/student ${args}
"""


def test_statistics_and_training_as_espnets_scripts_start_them(recipe, corpus, teacher_dir, monkeypatch):
    # The student has an attention decoder and is chosen by its accuracy, as in ESPnet's recipes by default.
    student = yaml.safe_load(corpus.config().read_text())
    student.update(normalize="utterance_mvn", normalize_conf={}, model_conf={"ctc_weight": 0.3})
    student.update(decoder="transformer", decoder_conf={"attention_heads": 2, "linear_units": 16, "num_blocks": 1})
    student.update(best_model_criterion=[["valid", "acc", "max"]])
    tiny_kd.write_yaml(recipe / "conf/train.yaml", student)
    args = f"--teacher {teacher_dir} --kd_config progressive_fkl"
    command = ["bash", "-c", STAND_IN, "recipe", " ".join(WRAPPER), RUN_LOCAL, "conf/train.yaml", corpus.dir, args]
    done = subprocess.run(command, cwd=recipe, env=ENV, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""

    stats, student = recipe / "exp/stats", recipe / "exp/student"
    for part in ("train", "valid"):
        for shape in ("speech_shape", "text_shape.char"):
            assert sorted_lines(stats / part / shape) == sorted_lines(corpus.dir / part / shape)
    assert (stats / "train/feats_stats.npz").is_file()

    record = json.loads((student / "kd_stage.json").read_text())
    assert record["finished"] and record["finished_kd_stage"] == 3 and record["teacher"] == [str(teacher_dir)]
    for directory in (student / "kd_stage1", student / "kd_stage2", student):
        assert (directory / "student.pth").is_file() and (directory / "config.yaml").is_file()
    # Stage 12 of asr.sh gives these files to espnet2.bin.asr_inference.
    settings = yaml.safe_load((student / "config.yaml").read_text())
    assert settings["normalize_conf"] == {"stats_file": "exp/stats/train/feats_stats.npz"}
    monkeypatch.chdir(recipe)
    experiment = find_experiment("exp/student")
    assert experiment[1].name == "valid.acc.ave.pth"  # asr.sh's default
    load_model(*experiment)


def sorted_lines(path):
    return sorted(path.read_text().splitlines())
