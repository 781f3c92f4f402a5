#!/usr/bin/env bash
# TED-LIUM release 2: talks, about 210 h to train on: ./run.sh --tedlium2 DIR (with train/, dev/, test/ in it).
set -euo pipefail

args=()
while [ $# -gt 0 ]; do
    if [ "$1" = --tedlium2 ]; then
        # For local/data.sh, from the directory this script is called in.
        tedlium2=$(realpath -m "${2:?--tedlium2 needs a directory}")
        export tedlium2
        shift 2
    else
        args+=("$1")
        shift
    fi
done

cd "$(dirname "${BASH_SOURCE[0]}")"
./asr_kd.sh \
    --token_type bpe \
    --nbpe 500 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --max_seconds 20 \
    "${args[@]}"
