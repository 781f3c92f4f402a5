#!/usr/bin/env bash
# The main job, from nothing to a results table; with --methods many methods and one table. See --help.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

usage() {
    cat <<'EOF_USAGE'
Usage: ./run_all.sh [--recipe NAME] [option of run.sh …]
       ./run_all.sh --methods all|"NAME …" [--seeds "N …"] [--jobs N] [--recipe NAME] [option of run.sh …]
Example: ./run_all.sh
         ./run_all.sh --seed 1 --expdir exp_seed1
         ./run_all.sh --methods "kl self_kd progressive_fkl" --seeds "0 1"
         ./run_all.sh --methods all --recipe an4 --an4 /corpora/an4 --ngpu 1

On a fresh machine it makes .venv, installs, and runs a recipe. The default is the embedded one (egs2/mini/asr_kd1):
speech synthesised on the spot, no download of data, no GPU.

Without --methods: a teacher, a plain student, the same student distilled by progressive factorized KD in three KD
stages, decoding, a verdict, and a report with tables and pictures in egs2/mini/asr_kd1/exp.

With --methods: data and teacher once, then for each seed the plain student and a student of each method, all from the
same teacher, with the same seed and epochs; at the end decoding, a verdict for each, and one report that compares them.
  --methods  pages of conf/methods by name, paths of pages, or all: every page that the recipe can run
  --seeds    default 0
  --jobs     runs side by side; default 2 where there are two CPU cores and --ngpu is 0, else 1. Small models may
             share a GPU, by how much faster is not measured: --ngpu 1 --jobs 3
  --recipe   a directory of egs2, default mini
A method whose student has to be another one has conf/train_student_METHOD.yaml in the recipe, and a plain student of
that file to be compared with. A failed run is named at the end; the others go on.

The console gets a line for each step, one line of progress, and the verdict; all else is in exp/run_all/*.log.

Exit codes: 0 done; 1 a mistake or a failure, in one line; 2 wrong options; 130 stopped with Ctrl-C, 143 with kill.
Run it again and it continues where it stopped, or shows the verdict. Further options go to every stage of the recipe's
run.sh, whose --help lists them.
EOF_USAGE
}

for word in "$@"; do
    case "${word}" in -h | --help) usage && exit ;; esac
done

export PYTHONPATH="${ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
words=("$@")
# Mistakes in the options are found before gigabytes are installed.
before_installing() { python -m espnet_kd.runs --root "${ROOT}" --only_check -- "${words[@]}"; }
EXTRAS='mini'
# shellcheck source=egs2/TEMPLATE/setup_env.sh
. "${ROOT}/egs2/TEMPLATE/setup_env.sh"
exec python -m espnet_kd.runs --root "${ROOT}" --activate "${ACTIVATE}" -- "$@"
