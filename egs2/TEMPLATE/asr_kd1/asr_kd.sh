#!/usr/bin/env bash
# The stages of every recipe: data, teacher, plain student, distilled student, decoding, results. See --help.
set -euo pipefail

# ---- options: every one below can be given as --name value ----
stage=1              # first stage to run
stop_stage=13        # last stage to run
method=progressive_fkl # method page: a name in conf/methods, or a path
kd_stages=           # use only these KD stages of the page, e.g. "1 3" (the last one gets the others' epochs)
teacher=             # an existing experiment EXP[/FILE.pth] as teacher; stage 5 is skipped
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
   3 token list                7 target cache (not yet:   12 decoding
   4 statistics                  the teacher runs online) 13 scoring and results

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
# needs FILE STAGE: a stage whose input is missing says which stage makes it
needs() {
    if [ ! -e "$1" ]; then
        echo "error: $1 is missing; stage $2 makes it: ./run.sh --stage $2" >&2
        exit 1
    fi
}

raw=${dumpdir}/raw
tokens_name=${token_type}
if [ "${token_type}" = bpe ]; then
    tokens_name=bpe_unigram${nbpe}
fi
stats_dir=${expdir}/stats_${tokens_name}
token_dir=data/token_list/${tokens_name}
tokens=${token_dir}/tokens.txt
tag=${tag:-$([ "${seed}" = 0 ] || echo "seed${seed}")}
teacher_exp=${expdir}/teacher
# A given teacher is decoded beside the recipe's own experiments, not into somebody else's directory.
[ -z "${teacher}" ] || teacher_exp=${expdir}/teacher_given
plain_exp=${expdir}/student_plain${tag:+_${tag}}
student_exp=${expdir}/student_$(basename "${method}" .yaml)${kd_stages:+_${kd_stages// /}}${tag:+_${tag}}
read -r -a kd_stages_list <<<"${kd_stages}"
read -r -a teacher_args_list <<<"${teacher_args}"
read -r -a train_args_list <<<"${train_args}"

if running 1; then
    log "stage 1: data preparation"
    # shellcheck disable=SC2086
    nj="${nj}" local/data.sh ${local_data_opts}
fi

if running 2; then
    log "stage 2: formatting${speed_perturb_factors:+, speed perturbation ${speed_perturb_factors}}"
    for dset in "${train_set}" "${valid_set}" ${test_sets}; do
        needs "data/${dset}/wav.scp" 1
        opts=()
        if [ "${dset}" != "${train_set}" ] && [ "${dset}" != "${valid_set}" ]; then
            : # every utterance of a test set is decoded, whatever its length
        else
            opts=(--drop_out_of_range --min_seconds "${min_seconds}" --max_seconds "${max_seconds}")
        fi
        if [ "${dset}" = "${train_set}" ] && [ -n "${speed_perturb_factors}" ]; then
            # shellcheck disable=SC2206
            opts+=(--speed_factors ${speed_perturb_factors})
        fi
        ${python} -m espnet_kd.bin.asr_kd_data format --src "data/${dset}" --dst "${raw}/${dset}" --nj "${nj}" "${opts[@]}"
    done
fi

if running 3; then
    log "stage 3: token list (${token_type})"
    needs "${raw}/${train_set}/text" 2
    ${python} -m espnet_kd.bin.asr_kd_data tokens --text "${raw}/${train_set}/text" --out "${token_dir}" \
        --token_type "${token_type}" --nbpe "${nbpe}"
    # Before any training: files sorted, unique and complete, audio readable, training text covered by the tokens (in
    # validation an unseen character is <unk>, and no fault).
    limits=(--min_seconds "${min_seconds}" --max_seconds "${max_seconds}")
    ${python} -m espnet_kd.bin.asr_kd_data validate "${raw}/${train_set}" "${limits[@]}" \
        --token_type "${token_type}" --token_list "${tokens}"
    ${python} -m espnet_kd.bin.asr_kd_data validate "${raw}/${valid_set}" "${limits[@]}"
fi

# Options that teacher and students share. Paths are relative to the recipe, as ESPnet writes them.
data_opts=(
    --token_type "${token_type}" --token_list "${tokens}"
    --train_data_path_and_name_and_type "${raw}/${train_set}/wav.scp,speech,sound"
    --train_data_path_and_name_and_type "${raw}/${train_set}/text,text,text"
    --valid_data_path_and_name_and_type "${raw}/${valid_set}/wav.scp,speech,sound"
    --valid_data_path_and_name_and_type "${raw}/${valid_set}/text,text,text"
)
if [ "${token_type}" = bpe ]; then
    data_opts+=(--bpemodel "${token_dir}/bpe.model")
fi
train_opts=(
    "${data_opts[@]}" --ngpu "${ngpu}" --resume true
    --train_shape_file "${stats_dir}/train/speech_shape"
    --train_shape_file "${stats_dir}/train/text_shape.${token_type}"
    --valid_shape_file "${stats_dir}/valid/speech_shape"
    --valid_shape_file "${stats_dir}/valid/text_shape.${token_type}"
)
if [ "${feats_normalize}" = global_mvn ]; then
    train_opts+=(--normalize global_mvn --normalize_conf "stats_file=${stats_dir}/train/feats_stats.npz")
else
    train_opts+=(--normalize "${feats_normalize}")
fi

if running 4 && [ -f "${stats_dir}/.done" ] && [ "${stats_dir}/.done" -nt "${raw}/${train_set}/wav.scp" ]; then
    log "stage 4: statistics are there, ${stats_dir}"
elif running 4; then
    log "stage 4: statistics"
    needs "${tokens}" 3
    mkdir -p "${stats_dir}/log"
    rm -f "${stats_dir}/log/"*.scp
    # No more jobs than validation utterances: an empty job would fail.
    count=$(wc -l <"${raw}/${valid_set}/wav.scp")
    jobs=$((nj < count ? nj : count))
    for part in train valid; do
        dset=${part}_set
        split -n "r/${jobs}" --numeric-suffixes=1 -a 4 --additional-suffix=.scp "${raw}/${!dset}/wav.scp" \
            "${stats_dir}/log/${part}."
        for ((job = 1; job <= jobs; job++)); do
            mv "${stats_dir}/log/${part}.$(printf %04d "${job}").scp" "${stats_dir}/log/${part}.${job}.scp"
        done
    done
    # shellcheck disable=SC2154
    ${train_cmd} JOB=1:"${jobs}" "${stats_dir}/log/stats.JOB.log" \
        ${python} -m espnet_kd.bin.asr_kd_train --collect_stats true --config "${student_config}" "${data_opts[@]}" \
        --train_shape_file "${stats_dir}/log/train.JOB.scp" --valid_shape_file "${stats_dir}/log/valid.JOB.scp" \
        --output_dir "${stats_dir}/log/stats.JOB" --ngpu 0
    dirs=()
    for ((job = 1; job <= jobs; job++)); do
        dirs+=(--input_dir "${stats_dir}/log/stats.${job}")
    done
    ${python} -m espnet2.bin.aggregate_stats_dirs "${dirs[@]}" --output_dir "${stats_dir}" >"${stats_dir}/log/aggregate.log" 2>&1
    vocabulary=$(wc -l <"${tokens}")
    for part in train valid; do
        # The vocabulary's size beside each text length, as ESPnet's batch samplers read it.
        sed -e "s/\$/,${vocabulary}/" "${stats_dir}/${part}/text_shape" >"${stats_dir}/${part}/text_shape.${token_type}"
    done
    touch "${stats_dir}/.done"
fi

# train DIR CONFIG LOG OPTIONS…: one training run, on several GPUs or machines through ESPnet's launcher
train() {
    local dir=$1 config=$2 log=$1/$3 launch=()
    shift 3
    needs "${stats_dir}/.done" 4
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
    needs "${stats_dir}/.done" 4
    settings=$(cat "${config}" "${tokens}" "${raw}/${train_set}/wav.scp" - <<<"${seed} $*" | cksum)
    if [ -f "${dir}/checkpoint.pth" ] && [ "$(cat "${dir}/.settings")" != "${settings}" ]; then
        echo "error: ${dir} holds a model of other options, configuration, tokens or data; choose another --expdir, or remove it" >&2
        exit 1
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

if running 5; then
    if [ -n "${teacher}" ]; then
        log "stage 5: skipped, the teacher is ${teacher}"
    else
        log "stage 5: teacher training, log in ${teacher_exp}/train.log"
        train_once teacher "${teacher_exp}" "${teacher_config}" "${teacher_args_list[@]}"
    fi
fi
teacher=${teacher:-${teacher_exp}}

if running 6; then
    log "stage 6: student without KD, log in ${plain_exp}/train.log"
    train_once plain "${plain_exp}" "${student_config}" "${train_args_list[@]}"
fi

if running 7; then
    log "stage 7: nothing to do, the teacher runs online"
fi

for k in 1 2 3; do
    if running $((7 + k)); then
        log "stage $((7 + k)): KD stage ${k} of ${method}, log in ${student_exp}/train.kd_stage${k}.log"
        if [ "${teacher}" = "${expdir}/teacher" ]; then
            needs "${teacher_exp}/.done" 5
        fi
        train "${student_exp}" "${student_config}" "train.kd_stage${k}.log" --seed "${seed}" "${train_args_list[@]}" \
            --teacher "${teacher}" --kd_config "${method}" --kd_stage "${k}" ${kd_stages:+--kd_stages "${kd_stages_list[@]}"}
    fi
done

if running 11; then
    log "stage 11: export to ${student_exp}/export"
    needs "${student_exp}/student.pth" 8
    ${python} -m espnet_kd.bin.asr_kd_export --expdir "${student_exp}"
fi

# What there is to decode: the teacher, the plain student and the distilled one, each beside its directory.
decoded=("${teacher}|${teacher_exp}" "${plain_exp}|${plain_exp}" "${student_exp}/export|${student_exp}")

if running 12; then
    log "stage 12: decoding"
    needs "${student_exp}/export/model.pth" 11
    for pair in "${decoded[@]}"; do
        model=${pair%|*} dir=${pair#*|}
        if [ "${model}" = "${plain_exp}" ] && [ ! -e "${plain_exp}/.done" ]; then
            log "no plain student in ${plain_exp} (stage 6): left out of the results"
            continue
        fi
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
        dir=${pair#*|}
        for dset in ${test_sets}; do
            if [ "${dir}" = "${plain_exp}" ] && [ ! -e "${plain_exp}/.done" ]; then
                continue
            fi
            needs "${dir}/decode_${dset}/1best_recog/text" 12
            ${python} -m espnet_kd.bin.asr_kd_score --hyp "${dir}/decode_${dset}/1best_recog/text" \
                --ref "${raw}/${dset}/text" --output_dir "${dir}/decode_${dset}"
        done
    done
    ${python} -m espnet_kd.bin.asr_kd_report --expdir "${expdir}"
    cat "${expdir}/RESULTS.md"
fi
