# What the stages of asr_kd.sh are made of; sourced by it, and of no use alone. Its options and variables are seen here.
# shellcheck shell=bash disable=SC2154,SC2034

usage() {
    local name value comment
    # shellcheck disable=SC1091
    [ ! -e "$(dirname "${stages}")/local/options.sh" ] || . "$(dirname "${stages}")/local/options.sh"
    cat <<EOF
Usage: ./run.sh [--stage N] [--stop_stage N] [--option value …]
Example: ./run.sh --stage 8 --method progressive_fkl --teacher exp/teacher --ngpu 1
         ./run.sh --ngpu 4 --num_nodes 2 --dry_run

$(sed -n '2,/^[^#]/s/^# //p' "$(dirname "${stages}")/run.sh")

Stages, the same in every recipe:
   1 data preparation          5 teacher training         8-10 KD stages 1-3
   2 formatting, speed         6 student without KD       11 export
   3 token list                7 N-best or targets of     12 decoding
   4 statistics                  the teacher              13 scoring and results

Where the training set has no text: the tokens are those of --teacher, stage 6 is skipped, and the method has to be one
without labels.

Batches: --batch_bins is what all GPUs of all machines take together in a step, and the optimizer moves after
--accum_grad such steps. On N times the GPUs, N times the --batch_bins fills the same memory of each; with an N-th of the
--accum_grad beside it the optimizer does the same as before. Teacher and students get the same.

Exit codes: 0 done; 1 a mistake or a failure, said in one line; 2 wrong options; 130 stopped with Ctrl-C, 143 with kill.
Whatever stopped it, the same command continues where it stopped.

Options (and this recipe's defaults):
EOF
    options | sed -nE 's/^([a-z_]+)=[^#]*(# ?(.*))?$/\1 \3/p' | while read -r name comment; do
        value=${!name}
        [[ "${value}" != *" "* ]] || value="\"${value}\""
        printf '  %-33s  %s\n' "--${name} ${value}" "${comment}"
    done
}

# The lines of asr_kd.sh that name options and defaults
options() { sed -n '/^# ---- options/,/^# ---- end/p' "${stages}"; }

# Options of local/data.sh that a recipe names in corpus_dirs (directories) and corpus_options, as given to run.sh
corpus=()
declare -A given=() # options of the command line, and their values

# Set the options from the command line; wrong ones end in exit code 2.
parse_options() {
    local name
    while [ $# -gt 0 ]; do
        case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --*)
            name=${1#--}
            [[ "${name}" =~ ^[a-z0-9_]+$ ]] || refuse "unknown option $1; ./run.sh --help lists them"
            if [[ "${name}" =~ ^(dry_run|show_options)$ ]] && [[ "${2:---}" == --* ]]; then
                set -- "$1" true "${@:2}" # these may stand alone
            fi
            if [[ " ${corpus_dirs:-} " == *" ${name} "* ]]; then
                [[ "${2:---}" != --* ]] || refuse "option $1 needs a value, a directory"
                set -- "$1" "$(realpath -m -- "$2")" "${@:3}"
            fi
            [ $# -ge 2 ] || refuse "option $1 needs a value"
            set -- "$1" "${2//$'\n'/ }" "${@:3}" # a value may go over several lines
            if [[ " ${corpus_dirs:-} ${corpus_options:-} " == *" ${name} "* ]]; then
                corpus+=("$1" "$2")
            elif grep -qE "^${name}=" <(options); then
                printf -v "${name}" '%s' "$2"
            else
                refuse "unknown option $1; ./run.sh --help lists them"
            fi
            given[${name}]=$2
            shift 2
            ;;
        *) refuse "unexpected argument $1; options are --name value" ;;
        esac
    done
}

# Refuse values that no stage could work with.
check_options() {
    local name
    for name in stage stop_stage ngpu seed; do
        [[ "${!name}" =~ ^(0|[1-9][0-9]*)$ ]] || refuse "--${name} must be a whole number, not '${!name}'"
    done
    for name in num_nodes nj nbpe fs batch_bins accum_grad; do
        case "${name}" in batch_bins | accum_grad) [ -n "${!name}" ] || continue ;; esac
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || refuse "--${name} must be a whole number above 0, not '${!name}'"
    done
    [ "${stage}" -le "${stop_stage}" ] || refuse "--stage ${stage} lies after --stop_stage ${stop_stage}: nothing to run"
    for name in dry_run show_options use_amp target_cache; do
        [[ "${!name}" =~ ^(true|false)$ ]] || [ "${name}${!name}" = use_amp ] ||
            refuse "--${name} must be true or false, not '${!name}'"
    done
    for name in expdir dumpdir train_set valid_set tag; do
        [[ "${!name}" != *[[:space:]]* ]] || refuse "--${name} must be without blanks, not '${!name}'"
    done
    for name in train_set valid_set; do
        [[ " ${test_sets} " != *" ${!name} "* ]] ||
            refuse "--${name} ${!name} is one of --test_sets: formatting would leave out some of a test set; copy it"
    done
}

# Every option as NAME=VALUE, for scripts
show_options_and_exit() {
    local name
    for name in $(options | sed -nE 's/^([a-z_]+)=.*/\1/p'); do echo "${name}=${!name}"; done
    exit 0
}

log() { if dry; then echo "# $*"; else echo "$(date '+%H:%M:%S') $*" >&2; fi; }
refuse() {
    echo "error: $*" >&2
    exit 2
}
fail() {
    echo "error: $*" >&2
    exit 1
}
# has_packages: on a fresh machine, say so in a line, before Python does it in many
has_packages() {
    [ "${python}" != python3 ] ||
        python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("espnet2") is None)' ||
        fail "this python3 has no espnet2: run ./run_all.sh or tests/run.sh once, which install into .venv, or activate" \
            "an environment (path.sh)"
}
# check_inputs: what later stages would stumble over; a mistake in a name is told before any work
check_inputs() {
    local name
    for name in teacher_config student_config; do
        [ -f "${!name}" ] || fail "--${name}: there is no file ${!name}"
    done
    dry || for name in ${teacher}; do
        [ -e "${name}" ] || fail "--teacher: there is no experiment ${name}"
    done
    [ -z "${given[method]:-}" ] || page_of "${method}"
}
running() { [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ]; }
dry() { [ "${dry_run}" = true ]; }
# run COMMAND …: the work of a stage; a dry run prints it as a shell would take it
run() {
    if dry; then
        printf '%q ' "$@"
        echo
    else
        "$@" & # so that a signal is acted upon at once
        wait $!
    fi
}
# stopped CODE: by a signal; no process is left behind
stopped() {
    local pid
    trap '' INT TERM
    for pid in $(jobs -p); do
        # shellcheck disable=SC2046
        kill $(with_descendants "${pid}") 2>/dev/null || true # some of them may have ended by now
    done
    wait
    echo "error: stopped; the same command continues where it stopped" >&2
    exit "$1"
}
with_descendants() {
    local child
    echo "$1"
    # shellcheck disable=SC2013
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do with_descendants "${child}"; done
}
# act COMMAND …: what stands around the work, such as making directories; nothing in a dry run
act() { dry || "$@"; }
# needs FILE STAGE: a stage whose input is missing says which stage makes it
needs() { dry || [ -e "$1" ] || fail "$1 is missing; stage $2 makes it: ./run.sh --stage $2"; }

