#!/usr/bin/env bash
# MLO-MAE (Guo, Ban, Xie): ViT-B, and its ablations (configs/mlo_mae). SET chooses the setting; the task's labels are those of the data set:
#   cifar10, cifar100   patches of 2 pixels at 32 px, batch 128, 200 epochs, unrolling 2 (Table 13); pad, crop and flip
#   imagenet            patches of 16 at 224 px, batch 256, 50 epochs, unrolling 1 (Table 12)
# Runs: MAE; MLO-MAE; unrolling 1, 2, 5; patches of 2, 4, 8; mask ratios 60 to 90; moving the masking network every fifth
# window; two levels (BLO-MAE); stage II with a fine-tuned encoder; a mask ratio that grows from 0.5 to 0.9.
#
#   SET=cifar100 bash scripts/mlo_mae/sweep.sh OUT --data CIFAR100    (train/<class>/ and val/<class>/, or torchvision's)
#   bash scripts/mlo_mae/sweep.sh OUT --data CIFAR10 --only "mae mlo every5"
#   bash scripts/mlo_mae/sweep.sh OUT --data CIFAR10 --gpu_hour
#   bash scripts/mlo_mae/sweep.sh OUT --cpu_small
#
# Learning rates are ours: the official MAE's for the autoencoder, the defaults of main_pretrain.py for head and masking
# network. Batches are accumulated on one GPU only where --accum_iter is given. More in scripts/_sweep.sh.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_sweep.sh"

SET=${SET:-cifar10}
case $SET in
    cifar10 | cifar100)
        tuning="$configs/mlo_mae/finetune_cifar.yaml" other_unrolls="1 5" patches="4 8"
        data_flags=(--dataset "$(imagefolder_or "$SET")" --data_path "$data" --num_workers 12)
        encoder=(--model vit_base_patch2 --global_pool)
        mean_std=(--mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159)
        [ "$SET" = cifar10 ] || mean_std=(--mean 0.50707 0.48655 0.44092 --std 0.26733 0.25644 0.27615)
        data_flags+=("${mean_std[@]}") ;;
    imagenet)
        tuning="$configs/mlo_mae/finetune_imagenet.yaml" other_unrolls=2 patches=''
        data_flags=(--data_path "$data" --num_workers 12)
        encoder=(--model vit_base_patch16 --global_pool) ;;
    *) echo "error: SET=$SET is unknown; use cifar10, cifar100 or imagenet" >&2; exit 2 ;;
esac
recipe="$configs/mlo_mae/${SET}_mlo.yaml"
mae=(--config "$configs/mlo_mae/${SET}_mae.yaml") mlo=(--config "$recipe")
pretrain=(--batch_size "$(per_process "$(images_of "$recipe")")")
finetune=(--config "$tuning" --batch_size "$(per_process "$(images_of "$tuning")")")
linprobe=(--cache_features)
if [ -n "$cpu_small" ]; then
    small_recipe
    mae=() mlo=(--mlo_mae --mlo_labels same --mlo_unroll "$(value_of mlo_unroll --config "$recipe")")
    mlo+=(--mlo_hidden 64 --mlo_mask_lr 0.1)
    patches="2 8"
fi
if [ -n "$gpu_hour" ]; then  # 15 runs: pretraining 45 (MAE), 165; fine-tuning 35; starting and probing 65
    [ "$SET" != imagenet ] || { echo "error: --gpu_hour is for SET=cifar10 or cifar100: ImageNet takes longer to read" >&2; exit 2; }
    pretrain+=(--model mae_vit_micro_patch4 --patch_size 2 --epochs 40 --warmup_epochs 2 --data_cache device)
    finetune+=(--epochs 10 --warmup_epochs 0.5 --eval_freq 10)
    encoder=(--model vit_micro_patch4 --global_pool)
fi

run mae "${mae[@]}"
run mlo "${mlo[@]}"
for k in $other_unrolls; do
    run "unroll$k" "${mlo[@]}" --mlo_unroll "$k"
done
for p in $patches; do
    run "mae-patch$p" "${mae[@]}" --patch_size "$p"
    run "patch$p" "${mlo[@]}" --patch_size "$p"
done
for ratio in 60 80 90; do
    run "ratio$ratio" "${mlo[@]}" --mask_ratio "0.$ratio"
done
run every5 "${mlo[@]}" --mlo_update_every 5
run blo "${mlo[@]}" --mlo_levels 2
run finetuned "${mlo[@]}" --mlo_stage2 finetune --mlo_prox 0.1
run curriculum "${mlo[@]}" --mask_ratio 0.5 --mask_ratio_end 0.9
table
