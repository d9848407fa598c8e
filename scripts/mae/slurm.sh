#!/usr/bin/env bash
# The same three runs as SLURM jobs through submitit: saved, requeued and resumed at their time limit.
#
#   bash scripts/mae/slurm.sh pretrain --nodes 8 --ngpus 8 --timeout 4320 --partition gpu --job_dir OUT/%j \
#       --data_path IMAGENET
#   bash scripts/mae/slurm.sh finetune --nodes 4 --ngpus 8 --partition gpu --finetune CHECKPOINT --data_path IMAGENET
#   bash scripts/mae/slurm.sh linprobe --nodes 4 --ngpus 8 --partition gpu --finetune CHECKPOINT --data_path IMAGENET
#
# These numbers of GPUs give the paper's batches; with other numbers add --accum_iter. Your flags come last and win.
# All flags: python submitit_pretrain.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/mae/_recipes.sh"
job=${1:-}
case $job in
    pretrain | finetune | linprobe) shift ;;
    *) echo "error: the job '$job' must be pretrain, finetune or linprobe" >&2; exit 2 ;;
esac
declare -n recipe=$job
exec "$python" "$root/submitit_$job.py" "${recipe[@]}" "$@"