# has_text SET: whether a formatted set has transcripts; a dry run expects them where nothing is formatted
has_text() { [ -s "${raw}/$1/text" ] || { dry && [ ! -e "${raw}/$1/wav.scp" ]; }; }
# needs_text WHO SET…: those of the sets that are formatted have transcripts
needs_text() {
    local dset
    for dset in "${@:2}"; do
        has_text "${dset}" || [ ! -e "${raw}/${dset}/wav.scp" ] ||
            fail "$1 needs transcripts, and ${raw}/${dset} has no text (a method such as label_free needs none)"
    done
}

stats_of() { echo "${expdir}/stats_$1_${tokens_name}"; }

# options_for SET LABELS: fill data_opts and train_opts, for training on SET; a text only where there is one, and that of
# SET only where LABELS is 1. Paths are relative to the recipe, as ESPnet writes them.
options_for() {
    local part dset stats shapes=()
    stats=$(stats_of "$1")
    data_opts=(--token_type "${token_type}" --token_list "${tokens}")
    [ "${token_type}" != bpe ] || data_opts+=(--bpemodel "${token_dir}/bpe.model")
    [ "${fs}" = 16000 ] || data_opts+=(--frontend_conf "fs=${fs}") # ESPnet's default is 16000
    for part in train valid; do
        dset=$([ "${part}" = train ] && echo "$1" || echo "${valid_set}")
        data_opts+=("--${part}_data_path_and_name_and_type" "${raw}/${dset}/wav.scp,speech,sound")
        shapes+=("--${part}_shape_file" "${stats}/${part}/speech_shape")
        if has_text "${dset}" && [ "${part}$2" != train0 ]; then
            data_opts+=("--${part}_data_path_and_name_and_type" "${raw}/${dset}/text,text,text")
            shapes+=("--${part}_shape_file" "${stats}/${part}/text_shape.${token_type}")
        fi
    done
    train_opts=("${data_opts[@]}" "${shapes[@]}" --ngpu "${ngpu}" --resume true --normalize "${feats_normalize}")
    if [ "${feats_normalize}" = global_mvn ]; then
        train_opts+=(--normalize_conf "stats_file=${stats}/train/feats_stats.npz")
    fi
}

