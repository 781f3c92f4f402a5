# Make the project's environment, or use the active one. Sourced by run_all.sh and tests/run.sh, which set ROOT (the
# project's directory) and EXTRAS (of setup.py, in quotes), and may define a function before_installing. Sets ACTIVATE.
# shellcheck shell=bash disable=SC2034

# Print the newest Python on the path that the project supports.
find_python() {
    local name
    for name in python3.12 python3.11 python3.10 python3 python; do
        if command -v "${name}" >/dev/null &&
            "${name}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "${name}"
            return
        fi
    done
    echo "error: no Python 3.10, 3.11 or 3.12 on the path; install one (for instance python3.11 with its venv module)" >&2
    return 1
}

# Conda's base environment is active in every shell of many machines, and other work depends on it. Therefore 5 GB are not
# installed there without a request.
_active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" = base ] &&
    [ -z "${ESPNET_KD_INTO_BASE:-}${ESPNET_KD_INSTALLED:-}" ]; then
    echo "conda's base environment is left as it is; ESPNET_KD_INTO_BASE=1 installs into it" >&2
    _active=
fi
if [ -n "${_active}" ]; then
    echo "using the active environment ${_active}" >&2
else
    if [ ! -f "${ROOT:?}/.venv/bin/activate" ]; then # written last
        python=$(find_python)
        echo "making ${ROOT}/.venv with $("${python}" --version)" >&2
        "${python}" -m venv "${ROOT}/.venv"
    fi
    # shellcheck disable=SC1091
    . "${ROOT}/.venv/bin/activate"
fi

# The command that a new shell must run before the commands of the README.
ACTIVATE=". ${VIRTUAL_ENV:-}/bin/activate"
[ -n "${VIRTUAL_ENV:-}" ] || ACTIVATE="conda activate ${CONDA_PREFIX}"

# Whether this setup.py and these extras are installed already. ESPNET_KD_INSTALLED=1 skips this check, for an environment
# that was made in another way, for instance on cluster nodes without network.
_stamp="$(python -c 'import sys; print(sys.prefix)')/.espnet_kd.$(cksum <<<"${ROOT} $(cat "${ROOT}/setup.py")" | cut -d ' ' -f 1)"
_missing=
for _extra in ${EXTRAS:?}; do
    [ -n "${ESPNET_KD_INSTALLED:-}" ] || [ -f "${_stamp}.${_extra}" ] || _missing=1
done
if [ -n "${_missing}" ]; then
    if declare -F before_installing >/dev/null; then before_installing; fi
    _log="$(python -c 'import sys; print(sys.prefix)')/espnet_kd_install.log"
    echo "installing espnet_kd[${EXTRAS// /,}] and what it needs, about 5 GB and a few minutes the first time; log: ${_log}" >&2
    if ! python -m pip install --disable-pip-version-check -q -e "${ROOT}[${EXTRAS// /,}]" >"${_log}" 2>&1; then
        tail -n 5 "${_log}" >&2
        echo "error: pip cannot install espnet_kd; its messages are in ${_log}" >&2
        return 1
    fi
    echo "installed" >&2
    for _extra in ${EXTRAS}; do
        touch "${_stamp}.${_extra}"
    done
fi
unset _active _stamp _missing _extra _log
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
