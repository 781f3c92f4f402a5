#!/usr/bin/env bash
# Run a recipe from installation to a results table; with --methods, compare many methods in one table. See --help.
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

On a fresh machine this script creates .venv, installs the project, and runs a recipe. The default recipe is the embedded
one (egs2/mini/asr_kd1): it synthesises its speech, downloads no data and needs no GPU.

Without --methods it trains a teacher, a plain student, and the same student distilled by progressive factorized KD in
three KD stages. It decodes them and writes a verdict and a report with tables and pictures to egs2/mini/asr_kd1/exp.

With --methods it prepares data and teacher once. Then it trains for each seed the plain student and one student for each
method, all with the same teacher, seed and epochs. At the end it decodes all students, and writes a verdict for each and
one report that compares them.
  --methods  names of pages in conf/methods, paths of pages, or all: every page that the recipe can run
  --seeds    default: 0
  --jobs     number of runs at the same time; default: 2 if there are two CPU cores and --ngpu is 0, else 1. Small
             models can share a GPU (--ngpu 1 --jobs 3); the gain is not measured
  --recipe   a directory of egs2; default: mini
If a method needs another student, the recipe has conf/train_student_METHOD.yaml for it, and the student is compared with
a plain student of that file. If a run fails, the other runs continue, and an error at the end names the failed one.

The console shows one line for each finished step, one line of progress, and the verdict. All other output is in
exp/run_all/*.log.

Exit codes: 0 done; 1 a mistake or a failure, reported in one line; 2 wrong options; 130 stopped with Ctrl-C, 143 with
kill. If you run the same command again, it continues where it stopped, or shows the verdict. Further options are passed
to every stage of the recipe's run.sh, whose --help lists them.
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
    (cd "${recipe}" && python -m espnet_kd.bin.asr_kd_page "$(value method)" --import_objectives >/dev/null)
fi
# Before data are prepared for hours. A cluster has GPUs that this machine need not have.
if [ "$(value ngpu)" != 0 ] && [ "$(value dry_run)" != true ] && grep -qs '^[^#]*cuda_cmd=.*run_local' "${recipe}/cmd.sh"; then
    python -c "from espnet_kd import cli; cli.run(lambda _: cli.check_gpus($(value ngpu)))"
fi

logs=$(cd "${recipe}" && realpath -m -- "$(value expdir)/run_all")
# shellcheck source=egs2/TEMPLATE/queue.sh
. "${ROOT}/egs2/TEMPLATE/queue.sh"
trap end_runs EXIT
trap 'echo "error: stopped; the same command continues where it stopped" >&2; exit 130' INT
trap 'exit 143' TERM

# show_verdict: the last words of the report, and how to go on
show_verdict() {
    [ ! -e "${logs%/*}/report/verdict.txt" ] || cat <(echo) "${logs%/*}/report/verdict.txt"
    printf '\nThe commands of README.md run in a shell after:  %s\n' "${ACTIVATE}"
}
# epochs_in CONFIG OPTIONS: those that a training has, 0 if that is not known
epochs_in() {
    local number=''
    [ ! -f "${recipe}/$1" ] || number=$(sed -n 's/^max_epoch: *\([0-9][0-9]*\) *$/\1/p' "${recipe}/$1")
    [[ ! " $2" =~ .*\ --max_epoch[\ =]+([0-9]+) ]] || number=${BASH_REMATCH[1]}
    echo "${number:-0}"
}
teacher_epochs=$([ -n "$(value teacher)" ] || epochs_in "$(value teacher_config)" "$(value teacher_args)")
student_epochs=$(epochs_in "$(value student_config)" "$(value train_args)")
exp=${logs%/*}

if [ -z "${methods}" ]; then
    if [ "$(value dry_run)" = true ]; then
        for stages in "1 4" "5 5" "6 6" "7 13"; do
            "${run}" --stage "${stages% *}" --stop_stage "${stages#* }" "${options[@]}"
        done
        exit
    fi
    mkdir -p "${logs}"
    method=$(basename "$(value method)" .yaml) tag=$(value tag) kd_stages=$(value kd_stages) more=$(value untranscribed)
    tag=${tag:-$([ "$(value seed)" = 0 ] || echo "seed$(value seed)")}
    student=${exp}/student_${method}${kd_stages:+_${kd_stages// /}}${more:+_untranscribed}${tag:+_${tag}}
    # Teacher and plain student need nothing of each other.
    enqueue data '' '' 0 --stage 1 --stop_stage 4
    enqueue teacher data "${exp}/teacher" "${teacher_epochs}" --stage 5 --stop_stage 5
    enqueue "plain student" data "${exp}/student_plain${tag:+_${tag}}" "${student_epochs}" --stage 6 --stop_stage 6
    enqueue "${method} student, decoding, results" $'teacher\nplain student' "${student}" "${student_epochs}" \
        --stage 7 --stop_stage 13
    log "${#queue[@]} steps in ${recipe}; logs in ${logs}"
    stop_at_failure=true
    run_queue "${at_once}"
    show_verdict
    exit
fi

# ---- many methods ----
# A student that the method's export makes smaller is compared with the plain student of another method's configuration.
declare -A exported_like=([self_kd]=layer_pruning)
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
        asr_kd_page.main([method, "--import_objectives"])

cli.run(main)
EOF_PAGES
)
# fact METHOD NAME
fact() { sed -n "\|^method=$1\$|,/^method=/s/^$2=//p" <<<"${facts}"; }

mkdir -p "${logs}"
log "methods: ${list[*]##*/}; seeds: ${seeds}; logs in ${logs}"
step data --stage 1 --stop_stage 4
cd "${recipe}"
expdir=$(value expdir)
raw=$(value dumpdir)/raw
train_set=$(value train_set)

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