# collect SET LABELS: statistics of a training set, and of the validation set
collect() {
    local stats count job jobs=${nj} dirs=()
    stats=$(stats_of "$1")
    if [ -z "$(find "${raw}/$1/wav.scp" "${raw}/${valid_set}/wav.scp" "${tokens}" -newer "${stats}/.done" 2>&1)" ]; then
        log "statistics are there, ${stats}"
        return
    fi
    if [ -e "${raw}/${valid_set}/wav.scp" ]; then
        # No more jobs than validation utterances: an empty job would fail.
        count=$(wc -l <"${raw}/${valid_set}/wav.scp")
        jobs=$((nj < count ? nj : count))
    fi
    act split_for_jobs "$1" "${stats}" "${jobs}"
    options_for "$1" "$2"
    # shellcheck disable=SC2086
    run ${train_cmd} JOB=1:"${jobs}" "${stats}/log/stats.JOB.log" \
        ${python} -m espnet_kd.bin.asr_kd_train --collect_stats true --config "${student_config}" "${data_opts[@]}" \
        --train_shape_file "${stats}/log/train.JOB.scp" --valid_shape_file "${stats}/log/valid.JOB.scp" \
        --output_dir "${stats}/log/stats.JOB" --ngpu 0
    for ((job = 1; job <= jobs; job++)); do
        dirs+=(--input_dir "${stats}/log/stats.${job}")
    done
    # shellcheck disable=SC2086
    run ${train_cmd} "${stats}/log/aggregate.log" \
        ${python} -m espnet2.bin.aggregate_stats_dirs "${dirs[@]}" --output_dir "${stats}"
    act finish_shapes "${stats}"
}

# split_for_jobs SET STATS JOBS: the utterances of each job
split_for_jobs() {
    local part dset
    mkdir -p "$2/log"
    rm -f "$2/.done" "$2/log/"*.scp "$2"/*/text_shape*
    for part in train valid; do
        dset=$([ "${part}" = train ] && echo "$1" || echo "${valid_set}")
        awk -v n="$3" -v out="$2/log/${part}." '{print > (out ((NR - 1) % n + 1) ".scp")}' "${raw}/${dset}/wav.scp"
    done
}

# finish_shapes STATS: put the vocabulary's size beside each text length, as ESPnet's batch samplers read it
finish_shapes() {
    local file
    for file in "$1"/*/text_shape; do
        [ ! -e "${file}" ] || sed -e "s/\$/,$(wc -l <"${tokens}")/" "${file}" >"${file}.${token_type}"
    done
    touch "$1/.done"
}

# shapes_of_untranscribed: ESPnet's statistics stop at an empty text, though its training does not: the text lengths of
# transcribed and untranscribed audio together are those of the transcribed part, and 0.
shapes_of_untranscribed() {
    awk -v none="0,$(wc -l <"${tokens}")" 'NR == FNR {n[$1] = $2; next} {print $1, ($1 in n) ? n[$1] : none}' \
        "$(stats_of "${train_set}")/train/text_shape.${token_type}" "$(stats_of "${kd_set}")/train/speech_shape" \
        >"$(stats_of "${kd_set}")/train/text_shape.${token_type}"
}

# train DIR CONFIG LOG OPTIONS…: one training run, on several GPUs or machines through ESPnet's launcher
train() {
    local dir=$1 config=$2 log=$1/$3 launch=()
    shift 3
    act mkdir -p "${dir}"
    if [ "${ngpu}" -gt 1 ] || [ "${num_nodes}" -gt 1 ]; then
        if [ "${num_nodes}" -gt 1 ] && [[ "${cuda_cmd}" == *run_local.sh* ]]; then
            dry || fail "--num_nodes ${num_nodes}: cuda_cmd in cmd.sh starts jobs on this machine; put slurm.pl there"
            log "cuda_cmd in cmd.sh starts jobs on this machine; a real run needs slurm.pl there"
        fi
        # shellcheck disable=SC2206
        launch=(${python} -m espnet2.bin.launch --cmd "${cuda_cmd} --name $(basename "${dir}")" --log "${log}"
            --ngpu "${ngpu}" --num_nodes "${num_nodes}" --init_file_prefix "${dir}/.dist_init_"
            --multiprocessing_distributed true --)
    else
        # shellcheck disable=SC2206
        launch=(${cuda_cmd} --gpu "${ngpu}" "${log}")
    fi
    # shellcheck disable=SC2086
    run "${launch[@]}" ${python} -m espnet_kd.bin.asr_kd_train --config "${config}" "${train_opts[@]}" \
        --output_dir "${dir}" "$@"
}

