#!/usr/bin/env bash
# Linear probing of ViT-B as in He et al. 2022 (Table 10): effective batch 16384, LARS, 90 epochs, [cls] token.
#
#   bash scripts/mae/linprobe.sh --finetune CHECKPOINT --data_path IMAGENET --output_dir OUT
#
# GPUS, NODES, NODE_RANK and MASTER as in pretrain.sh. Without augmentation, in a hundredth of the time:
# python main_linprobe.py --cache_features --finetune CHECKPOINT --data_path IMAGENET --output_dir OUT
# All flags: python main_linprobe.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/mae/_recipes.sh"
torchrun_main main_linprobe.py "${linprobe[@]}" --accum_iter "$(accumulate "$linprobe_effective" "$linprobe_batch")" "$@"
