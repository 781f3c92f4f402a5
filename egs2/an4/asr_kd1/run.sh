#!/usr/bin/env bash
# CMU AN4: real speech, 50 minutes of it. ./run.sh --an4 DIR, or without it the corpus is downloaded.
set -euo pipefail

args=()
while [ $# -gt 0 ]; do
    if [ "$1" = --an4 ]; then
        # For local/data.sh, from the directory this script is called in.
        an4=$(realpath -m "${2:?--an4 needs a directory}")
        export an4
        shift 2
    else
        args+=("$1")
        shift
    fi
done

cd "$(dirname "${BASH_SOURCE[0]}")"
./asr_kd.sh \
    --token_type char \
    --min_seconds 0.4 \
    --max_seconds 10 \
    "${args[@]}"
