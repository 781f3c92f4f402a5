# The options of asr_kd.sh: reading, help and checks. Sourced by kd_functions.sh; uses the variables of asr_kd.sh.
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
   2 formatting, speed         6 plain student (no KD)    11 export
   3 token list                7 N-best or targets of     12 decoding
   4 statistics                  the teacher              13 scoring and results

If the training set has no text, the tokens are those of --teacher, stage 6 is skipped, and the method must be one that
needs no transcripts.

Batches: --batch_bins is the size of a batch over all GPUs of all machines together. The optimizer updates the parameters
once per --accum_grad batches. With N times as many GPUs, N times the --batch_bins needs the same memory on each GPU; if
you also divide --accum_grad by N, the updates stay the same. Both options apply to teacher and students.

Exit codes: 0 done; 1 a mistake or a failure, reported in one line; 2 wrong options; 130 stopped with Ctrl-C, 143 with
kill. After any interruption, the same command continues where it stopped.

Options, with the defaults of this recipe:
EOF
    options | sed -nE 's/^([a-z_]+)=[^#]*(# ?(.*))?$/\1 \3/p' | while read -r name comment; do
        value=${!name}
        [[ "${value}" != *" "* ]] || value="\"${value}\""
        printf '  %-33s  %s\n' "--${name} ${value}" "${comment}"
    done
}

# Print the lines of asr_kd.sh with the options and their defaults
options() { sed -n '/^# ---- options/,/^# ---- end/p' "${stages}"; }

# Options of local/data.sh that a recipe names in corpus_dirs (directories) and corpus_options, as given to run.sh
corpus=()
declare -A given=() # options of the command line, and their values
given_words=() # the same in their order

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
            given_words+=("$1" "$2")
            shift 2
            ;;
        *) refuse "unexpected argument $1; options are --name value" ;;
        esac
    done
}

# Print the options that the user gave, quoted for a shell; without stages, and without the options of the recipe's run.sh.
own_options() {
    local i run
    run=$(<"$(dirname "${stages}")/run.sh")
    for ((i = 0; i < ${#given_words[@]}; i += 2)); do
        case "${given_words[i]}" in --stage | --stop_stage) continue ;; esac
        [[ "${run}" == *" ${given_words[i]} ${given_words[i + 1]} "* ]] ||
            [[ "${run}" == *" ${given_words[i]} \"${given_words[i + 1]}\" "* ]] ||
            printf ' %q %q' "${given_words[@]:i:2}"
    done
}

# chosen NAME: whether the user gave this option; an option in the recipe's run.sh does not count
chosen() { [[ "$(own_options) " == *" --$1 "* ]]; }

# Refuse values with which no stage can work.
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
    for name in expdir dumpdir train_set valid_set method teacher_config student_config token_type feats_normalize \
        min_seconds max_seconds python; do
        [ -n "${!name//[[:space:]]/}" ] ||
            refuse "--${name} is empty (an unset variable?); give a value, or leave the option out"
    done
    for name in expdir dumpdir train_set valid_set tag teacher_config student_config; do
        [[ "${!name}" != *[[:space:]]* ]] || refuse "--${name} must be without blanks, not '${!name}'"
    done
    read -r -a list <<<"${test_sets}"
    for name in "train_set ${train_set}" "valid_set ${valid_set}" "tag ${tag}" "${list[@]/#/test_sets }"; do
        [[ "${name#* }" =~ ^([^./-][^/]*)?$ ]] ||
            refuse "--${name%% *} must be a name, not '${name#* }': without '/', and with no '.' or '-' in front"
    done
    [[ "${token_type}" =~ ^(char|word|bpe)$ ]] || refuse "--token_type must be char, word or bpe, not '${token_type}'"
    [[ "${student_tokens}" =~ ^(teacher|own)$ ]] ||
        refuse "--student_tokens must be teacher or own, not '${student_tokens}'"
    [[ "${feats_normalize}" =~ ^(global_mvn|utterance_mvn|none)$ ]] ||
        refuse "--feats_normalize must be global_mvn, utterance_mvn or none, not '${feats_normalize}'"
    [ -z "${nlsyms}" ] || [ -f "${nlsyms}" ] || refuse "--nlsyms: there is no file ${nlsyms}"
    [ -z "${nlsyms}" ] || [ -z "${teacher}" ] ||
        refuse "--nlsyms: the symbols that stay whole are those of the given --teacher; leave this option out"
    [ "${train_set}" != "${valid_set}" ] || refuse "--valid_set ${valid_set} is the --train_set; name another data dir"
    [[ " ${test_sets} " != *" ${train_set} "* ]] ||
        refuse "--train_set ${train_set} is one of --test_sets: formatting would leave out some of a test set; copy it"
}

# Print every option as NAME=VALUE, for scripts
show_options_and_exit() {
    local name
    for name in $(options | sed -nE 's/^([a-z_]+)=.*/\1/p'); do echo "${name}=${!name}"; done
    exit 0
}
