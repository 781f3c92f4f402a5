#!/usr/bin/env bash
# The stages of every recipe: data, teacher, plain student, distilled student, decoding, results. See --help.
set -euo pipefail

# ---- options: each can be given as --name value ----
stage=1              # first stage to run
stop_stage=13        # last stage to run
method=progressive_fkl # method page: a name in conf/methods, or a path
kd_stages=           # use only these KD stages of the page, e.g. "1 3" (the last one gets the share of the others)
teacher=             # finished experiment EXP[/FILE.pth], packed .zip, hf:DIR, hf:OWNER/NAME (Hugging Face) or onnx:FILE; several in quotes
                     # The first of several gives tokens and N-best; hf: and onnx: are imported first.
import_args=         # further options of asr_kd_import, e.g. "--tokens tokens.txt" for an ONNX file
target_cache=false   # true: stage 7 stores the teacher's outputs on disk, and the KD stages run without the teacher
cache_args=          # further options of asr_kd_cache, e.g. "--top_k 32"
teacher_config=conf/train_teacher.yaml # ESPnet training YAML of the teacher
student_config=conf/train_student.yaml # ESPnet training YAML of the students
teacher_args=        # further options of espnet2.bin.asr_train for the teacher
train_args=          # further options of espnet2.bin.asr_train for the plain and the distilled students
ngpu=0               # GPUs per machine; 0: CPU
num_nodes=1          # number of machines
use_amp=             # true: mixed precision; this and the next two apply to teacher and students
batch_bins=          # size of a batch over all GPUs together
accum_grad=          # batches per update of the parameters
nj=2                 # parallel jobs in data preparation, statistics and decoding
seed=0               # random seed of training
train_set=train      # name of the data dir for training
valid_set=valid      # name of the data dir for validation
test_sets='test'      # names of the data dirs to decode, several in quotes; may include the validation set, e.g. "valid test"
pseudo=              # data dirs with transcripts of a recogniser (asr_kd_pseudo), several in quotes; added to train_set
untranscribed=       # more audio for the KD stages: data dirs, several in quotes; a text in them is not read
local_data_opts=     # further options of local/data.sh
espnet_data=         # directory of an ESPnet recipe: stage 1 takes train_set, valid_set, test_sets from its dump/raw
fs=16000             # sampling rate, Hz
token_type=char      # char | word | bpe; a model from hf: or onnx: has its own
student_tokens=teacher # token list of the students if --teacher is given: teacher, or own (of the training text)
nbpe=500             # length of the token list, for bpe
nlsyms=              # file of symbols that are not split, one per line, such as [NOISE]; a given teacher has its own
speed_perturb_factors= # e.g. "0.9 1.0 1.1"
min_seconds=0.1      # shorter training utterances are left out, and counted
max_seconds=30       # longer training utterances are left out, and counted
feats_normalize=global_mvn # global_mvn | utterance_mvn | none
dumpdir=dump         # directory of the formatted data
expdir=exp           # directory of statistics, experiments and results
tag=                 # suffix of the students' directory names; default: the seed, if it is not 0
export_formats=      # further forms to export in stage 11, e.g. "onnx sherpa web"; their cost is measured and reported
export_args=         # further options of asr_kd_export, e.g. "--max_seconds 60"
experiments=         # experiments for stages 12 and 13 beside the teacher, several in quotes; default: the students
dry_run=false        # true, or --dry_run alone: print the commands of the stages, run none
show_options=false   # true, or --show_options alone: print every option with its value, run nothing
python=python3       # Python interpreter
# ---- end of options ----

stages=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/asr_kd.sh
# shellcheck source=egs2/TEMPLATE/asr_kd1/kd_functions.sh
. "$(dirname "$(realpath "${stages}")")/kd_functions.sh"
parse_options "$@" # directories of the corpus count from where this was called, all else from the recipe
cd "$(dirname "${stages}")"
# shellcheck disable=SC1091
. ./path.sh
# shellcheck disable=SC1091
. ./cmd.sh
# Options that follow from the recipe's own options.
# shellcheck disable=SC1091
[ ! -e local/options.sh ] || . local/options.sh
check_options
[ "${show_options}" = false ] || show_options_and_exit
has_packages
trap 'stopped 130' INT
trap 'stopped 143' TERM

