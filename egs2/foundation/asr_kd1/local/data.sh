#!/usr/bin/env bash
# Stage 1: a directory of audio into data/{train,valid,test}. Options: local/data.sh --help
set -euo pipefail

# shellcheck source=/dev/null
. ./path.sh

# shellcheck disable=SC2086
${python:-python3} -m espnet_kd.bin.asr_kd_data audio --out data "$@"
