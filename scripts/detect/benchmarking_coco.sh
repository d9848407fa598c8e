#!/usr/bin/env bash
# Mask R-CNN on COCO as in "Benchmarking detection transfer learning with vision transformers" (Li et al. 2021), the
# protocol of the tables of MAE, RC-MAE and MLO-MAE: 184,375 steps of 64 images (100 epochs), rate 8e-5, half a
# cosine.
#
#   bash scripts/detect/benchmarking_coco.sh --finetune CHECKPOINT --data_path COCO --output_dir OUT     all GPUs here
#   bash scripts/detect/benchmarking_coco.sh --cpu_small --output_dir OUT     the same flags on made-up scenes
#
# CHECKPOINT is a pretraining. Published AP of boxes / masks, ViT-B (ViT-L): MAE 50.3/44.9 (53.3/47.2), RC-MAE
# 51.0/45.4 (53.8/47.7), MLO-MAE 51.1 boxes. An independent implementation (MIMDet) reached 50.4/44.9 with MAE's
# ViT-B, and 50.2/44.9 in half the steps. For ViT-L add --model vit_large_patch16.
#
# Differs from their code: relative positions are ViTDet's, a table for rows and one for columns (theirs has a bias
# for each head and offset, without weight decay); torchvision's RoIAlign (`aligned=False`, 2 x 2 samples in a bin,
# theirs are adaptive) and its smooth L1 loss (beta 1/9; theirs is L1); torchvision would keep 2,000 proposals, here
# 1,000 as theirs; images without objects are left out; bf16. Batch norm of the pyramid and the heads is synchronised
# over the GPUS.
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
train_recipe main_detect.py detect/benchmarking_coco 8 "$@"
