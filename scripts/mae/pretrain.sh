#!/usr/bin/env bash
# Pretraining as in He et al. 2022 (Table 8): effective batch 4096, base rate 1.5e-4, 40 warm-up epochs.
#
#   bash scripts/mae/pretrain.sh --data_path IMAGENET --output_dir OUT                all GPUs of this machine
#   GPUS=1 bash scripts/mae/pretrain.sh --accum_iter 64 --data_path … --output_dir …   one GPU, same effective batch
#   NODES=8 NODE_RANK=0 MASTER=host0:29500 bash scripts/mae/pretrain.sh …             once on each node
#
# The paper's batch is 64 x 8 GPUs x 8 nodes; with fewer, raise --accum_iter. Later flags win over the ones below.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
torchrun_main main_pretrain.py --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --batch_size 64 \
    --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --resume auto "$@"
