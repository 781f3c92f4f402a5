#!/usr/bin/env bash
# The embedded recipe: it synthesises its speech, and downloads no data.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/asr_kd.sh" \
    --token_type word \
    --min_seconds 0.4 \
    --max_seconds 10 \
    "$@"
