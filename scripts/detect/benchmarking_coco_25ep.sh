#!/usr/bin/env bash
# benchmarking_coco.sh in a quarter of its steps (46,093: 25 epochs), the length at which MIMDet (Fang et al. 2022)
# reproduced the protocol: rate 8e-5, half a cosine, the same 461 steps of warm-up.
#
#   bash scripts/detect/benchmarking_coco_25ep.sh --finetune CHECKPOINT --data_path COCO --output_dir OUT
#   bash scripts/detect/benchmarking_coco_25ep.sh --cpu_small --output_dir OUT     the same flags on made-up scenes
#
# CHECKPOINT is a pretraining. Published AP of boxes / masks of MAE's ViT-B: 48.0/43.0; there is no ViT-L. What
# differs from their code, GPUS and NODES: benchmarking_coco.sh. Your flags come last and win.
# All flags: python main_detect.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/_dense.sh"
train_recipe main_detect.py detect/benchmarking_coco_25ep 8 "$@"
