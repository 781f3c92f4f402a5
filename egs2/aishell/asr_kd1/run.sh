#!/usr/bin/env bash
# AISHELL-1: Mandarin, read, 151 h to train on: ./run.sh --aishell DIR (with transcript/ and wav/ in it).
set -euo pipefail

args=()
while [ $# -gt 0 ]; do
    if [ "$1" = --aishell ]; then
        # For local/data.sh, from the directory this script is called in.
        aishell=$(realpath -m "${2:?--aishell needs a directory}")
        export aishell
        shift 2
    else
        args+=("$1")
        shift
    fi
done

cd "$(dirname "${BASH_SOURCE[0]}")"
./asr_kd.sh \
    --token_type char \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --max_seconds 20 \
    "${args[@]}"
