#!/usr/bin/env bash
# Linear probe of patches on ADE20K: batch norm and a 1x1 convolution on the frozen patch tokens of the last block,
# with the numbers of DINOv3's linear segmentation (Simeoni et al. 2025): 40,000 steps of 16 crops, rate 1e-3, weight
# decay 1e-3.
#
#   bash scripts/segment/linear_ade20k.sh --finetune CHECKPOINT --data_path ADE20K --output_dir OUT     all GPUs here
#   bash scripts/segment/linear_ade20k.sh --cpu_small --output_dir OUT     the same flags on made-up scenes
#
# No number of MAE by this protocol is published: compare with encoders that you evaluate by it. It is far below
# fine-tuning, and costs about a tenth. tools/dense_probe.py is a cheaper one, without crops and windows.
#
# Differs from their code: crops, windows and the schedule are those of mae_ade20k.sh; theirs are not known to us.
#
# GPUS, NODES, NODE_RANK and MASTER as in scripts/mae/pretrain.sh. Your flags come last and win.
# All flags: python main_segment.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/_dense.sh"
train_recipe main_segment.py segment/linear_ade20k 16 "$@"
