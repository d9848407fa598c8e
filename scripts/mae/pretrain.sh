#!/usr/bin/env bash
# Pretraining as in He et al. 2022 (Table 8): ViT-L, effective batch 4096, base rate 1.5e-4, 800 epochs.
#
#   bash scripts/mae/pretrain.sh --data_path IMAGENET --output_dir OUT             all GPUs of this machine
#   GPUS=1 bash scripts/mae/pretrain.sh …                                          one GPU
#   NODES=8 NODE_RANK=0 MASTER=host0:29500 bash scripts/mae/pretrain.sh …          once on each node
#
# Gradients are accumulated up to the paper's batch. Your flags come last and win.
# All flags: python main_pretrain.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/mae/_recipes.sh"
torchrun_main main_pretrain.py "${pretrain[@]}" --accum_iter "$(accumulate "$pretrain_effective" "$pretrain_batch")" \
    --resume auto "$@"
