#!/usr/bin/env bash
# LibriSpeech, any of its parts: ./run.sh --librispeech DIR, or without it the parts are downloaded.
# --train_parts, --valid_parts, --test_parts "PART …" (default: 960 h, dev-*, test-*); --split_by_speaker "PART …", whose
# speakers are divided among train, valid and test.
set -euo pipefail

args=()
while [ $# -gt 0 ]; do
    case "$1" in
    --librispeech)
        # For local/data.sh, from the directory this script is called in.
        librispeech=$(realpath -m "${2:?--librispeech needs a directory}")
        export librispeech
        ;;
    --train_parts | --valid_parts | --test_parts | --split_by_speaker)
        declare -x "${1#--}=${2?$1 needs the names of parts}"
        ;;
    *)
        args+=("$1")
        shift
        continue
        ;;
    esac
    shift 2
done

# What is decoded: the parts that were named for it, else the test speakers of a split; --test_sets says otherwise.
test_sets=${split_by_speaker:+test}
test_sets=${test_parts-${test_sets:-test-clean test-other}}

cd "$(dirname "${BASH_SOURCE[0]}")"
./asr_kd.sh \
    --token_type bpe \
    --nbpe 5000 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --max_seconds 30 \
    --test_sets "${test_sets//-/_}" \
    "${args[@]}"
