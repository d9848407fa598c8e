#!/usr/bin/env bash
# "The effectiveness of MAE pre-pretraining for billion-scale pretraining" (Singh et al. 2023): MAE, then weakly supervised
# pretraining (WSP) on hashtags, then fine-tuning, linear probe and few-shot. WSP starts from random weights and from MAE
# after 0.1, 0.5 and 1 of its budget; every length of WSP is a separate run with its own schedule. At the end a
# table and three figures: accuracy against epochs of WSP for every initialisation. The recipes: configs/maws, configs/mae.
#
#   WEAK=DIR WEAK_LIST=train.txt WEAK_VAL=val.txt bash scripts/maws/sweep.sh OUT --data IMAGENET
#   bash scripts/maws/sweep.sh OUT --gpu_hour --data CIFAR10
#   bash scripts/maws/sweep.sh OUT --cpu_small --data CIFAR10          (all as train/<class>/ and val/<class>/)
#
# The lists hold path<TAB>label,label,… below WEAK. MAE_EPOCHS is the budget, WSP_EPOCHS the lengths (both may be
# fractions), NOISE the noise of --cpu_small (3.5 minutes of CPU time for random-wsp0.5) and --gpu_hour; their hashtags are synthetic.
# Further flags go to MAE; --only, --list, SEEDS and GPUS as in scripts/_sweep.sh.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../_sweep.sh"
. "$here/_stages.sh"

if [ -n "$cpu_small" ]; then
    mae_epochs=${MAE_EPOCHS:-10} wsp_epochs=${WSP_EPOCHS:-0.5 1 2}
    . "$here/_small.sh"
elif [ -n "$gpu_hour" ]; then  # MAE 60; 16 runs: hashtags 10 to 110, fine-tuning 20, probe and few-shot 35, starting 50
    mae_epochs=${MAE_EPOCHS:-40} wsp_epochs=${WSP_EPOCHS:-4 10 20 40}
    . "$here/_small.sh"
else
    [ -n "$list" ] || : "${WEAK:?the folder of the images with hashtags}" "${WEAK_LIST:?their list file}" "${WEAK_VAL:?its held-out part}"
    mae_epochs=${MAE_EPOCHS:-$(value_of epochs --config "$configs/maws/mae.yaml")} wsp_epochs=${WSP_EPOCHS:-0.1 0.25 0.5 1}
    weak=${WEAK:-} weak_train=${WEAK_LIST:-} weak_val=${WEAK_VAL:-} labelled=$data statistics=()
    pretrain=(--config "$configs/maws/mae.yaml" --accum_iter "$(accumulation_of "$configs/maws/mae.yaml")")
    wsp=(--config "$configs/maws/wsp.yaml" --accum_iter "$(accumulation_of "$configs/maws/wsp.yaml")")
    evaluation_recipes
    encoder=(--model vit_base_patch16)
fi

mae() { # NAME SHARE SEED
    local epochs
    epochs=$(share "$2" "$mae_epochs")
    once "$out/$1-seed$3/encoder.safetensors" main main_pretrain.py --dataset filelist --data_path "$weak" \
        --train_list "$weak_train" --val_list "$weak_val" "${statistics[@]}" "${pretrain[@]}" --epochs "$epochs" \
        --warmup_epochs "$(share 0.1 "$epochs")" --seed "$3" --keep 1 --output_dir "$out/$1-seed$3" --resume auto \
        "${extra[@]}"
}

chain() { # SHARE (of the MAE budget; 0: random weights) EPOCHS (of WSP)
    local start=random name from seed
    [ "$1" = 0 ] || start=mae$1
    name=$start-wsp$2
    chosen "$name" || return 0
    for seed in $SEEDS; do
        from=()
        if [ "$1" != 0 ]; then
            mae "$start" "$1" "$seed"
            from=(--finetune "$out/$start-seed$seed/encoder.safetensors")
        fi
        once "$out/$name-seed$seed/results.jsonl" main main_finetune.py --dataset filelist --targets multilabel \
            --data_path "$weak" --train_list "$weak_train" --val_list "$weak_val" "${statistics[@]}" "${encoder[@]}" \
            --cls_token "${wsp[@]}" --epochs "$2" --warmup_epochs "$(share 0.1 "$2")" --seed "$seed" --keep 1 \
            "${from[@]}" --output_dir "$out/$name-seed$seed" --resume auto
        judge "$name-seed$seed" "$(newest "$out/$name-seed$seed")" "$seed"
    done
}

for start in 0 0.1 0.5 1; do
    for length in $wsp_epochs; do
        chain "$start" "$length"
    done
done
figures pretrain.epochs,finetune.epochs finetune.epochs wsp
