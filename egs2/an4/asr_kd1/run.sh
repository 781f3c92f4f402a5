#!/usr/bin/env bash
# CMU AN4: 50 minutes of real speech. Give --an4 DIR; without it the corpus is downloaded.
set -euo pipefail
export corpus_dirs="an4"
exec "$(dirname "${BASH_SOURCE[0]}")/asr_kd.sh" \
    --token_type char \
    --min_seconds 0.4 \
    --max_seconds 10 \
    "$@"
