#!/usr/bin/env bash
# The same three mains as SLURM jobs through submitit: saved, requeued and resumed when their time is over.
#
#   bash scripts/mae/slurm.sh pretrain --nodes 8 --ngpus 8 --timeout 4320 --partition gpu --job_dir OUT/%j \
#       --data_path IMAGENET --model mae_vit_large_patch16 --norm_pix_loss --epochs 800 --blr 1.5e-4
#
# The first word is pretrain, finetune or linprobe; job flags first or last, all others are the main's.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
job=${1:?pretrain, finetune or linprobe}
shift
exec "$python" "$root/submitit_$job.py" "$@"
