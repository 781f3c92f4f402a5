#!/usr/bin/env bash
# LibriSpeech, any of its parts. Give --librispeech DIR; without it the parts are downloaded.
# --train_parts, --valid_parts, --test_parts "PART …" choose the parts (default: 960 h, dev-*, test-*).
# --split_by_speaker "PART …" divides the speakers of these parts among train, valid and test.
set -euo pipefail
export corpus_dirs="librispeech" corpus_options="train_parts valid_parts test_parts split_by_speaker"
exec "$(dirname "${BASH_SOURCE[0]}")/asr_kd.sh" \
    --token_type bpe \
    --nbpe 5000 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --max_seconds 30 \
    "$@"
