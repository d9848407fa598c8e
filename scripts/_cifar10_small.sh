# shellcheck shell=bash disable=SC2154,SC2034,SC1091
# Sourced by the small studies on CIFAR-10: 500 training images of each class for all stages
# (pretraining, probing, fine-tuning), the whole test set, three seeds, linked into OUT/data. Sets the arrays of
# _sweep.sh; --data is CIFAR-10 as train/<class>/ and val/<class>/.
SEEDS=${SEEDS:-0 1 2}
. "$(dirname "${BASH_SOURCE[0]}")/_sweep.sh"

few="$out/data"
if [ -z "$list" ] && [ ! -d "$few" ]; then
    rm -rf "$few.tmp"
    for class in "$data"/train/*/; do
        mkdir -p "$few.tmp/train/$(basename "$class")"
        find "$(realpath "$class")" -type f -print0 | sort -z | sed -zn 1,500p |
            xargs -0 -r ln -s -t "$few.tmp/train/$(basename "$class")"
    done
    ln -s "$(realpath "$data/val")" "$few.tmp/val"
    mv "$few.tmp" "$few"
fi

data_flags=(--data_path "$few" --mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159 --num_workers 1)
common=(--norm_pix_loss --aug crop --batch_size 100 --lr 1.5e-3 --warmup_epochs 1 --save_freq 1)
pretrain=(--model mae_vit_micro_patch4 "${common[@]}" --epochs 9 --amp_dtype fp32 --vis_freq 5)
# 400 steps with RandAugment: fine-tuning has not converged, and is behind the linear probe.
finetune=(--aug_preset small --aug crop --smoothing 0 --reprob 0 --drop_path 0 --batch_size 50 --epochs 4
    --warmup_epochs 1 --lr 4e-3 --layer_decay 0.75 --save_freq 10 --eval_freq 4)
linprobe=(--cache_features)
encoder=(--model vit_micro_patch4 --global_pool --amp_dtype fp32)
