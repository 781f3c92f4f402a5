#!/usr/bin/env bash
# The stages of every recipe: data, teacher, plain student, distilled student, decoding, results. See --help.
set -euo pipefail

# ---- options: every one below can be given as --name value ----
stage=1              # first stage to run
stop_stage=13        # last stage to run
method=progressive_fkl # method page: a name in conf/methods, or a path
kd_stages=           # use only these KD stages of the page, e.g. "1 3" (the last one gets the others' epochs)
teacher=             # existing experiments EXP[/FILE.pth], several in quotes; tokens and N-best are the first one's
teacher_config=conf/train_teacher.yaml
student_config=conf/train_student.yaml
teacher_args=        # further options of espnet2.bin.asr_train for the teacher
train_args=          # … and for the students, plain and distilled alike
ngpu=0               # GPUs per machine; 0: CPU
num_nodes=1          # machines
nj=2                 # jobs side by side in data preparation, statistics and decoding
seed=0               # of training
train_set=train
valid_set=valid
test_sets='test'      # several in quotes
untranscribed=       # more audio for the KD stages: data dirs, several in quotes; a text in them is not read
local_data_opts=     # options of local/data.sh
token_type=char      # char | bpe
nbpe=500
speed_perturb_factors= # e.g. "0.9 1.0 1.1"
min_seconds=0.1      # training utterances outside these limits are left out, and counted
max_seconds=30
feats_normalize=global_mvn
dumpdir=dump
expdir=exp
tag=                 # end of the students' directory names; default: the seed, where it isn't 0
python=python3
# ---- end of options ----

usage() {
    cat <<EOF
Usage: ./run.sh [--stage N] [--stop_stage N] [--option value …]
Example: ./run.sh --stage 8 --method progressive_fkl --teacher exp/teacher --ngpu 1

Stages, the same in every recipe:
   1 data preparation          5 teacher training         8-10 KD stages 1-3
   2 formatting, speed         6 student without KD       11 export
   3 token list                7 N-best of the teacher,   12 decoding
   4 statistics                  if the method needs it   13 scoring and results

Where the training set has no text: the tokens are those of --teacher, stage 6 is skipped, and the method has to be one
without labels.

Options (defaults):
EOF
    sed -n '/^# ---- options/,/^# ---- end/p' "${BASH_SOURCE[0]}" | sed -nE 's/^([a-z_]+)=([^#]*)(# ?(.*))?$/  --\1 \2\t\4/p' |
        expand -t 36
}

