#!/usr/bin/env bash
# A directory of audio without transcripts, and a pre-trained CTC model as the teacher: ./run.sh --audio DIR --teacher hf:DIR
set -euo pipefail
export corpus_dirs="audio"
exec "$(dirname "${BASH_SOURCE[0]}")/asr_kd.sh" \
    --token_type char \
    --method label_free \
    --teacher_config conf/train_student.yaml \
    --max_seconds 16 \
    "$@"
