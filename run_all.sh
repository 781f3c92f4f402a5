#!/usr/bin/env bash
# Run a recipe from installation to a results table; with --methods, compare many methods in one table. See --help.
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

On a fresh machine this script creates .venv, installs the project, and runs a recipe. The default recipe is the embedded
one (egs2/mini/asr_kd1): it synthesises its speech, downloads no data and needs no GPU.

Without --methods it trains a teacher, a plain student, and the same student distilled by progressive factorized KD in
three KD stages. It decodes them and writes a verdict and a report with tables and pictures to egs2/mini/asr_kd1/exp.

With --methods it prepares data and teacher once. Then it trains for each seed the plain student and one student for each
method, all with the same teacher, seed and epochs. At the end it decodes all students, and writes a verdict for each and
one report that compares them.
  --methods  names of pages in conf/methods, paths of pages, or all: every page that the recipe can run
  --seeds    default: 0
  --jobs     number of runs at the same time; default: 2 if there are two CPU cores and --ngpu is 0, else 1. Small
             models can share a GPU (--ngpu 1 --jobs 3); the gain is not measured
  --recipe   a directory of egs2; default: mini
If a method needs another student, the recipe has conf/train_student_METHOD.yaml for it, and the student is compared with
a plain student of that file. If a run fails, the other runs continue, and an error at the end names the failed one.

The console shows one line for each finished step, one line of progress, and the verdict. All other output is in
exp/run_all/*.log.

Exit codes: 0 done; 1 a mistake or a failure, reported in one line; 2 wrong options; 130 stopped with Ctrl-C, 143 with
kill. If you run the same command again, it continues where it stopped, or shows the verdict. Further options are passed
to every stage of the recipe's run.sh, whose --help lists them.
EOF_USAGE
}

for word in "$@"; do
    case "${word}" in -h | --help) usage && exit ;; esac
done

export PYTHONPATH="${ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
words=("$@")
# Check the options before gigabytes are installed.
before_installing() { python -m espnet_kd.runs --root "${ROOT}" --only_check -- "${words[@]}"; }
EXTRAS='mini'
# shellcheck source=egs2/TEMPLATE/setup_env.sh
. "${ROOT}/egs2/TEMPLATE/setup_env.sh"
exec python -m espnet_kd.runs --root "${ROOT}" --activate "${ACTIVATE}" -- "$@"