# First the teacher and what students share; then by seed, so that a distilled student starts as soon as its teacher is
# there. Until then plain students do.
enqueue teacher '' "${exp}/teacher" "${teacher_epochs}" --stage 5 --stop_stage 5
declare -A data_of=() needs_of=() own_of=()
last_list=
for method in "${list[@]}"; do
    name=$(basename "${method}" .yaml)
    own_of["${name}"]=$([ ! -e "conf/train_student_${name}.yaml" ] || echo "conf/train_student_${name}.yaml")
    data=()
    if [ "$(fact "${method}" labels)" = 0 ]; then
        if [ -z "${state["statistics without text"]:-}" ]; then # once for all such methods
            make_without_text
            enqueue "statistics without text" '' '' 0 --stage 4 --stop_stage 4 --train_set "${without_text}"
        fi
        data=(--train_set "${without_text}")
        data_of["${name}"]="${data[*]}" needs_of["${name}"]+=$'statistics without text\n'
    fi
    if [ "$(fact "${method}" teacher)" != none ] || [ "$(fact "${method}" nbest)" != 0 ]; then
        needs_of["${name}"]+=$'teacher\n'
    fi
    if [ "$(fact "${method}" nbest)" != 0 ] || [ "$(value target_cache)$(fact "${method}" teacher)" = truerequired ]; then
        # Once, before the seeds that share it run side by side; two methods may share an N-best, so one after the other.
        enqueue "stage 7 for ${name}" "${needs_of["${name}"]}${last_list:+${last_list}?}" '' 0 \
            --stage 7 --stop_stage 7 --method "${method}" "${data[@]}"
        last_list="stage 7 for ${name}"
        needs_of["${name}"]+="${last_list}"
    fi
done
for seed in ${seeds}; do
    tag=$(tag_of "${seed}")
    enqueue "plain, seed ${seed}" '' "${exp}/student_plain${tag:+_${tag}}" "${student_epochs}" \
        --stage 6 --stop_stage 6 --seed "${seed}"
    experiments+=("plain, seed ${seed}|${expdir}/student_plain${tag:+_${tag}}")
    for method in "${list[@]}"; do
        name=$(basename "${method}" .yaml)
        read -r -a data <<<"${data_of["${name}"]:-}"
        own=() number=${student_epochs}
        if [ -n "${own_of["${name}"]}" ]; then
            own=(--student_config "${own_of["${name}"]}") number=$(epochs_in "${own_of["${name}"]}" "$(value train_args)")
        fi
        like=${exported_like["${name}"]:-${name}} like_config=
        [ ! -e "conf/train_student_${like}.yaml" ] || like_config=conf/train_student_${like}.yaml
        if [ -n "${like_config}" ] && [ -z "${state["plain like ${like}, seed ${seed}"]:-}" ]; then
            like_tag=${like}${tag:+_${tag}}
            enqueue "plain like ${like}, seed ${seed}" '' "${exp}/student_plain_${like_tag}" \
                "$(epochs_in "${like_config}" "$(value train_args)")" \
                --stage 6 --stop_stage 6 --seed "${seed}" --student_config "${like_config}" --tag "${like_tag}"
            experiments+=("plain like ${like}, seed ${seed}|${expdir}/student_plain_${like_tag}")
        fi
        enqueue "${name}, seed ${seed}" "${needs_of["${name}"]:-}" "${exp}/student_${name}${tag:+_${tag}}" "${number}" \
            --stage 8 --stop_stage 11 --method "${method}" --seed "${seed}" "${own[@]}" "${data[@]}"
        experiments+=("${name}, seed ${seed}|${expdir}/student_${name}${tag:+_${tag}}/export")
    done
done

log "${#queue[@]} runs, ${jobs} side by side"
run_queue "${jobs}"
failed=()
for name in "${queue[@]}"; do
    if [ "${state["${name}"]}" = failed ]; then
        failed+=("${name}")
    elif [ "${state["${name}"]}" = lost ] && [ "${state[teacher]}" != failed ]; then
        failed+=("${name}") # it would train from what an earlier run left
    fi
done
[ "${state[teacher]}" != failed ] || failed+=("all methods that need the teacher")

decoded=()
for entry in "${experiments[@]}"; do
    if [ "${state["${entry%%|*}"]}" = 'done' ] && [ -e "${entry#*|}/config.yaml" ]; then
        decoded+=("${entry#*|}")
    fi
done
if [ "${#decoded[@]}" -gt 0 ]; then
    step "decoding, scoring and results" --stage 12 --experiments "${decoded[*]}" ||
        failed+=("decoding, scoring and results")
fi
if [ "${#failed[@]}" -gt 0 ]; then
    echo "error: failed: $(printf '%s; ' "${failed[@]}")logs in ${logs}" >&2
    exit 1
fi
show_verdict
