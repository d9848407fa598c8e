#!/usr/bin/env bash
# MAE against MLO-MAE in the same time: CIFAR-10, ViT-Small with patches of 4, batch 512, bf16, on one GPU. A benchmark
# first measures the cost of an MLO-MAE step on this machine; MLO-MAE then trains for correspondingly fewer epochs.
#
#   EPOCHS=100 bash scripts/mlo_mae/equal_time.sh OUT --data CIFAR10      (train/<class>/ and val/<class>/, or torchvision's)
#
# EPOCHS (default 100) is MAE's. More in scripts/_sweep.sh.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_sweep.sh"

epochs=${EPOCHS:-100}
data_flags=(--dataset "$(imagefolder_or cifar10)" --data_path "$data" --num_workers 12
    --mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159)
pretrain=(--model mae_vit_small_patch4 --norm_pix_loss --aug crop --batch_size "$(per_process 512)" --blr 1e-3
    --warmup_epochs 5 --vis_freq 10)
finetune=(--batch_size "$(per_process 512)" --epochs 20 --warmup_epochs 2 --blr 5e-4 --layer_decay 0.75 --drop_path 0.1)
linprobe=(--cache_features)
encoder=(--model vit_small_patch4 --global_pool)

cost="$out/cost.json"
if [ -z "$list" ]; then
    mkdir -p "$out"
    once "$cost" "$python" "$root/benchmarks/mlo.py" --model mae_vit_small_patch4 --batch_size 512 --rounds 3 \
        --device "${DEVICE:-cuda}" --only "fd, every 1" "fd, every 5" --out "$cost"
fi
in_time() { # VARIANT: print its epochs in MAE's time; an epoch has four fifths of the images
    [ -z "$list" ] || { echo "$epochs"; return; }
    "$python" -c "import json, sys; row = json.load(open(sys.argv[1]))['rows'][sys.argv[2]]
print(max(6, round(float(sys.argv[3]) / row['time'] / 0.8)))" "$cost" "$1" "$epochs"
}

run mae --epochs "$epochs"
run mlo --mlo_mae --mlo_labels same --epochs "$(in_time 'fd, every 1')"
run mlo-every5 --mlo_mae --mlo_labels same --mlo_update_every 5 --epochs "$(in_time 'fd, every 5')"
table
