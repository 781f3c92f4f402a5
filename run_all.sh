#!/usr/bin/env bash
# The main job, from nothing to a results table; with --methods many methods and one table. See --help.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

usage() {
    cat <<'EOF_USAGE'
Usage: ./run_all.sh [--recipe NAME] [option of run.sh …]
       ./run_all.sh --methods all|"NAME …" [--seeds "N …"] [--jobs N] [--recipe NAME] [option of run.sh …]
Example: ./run_all.sh
         ./run_all.sh --seed 1 --expdir exp_seed1
         ./run_all.sh --methods "kl self_kd progressive_fkl" --seeds "0 1"
         ./run_all.sh --methods all --recipe an4 --an4 /corpora/an4 --ngpu 1

On a fresh machine it makes .venv, installs, and runs a recipe. The default is the embedded one (egs2/mini/asr_kd1):
speech synthesised on the spot, no download of data, no GPU.

Without --methods: a teacher, a plain student, the same student distilled by progressive factorized KD in three KD
stages, decoding and a table with pictures in egs2/mini/asr_kd1/exp.

With --methods: data and teacher once, then for each seed the plain student and a student of each method, all from the
same teacher, with the same seed and epochs; at the end decoding and one table that compares them (exp/RESULTS.md).
  --methods  pages of conf/methods by name, paths of pages, or all: every page that the recipe can run
  --seeds    default 0
  --jobs     runs side by side; default 2 where there are two CPU cores and --ngpu is 0, else 1
  --recipe   a directory of egs2, default mini
A method whose student has to be another one has conf/train_student_METHOD.yaml in the recipe, and a plain student of
that file to be compared with. A failed run is named at the end; the others go on. Logs: exp/run_all.

Exit codes: 0 done; 1 a mistake or a failure, said in one line; 2 wrong options; 130 stopped with Ctrl-C, 143 with kill.
Run it again and it continues where it stopped, or shows the table. Further options go to every stage of the recipe's
run.sh, whose --help lists them.
EOF_USAGE
}

fail() {
    echo "error: $*" >&2
    exit 2
}

