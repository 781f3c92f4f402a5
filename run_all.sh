#!/usr/bin/env bash
# The main job, from nothing to a results table: see --help.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    cat <<'EOF'
Usage: ./run_all.sh [option of run.sh …]
Example: ./run_all.sh
         ./run_all.sh --seed 1 --expdir exp_seed1

On a fresh machine it makes .venv, installs, and runs the embedded recipe (egs2/mini/asr_kd1): speech synthesised on
the spot, a teacher, a plain student, the same student distilled by progressive factorized KD in three stages, decoding
and a table with pictures in egs2/mini/asr_kd1/exp. No download of data, no GPU. Run it again and it continues where it
stopped, or shows the table. Options go to every stage of egs2/mini/asr_kd1/run.sh, whose --help lists them.
EOF
    exit 0
fi

EXTRAS='mini'
# shellcheck source=egs2/TEMPLATE/setup_env.sh
. "${ROOT}/egs2/TEMPLATE/setup_env.sh"

recipe=${ROOT}/egs2/mini/asr_kd1
"${recipe}/run.sh" --stage 1 --stop_stage 4 "$@"
# Teacher and plain student need nothing of each other: side by side on two cores.
# A process group of its own, so that all of it ends when this script does.
set -m
"${recipe}/run.sh" --stage 5 --stop_stage 5 "$@" &
teacher=$!
set +m
trap 'kill -- "-${teacher}" 2>/dev/null || true' EXIT
"${recipe}/run.sh" --stage 6 --stop_stage 6 "$@"
wait "${teacher}"
"${recipe}/run.sh" --stage 7 "$@"
