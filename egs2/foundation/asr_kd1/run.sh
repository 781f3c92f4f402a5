#!/usr/bin/env bash
# Audio without transcripts, and a pre-trained CTC model as the teacher: give --audio DIR and --teacher hf:DIR.
set -euo pipefail
export corpus_dirs="audio"
exec "$(dirname "${BASH_SOURCE[0]}")/asr_kd.sh" \
    --token_type char \
    --method label_free \
    --teacher_config conf/train_student.yaml \
    --max_seconds 16 \
    "$@"
