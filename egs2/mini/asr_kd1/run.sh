#!/usr/bin/env bash
# The embedded default: speech synthesised on the spot, nothing to download.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/asr_kd.sh" \
    --token_type word \
    --min_seconds 0.4 \
    --max_seconds 10 \
    "$@"
