#!/usr/bin/env bash
# Fine-tuning as in He et al. 2022 (Table 9), with an effective batch of 1024 (configs/mae/finetune_vit_base.yaml).
#
#   bash scripts/mae/finetune.sh --finetune CHECKPOINT --data_path IMAGENET --output_dir OUT
#   MODEL=vit_large bash scripts/mae/finetune.sh …        its file in configs/mae; vit_base (default), vit_large or vit_huge
#
# GPUS, NODES, NODE_RANK and MASTER as in pretrain.sh. Gradients are accumulated up to the paper's batch.
# All flags: python main_finetune.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
recipe="$configs/mae/finetune_${MODEL:-vit_base}.yaml"
[ -e "$recipe" ] || { echo "error: MODEL=$MODEL has no recipe: use vit_base, vit_large or vit_huge" >&2; exit 2; }
torchrun_main main_finetune.py --config "$recipe" --accum_iter "$(accumulation_of "$recipe")" --resume auto "$@"
