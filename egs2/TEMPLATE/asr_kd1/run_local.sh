#!/usr/bin/env bash
# Run jobs on this machine, with the calling convention of Kaldi's run.pl:
#   run_local.sh [--option value …] [JOB=1:N] LOG COMMAND …
# The letters JOB in the log's name and in the command are replaced by the job's number. Options for clusters such as
# --gpu and --mem are ignored. The epochs and errors of a single job are shown while it runs, and its log is appended to, so
# that a resumed run keeps the log of the earlier one.
set -euo pipefail

while [[ "${1:-}" == --* ]]; do
    shift 2
done
first=1 last=1 name="" # no number to fill in unless one was asked for
if [[ "${1:-}" =~ ^JOB=([0-9]+)(:([0-9]+))?$ ]]; then
    first=${BASH_REMATCH[1]}
    last=${BASH_REMATCH[3]:-${first}}
    name=JOB
    shift
fi
if [ $# -lt 2 ]; then
    echo "usage: $0 [--option value …] [JOB=1:N] LOG COMMAND …" >&2
    exit 2
fi
log=$1
shift

# Print the epochs of a training log, without prefixes and times.
progress() {
    sed -u -nE '/epoch started|epoch results|KD stage|going back|writing .* again|^error:/{
        s/^.* (INFO|WARNING): //
        s/[a-z0-9_]*(time|lr0|count|loss_scale|clip|grad_norm)=[^,]*(, |$)//g
        s/[a-z_]*=nan(, |$)//g
        p
    }' >&2
}

pids=() reader="" before=0 # bytes of the log of a single job that an earlier run wrote
# A job that has ended already cannot be killed; this is not an error.
trap 'trap "" INT TERM; kill "${pids[@]}" 2>/dev/null || true; wait; exit 143' INT TERM
for ((job = first; job <= last; job++)); do
    job_log=${log} command=("$@")
    if [ -n "${name}" ]; then
        job_log=${log//JOB/${job}} command=("${@//JOB/${job}}")
    fi
    mkdir -p "$(dirname "${job_log}")"
    if [ "${first}" = "${last}" ]; then
        [ ! -e "${job_log}" ] || before=$(wc -c <"${job_log}")
        exec {shown}> >(tee -a "${job_log}" | progress)
        reader=$!
        "${command[@]}" >&"${shown}" 2>&1 {shown}>&- & # not in a pipe: the signal above has to reach it
        exec {shown}>&-
    else
        "${command[@]}" >"${job_log}" 2>&1 &
    fi
    pids+=($!)
done
failed=0 errors=$'\n' # those that have been shown
for i in "${!pids[@]}"; do
    rc=0
    wait "${pids[i]}" || rc=$?
    [ -z "${reader}" ] || wait "${reader}" 2>/dev/null || true # until all is shown; only the exit code of the job counts
    if [ "${rc}" != 0 ]; then
        failed=1
        job_log=${log//${name:-JOB}/$((first + i))}
        [ -n "${name}" ] || job_log=${log}
        own=$(tail -c "+$((before + 1))" "${job_log}")
        error=$(grep '^error:' <<<"${own}" || true) # grep fails if the log has no such line
        if [ -z "${error}" ]; then
            echo "error: job $((first + i)) failed with exit code ${rc}; the end of ${job_log}:" >&2
            tail -n 5 <<<"${own}" >&2
        elif [ -n "${reader}" ] || [[ "${errors}" == *$'\n'"${error}"$'\n'* ]]; then # shown, or another job's as well
            echo "the whole log is ${job_log}" >&2
        else
            errors+=${error}$'\n'
            printf '%s\nthe whole log is %s\n' "${error}" "${job_log}" >&2
        fi
    fi
done
exit "${failed}"