raw=${dumpdir}/raw
paths "${pseudo}"
train_sources=("data/${train_set}" "${list[@]}")
prepared_set=${train_set} # what stage 1 makes
[ -z "${pseudo}" ] || train_set=${train_set}_and_pseudo
kd_set=${train_set}${untranscribed:+_and_untranscribed} # what the KD stages train on

paths "${teacher}"
teachers=("${list[@]}")
foreign=() # those of other makers: "SOURCE|EXP that it becomes"
own_teacher=${expdir}/teacher
for i in "${!teachers[@]}"; do
    if [[ "${teachers[i]}" == hf:* || "${teachers[i]}" == onnx:* ]]; then
        imported=$(name_of_import "${teachers[i]}")
        foreign+=("${teachers[i]}|${imported}")
        teachers[i]=${imported}
    fi
done
if [ ${#teachers[@]} -gt 0 ]; then
    teacher_name=$(name_of_teacher "${teachers[0]%/*.pth}")
else
    teachers=("${own_teacher}") teacher_name=teacher
fi
tokens_name=${token_type}
[ "${token_type}" != bpe ] || tokens_name=bpe_unigram${nbpe}
# Each training set, and each formatting of it, has its own token list.
token_lists=$([ "${dumpdir}" = dump ] && echo data || echo "${dumpdir}")/token_list
token_dir=${token_lists}/${tokens_name}$([ "${train_set}" = train ] || echo "_${train_set}")
# Without stage 3, a given teacher may have been trained with the recipe's tokens; the training compares the lists.
if teachers_tokens && { running 3 || [ -e "${token_lists}/teacher_${teacher_name}/tokens.txt" ]; }; then
    tokens_name=teacher_${teacher_name}
    token_dir=${token_lists}/${tokens_name}
fi
tokens=${token_dir}/tokens.txt
tag=${tag:-$([ "${seed}" = 0 ] || echo "seed${seed}")}
plain_exp=${expdir}/student_plain${pseudo:+_pseudo}${tag:+_${tag}}
student_exp=${expdir}/student_$(basename "${method}" .yaml)${kd_stages:+_${kd_stages// /}}
student_exp+=${pseudo:+_pseudo}${untranscribed:+_untranscribed}${tag:+_${tag}}
cache=${expdir}/targets_${teacher_name}_${kd_set}_$(basename "${method}" .yaml)
paths "${untranscribed}"
untranscribed_list=("${list[@]}")
read -r -a kd_stages_list <<<"${kd_stages}"
read -r -a cache_args_list <<<"${cache_args}"
read -r -a import_args_list <<<"${import_args}"
read -r -a teacher_args_list <<<"${teacher_args}"
read -r -a train_args_list <<<"${train_args}"
read -r -a test_list <<<"${test_sets}"
read -r -a export_formats_list <<<"${export_formats}"
read -r -a export_args_list <<<"${export_args}"
read -r -a experiments_list <<<"${experiments}"
only_test=() test_dirs=() # the validation set may be decoded too, all of it, from a place of its own
for dset in "${test_list[@]}"; do
    if [ "${dset}" = "${valid_set}" ]; then
        test_dirs+=("${raw}/whole/${dset}")
    else
        only_test+=("${dset}") test_dirs+=("${raw}/${dset}")
    fi
done
[ ${#test_list[@]} -gt 0 ] || [ "${stop_stage}" -lt 12 ] ||
    refuse "no --test_sets: there is nothing to decode in stage 12; name a data dir, or give --stop_stage 11"
check_inputs
# Options that teacher and students share; the options of each follow them.
scale=(${use_amp:+--use_amp "${use_amp}"} ${batch_bins:+--batch_bins "${batch_bins}"})
scale+=(${accum_grad:+--accum_grad "${accum_grad}"})
kd() { run ${python} -m "espnet_kd.bin.asr_kd_$1" "${@:2}"; }
gpu=$((ngpu > 0 ? 1 : 0)) # decoding takes one, or none
for pair in "${foreign[@]}"; do
    kd import "${pair%|*}" --output_dir "${pair##*|}" "${import_args_list[@]}"
done
[ ${#foreign[@]} -eq 0 ] || same_rate
# A model from hf: or onnx: has its own token type, which replaces that of the recipe.
[ ${#foreign[@]} -eq 0 ] || ! teachers_tokens || chosen token_type || token_type=$(type_of_teacher)
[ "${stop_stage}" = 1 ] || right_texts
# kd_decode LOG VERB OPTION…: run a model over data, either here with its progress on the screen, or by the command of cmd.sh
kd_decode() {
    if [[ "${decode_cmd:-run_local.sh}" == *run_local.sh* ]]; then
        kd "${@:2}"
    else
        # shellcheck disable=SC2086
        run ${decode_cmd} --gpu "${gpu}" "$1" ${python} -m "espnet_kd.bin.asr_kd_$2" "${@:3}"
    fi
}

if running 1; then
    if [ -n "${espnet_data}" ]; then
        log "stage 1: data of ${espnet_data}"
        kd data espnet --espnet_data "${espnet_data}" --nj "${nj}" \
            --sets "${prepared_set}" "${valid_set}" "${only_test[@]}"
    else
        log "stage 1: data preparation"
        # shellcheck disable=SC2086
        run env nj="${nj}" python="${python}" local/data.sh "${corpus[@]}" ${local_data_opts}
    fi
fi

limits=(--min_seconds "${min_seconds}" --max_seconds "${max_seconds}")
if running 2; then
    log "stage 2: formatting${speed_perturb_factors:+, speed perturbation ${speed_perturb_factors}}"
    format() { kd data format --nj "${nj}" --fs "${fs}" "$@"; }
    read -r -a factors <<<"${speed_perturb_factors}"
    train_text=$([ -n "${pseudo}" ] && echo required || echo optional)
    speed=(${speed_perturb_factors:+--speed_factors "${factors[@]}"})
    for dset in "${train_set}" "${valid_set}" "${only_test[@]}"; do
        sources=("data/${dset}")
        [ "${dset}" != "${train_set}" ] || sources=("${train_sources[@]}")
        needs "${sources[0]}/wav.scp" 1
        case "${dset}" in
        "${train_set}") opts=(--text "${train_text}" --drop_out_of_range "${limits[@]}" "${speed[@]}") ;;
        "${valid_set}") opts=(--text optional --drop_out_of_range "${limits[@]}") ;;
        *) opts=(${teacher:+--text optional}) ;; # every utterance of a test set is decoded, whatever its length
        esac
        format --src "${sources[@]}" --dst "${raw}/${dset}" "${opts[@]}"
    done
    if [ ${#only_test[@]} -lt ${#test_list[@]} ]; then
        format --src "data/${valid_set}" --dst "${raw}/whole/${valid_set}" ${teacher:+--text optional}
    fi
    if [ -n "${untranscribed}" ]; then
        format --src "${untranscribed_list[@]}" --dst "${raw}/${train_set}_untranscribed" --text none \
            --drop_out_of_range "${limits[@]}" "${speed[@]}"
        kd data combine --transcribed "${raw}/${train_set}" --untranscribed "${raw}/${train_set}_untranscribed" \
            --dst "${raw}/${kd_set}"
    fi
fi

if running 3; then
    log "stage 3: token list (${token_type}, $(teachers_tokens && echo "of ${teachers[0]}" || echo "of the training text"))"
    needs "${raw}/${kd_set}/wav.scp" 2
    # A model from hf: or onnx: has its own characters, and so has a student that gets its token list.
    if [ ${#foreign[@]} -gt 0 ] && ! teachers_tokens; then
        theirs=${token_lists}/teacher_${teacher_name}
        kd data tokens --teacher "${teachers[0]}" --out "${theirs}" --token_type "$(type_of_teacher)"
        fit_texts "${theirs}/tokens.txt" "$(type_of_teacher)"
    fi
    if teachers_tokens; then
        source=(--teacher "${teachers[0]}")
    elif has_text "${train_set}"; then
        source=(--text "${raw}/${train_set}/text" ${nlsyms:+--nlsyms "${nlsyms}"})
    else
        fail "data/${train_set} has no text to make a token list from; give --teacher, whose tokens the student takes"
    fi
    kd data tokens "${source[@]}" --out "${token_dir}" --token_type "${token_type}" --nbpe "${nbpe}"
    [ ${#foreign[@]} -eq 0 ] || ! teachers_tokens || fit_texts "${tokens}" "${token_type}"
    # Checked before any training: the files are sorted, unique and complete, the audio is readable, and the token list
    # covers the training text (in validation an unknown character becomes <unk>, which is counted and accepted).
    checks=("${limits[@]}" --fs "${fs}" --nj "${nj}" --no_text --headers_only) # stage 2 has decoded them
    checks+=(--token_type "${token_type}" --token_list "${tokens}")
    kd data validate "${raw}/${kd_set}" "${checks[@]}" ${untranscribed:+--allow_empty}
    kd data validate "${raw}/${valid_set}" "${checks[@]}" --allow_unknown
fi

if running 4; then
    log "stage 4: statistics"
    needs "${tokens}" 3
    needs "${raw}/${kd_set}/wav.scp" 2
    needs "${raw}/${valid_set}/wav.scp" 2
    if [ -n "${untranscribed}" ] && has_text "${train_set}"; then
        # Teacher and plain student are trained on the transcribed part only.
        collect "${train_set}" 1
        collect "${kd_set}" 0
        act shapes_of_untranscribed
    else
        collect "${kd_set}" 1
    fi
    check_lengths
    [ ${#foreign[@]} -eq 0 ] || ! teachers_tokens || check_ceiling
fi

if running 5; then
    [ -n "${teacher}" ] || page_of "${method}"
    if [ -n "${teacher}" ]; then
        log "stage 5: skipped, the teacher is ${teacher}"
    elif [ -n "${page[without_teacher]}" ]; then
        log "stage 5: skipped, ${method} has no teacher"
    else
        log "stage 5: teacher training, log in ${own_teacher}/train.log"
        train_once teacher "${own_teacher}" "${teacher_config}" "${scale[@]}" "${teacher_args_list[@]}"
    fi
fi

if running 6; then
    transcribed=1
    { has_text "${train_set}" && has_text "${valid_set}"; } || transcribed=
    [ -n "${transcribed}" ] || page_of "${method}"
    # run_all.sh runs stage 6 alone, for methods without transcripts too.
    if [ -z "${transcribed}" ] &&
        { [ "${stage}" -lt 6 ] || { [ "${page[labels]}" = 0 ] && [ -e "${raw}/${train_set}/wav.scp" ]; }; }; then
        log "stage 6: skipped, a student without KD needs transcripts, of ${train_set} and ${valid_set}"
    else
        log "stage 6: student without KD, log in ${plain_exp}/train.log"
        train_once plain "${plain_exp}" "${student_config}" "${scale[@]}" "${train_args_list[@]}"
    fi
fi

if running 7; then
    page_of "${method}"
    for_students=(--data_dir "${raw}/${kd_set}" "${raw}/${valid_set}" --nj "${nj}" --ngpu "${gpu}")
    if [ "${page[nbest]}" != 0 ]; then
        nbest=$(nbest_of_teacher)
        log "stage 7: N-best of the teacher, ${nbest}"
        needs_teacher
        needs "${raw}/${kd_set}/wav.scp" 2
        in_tokens=()
        [ "${student_tokens}" = teacher ] || in_tokens=(--token_list "${tokens}" --token_type "${token_type}")
        kd_decode "${nbest}.log" nbest --teacher "${teachers[0]}" --output "${nbest}" --nbest "${page[nbest]}" \
            "${in_tokens[@]}" "${for_students[@]}"
    fi
    if cached; then
        log "stage 7: targets of the teacher, ${cache}"
        needs_teacher
        needs "${raw}/${kd_set}/wav.scp" 2
        kd_decode "${cache}.log" cache --teacher "${teachers[0]}" --output "${cache}" --kd_config "${method}" \
            "${for_students[@]}" "${cache_args_list[@]}"
    elif [ "${page[nbest]}" = 0 ]; then
        log "stage 7: nothing to do, ${method} needs no N-best of the teacher, and --target_cache is not true"
    fi
fi

# The KD stages are phases of one training, so that one process runs all that are wanted.
kd_stage=0
for k in 1 2 3; do
    running $((7 + k)) || continue
    page_of "${method}"
    if [ "${k}" -gt "${page[stages]}" ]; then
        log "stage $((7 + k)): nothing to do, the KD stages of ${method} are ${page[stages]}"
    elif [ ${#kd_stages_list[@]} -gt 0 ] && [[ " ${kd_stages_list[*]} " != *" ${k} "* ]]; then
        log "stage $((7 + k)): nothing to do, --kd_stages ${kd_stages} leaves out KD stage ${k}"
    else
        log "stage $((7 + k)): KD stage ${k} of ${method}"
        kd_stage=${k}
    fi
done
if [ "${kd_stage}" -gt 0 ]; then
    kd_log=train.kd_stage${kd_stage}.log
    log "training up to the end of KD stage ${kd_stage}, log in ${student_exp}/${kd_log}"
    [ "${page[labels]}" = 0 ] || needs_text "${method}" "${kd_set}" "${valid_set}"
    needs "$(stats_of "${kd_set}")/.done" 4
    options_for "${kd_set}" "${page[labels]}"
    needs_teacher
    opts=(--kd_config "${method}" --kd_stage "${kd_stage}" ${kd_stages:+--kd_stages "${kd_stages_list[@]}"})
    [ "${page[teacher]}" = none ] || opts+=(--teacher "${teachers[@]}")
    if cached; then
        needs "${cache}/manifest.json" 7
        opts+=(--target_cache "${cache}")
    fi
    if [ "${page[nbest]}" != 0 ]; then
        needs "$(nbest_of_teacher)" 7
        opts+=(--nbest "$(nbest_of_teacher)")
    fi
    train "${student_exp}" "${student_config}" "${kd_log}" --seed "${seed}" "${scale[@]}" "${train_args_list[@]}" "${opts[@]}"
fi

if running 11; then
    log "stage 11: export to ${student_exp}/export"
    [ -e "${student_exp}/student.pth" ] || page_of "${method}"
    last=${kd_stages##* } # of the KD stages
    needs "${student_exp}/student.pth" $((7 + ${last:-${page[stages]:-3}}))
    opts=()
    if [ -n "${export_formats}" ]; then
        for dset in "${test_dirs[@]}"; do
            needs "${dset}/wav.scp" 2
        done
        opts=(--format espnet "${export_formats_list[@]}" --card)
        [ ${#test_dirs[@]} -eq 0 ] || opts+=(--measure "${test_dirs[@]}")
    fi
    kd export --expdir "${student_exp}" "${opts[@]}" "${export_args_list[@]}"
fi

if running 12 || running 13; then
    decoded=() # experiments; what is decoded with EXP/export lies in EXP
    trained=() # those of stages 5 and 6
    if [ -n "${teacher}" ]; then
        for i in "${!teachers[@]}"; do
            given_teacher "${i}"
            decoded+=("${found}")
        done
    else
        trained+=("${own_teacher}")
    fi
    if [ -z "${experiments}" ]; then
        trained+=("${plain_exp}")
        experiments_list=("${student_exp}/export")
    fi
    for dir in "${trained[@]}"; do
        if dry || [ -e "${dir}/.done" ]; then
            decoded+=("${dir}")
        else
            log "nothing is trained in ${dir} (stages 5 and 6): left out of the results"
        fi
    done
    for dir in "${experiments_list[@]}"; do
        for earlier in "${dir%/export}"/kd_stage*; do # what a KD stage hands over to the next
            [ ! -e "${earlier}/student.pth" ] || decoded+=("${earlier}")
        done
        decoded+=("${dir}")
    done
    decode=(--expdir "${decoded[@]}" --data_dir "${test_dirs[@]}")
fi

if running 12; then
    log "stage 12: decoding"
    [ -n "${experiments}" ] || needs "${student_exp}/export/model.pth" 11
    for dset in "${test_dirs[@]}"; do
        needs "${dset}/wav.scp" 2
    done
    kd_decode "${expdir}/decode.log" inference "${decode[@]}" --ngpu "${gpu}" --nj "${nj}"
fi

if running 13; then
    log "stage 13: scoring and results"
    reference=() # where a test set has no transcripts: what the teacher recognises
    for dset in "${test_dirs[@]}"; do
        [ -s "${dset}/text" ] || dry || [ -z "${teacher}" ] || reference=(--reference_exp "${decoded[0]}")
    done
    kd score "${decode[@]}" "${reference[@]}"
    kd report "${expdir}"
fi
