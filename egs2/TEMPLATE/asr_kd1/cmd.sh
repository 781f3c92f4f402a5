# How jobs are started: sourced by asr_kd.sh. Any command with the calling convention of Kaldi's run.pl will do:
#   COMMAND [options] [JOB=1:N] LOG PROGRAM …        e.g. "queue.pl --mem 8G", "slurm.pl --config conf/slurm.conf"
# shellcheck shell=bash disable=SC2034
train_cmd="./run_local.sh"  # statistics (CPU)
cuda_cmd="./run_local.sh"   # training
decode_cmd="./run_local.sh" # decoding; N-best and targets of the teacher
