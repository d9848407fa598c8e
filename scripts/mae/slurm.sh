#!/usr/bin/env bash
# The three runs of configs/mae as SLURM jobs through submitit: saved, requeued and resumed at their time limit.
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
job=${1:-}
case $job in
    pretrain) recipe=pretrain_vit_large ;;
    finetune | linprobe) recipe=${job}_vit_base ;;
    *) echo "error: the job '$job' must be pretrain, finetune or linprobe" >&2; exit 2 ;;
esac
shift
exec "$python" "$root/submitit_$job.py" --config "$configs/mae/$recipe.yaml" --accum_iter 1 "$@"
