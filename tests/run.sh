#!/usr/bin/env bash
# Run the tests: see --help.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    cat <<'EOF'
Usage: tests/run.sh [--fast | --long] [pytest option …]
Example: tests/run.sh
         tests/run.sh --fast
         tests/run.sh tests/losses -k gradcheck

Creates .venv if no environment is active, installs the project, and runs the linters, the unit tests, and the recipes end
to end with one or two epochs. --fast leaves out the linters, and all tests that train or take more than three seconds of
CPU time. --long also trains the embedded recipe in full. Optional public corpora are searched in
ESPNET_KD_TEST_CORPORA (default: ../shared); the end of the output lists the tests that are skipped without them.
EOF
    exit 0
fi

EXTRAS='mini test'
# shellcheck source=egs2/TEMPLATE/setup_env.sh
. "${ROOT}/egs2/TEMPLATE/setup_env.sh"
cd "${ROOT}"

long=0
if [ "${1:-}" = --long ]; then
    long=1
    shift
elif [ "${1:-}" = --fast ]; then
    exec python -m pytest -n 2 --dist loadfile -m "not trains" "${@:2}"
fi
if [ $# -gt 0 ]; then
    ESPNET_KD_TEST_LONG=${long} exec python -m pytest "$@"
fi

ruff check .
mypy
git ls-files '*.sh' .ci/run | xargs shellcheck --external-sources
[ "${long}" = 1 ] || echo "left out: the embedded recipe in full length, some minutes (tests/run.sh --long)" >&2
# -rs: print the reason of every skip. Two workers, because a recipe test mostly runs one process.
ESPNET_KD_TEST_LONG=${long} exec python -m pytest -n 2 --dist loadfile -rs --durations 10
