#!/usr/bin/env bash
# Does MAE gain from bigger data and bigger models (Singh et al. 2023, Figure 2)? A grid of (model x share of the images),
# every run with the same number of optimizer steps, then fine-tuned, probed and few-shot; a table and three figures:
# accuracy against the number of images for every model.
#
#   WEAK=DIR bash scripts/maws/scaling.sh OUT --data IMAGENET            (WEAK: a folder of images, by default --data's)
#   bash scripts/maws/scaling.sh OUT --cpu_small --data CIFAR10
#
# SIZES (encoders), SHARES and STEPS come from the environment; smaller shares are parts of larger ones. Further flags go
# to MAE; --only, --list, SEEDS and GPUS as in scripts/_sweep.sh.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../_sweep.sh"
. "$here/_stages.sh"

[ -z "$gpu_hour" ] || { echo "error: $0 has no --gpu_hour: set its length by SIZES, SHARES and STEPS" >&2; exit 2; }
if [ -n "$cpu_small" ]; then
    sizes=${SIZES:-vit_micro_patch4 deit_tiny_patch4} shares=${SHARES:-0.1 0.3 1} steps=${STEPS:-250}
    . "$here/_small.sh"
    images="$weak/train"
else
    sizes=${SIZES:-vit_base_patch16 vit_large_patch16 vit_huge_patch14} shares=${SHARES:-0.01 0.1 1} steps=${STEPS:-250000}
    recipe="$configs/mae/pretrain_vit_large.yaml"
    images=${WEAK:-$data/train} labelled=$data statistics=()
    pretrain=(--config "$recipe" --accum_iter "$(accumulation_of "$recipe")")
    evaluation_recipes
fi

part() { # SHARE: print the list file of this share of the images, the first ones of one random order
    local all="$out/lists/all.txt" one="$out/lists/$1.txt"
    if [ ! -e "$one" ]; then
        mkdir -p "$out/lists"
        [ -e "$all" ] || (cd "$images" && find -L . -type f | sort | shuf --random-source=<(yes)) > "$all"
        head -n "$(share "$1" "$(wc -l < "$all")" | cut -d. -f1)" "$all" > "$one"
    fi
    echo "$one"
}

for size in $sizes; do
    for portion in $shares; do
        name=$size-share$portion
        chosen "$name" || continue
        for seed in $SEEDS; do
            folder="$out/$name-seed$seed" encoder=(--model "$size")
            once "$folder/encoder.safetensors" main main_pretrain.py --dataset filelist --data_path "$images" \
                --train_list "$(part "$portion")" "${statistics[@]}" "${pretrain[@]}" --model "mae_$size" \
                --max_steps "$steps" --seed "$seed" --vis_freq 0 --keep 1 --output_dir "$folder" --resume auto \
                "${extra[@]}"
            judge "$name-seed$seed" "$folder/encoder.safetensors" "$seed"
        done
    done
done
figures pretrain.model,pretrain.images.train pretrain.images.train scaling