# describe DIR ROLE SEED: what the results table says of an experiment
describe() {
    mkdir -p "$1"
    printf '{"role": "%s", "method": null, "kd_stages": null, "seed": %s}\n' "$2" "$3" >"$1/experiment.json"
}

# train_once ROLE DIR CONFIG OPTIONS…: teacher or plain student, unless DIR has it; a DIR of other settings is refused
train_once() {
    local role=$1 dir=$2 config=$3
    shift 3
    needs_text "the ${role} model" "${train_set}" "${valid_set}"
    needs "$(stats_of "${train_set}")/.done" 4
    options_for "${train_set}" 1
    act check_settings "${dir}" "${config}" "$@"
    if [ -f "${dir}/.done" ]; then
        log "the ${role} is trained, ${dir}"
        return
    fi
    train "${dir}" "${config}" train.log --seed "${seed}" "$@"
    act describe "${dir}" "${role}" "${seed}"
    act touch "${dir}/.done"
}

# check_settings DIR CONFIG OPTIONS…: refuse a DIR that holds a model of other settings; note those of a new one
check_settings() {
    local dir=$1 settings other=''
    [ "${feats_normalize}" = global_mvn ] || other=" ${feats_normalize}"
    settings=$(cat "$2" "${tokens}" "${raw}/${train_set}/wav.scp" - <<<"${seed} ${*:3}${other}" | cksum)
    if [ -f "${dir}/checkpoint.pth" ] && [ "$(cat "${dir}/.settings")" != "${settings}" ]; then
        fail "${dir} holds a model of other options, configuration, tokens or data; choose another --expdir, or remove it"
    fi
    [ ! -f "${dir}/.done" ] || return 0
    mkdir -p "${dir}"
    echo "${settings}" >"${dir}/.settings"
}

# page_of METHOD: what its page says, once: page[teacher] (required, none), page[stages], page[nbest], page[labels] (1, 0)
declare -A page=()
page_of() {
    local name value lines
    [ ${#page[@]} -eq 0 ] || return 0
    # shellcheck disable=SC2086
    lines=$(${python} -m espnet_kd.bin.asr_kd_page "$1")
    while IFS='=' read -r name value; do page[${name}]=${value}; done <<<"${lines}"
    page[without_teacher]=$([ "${page[teacher]}${page[nbest]}" != none0 ] || echo 1)
}

# nbest_of_teacher: the file; pages may ask for N-best of different lengths
nbest_of_teacher() { echo "${expdir}/nbest${page[nbest]}_${teacher_name}_${kd_set}"; }

# cached: whether the KD stages train from targets on disk
cached() { [ "${target_cache}" = true ] && [ "${page[teacher]}" = required ]; }
needs_teacher() { [ -n "${teacher}${page[without_teacher]}" ] || needs "${own_teacher}/.done" 5; }

# name_of_teacher EXP: in the names of what is made of it; that of one from elsewhere says which of its name it is
name_of_teacher() {
    local dir
    dir=$(realpath -m -- "$1")
    if [ "$(dirname "${dir}")" = "$(realpath -m -- "${expdir}")" ]; then
        basename "${dir}"
    else
        echo "$(basename "${dir}")_$(cksum <<<"${dir}" | cut -d ' ' -f 1)"
    fi
}

# given_teacher I: set found to the given teacher number I, seen from where the recipe's results lie: they are not put
# into somebody else's directory
given_teacher() {
    local experiment=${teachers[$1]} file='' dir
    dir=${expdir}/teacher_given$([ "$1" = 0 ] || echo $(($1 + 1)))
    if [[ "${experiment}" == *.pth ]]; then
        file=/${experiment##*/} experiment=$(dirname "${experiment}")
    fi
    act describe "${dir}" teacher null
    found=${dir}/export${file}
    [[ "${experiment}" != *.zip ]] || found=${dir}/packed.zip
    act link "${experiment}" "${found%"${file}"}"
}
link() {
    [ -e "$1" ] || fail "--teacher: there is no experiment $1"
    ln -sfn "$(realpath "$1")" "$2"
}
