#!/usr/bin/env bash
# CMU AN4: real speech, 50 minutes of it. ./run.sh --an4 DIR, or without it the corpus is downloaded. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

args=() an4=()
while [ $# -gt 0 ]; do
    case "$1" in
    --an4)
        an4=(--local_data_opts "--an4 ${2:?--an4 needs a directory}")
        shift 2
        ;;
    *)
        args+=("$1")
        shift
        ;;
    esac
done

./asr_kd.sh \
    --token_type char \
    --min_seconds 0.4 \
    --max_seconds 10 \
    "${an4[@]}" "${args[@]}"