methods='' seeds='' jobs='' recipe=mini
options=() # of run.sh
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --methods | --seeds | --jobs | --recipe)
        [ -n "${2:-}" ] || fail "option $1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
    *)
        options+=("$1")
        shift
        if [ $# -gt 0 ]; then # its value; what is no option, run.sh refuses
            options+=("$1")
            shift
        fi
        ;;
    esac
done
[ -x "${ROOT}/egs2/${recipe}/asr_kd1/run.sh" ] || fail "no recipe egs2/${recipe}/asr_kd1"
[ -n "${methods}" ] || [ -z "${seeds}${jobs}" ] || fail "--seeds and --jobs go with --methods"
for ((i = 0; i < ${#options[@]}; i += 2)); do
    case "${options[i]}" in
    --stage | --stop_stage | --show_options | --experiments) fail "${options[i]} is for run.sh of a recipe" ;;
    esac
done
recipe=${ROOT}/egs2/${recipe}/asr_kd1
run=${recipe}/run.sh

# value NAME: what run.sh takes for an option
settings=$("${run}" --show_options true "${options[@]}") || exit
value() { sed -n "s/^$1=//p" <<<"${settings}"; }

# Two trainings side by side need two cores; a GPU is for one.
at_once=$([ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && [ "$(value ngpu)" = 0 ] && echo 2 || echo 1)
if [ -n "${methods}" ]; then
    [ "$(value dry_run)" != true ] || fail "--dry_run is for one method: give it without --methods, or to run.sh"
    seeds=${seeds:-0}
    seen=' '
    for seed in ${seeds}; do
        [[ "${seed}" =~ ^(0|[1-9][0-9]*)$ ]] || fail "--seeds must be whole numbers, not '${seeds}'"
        [[ "${seen}" != *" ${seed} "* ]] || fail "--seeds names ${seed} twice"
        seen+="${seed} "
    done
    for ((i = 0; i < ${#options[@]}; i += 2)); do
        case "${options[i]}" in
        --method | --kd_stages | --seed | --tag | --untranscribed)
            fail "${options[i]} cannot be given with --methods: its runs differ in nothing but method and seed"
            ;;
        esac
    done
    jobs=${jobs:-${at_once}}
    [[ "${jobs}" =~ ^[1-9][0-9]*$ ]] || fail "--jobs must be a number above 0, not '${jobs}'"
fi

EXTRAS='mini'
# shellcheck source=egs2/TEMPLATE/setup_env.sh
. "${ROOT}/egs2/TEMPLATE/setup_env.sh"
if [ -z "${methods}" ] && [[ " ${options[*]} " == *" --method "* ]]; then # a mistake in it is told before any work
    (cd "${recipe}" && python -m espnet_kd.bin.asr_kd_page "$(value method)" >/dev/null)
fi

# Runs in the background, each in a process group of its own, so that all of it ends when this script does.
pids=() names=() starts=()
end_runs() {
    local pid
    for pid in "${pids[@]}"; do
        kill -- "-${pid}" 2>/dev/null || true
    done
    wait
}
trap end_runs EXIT
trap 'echo "error: stopped; the same command continues where it stopped" >&2; exit 130' INT
trap 'exit 143' TERM
# start COMMAND …: in the background
start() {
    set -m
    "$@" &
    set +m
    pids+=($!)
}

if [ -z "${methods}" ]; then
    # Teacher and plain student need nothing of each other.
    for stages in "1 4" "5 5" "6 6" "7 13"; do
        start "${run}" --stage "${stages% *}" --stop_stage "${stages#* }" "${options[@]}"
        [ "${stages} ${at_once}" != "5 5 2" ] || continue
        for pid in "${pids[@]}"; do wait "${pid}"; done
        pids=()
    done
    exit
fi

# ---- many methods ----
log() { echo "$(date '+%H:%M:%S') $*" >&2; }

# A student that the method's export makes as small as the plain one is compared with that one.
shrinks='self_kd'
pages=$(python -c 'import os, espnet_kd; print(os.path.join(os.path.dirname(espnet_kd.__file__), "conf/methods"))')
if [ "${methods}" = all ]; then
    methods=
    for page in "${pages}"/*.yaml; do
        method=$(basename "${page}" .yaml)
        # Elsewhere it has a student of its own, so that this recipe's plain one won't do.
        if compgen -G "${ROOT}/egs2/*/asr_kd1/conf/train_student_${method}.yaml" >/dev/null &&
            [ ! -e "${recipe}/conf/train_student_${method}.yaml" ]; then
            log "${method} is left out: the recipe has no conf/train_student_${method}.yaml"
        else
            methods+=" ${method}"
        fi
    done
fi
list=()
seen=' '
for method in ${methods}; do
    case "${method}" in
    *.yaml | *.yml) method=$(realpath "${method}") ;; # run.sh works in the recipe's directory
    esac
    list+=("${method}")
    name=$(basename "${method}" .yaml)
    [[ "${seen}" != *" ${name} "* ]] || fail "--methods names ${name} twice: its students would be in one directory"
    seen+="${name} "
done
# "METHOD teacher=… stages=… labels=… nbest=…" a line; all pages in one process, which takes seconds to start.
facts=$(python - "${list[@]}" <<'EOF_PAGES'
import sys
from espnet_kd import cli
from espnet_kd.bin import asr_kd_page

def main(_):
    for method in sys.argv[1:]:
        print("method=" + method)
        asr_kd_page.main([method])

cli.run(main)
EOF_PAGES
)
# fact METHOD NAME
fact() { sed -n "\|^method=$1\$|,/^method=/s/^$2=//p" <<<"${facts}"; }

start "${run}" "${options[@]}" --stage 1 --stop_stage 4
wait "${pids[0]}"
pids=()

cd "${recipe}"
expdir=$(value expdir)
raw=$(value dumpdir)/raw
train_set=$(value train_set)
logs=${expdir}/run_all
mkdir -p "${logs}"
failed=() finished=0

# All that is to be run, as "NAME|options": what needs no teacher beside its training, what students share of it, the
# students.
first=("teacher|--stage 5 --stop_stage 5") lists=() second=()
experiments=() # that there will be to decode, as "NAME|EXP"
without_text=${train_set}_without_text
# Distilled without labels: to show that none is used, the training data have none. Everything but text is copied, files
# only: the audio stays where wav.scp says.
make_without_text() {
    local file
    mkdir -p "${raw}/${without_text}"
    for file in "${raw}/${train_set}"/*; do
        if [ -f "${file}" ] && [ "$(basename "${file}")" != text ]; then
            cp -p "${file}" "${raw}/${without_text}/"
        fi
    done
}
tag_of() { [ "$1" = 0 ] || echo "seed$1"; }
for seed in ${seeds}; do
    tag=$(tag_of "${seed}")
    first+=("plain, seed ${seed}|--stage 6 --stop_stage 6 --seed ${seed}")
    experiments+=("plain, seed ${seed}|${expdir}/student_plain${tag:+_${tag}}")
done
for method in "${list[@]}"; do
    name=$(basename "${method}" .yaml)
    own=''
    [ ! -e "conf/train_student_${name}.yaml" ] || own="--student_config conf/train_student_${name}.yaml"
    data=''
    if [ "$(fact "${method}" labels)" = 0 ]; then
        if [[ "${first[*]}" != *"${without_text}"* ]]; then # once for all such methods
            make_without_text
            first+=("statistics without text|--stage 4 --stop_stage 4 --train_set ${without_text}")
        fi
        data="--train_set ${without_text}"
    fi
    for seed in ${seeds}; do
        tag=$(tag_of "${seed}")
        if [ -n "${own}" ] && [[ " ${shrinks} " != *" ${name} "* ]]; then
            first+=("plain like ${name}, seed ${seed}|--stage 6 --stop_stage 6 --seed ${seed} ${own} --tag ${name}${tag:+_${tag}}")
            experiments+=("plain like ${name}, seed ${seed}|${expdir}/student_plain_${name}${tag:+_${tag}}")
        fi
        entry="${name}, seed ${seed}|--stage 8 --stop_stage 11 --method ${method} --seed ${seed} ${own} ${data}"
        if [ "$(fact "${method}" teacher)" = none ] && [ "$(fact "${method}" nbest)" = 0 ]; then
            first+=("${entry}")
        else
            second+=("${entry}")
        fi
        experiments+=("${name}, seed ${seed}|${expdir}/student_${name}${tag:+_${tag}}/export")
    done
    if [ "$(fact "${method}" nbest)" != 0 ] || [ "$(value target_cache)$(fact "${method}" teacher)" = truerequired ]; then
        # Once, before the seeds that share it run side by side.
        lists+=("stage 7 for ${name}|--stage 7 --stop_stage 7 --method ${method} ${data}")
    fi
done
total=$((${#first[@]} + ${#lists[@]} + ${#second[@]}))

# collect LIMIT: wait until fewer than LIMIT runs are going on; say how each ended
collect() {
    local i rc
    while [ "${#pids[@]}" -ge "$1" ]; do
        for i in "${!pids[@]}"; do
            if kill -0 "${pids[i]}" 2>/dev/null; then
                continue
            fi
            rc=0
            wait "${pids[i]}" || rc=$?
            finished=$((finished + 1))
            local took=$((SECONDS - starts[i])) file="${logs}/${names[i]//[, ]/_}.log"
            if [ "${rc}" = 0 ]; then
                log "${finished} of ${total}: ${names[i]}, ${took} s"
            else
                failed+=("${names[i]}")
                log "${finished} of ${total}: ${names[i]} FAILED; the end of ${recipe}/${file}:"
                tail -n 5 "${file}" >&2
            fi
            unset "pids[i]" "names[i]" "starts[i]"
        done
        [ "${#pids[@]}" -lt "$1" ] || sleep 0.5
    done
}
# run_pool LIMIT ENTRY…: so many side by side
run_pool() {
    local limit=$1 entry name
    local -a arguments
    shift
    for entry in "$@"; do
        collect "${limit}"
        name=${entry%%|*}
        read -r -a arguments <<<"${entry#*|}"
        start "${run}" "${options[@]}" "${arguments[@]}" >"${logs}/${name//[, ]/_}.log" 2>&1 </dev/null
        names+=("${name}") starts+=("${SECONDS}")
    done
    collect 1
}
has_failed() { printf '%s\n' "${failed[@]}" | grep -qxF -- "$1"; }

log "${total} runs, ${jobs} side by side; logs in ${recipe}/${logs}"
run_pool "${jobs}" "${first[@]}"
if has_failed teacher; then
    log "no teacher: $((${#lists[@]} + ${#second[@]})) runs that need it are left out"
    failed+=("all methods that need the teacher")
    lists=() second=()
fi
run_pool 1 "${lists[@]}"
ready=()
for entry in "${second[@]}"; do
    if has_failed "stage 7 for ${entry%%, seed *}"; then
        failed+=("${entry%%|*}") # it would train from what an earlier run left
    else
        ready+=("${entry}")
    fi
done
run_pool "${jobs}" "${ready[@]}"

decoded=()
for entry in "${experiments[@]}"; do
    if ! has_failed "${entry%%|*}" && [ -e "${entry#*|}/config.yaml" ]; then
        decoded+=("${entry#*|}")
    fi
done
if [ "${#decoded[@]}" -gt 0 ]; then
    log "decoding, scoring and results"
    start "${run}" "${options[@]}" --stage 12 --experiments "${decoded[*]}"
    wait "${pids[@]}" || failed+=("decoding, scoring and results")
    pids=()
fi
if [ "${#failed[@]}" -gt 0 ]; then
    echo "error: failed: $(printf '%s; ' "${failed[@]}")logs in ${recipe}/${logs}" >&2
    exit 1
fi