while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --*)
        name=${1#--}
        if ! grep -qE "^${name}=" <(sed -n '/^# ---- options/,/^# ---- end/p' "${BASH_SOURCE[0]}"); then
            echo "error: unknown option $1; ./run.sh --help lists them" >&2
            exit 2
        fi
        if [ $# -lt 2 ]; then
            echo "error: option $1 needs a value" >&2
            exit 2
        fi
        printf -v "${name}" '%s' "$2"
        shift 2
        ;;
    *)
        echo "error: unexpected argument $1; options are --name value" >&2
        exit 2
        ;;
    esac
done

# shellcheck disable=SC1091
. ./path.sh
# shellcheck disable=SC1091
. ./cmd.sh

for number in stage stop_stage ngpu num_nodes nj seed; do
    if ! [[ "${!number}" =~ ^[0-9]+$ ]]; then
        echo "error: --${number} must be a whole number, not '${!number}'" >&2
        exit 2
    fi
done

log() { echo "$(date '+%H:%M:%S') $*" >&2; }
running() { [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ]; }
fail() {
    echo "error: $*" >&2
    exit 1
}
# needs FILE STAGE: a stage whose input is missing says which stage makes it
needs() { [ -e "$1" ] || fail "$1 is missing; stage $2 makes it: ./run.sh --stage $2"; }

raw=${dumpdir}/raw
kd_set=${train_set}${untranscribed:+_and_untranscribed} # what the KD stages train on
has_text() { [ -s "${raw}/$1/text" ]; }
# needs_text WHO SET…: those of the sets that are formatted have transcripts
needs_text() {
    local dset
    for dset in "${@:2}"; do
        has_text "${dset}" || [ ! -e "${raw}/${dset}/wav.scp" ] ||
            fail "$1 needs transcripts, and ${raw}/${dset} has no text (a method such as label_free needs none)"
    done
}

read -r -a teachers <<<"${teacher}"
own_teacher=${expdir}/teacher
if [ ${#teachers[@]} -gt 0 ]; then
    teacher_name=${teachers[0]%/*.pth}
    teacher_name=$(basename "${teacher_name}")
else
    teachers=("${own_teacher}") teacher_name=teacher
fi
tokens_name=${token_type}
[ "${token_type}" != bpe ] || tokens_name=bpe_unigram${nbpe}
# Without stage 3 a given teacher may as well have been trained with the recipe's tokens; training compares the lists.
if [ -n "${teacher}" ] && { running 3 || [ -e "data/token_list/teacher_${teacher_name}/tokens.txt" ]; }; then
    tokens_name=teacher_${teacher_name}
fi
stats_of() { echo "${expdir}/stats_$1_${tokens_name}"; }
token_dir=data/token_list/${tokens_name}
tokens=${token_dir}/tokens.txt
tag=${tag:-$([ "${seed}" = 0 ] || echo "seed${seed}")}
plain_exp=${expdir}/student_plain${tag:+_${tag}}
student_exp=${expdir}/student_$(basename "${method}" .yaml)${kd_stages:+_${kd_stages// /}}${untranscribed:+_untranscribed}${tag:+_${tag}}
nbest=${expdir}/nbest_${teacher_name}_${kd_set}
read -r -a untranscribed_list <<<"${untranscribed}"
read -r -a kd_stages_list <<<"${kd_stages}"
read -r -a teacher_args_list <<<"${teacher_args}"
read -r -a train_args_list <<<"${train_args}"

if running 1; then
    log "stage 1: data preparation"
    # shellcheck disable=SC2086
    nj="${nj}" local/data.sh ${local_data_opts}
fi

limits=(--min_seconds "${min_seconds}" --max_seconds "${max_seconds}")
if running 2; then
    log "stage 2: formatting${speed_perturb_factors:+, speed perturbation ${speed_perturb_factors}}"
    format() { ${python} -m espnet_kd.bin.asr_kd_data format --nj "${nj}" "$@"; }
    read -r -a factors <<<"${speed_perturb_factors}"
    speed=(${speed_perturb_factors:+--speed_factors "${factors[@]}"})
    for dset in "${train_set}" "${valid_set}" ${test_sets}; do
        needs "data/${dset}/wav.scp" 1
        case "${dset}" in
        "${train_set}") opts=(--text optional --drop_out_of_range "${limits[@]}" "${speed[@]}") ;;
        "${valid_set}") opts=(--text optional --drop_out_of_range "${limits[@]}") ;;
        *) opts=() ;; # every utterance of a test set is decoded, whatever its length
        esac
        format --src "data/${dset}" --dst "${raw}/${dset}" "${opts[@]}"
    done
    if [ -n "${untranscribed}" ]; then
        format --src "${untranscribed_list[@]}" --dst "${raw}/${train_set}_untranscribed" --text none --drop_out_of_range \
            "${limits[@]}" "${speed[@]}"
        ${python} -m espnet_kd.bin.asr_kd_data combine --transcribed "${raw}/${train_set}" \
            --untranscribed "${raw}/${train_set}_untranscribed" --dst "${raw}/${kd_set}"
    fi
fi

if running 3; then
    log "stage 3: token list (${token_type}${teacher:+, of ${teachers[0]}})"
    needs "${raw}/${kd_set}/wav.scp" 2
    if [ -n "${teacher}" ]; then
        source=(--teacher "${teachers[0]}")
    elif has_text "${train_set}"; then
        source=(--text "${raw}/${train_set}/text")
    else
        fail "data/${train_set} has no text to make a token list from; give --teacher, whose tokens the student takes"
    fi
    ${python} -m espnet_kd.bin.asr_kd_data tokens "${source[@]}" --out "${token_dir}" --token_type "${token_type}" --nbpe "${nbpe}"
    # Before any training: files sorted, unique and complete, audio readable, training text covered by the tokens (in
    # validation an unseen character is <unk>, and no fault).
    ${python} -m espnet_kd.bin.asr_kd_data validate "${raw}/${kd_set}" "${limits[@]}" --no_text ${untranscribed:+--allow_empty} \
        --token_type "${token_type}" --token_list "${tokens}"
    ${python} -m espnet_kd.bin.asr_kd_data validate "${raw}/${valid_set}" "${limits[@]}" --no_text
fi

# options_for SET LABELS: fill data_opts and train_opts, for training on SET; a text only where there is one, and that of
# SET only where LABELS is 1. Paths are relative to the recipe, as ESPnet writes them.
options_for() {
    local part dset stats shapes=()
    stats=$(stats_of "$1")
    data_opts=(--token_type "${token_type}" --token_list "${tokens}")
    [ "${token_type}" != bpe ] || data_opts+=(--bpemodel "${token_dir}/bpe.model")
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
    local stats part dset file job jobs count dirs=()
    stats=$(stats_of "$1")
    if [ -z "$(find "${raw}/$1/wav.scp" "${raw}/${valid_set}/wav.scp" "${tokens}" -newer "${stats}/.done" 2>&1)" ]; then
        log "statistics are there, ${stats}"
        return
    fi
    mkdir -p "${stats}/log"
    rm -f "${stats}/.done" "${stats}/log/"*.scp "${stats}"/*/text_shape*
    # No more jobs than validation utterances: an empty job would fail.
    count=$(wc -l <"${raw}/${valid_set}/wav.scp")
    jobs=$((nj < count ? nj : count))
    for part in train valid; do
        dset=$([ "${part}" = train ] && echo "$1" || echo "${valid_set}")
        awk -v n="${jobs}" -v out="${stats}/log/${part}." '{print > (out ((NR - 1) % n + 1) ".scp")}' "${raw}/${dset}/wav.scp"
    done
    options_for "$1" "$2"
    # shellcheck disable=SC2154
    ${train_cmd} JOB=1:"${jobs}" "${stats}/log/stats.JOB.log" \
        ${python} -m espnet_kd.bin.asr_kd_train --collect_stats true --config "${student_config}" "${data_opts[@]}" \
        --train_shape_file "${stats}/log/train.JOB.scp" --valid_shape_file "${stats}/log/valid.JOB.scp" \
        --output_dir "${stats}/log/stats.JOB" --ngpu 0
    for ((job = 1; job <= jobs; job++)); do
        dirs+=(--input_dir "${stats}/log/stats.${job}")
    done
    ${python} -m espnet2.bin.aggregate_stats_dirs "${dirs[@]}" --output_dir "${stats}" >"${stats}/log/aggregate.log" 2>&1
    for file in "${stats}"/*/text_shape; do
        # The vocabulary's size beside each text length, as ESPnet's batch samplers read it.
        [ ! -e "${file}" ] || sed -e "s/\$/,$(wc -l <"${tokens}")/" "${file}" >"${file}.${token_type}"
    done
    touch "${stats}/.done"
}

if running 4; then
    log "stage 4: statistics"
    needs "${tokens}" 3
    needs "${raw}/${kd_set}/wav.scp" 2
    needs "${raw}/${valid_set}/wav.scp" 2
    if [ -n "${untranscribed}" ] && has_text "${train_set}"; then
        # Teacher and plain student train on the transcribed part alone. ESPnet's statistics stop at an empty text, though
        # its training does not: the text lengths of the whole are those of this part, and 0.
        collect "${train_set}" 1
        collect "${kd_set}" 0
        awk -v none="0,$(wc -l <"${tokens}")" 'NR == FNR {n[$1] = $2; next} {print $1, ($1 in n) ? n[$1] : none}' \
            "$(stats_of "${train_set}")/train/text_shape.${token_type}" "$(stats_of "${kd_set}")/train/speech_shape" \
            >"$(stats_of "${kd_set}")/train/text_shape.${token_type}"
    else
        collect "${kd_set}" 1
    fi
fi

# train DIR CONFIG LOG OPTIONS…: one training run, on several GPUs or machines through ESPnet's launcher
train() {
    local dir=$1 config=$2 log=$1/$3 launch=()
    shift 3
    mkdir -p "${dir}"
    if [ "${ngpu}" -gt 1 ] || [ "${num_nodes}" -gt 1 ]; then
        # shellcheck disable=SC2206,SC2154
        launch=(${python} -m espnet2.bin.launch --cmd "${cuda_cmd} --name $(basename "${dir}")" --log "${log}"
            --ngpu "${ngpu}" --num_nodes "${num_nodes}" --init_file_prefix "${dir}/.dist_init_"
            --multiprocessing_distributed true --)
    else
        # shellcheck disable=SC2206
        launch=(${cuda_cmd} --gpu "${ngpu}" "${log}")
    fi
    "${launch[@]}" ${python} -m espnet_kd.bin.asr_kd_train --config "${config}" "${train_opts[@]}" --output_dir "${dir}" "$@"
}
# describe DIR ROLE SEED: what the results table says of an experiment
describe() {
    mkdir -p "$1"
    printf '{"role": "%s", "method": null, "kd_stages": null, "seed": %s}\n' "$2" "$3" >"$1/experiment.json"
}

# train_once ROLE DIR CONFIG OPTIONS…: teacher or plain student, unless DIR has it; a DIR of other settings is refused
train_once() {
    local role=$1 dir=$2 config=$3 settings
    shift 3
    needs_text "the ${role} model" "${train_set}" "${valid_set}"
    needs "$(stats_of "${train_set}")/.done" 4
    options_for "${train_set}" 1
    settings=$(cat "${config}" "${tokens}" "${raw}/${train_set}/wav.scp" - <<<"${seed} $*" | cksum)
    if [ -f "${dir}/checkpoint.pth" ] && [ "$(cat "${dir}/.settings")" != "${settings}" ]; then
        fail "${dir} holds a model of other options, configuration, tokens or data; choose another --expdir, or remove it"
    fi
    if [ -f "${dir}/.done" ]; then
        log "the ${role} is trained, ${dir}"
        return
    fi
    mkdir -p "${dir}"
    echo "${settings}" >"${dir}/.settings"
    train "${dir}" "${config}" train.log --seed "${seed}" "$@"
    describe "${dir}" "${role}" "${seed}"
    touch "${dir}/.done"
}

# page_of METHOD: what its page says, once: page[teacher] (required, none), page[stages], page[nbest], page[labels] (1, 0)
declare -A page=()
page_of() {
    local name value lines
    [ ${#page[@]} -eq 0 ] || return 0
    lines=$(${python} -m espnet_kd.bin.asr_kd_page "$1")
    while IFS='=' read -r name value; do page[${name}]=${value}; done <<<"${lines}"
    page[without_teacher]=$([ "${page[teacher]}${page[nbest]}" != none0 ] || echo 1)
}

if running 5; then
    [ -n "${teacher}" ] || page_of "${method}"
    if [ -n "${teacher}" ]; then
        log "stage 5: skipped, the teacher is ${teacher}"
    elif [ -n "${page[without_teacher]}" ]; then
        log "stage 5: skipped, ${method} has no teacher"
    else
        log "stage 5: teacher training, log in ${own_teacher}/train.log"
        train_once teacher "${own_teacher}" "${teacher_config}" "${teacher_args_list[@]}"
    fi
fi

if running 6 && [ "${stage}" -lt 6 ] && ! { has_text "${train_set}" && has_text "${valid_set}"; }; then
    log "stage 6: skipped, a student without KD needs transcripts, of ${train_set} and ${valid_set}"
elif running 6; then
    log "stage 6: student without KD, log in ${plain_exp}/train.log"
    train_once plain "${plain_exp}" "${student_config}" "${train_args_list[@]}"
fi

needs_teacher() { [ -n "${teacher}${page[without_teacher]}" ] || needs "${own_teacher}/.done" 5; }
if running 7; then
    page_of "${method}"
    if [ "${page[nbest]}" = 0 ]; then
        log "stage 7: nothing to do, ${method} needs no N-best of the teacher"
    else
        log "stage 7: N-best of the teacher, ${nbest}"
        needs_teacher
        needs "${raw}/${kd_set}/wav.scp" 2
        ${python} -m espnet_kd.bin.asr_kd_nbest --teacher "${teachers[0]}" --data_dir "${raw}/${kd_set}" \
            --data_dir "${raw}/${valid_set}" --output "${nbest}" --nbest "${page[nbest]}" --nj "${nj}" \
            --ngpu "$((ngpu > 0 ? 1 : 0))"
    fi
fi

for k in 1 2 3; do
    running $((7 + k)) || continue
    page_of "${method}"
    if [ "${k}" -gt "${page[stages]}" ]; then
        log "stage $((7 + k)): nothing to do, the KD stages of ${method} are ${page[stages]}"
        continue
    fi
    log "stage $((7 + k)): KD stage ${k} of ${method}, log in ${student_exp}/train.kd_stage${k}.log"
    [ "${page[labels]}" = 0 ] || needs_text "${method}" "${kd_set}" "${valid_set}"
    needs "$(stats_of "${kd_set}")/.done" 4
    options_for "${kd_set}" "${page[labels]}"
    needs_teacher
    opts=(--kd_config "${method}" --kd_stage "${k}" ${kd_stages:+--kd_stages "${kd_stages_list[@]}"})
    [ "${page[teacher]}" = none ] || opts+=(--teacher "${teachers[@]}")
    if [ "${page[nbest]}" != 0 ]; then
        needs "${nbest}" 7
        opts+=(--nbest "${nbest}")
    fi
    train "${student_exp}" "${student_config}" "train.kd_stage${k}.log" --seed "${seed}" "${train_args_list[@]}" "${opts[@]}"
done

if running 11; then
    log "stage 11: export to ${student_exp}/export"
    needs "${student_exp}/student.pth" 8
    ${python} -m espnet_kd.bin.asr_kd_export --expdir "${student_exp}"
fi

if running 12 || running 13; then
    # What there is to decode, as model|directory of its results. A given teacher is decoded beside the recipe's own
    # experiments, not into somebody else's directory.
    decoded=()
    for i in "${!teachers[@]}"; do
        [ -z "${teacher}" ] || decoded+=("${teachers[i]}|${expdir}/teacher_given$([ "${i}" = 0 ] || echo $((i + 1)))")
    done
    for dir in $([ -n "${teacher}" ] || echo "${own_teacher}") "${plain_exp}"; do
        if [ -e "${dir}/.done" ]; then
            decoded+=("${dir}|${dir}")
        else
            log "nothing is trained in ${dir} (stages 5 and 6): left out of the results"
        fi
    done
    decoded+=("${student_exp}/export|${student_exp}")
fi

if running 12; then
    log "stage 12: decoding"
    needs "${student_exp}/export/model.pth" 11
    for pair in "${decoded[@]}"; do
        model=${pair%|*} dir=${pair#*|}
        [ -e "${dir}/experiment.json" ] || describe "${dir}" teacher null
        for dset in ${test_sets}; do
            needs "${raw}/${dset}/wav.scp" 2
            ${python} -m espnet_kd.bin.asr_kd_inference --expdir "${model}" --data_dir "${raw}/${dset}" \
                --output_dir "${dir}/decode_${dset}" --ngpu "$((ngpu > 0 ? 1 : 0))" --nj "${nj}"
        done
    done
fi

if running 13; then
    log "stage 13: scoring and results"
    for pair in "${decoded[@]}"; do
        for dset in ${test_sets}; do
            dir=${pair#*|}/decode_${dset}
            needs "${dir}/1best_recog/text" 12
            ${python} -m espnet_kd.bin.asr_kd_score --hyp "${dir}/1best_recog/text" --ref "${raw}/${dset}/text" --output_dir "${dir}"
        done
    done
    ${python} -m espnet_kd.bin.asr_kd_report --expdir "${expdir}"
    cat "${expdir}/RESULTS.md"
fi
