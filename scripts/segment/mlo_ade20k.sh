#!/usr/bin/env bash
# MLO-MAE on ADE20K with UPerNet (Guo et al., Section 4.3, Table 4 and Appendix B.6): 160,000 steps of 8 crops, rate
# 1e-4.
#
#   bash scripts/segment/mlo_ade20k.sh --finetune FINETUNED --data_path ADE20K --output_dir OUT     all GPUs here
#   bash scripts/segment/mlo_ade20k.sh --cpu_small --output_dir OUT     the same flags on made-up scenes
#
# FINETUNED is fine-tuned on ImageNet, not only pretrained, unlike in MAE's protocol (mae_ade20k.sh). To make it:
#   bash scripts/mae/finetune.sh --finetune CHECKPOINT --data_path IMAGENET --output_dir FT     (FT/checkpoint-best.pth)
# Published mIoU of ViT-B: MAE 48.1, MLO-MAE 49.8. There is no ViT-L.
#
# The paper states batch, steps, rate and AdamW, and that MAE's code was used: the other flags are those of
# mae_ade20k.sh, which also lists the differences from that code.
#
# GPUS, NODES, NODE_RANK and MASTER as in scripts/mae/pretrain.sh. Your flags come last and win.
# All flags: python main_segment.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/_dense.sh"
train_recipe main_segment.py segment/mlo_ade20k 8 "$@"
