#!/usr/bin/env bash
# All tests and measurements for a GPU in one command: see --help.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

usage() {
    cat <<'EOF'
Usage: tests/gpu/run.sh [--wheels DIR] [--cpu] [--output DIR] [--only PART …]
Example: tests/gpu/run.sh --wheels ~/wheels --output ~/gpu

For a machine with Python, torch, torchaudio and a GPU, without network; takes five minutes. Tests losses, frame selections
and alignment against float64, and that they do not wait for the GPU; trains with every method page in mixed precision;
tests a target cache, a training that is killed and resumed, and decoding; then runs asr_kd_bench. Prints a table, and
writes it with all measurements to DIR/gpu.json (default: a directory in /tmp), with the logs beside it. The exit code is 1
if something failed.

--wheels  a directory of wheels to install into a new environment in DIR; default: use what is installed. To make it on a
          machine with network: pip wheel --wheel-dir wheels '.[test]', then remove torch*, nvidia* and triton*
--cpu     do the same on a CPU, with the kernels in Triton's interpreter; what needs CUDA is left out, and listed by name
--only    losses (needs torch only), training, bench
EOF
}

wheels='' output=''
options=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --wheels | --output)
            [ $# -gt 1 ] || { echo "error: $1 needs a directory" >&2; exit 2; }
            if [ "$1" = --wheels ]; then wheels=$2; else output=$2; fi
            shift 2
            ;;
        *) options+=("$1"); shift ;;
    esac
done
[ -n "${output}" ] || output=$(mktemp -d /tmp/espnet_kd_gpu.XXXXXX)
mkdir -p "${output}"
output=$(cd "${output}" && pwd -P)

python=python3
if [ -n "${wheels}" ]; then
    [ -d "${wheels}" ] || { echo "error: --wheels ${wheels} is no directory" >&2; exit 2; }
    shopt -s nullglob
    found=("${wheels}"/*.whl)
    [ ${#found[@]} -gt 0 ] || { echo "error: --wheels ${wheels} holds no .whl file" >&2; exit 2; }
    [ -d "${output}/venv" ] || python3 -m venv --system-site-packages "${output}/venv"
    python=${output}/venv/bin/python
    # Without their dependencies: the folder already has all packages that were chosen for them.
    "${python}" -m pip install --quiet --disable-pip-version-check --no-index --no-deps "${found[@]}"
fi
cd "${ROOT}"
export PYTHONPATH="${ROOT}${PYTHONPATH:+:${PYTHONPATH}}" PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
exec "${python}" tests/gpu/report.py --output "${output}" "${options[@]+"${options[@]}"}"
