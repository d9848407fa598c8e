#!/usr/bin/env bash
# MLO-MAE on a small CIFAR-10 (_cifar10_small.sh): MAE, masks learned without labels (HPM, AutoMAE) or by attention, masks
# learned from labels (moved every time, every fifth time, two levels), a frozen mask from an earlier run, an untrained
# encoder. 400 steps of 100 images for each; a fifth of the labelled training images is held out from stage I, so an epoch
# of MLO-MAE is shorter.
#
#   bash scripts/mlo_mae/cifar10_study.sh OUT --data CIFAR10        (train/<class>/ and val/<class>/)
#
# More in scripts/_sweep.sh: --only, --list, SEEDS (here 0 1 2).
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_cifar10_small.sh"

mlo=(--mlo_mae --mlo_labels same --mlo_batch_size 32 --mlo_mask_lr 0.1 --epochs 10)
scratch random
run mae --epochs 8
run hpm --hpm --epochs 8
run automae --automae --epochs 8
run attmask --attmask hint --epochs 8
run mlo "${mlo[@]}"
run mlo-every5 "${mlo[@]}" --mlo_update_every 5
run blo "${mlo[@]}" --mlo_levels 2
run frozen --mlo_mae --mlo_frozen --mlo_mask_net "$out/mlo-seed{seed}/checkpoint-9.pth" --epochs 8
# MAE for at least the time of MLO-MAE, by the ratios of benchmarks/mlo.py.
run mae-equaltime --epochs 20
table
