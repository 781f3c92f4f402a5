#!/usr/bin/env bash
# The embedded default: speech synthesised on the spot, nothing to download. See --help.
# Mandarin: --local_data_opts "--language cmn" --dumpdir dump_cmn --expdir exp_cmn (in a fresh data/).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./asr_kd.sh \
    --token_type char \
    --min_seconds 0.4 \
    --max_seconds 10 \
    "$@"
