#!/usr/bin/env bash
# Linear probing of ViT-B as in He et al. 2022 (Table 10): effective batch 16384, LARS, 90 epochs, [cls] token.
#
#   bash scripts/mae/linprobe.sh --finetune CHECKPOINT --data_path IMAGENET --output_dir OUT
#   bash scripts/mae/linprobe.sh --cache_features --finetune … (minutes instead of hours: encodes every image once)
#
# GPUS, NODES, NODE_RANK and MASTER as in pretrain.sh. With 8 GPUs the effective batch is 512 x 4 x 8 = 16384.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
torchrun_main main_linprobe.py --model vit_base_patch16 --cls_token --batch_size 512 --accum_iter 4 --epochs 90 \
    --blr 0.1 --weight_decay 0 "$@"
