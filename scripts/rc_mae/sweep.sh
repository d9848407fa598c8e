#!/usr/bin/env bash
# RC-MAE as in Lee et al. (ICLR 2023): ViT-B on ImageNet, effective batch 4096, 1600 epochs, momentum 0.996 to 1; beside
# MAE, with the same or another mask for the teacher, and with the released code's effectively constant momentum. Both
# the student and its teacher (`-ema`, what the paper reports) are fine-tuned as He et al. (Table 9) and probed (Table 10).
# The recipes: configs/rc_mae, configs/mae.
#
#   bash scripts/rc_mae/sweep.sh OUT --data IMAGENET              (train/<class>/ and val/<class>/)
#   GPUS=8 bash scripts/rc_mae/sweep.sh OUT --data IMAGENET --only "mae same"
#   bash scripts/rc_mae/sweep.sh OUT --data TINY_IMAGENET --gpu_hour      (reading ImageNet alone takes longer)
#   bash scripts/rc_mae/sweep.sh OUT --cpu_small
#
# Gradients are accumulated up to the paper's batches. More in scripts/_sweep.sh.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_sweep.sh"

data_flags=(--data_path "$data")
tuning="$configs/mae/finetune_vit_base.yaml" probing="$configs/mae/linprobe_vit_base.yaml"
mae=(--config "$configs/rc_mae/mae.yaml") rc_mae=(--config "$configs/rc_mae/rc_mae.yaml")
pretrain=(--accum_iter "$(accumulation_of "$configs/rc_mae/mae.yaml")")
finetune=(--config "$tuning" --accum_iter "$(accumulation_of "$tuning")")
linprobe=(--config "$probing" --accum_iter "$(accumulation_of "$probing")")
encoder=(--model vit_base_patch16)
cosine=1000  # steps between two gradient diagnostics
if [ -n "$gpu_hour" ]; then
    # 4 runs on 100,000 images: pretraining 490 (MAE), 660; 7 encoders: fine-tuning 70, starting and probing 60
    batch=$(per_process 512)
    data_flags=(--dataset "$(imagefolder_or tiny_imagenet)" --data_path "$data" --input_size 64 --num_workers 12)
    pretrain=(--model mae_vit_small_patch16 --patch_size 8 --batch_size "$batch" --accum_iter 1 --epochs 40
        --warmup_epochs 1 --data_cache device --cache_size 64)
    finetune+=(--batch_size "$batch" --accum_iter 1 --epochs 8 --warmup_epochs 0.4 --eval_freq 8)
    linprobe=(--cache_features)
    encoder=(--model vit_small_patch16 --patch_size 8)
fi
if [ -n "$cpu_small" ]; then
    small_recipe
    mae=() rc_mae=(--rc_mae) cosine=50
fi

run mae "${mae[@]}"
run same "${rc_mae[@]}" --log_grad_cosine "$cosine"
run different "${rc_mae[@]}" --rc_mask different --log_grad_cosine "$cosine"
run constant "${rc_mae[@]}" --rc_schedule constant
table
