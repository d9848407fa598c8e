#!/usr/bin/env bash
# MAE-K and EMA-MAE as in the Bootstrap-MAE report (Li): DeiT-Tiny on CIFAR-10 at 32 px, batch 512, 200 epochs; fine-tuned
# for 100 epochs, and probed linearly (configs/bootstrap_mae). Runs: the baseline, a random encoder, K in {1, 2, 4, 5, 10, 20}, WSE in {0, 5, 20,
# 50} at tau 0.005, tau in {0.1, 0.3} at WSE 20. Settings that the report omits are the official MAE's defaults.
#
#   bash scripts/bootstrap_mae/sweep.sh OUT --data CIFAR10        (train/<class>/ and val/<class>/, or torchvision's files)
#   bash scripts/bootstrap_mae/sweep.sh OUT --data CIFAR10 --only "mae k10 k20 wse20"
#   bash scripts/bootstrap_mae/sweep.sh OUT --data CIFAR10 --gpu_hour
#   bash scripts/bootstrap_mae/sweep.sh OUT --cpu_small
#
# More in scripts/_sweep.sh. For an estimate of the time see docs/results.md.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_sweep.sh"

data_flags=(--dataset "$(imagefolder_or cifar10)" --data_path "$data" --num_workers 12
    --mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159)
recipes="$configs/bootstrap_mae"
batch=$(per_process "$(images_of "$recipes/mae.yaml")")
mae=(--config "$recipes/mae.yaml") mae_k=(--config "$recipes/mae_k.yaml") ema_mae=(--config "$recipes/ema_mae.yaml")
pretrain=(--batch_size "$batch")
finetune=(--config "$recipes/finetune.yaml" --batch_size "$batch")
linprobe=(--config "$recipes/linprobe.yaml" --batch_size "$batch")
encoder=(--model deit_tiny_patch4 --global_pool)
if [ -n "$cpu_small" ]; then
    small_recipe
    mae=() mae_k=() ema_mae=(--ema_mae)
fi
scaled() { echo "$1"; }  # EPOCHS of the paper's 200: print the corresponding epochs of these runs
if [ -n "$gpu_hour" ]; then  # 13 runs: pretraining 120 (MAE), 165 (features); fine-tuning 65; starting and probing 60
    pretrain+=(--epochs 100 --warmup_epochs 20 --data_cache device)
    finetune+=(--epochs 20 --warmup_epochs 1 --eval_freq 20)
    linprobe=(--cache_features)
    scaled() { echo $((($1 + 1) / 2)); }
fi

run mae "${mae[@]}"
scratch scratch
for k in 1 2 4 5 10 20; do
    [ -n "$gpu_hour" ] && [ "$k" = 1 ] && continue  # half an epoch
    run "k$k" "${mae_k[@]}" --mae_k "$(scaled "$k")"
done
for wse in 0 5 20 50; do
    [ -n "$cpu_small" ] && [ "$wse" = 50 ] && continue  # longer than its runs
    run "wse$wse" "${ema_mae[@]}" --wse "$(scaled "$wse")" --tau 0.005
done
for tau in 0.1 0.3; do
    run "wse20-tau$tau" "${ema_mae[@]}" --wse "$(scaled 20)" --tau "$tau"
done
table
