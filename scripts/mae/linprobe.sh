#!/usr/bin/env bash
# Linear probing of ViT-B as in He et al. 2022 (Table 10): LARS, [cls] token, effective batch 16384
# (configs/mae/linprobe_vit_base.yaml).
#
#   bash scripts/mae/linprobe.sh --finetune CHECKPOINT --data_path IMAGENET --output_dir OUT
#
# GPUS, NODES, NODE_RANK and MASTER as in pretrain.sh. Without augmentation, in a hundredth of the time:
# python main_linprobe.py --cache_features --finetune CHECKPOINT --data_path IMAGENET --output_dir OUT
# All flags: python main_linprobe.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
recipe="$configs/mae/linprobe_vit_base.yaml"
torchrun_main main_linprobe.py --config "$recipe" --accum_iter "$(accumulation_of "$recipe")" "$@"
