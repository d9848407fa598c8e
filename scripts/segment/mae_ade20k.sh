#!/usr/bin/env bash
# MAE on ADE20K with UPerNet (He et al. 2022, Appendix A.4 and Table 5, with the code of BEiT): 160,000 steps of 16
# crops.
#
#   bash scripts/segment/mae_ade20k.sh --finetune CHECKPOINT --data_path ADE20K --output_dir OUT     all GPUs here
#   bash scripts/segment/mae_ade20k.sh --cpu_small --output_dir OUT     the same flags on made-up scenes
#
# CHECKPOINT is a pretraining, not a fine-tuned classifier. Published mIoU: ViT-B 48.1, ViT-L 53.6. For ViT-L add
# --model vit_large_patch16; the paper searched its learning rate, layer decay and drop path, and does not state them.
#
# Differs from their code: the rate falls linearly from the end of the warm-up (theirs from step 0, 1 % less); 160,000
# steps are those of BEiT's configuration (the paper says 100 epochs, which are 126,300); windows every 341 pixels;
# bf16. Batch norm is synchronised over the GPUS, and sees fewer images where batches are accumulated.
#
# All 16 images on one GPU need 27 GiB with ViT-B and 42 with ViT-L; BATCH=4 accumulates four times four (tools/plan.py
# --task segment).
#
# GPUS, NODES, NODE_RANK and MASTER as in scripts/mae/pretrain.sh. Your flags come last and win.
# All flags: python main_segment.py --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh"
. "$root/scripts/_dense.sh"
train_recipe main_segment.py segment/mae_ade20k 16 "$@"
