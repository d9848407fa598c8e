#!/usr/bin/env bash
# Pretraining as in He et al. 2022 (Table 8): ViT-L, effective batch 4096, 800 epochs (configs/mae/pretrain_vit_large.yaml).
#
#   bash scripts/mae/pretrain.sh --data_path IMAGENET --output_dir OUT             all GPUs of this machine
#   GPUS=1 bash scripts/mae/pretrain.sh …                                          one GPU
#   NODES=8 NODE_RANK=0 MASTER=host0:29500 bash scripts/mae/pretrain.sh …          once on each node
#
# Gradients are accumulated up to the paper's batch. Your flags come last and win.
# All flags: python main_pretrain.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
recipe="$configs/mae/pretrain_vit_large.yaml"
torchrun_main main_pretrain.py --config "$recipe" --accum_iter "$(accumulation_of "$recipe")" --resume auto "$@"
