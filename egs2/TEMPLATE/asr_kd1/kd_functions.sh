# Functions for the stages of asr_kd.sh, which sources this file. They use its options and variables.
# shellcheck shell=bash disable=SC2154,SC2034

# shellcheck source=egs2/TEMPLATE/asr_kd1/kd_options.sh
. "$(dirname "${BASH_SOURCE[0]}")/kd_options.sh"

log() { if dry; then echo "# $*"; else echo "$(date '+%H:%M:%S') $*" >&2; fi; }
refuse() {
    echo "error: $*" >&2
    exit 2
}
fail() {
    echo "error: $*" >&2
    exit 1
}
# has_packages: end with a short error on a fresh machine, instead of Python's traceback
has_packages() {
    [ "${python}" != python3 ] ||
        python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("espnet2") is None)' ||
        fail "this python3 has no espnet2: run ./run_all.sh or tests/run.sh once, which install into .venv, or activate" \
            "an environment (path.sh)"
}
# check_inputs: find wrong names and missing files before any work, not in a later stage
check_inputs() {
    local name
    for name in teacher_config student_config; do
        [ -f "${!name}" ] || fail "--${name}: there is no file ${!name}"
    done
    dry || [ -z "${teacher}" ] || for name in "${teachers[@]}"; do
        [ -e "${name}" ] || [[ " ${foreign[*]##*|} " == *" ${name} "* ]] ||
            fail "--teacher: there is no experiment ${name}"
    done
    for name in "${train_sources[@]:1}"; do
        dry || [ -s "${name}/text" ] || fail "--pseudo: ${name} has no text; asr_kd_pseudo makes one"
    done
    if [ "${student_tokens}" = own ] && [ "${stop_stage}" -ge 7 ]; then
        [ -n "${teacher}" ] || fail "--student_tokens own: there is no --teacher with others; leave this option out"
        page_of "${method}"
        [ "${page[teacher]}" = none ] || fail "--student_tokens own: ${method} compares what the teacher gives in each" \
            "frame, and needs the teacher's tokens; sequence_kd goes by its text, and so does asr_kd_pseudo"
    fi
    if [ "${target_cache}" = true ] && [ ${#teachers[@]} -gt 1 ] && [ "${stop_stage}" -ge 7 ]; then
        page_of "${method}"
        ! cached || fail "--target_cache true: it stores the outputs of one teacher, and --teacher names ${#teachers[@]};" \
            "the teachers run beside the student without this option"
    fi
    [ -z "${given[method]:-}${kd_stages}" ] || page_of "${method}"
    for name in "${kd_stages_list[@]}"; do
        [[ "${name}" =~ ^[1-9]$ && "${name}" -le "${page[stages]}" ]] ||
            fail "--kd_stages ${kd_stages}: ${method} has the KD stages 1 to ${page[stages]}"
    done
    # On a cluster the jobs run on other machines, and data preparation needs no GPU.
    dry || [ "${stop_stage}" -lt 5 ] || [[ "${cuda_cmd}" != *run_local.sh* ]] || has_gpus
}
# has_gpus: whether this machine has as many GPUs as --ngpu
has_gpus() {
    # shellcheck disable=SC2086
    [ "${ngpu}" = 0 ] || ${python} -c "from espnet_kd import cli; cli.run(lambda _: cli.check_gpus(${ngpu}))"
}
# paths VALUE: set list to the paths in an option's value, which are separated by blanks. A blank within a path is written
# with a backslash before it, unless the whole value is an existing path.
list=()
paths() {
    if [ -e "$1" ]; then
        list=("$1")
    else
        # shellcheck disable=SC2162
        read -a list <<<"$1"
    fi
}
running() { [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ]; }
dry() { [ "${dry_run}" = true ]; }
# run COMMAND …: run a command of a stage; in a dry run, print it so that it can be pasted into a shell
run() {
    if dry; then
        printf '%q ' "$@"
        echo
    else
        "$@" & # in the background, so that this shell reacts to a signal at once
        wait $!
    fi
}
# stopped CODE: after a signal, stop all processes that were started here, and exit
stopped() {
    local pid
    trap '' INT TERM
    for pid in $(jobs -p); do
        # shellcheck disable=SC2046
        kill $(with_descendants "${pid}") 2>/dev/null || true # some may have ended already
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
# act COMMAND …: run a command beside the main work, such as making directories; a dry run neither runs nor prints it
act() { dry || "$@"; }
# needs FILE STAGE: end with an error that names the stage which makes a missing input
needs() { dry || [ -e "$1" ] || fail "$1 is missing; stage $2 makes it: ./run.sh --stage $2$(own_options)"; }

# has_text SET: whether a formatted set has transcripts; a dry run assumes that a set not yet formatted has them
has_text() { [ -s "${raw}/$1/text" ] || { dry && [ ! -e "${raw}/$1/wav.scp" ]; }; }
# needs_text WHO SET…: end with an error if one of the formatted sets has no transcripts
needs_text() {
    local dset
    for dset in "${@:2}"; do
        has_text "${dset}" || [ ! -e "${raw}/${dset}/wav.scp" ] ||
            fail "$1 needs transcripts, and ${raw}/${dset} has no text (a method such as label_free needs none)"
    done
}

# recorded OPTIONS…: whether a finished result was made from these inputs; end the script if a model was made from other data
recorded() {
    local code=0
    # shellcheck disable=SC2086
    ${python} -m espnet_kd.bin.asr_kd_record check "$@" || code=$?
    [ "${code}" = 0 ] || [ "${code}" = 3 ] || exit "${code}"
    return "${code}"
}
# record OPTIONS…: write the record of a finished result
# shellcheck disable=SC2086
record() { dry || ${python} -m espnet_kd.bin.asr_kd_record finish "$@"; }

stats_of() { echo "${expdir}/stats_$1_${tokens_name}"; }

# options_for SET LABELS: set data_opts and train_opts for a training on SET. Sets without transcripts get no text option,
# and SET gets one only if LABELS is 1. Paths are relative to the recipe, as ESPnet writes them.
options_for() {
    local part dset stats shapes=()
    stats=$(stats_of "$1")
    data_opts=(--token_type "${token_type}" --token_list "${tokens}")
    [ "${token_type}" != bpe ] || data_opts+=(--bpemodel "${token_dir}/bpe.model")
    [ ! -s "${token_dir}/nlsyms.txt" ] || data_opts+=(--non_linguistic_symbols "${token_dir}/nlsyms.txt")
    [ ! -s "${token_dir}/cleaner" ] || data_opts+=(--cleaner "$(<"${token_dir}/cleaner")")
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

# collect SET LABELS: compute the statistics of a training set and of the validation set
collect() {
    local stats count job jobs=${nj} dirs=() inputs=() dset
    stats=$(stats_of "$1")
    inputs=(--record "${stats}/.done" --value="fs ${fs}" --audio "${raw}/$1" --expdir "${expdir}" --file "${tokens}")
    for dset in "$1" "${valid_set}"; do
        [ ! -e "${raw}/${dset}/wav.scp" ] || inputs+=("${raw}/${dset}/wav.scp")
        ! has_text "${dset}" || dry || inputs+=("${raw}/${dset}/text")
    done
    if ! dry && recorded "${inputs[@]}"; then
        log "statistics are there, ${stats}"
        return
    fi
    if [ -e "${raw}/${valid_set}/wav.scp" ]; then
        # At most as many jobs as validation utterances, because a job without utterances would fail.
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
    kd data statistics "${stats}"/{train,valid}/feats_stats.npz
    act finish_shapes "${stats}"
    record "${inputs[@]}"
}

# check_lengths: check that all utterances have enough frames for the models that are trained here
check_lengths() {
    local stats fs_option='' models=() inputs=()
    stats=$(stats_of "${kd_set}")
    [ "${fs}" = 16000 ] || fs_option="--frontend_conf fs=${fs} "
    models=(--model "student=${fs_option}--config ${student_config} ${train_args}")
    [ -n "${teacher}" ] || models+=(--model "teacher=${fs_option}--config ${teacher_config} ${teacher_args}")
    inputs=(--record "${stats}/.lengths" --value="${models[*]}")
    inputs+=(--file "${student_config}" "${teacher_config}" "${tokens}" "${stats}/.done")
    dry || ! recorded "${inputs[@]}" || return 0
    kd data lengths "${models[@]}" --stats "${stats}" --data_dirs "${raw}/${kd_set}" "${raw}/${valid_set}" \
        --token_list "${tokens}" --token_type "${token_type}"
    record "${inputs[@]}"
}

# check_ceiling: print once how many of the teacher's tokens are lost at the student's frame rate
check_ceiling() {
    local inputs=() more=''
    [ "${fs}" = 16000 ] || more="--frontend_conf fs=${fs} "
    more+=${train_args}
    inputs=(--record "${teachers[0]}/.ceiling" --value="student ${more}")
    inputs+=(--file "${teachers[0]}/config.yaml" "${student_config}" "${raw}/${valid_set}/wav.scp")
    dry || ! recorded "${inputs[@]}" || return 0
    kd ceiling --teacher "${teachers[0]}" --data_dir "${raw}/${valid_set}" --student_config "${student_config}" \
        ${more:+--student_args="${more}"}
    record "${inputs[@]}"
}

# split_for_jobs SET STATS JOBS: divide the utterances among the jobs
split_for_jobs() {
    local part dset
    mkdir -p "$2/log"
    rm -f "$2/.done" "$2/log/"*.scp "$2"/*/text_shape*
    for part in train valid; do
        dset=$([ "${part}" = train ] && echo "$1" || echo "${valid_set}")
        awk -v n="$3" -v out="$2/log/${part}." '{print > (out ((NR - 1) % n + 1) ".scp")}' "${raw}/${dset}/wav.scp"
    done
}

# finish_shapes STATS: add the vocabulary size to each text length, as ESPnet's batch samplers expect
finish_shapes() {
    local file
    for file in "$1"/*/text_shape; do
        [ ! -e "${file}" ] || sed -e "s/\$/,$(wc -l <"${tokens}")/" "${file}" >"${file}.${token_type}"
    done
}

# shapes_of_untranscribed: write the text lengths of transcribed and untranscribed audio together, with 0 for the latter.
# ESPnet's training accepts empty texts, but its statistics do not.
shapes_of_untranscribed() {
    awk -v none="0,$(wc -l <"${tokens}")" 'NR == FNR {n[$1] = $2; next} {print $1, ($1 in n) ? n[$1] : none}' \
        "$(stats_of "${train_set}")/train/text_shape.${token_type}" "$(stats_of "${kd_set}")/train/speech_shape" \
        >"$(stats_of "${kd_set}")/train/text_shape.${token_type}"
}

# train DIR CONFIG LOG OPTIONS…: run one training; on several GPUs or machines, through ESPnet's launcher
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

# describe DIR ROLE SEED: write the description of an experiment for the results table
describe() {
    mkdir -p "$1"
    printf '{"role": "%s", "method": null, "kd_stages": null, "seed": %s}\n' "$2" "$3" >"$1/experiment.json"
}

# train_once ROLE DIR CONFIG OPTIONS…: train a teacher or a plain student, unless DIR has it already
train_once() {
    local role=$1 dir=$2 config=$3 inputs=()
    shift 3
    needs_text "the ${role} model" "${train_set}" "${valid_set}"
    needs "$(stats_of "${train_set}")/.done" 4
    options_for "${train_set}" 1
    inputs=(--model "${dir}" --fixed "${tokens}" "${raw}/${train_set}/wav.scp" --file "${config}")
    inputs+=(--value="${seed} $* ${feats_normalize}")
    if ! dry && recorded "${inputs[@]}"; then
        log "the ${role} is trained, ${dir}"
        return
    fi
    # If DIR was begun with other options, asr_kd_train refuses those that would change the model.
    train "${dir}" "${config}" train.log --seed "${seed}" "$@"
    act describe "${dir}" "${role}" "${seed}"
    record "${inputs[@]}"
}

# page_of METHOD: read its page once and set page[teacher] (required, none), page[stages], page[nbest], page[labels] (1, 0)
declare -A page=()
page_of() {
    local name value lines
    [ ${#page[@]} -eq 0 ] || return 0
    # shellcheck disable=SC2086
    lines=$(${python} -m espnet_kd.bin.asr_kd_page "$1" --import_objectives)
    while IFS='=' read -r name value; do page[${name}]=${value}; done <<<"${lines}"
    page[without_teacher]=$([ "${page[teacher]}${page[nbest]}" != none0 ] || echo 1)
}

# nbest_of_teacher: print the path of the N-best file; its name has the N of the page
nbest_of_teacher() {
    local own
    own=$([ "${student_tokens}" = teacher ] || echo "_${tokens_name}")
    echo "${expdir}/nbest${page[nbest]}_${teacher_name}_${kd_set}${own}"
}

# cached: whether the KD stages read the teacher's outputs from disk
cached() { [ "${target_cache}" = true ] && [ "${page[teacher]}" = required ]; }
needs_teacher() { [ -n "${teacher}${page[without_teacher]}" ] || needs "${own_teacher}/.done" 5; }

# name_of_teacher EXP: print its name for use in file names; a checksum of the path is added if it is not in expdir, because
# experiments in different directories may have the same name
name_of_teacher() {
    local dir
    dir=$(realpath -m -- "$1")
    if [ "$(dirname "${dir}")" = "$(realpath -m -- "${expdir}")" ]; then
        basename "${dir}" | tr '[:blank:]' _
    else
        echo "$(basename "${dir}" | tr '[:blank:]' _)_$(cksum <<<"${dir}" | cut -d ' ' -f 1)"
    fi
}

# name_of_import SOURCE: print the directory of the experiment into which a model from hf: or onnx: is imported
name_of_import() {
    local name=${1#*:}
    name=${name%/}
    name=$(basename "${name%.onnx}")
    echo "${expdir}/imported_${name//[^[:alnum:]._-]/_}"
}

# teachers_tokens: whether the student gets the token list of a given teacher
teachers_tokens() { [ -n "${teacher}" ] && [ "${student_tokens}" = teacher ]; }
# type_of_teacher: print the token type of the first teacher, which is imported
type_of_teacher() {
    local type # empty in a dry run if the teacher is not imported yet, because then there is no config.yaml
    type=$(sed -n 's/^token_type: *//p' "${teachers[0]}/config.yaml" 2>/dev/null || true)
    echo "${type:-${token_type}}"
}
# same_rate: end with an error if an imported teacher needs audio of another sampling rate than --fs
same_rate() {
    local pair rate
    for pair in "${foreign[@]}"; do
        # In a dry run the teacher may not be imported yet, and then has no config.yaml.
        rate=$(sed -n '/^frontend_conf:/{n;s/^ *fs: *//p}' "${pair##*|}/config.yaml" 2>/dev/null || true)
        [ "${rate:-${fs}}" = "${fs}" ] ||
            fail "--teacher ${pair%|*}: it takes audio of ${rate} Hz, and --fs is ${fs}; give --fs ${rate}"
    done
}
# sets_with FILE: set list to the formatted data dirs that have it; a dry run assumes that those to be formatted have a text
sets_with() {
    local dir
    list=()
    for dir in "${raw}/${train_set}" "${raw}/${kd_set}" "${raw}/${valid_set}" "${test_dirs[@]}"; do
        [[ " ${list[*]} " == *" ${dir} "* ]] ||
            { [ ! -s "${dir}/$1" ] && { ! dry || [ "$1" != text ] || [ -e "${dir}/wav.scp" ]; }; } || list+=("${dir}")
    done
}
# fit_texts TOKENS TYPE: convert the texts to the characters of a token list; words and phones have none
fit_texts() {
    sets_with text
    [ "$2" = word ] || [ ${#list[@]} -eq 0 ] || kd data fit_text --token_list "$1" --token_type "$2" "${list[@]}"
}
# right_texts: ensure that the texts are those for this run, which an earlier run with another teacher may have changed
right_texts() {
    local theirs=${token_lists}/teacher_${teacher_name}/tokens.txt
    [ -z "${teacher}" ] || running 3 || [ ! -e "${theirs}" ] || ! grep -qs '^foreign:' "${teachers[0]%/*.pth}/config.yaml" ||
        fit_texts "${theirs}" "$(type_of_teacher)"
    [ -z "${teacher}" ] || return 0
    sets_with text.before_fit
    if [ ${#list[@]} -gt 0 ] && { running 2 || running 3; }; then
        kd data fit_text --undo "${list[@]}"
    elif [ ${#list[@]} -gt 0 ] && ! dry && [ "${stop_stage}" -ge 4 ] && [ "${stage},${stop_stage}" != 11,11 ]; then
        fail "${list[0]}/text was converted to the characters of an imported teacher (an earlier --teacher hf: or onnx:)," \
            "and no --teacher is given; give it, or restore the texts: ./run.sh --stage 2 --stop_stage 3$(own_options)"
    fi
}

# given_teacher I: set found to a link in expdir to the given teacher number I, so that its decoding results are not written
# into its own directory
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
