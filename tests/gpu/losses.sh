#!/usr/bin/env bash
# The losses on a GPU: see --help.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    cat <<'EOF'
Usage: tests/gpu/losses.sh [--cpu]
Example: tests/gpu/losses.sh > losses.json

On a machine with a GPU, Python, torch and the Triton that comes with it; no network, no ESPnet. Checks every loss on the
GPU against float64 and that nothing waits for it, in two minutes, then prints what factorized KL costs, as JSON: the
kernels ("ours"), plain torch without waits ("masked"), written plainly ("plain"). All else goes to standard error.
--cpu: without a GPU, the kernels in Triton's interpreter; a few minutes.
EOF
    exit 0
fi

cd "${ROOT}"
export PYTHONPATH="${ROOT}${PYTHONPATH:+:${PYTHONPATH}}" PYTHONWARNINGS=ignore
if [ "${1:-}" = --cpu ]; then
    TRITON_INTERPRET=1 python tests/losses/grid.py >&2
else
    python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: give --cpu"'
    if python -c 'import pytest' 2> /dev/null; then
        # Not tests/conftest.py, which imports ESPnet.
        python -m pytest -m gpu -rs --confcutdir tests/losses tests/losses tests/test_select.py tests/test_frames.py \
            tests/test_late.py >&2
    else
        python tests/losses/grid.py cuda >&2
        echo "left out for want of pytest: large vocabularies, waits" >&2
    fi
fi
python -m espnet_kd.bin.asr_kd_bench --only loss --nonblank 0.2 0.5 --json
