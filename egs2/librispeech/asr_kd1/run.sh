#!/usr/bin/env bash
# LibriSpeech, any of its parts: ./run.sh --librispeech DIR, or without it the parts are downloaded. See --help.
# Of this recipe: --train_parts, --valid_parts, --test_parts "PART …" (default: 960 h, dev-*, test-*), and
# --split_by_speaker "PART …", whose speakers are divided among train, valid and test.
set -euo pipefail

args=()
test_sets="test_clean test_other"
while [ $# -gt 0 ]; do
    case "$1" in
    --librispeech)
        # For local/data.sh, from the directory this script is called in.
        librispeech=$(realpath "${2:?--librispeech needs a directory}")
        export librispeech
        ;;
    --train_parts | --valid_parts | --test_parts | --split_by_speaker)
        declare -x "${1#--}=${2?$1 needs the names of parts}"
        [ "$1" != --test_parts ] || test_sets=${2//-/_}
        [ "$1" != --split_by_speaker ] || test_sets="test"
        ;;
    *)
        args+=("$1")
        shift
        continue
        ;;
    esac
    shift 2
done

cd "$(dirname "${BASH_SOURCE[0]}")"
./asr_kd.sh \
    --token_type bpe \
    --nbpe 5000 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --max_seconds 30 \
    --test_sets "${test_sets}" \
    "${args[@]}"
