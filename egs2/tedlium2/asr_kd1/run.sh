#!/usr/bin/env bash
# TED-LIUM release 2: talks, about 210 h for training. Give --tedlium2 DIR, the directory with train/, dev/ and test/.
set -euo pipefail
export corpus_dirs="tedlium2"
exec "$(dirname "${BASH_SOURCE[0]}")/asr_kd.sh" \
    --token_type bpe \
    --nbpe 500 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --max_seconds 20 \
    "$@"
