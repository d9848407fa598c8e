#!/usr/bin/env bash
# Fine-tuning of ViT-B as in He et al. 2022 (Table 9): effective batch 1024, layer decay 0.65, 100 epochs.
#
#   bash scripts/mae/finetune.sh --finetune CHECKPOINT --data_path IMAGENET --output_dir OUT
#   (ViT-L: --model vit_large_patch16 --epochs 50 --layer_decay 0.75 --drop_path 0.2; ViT-H: … --drop_path 0.3)
#
# GPUS, NODES, NODE_RANK and MASTER as in pretrain.sh. With 8 GPUs the effective batch is 32 x 4 x 8 = 1024.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
torchrun_main main_finetune.py --model vit_base_patch16 --batch_size 32 --accum_iter 4 --epochs 100 --blr 5e-4 \
    --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --aug_preset full --resume auto "$@"
