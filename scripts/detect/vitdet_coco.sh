#!/usr/bin/env bash
# Mask R-CNN on COCO as in ViTDet (Li et al. 2022): simple feature pyramid, windows of 14, layer norm in the heads,
# 184,375 steps of 64 images (100 epochs), a rate of 1e-4 that drops twice.
#
#   bash scripts/detect/vitdet_coco.sh --finetune CHECKPOINT --data_path COCO --output_dir OUT     all GPUs here
#   bash scripts/detect/vitdet_coco.sh --cpu_small --output_dir OUT     the same flags on made-up scenes
#
# CHECKPOINT is a pretraining. Published AP of boxes / masks with MAE: ViT-B 51.6/45.9, ViT-L 55.5/49.2. For ViT-L add
# --model vit_large_patch16 --layer_decay 0.8 --drop_path 0.4
#
# Differs from their code: torchvision's RoIAlign (`aligned=False`, 2 x 2 samples in a bin, theirs are adaptive) and
# its smooth L1 loss (beta 1/9; theirs is L1); torchvision would keep 2,000 proposals, here 1,000 as theirs; biases
# have no weight decay; images without objects are left out; bf16.
#
# A GPU of 80 GB takes 8 images of ViT-B at once, 4 of ViT-L (set BATCH=4); one of 16 GB takes one image of ViT-B
# (BATCH=1). The rest of the 64 images is accumulated (tools/plan.py --task detect).
#
# GPUS, NODES, NODE_RANK and MASTER as in scripts/mae/pretrain.sh. Your flags come last and win.
# All flags: python main_detect.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/_dense.sh"
train_recipe main_detect.py detect/vitdet_coco 8 "$@"
