# Environment of a recipe: sourced by run.sh, asr_kd.sh and local/data.sh. Edit it for your machines.
# shellcheck shell=bash
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd -P)

# The environment that run_all.sh made, unless another one than conda's base is active.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "${_root}/.venv/bin/activate" ] &&
    { [ -z "${CONDA_PREFIX:-}" ] || [ "${CONDA_DEFAULT_ENV:-}" = base ]; }; then
    # shellcheck disable=SC1091
    . "${_root}/.venv/bin/activate"
fi
export PYTHONPATH="${_root}${PYTHONPATH:+:${PYTHONPATH}}"
export PYTHONIOENCODING=UTF-8
export LC_ALL=C
# More OpenMP threads than free cores make training many times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset _root
