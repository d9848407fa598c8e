#!/usr/bin/env bash
# MAE, MAE-K, EMA-MAE, RC-MAE and DMAE on CIFAR-10 with a laptop's means: 500 training images of each class for everything
# (pretraining, probing, fine-tuning), the whole test set, three seeds. One MAE run takes about two minutes on two cores.
#
#   bash scripts/cifar10_methods_study.sh OUT --data CIFAR10        (train/<class>/ and val/<class>/)
#
# More in scripts/_sweep.sh: --only, --list, SEEDS (here 0 1 2).
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
SEEDS=${SEEDS:-0 1 2}
. "$(dirname "${BASH_SOURCE[0]}")/_sweep.sh"

few="$out/data"
if [ -z "$list" ] && [ ! -d "$few" ]; then
    rm -rf "$few.tmp"
    for class in "$data"/train/*/; do
        mkdir -p "$few.tmp/train/$(basename "$class")"
        find "$(realpath "$class")" -type f | sort | sed -n 1,500p |
            xargs -d '\n' ln -s -t "$few.tmp/train/$(basename "$class")"
    done
    ln -s "$(realpath "$data/val")" "$few.tmp/val"
    mv "$few.tmp" "$few"
fi

data_flags=(--data_path "$few" --mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159 --num_workers 1)
common=(--norm_pix_loss --aug crop --batch_size 100 --lr 1.5e-3 --warmup_epochs 1 --save_freq 1)
pretrain=(--model mae_vit_micro_patch4 "${common[@]}" --epochs 9 --amp_dtype fp32 --vis_freq 5)
finetune=(--aug_preset small --aug crop --smoothing 0 --reprob 0 --drop_path 0 --batch_size 50 --epochs 4
    --warmup_epochs 1 --lr 4e-3 --layer_decay 0.75 --save_freq 10 --eval_freq 4)
linprobe=(--cache_features)
encoder=(--model vit_micro_patch4 --global_pool --amp_dtype fp32)

# The teacher of DMAE: a larger encoder, on the same images, for 40 epochs.
teacher="$out/teacher"
if [ -z "$list" ] && wanted dmae; then
    once "$teacher/encoder.safetensors" main main_pretrain.py "${data_flags[@]}" --model mae_deit_tiny_patch4 \
        --decoder_embed_dim 96 --decoder_depth 2 --decoder_num_heads 4 "${common[@]}" --epochs 40 --vis_freq 10 \
        --seed 100 --keep 1 --output_dir "$teacher" --resume auto
fi

scratch random
run mae
run maek --mae_k 3
run emamae --ema_mae --wse 3 --tau 0.005
run rcmae --rc_mae
run dmae --dmae_teacher "$teacher/checkpoint-39.pth" --dmae_teacher_model mae_deit_tiny_patch4
# MAE with at least the time that the dearest method takes, by the ratios of benchmarks/methods.py.
run mae-equaltime --epochs 16
table
