#!/usr/bin/env bash
# Faster R-CNN on Pascal VOC 2007 as in MLO-MAE (Guo et al., Appendix D.1, Table 15): 512 pixels, batch 16, AdamW with
# rate and weight decay 1e-4, 50 to 100 epochs; trained on trainval, evaluated on test.
#
#   bash scripts/detect/voc07.sh --finetune CHECKPOINT --data_path VOC --output_dir OUT     all GPUs here
#   bash scripts/detect/voc07.sh --cpu_small --output_dir OUT     the same flags on made-up scenes
#
# CHECKPOINT is a pretraining; VOC holds VOCdevkit/VOC2007. Published mAP of ViT-B: supervised 79.1, MAE 82.8,
# MLO-MAE 83.5. There is no ViT-L. The test set is evaluated once, at the end. The paper stops early by
# validation: choose the length with --train_split train --val_split val --epochs 100 --eval_freq 1, then train with
# that --epochs.
#
# The paper states no detector: a head with cross-entropy and smooth L1 is read as Faster R-CNN on ViTDet's pyramid
# with its windows. It states neither a schedule (constant here), nor layer decay and drop path (none here); its
# random crops are read as large-scale jitter. torchvision's RoIAlign and losses differ from detectron2's as
# vitdet_coco.sh says; bf16.
#
# GPUS, NODES, NODE_RANK and MASTER as in scripts/mae/pretrain.sh. Your flags come last and win.
# All flags: python main_detect.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/_dense.sh"
train_recipe main_detect.py detect/voc07 16 "$@"
