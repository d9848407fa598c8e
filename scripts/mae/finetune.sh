#!/usr/bin/env bash
# Fine-tuning of ViT-B as in He et al. 2022 (Table 9): effective batch 1024, layer decay 0.65, 100 epochs.
#
#   bash scripts/mae/finetune.sh --finetune CHECKPOINT --data_path IMAGENET --output_dir OUT
#   (ViT-L: --model vit_large_patch16 --epochs 50 --blr 1e-3 --layer_decay 0.75 --drop_path 0.2;
#   ViT-H: --model vit_huge_patch14 --epochs 50 --blr 1e-3 --layer_decay 0.75 --drop_path 0.3)
#
# GPUS, NODES, NODE_RANK and MASTER as in pretrain.sh. Gradients are accumulated up to the paper's batch.
# All flags: python main_finetune.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/mae/_recipes.sh"
torchrun_main main_finetune.py "${finetune[@]}" --accum_iter "$(accumulate "$finetune_effective" "$finetune_batch")" \
    --resume auto "$@"
