#!/usr/bin/env bash
# AISHELL-1: read Mandarin speech, 151 h for training. Give --aishell DIR, the directory with transcript/ and wav/.
set -euo pipefail
export corpus_dirs="aishell"
exec "$(dirname "${BASH_SOURCE[0]}")/asr_kd.sh" \
    --token_type char \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --max_seconds 20 \
    "$@"
