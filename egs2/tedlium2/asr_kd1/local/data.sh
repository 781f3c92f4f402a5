#!/usr/bin/env bash
# Stage 1: TED-LIUM 2 into data/{train,valid,test}. Options: local/data.sh --help
set -euo pipefail

# shellcheck source=/dev/null
. ./path.sh

# The padding is that of ESPnet's recipe: its training segments begin and end too close to the words.
# shellcheck disable=SC2086
${python:-python3} -m espnet_kd.bin.asr_kd_data tedlium2 --out data --nj "${nj:-1}" --padding 0.15 0.1 "$@"
