#!/usr/bin/env bash
# Continued pretraining on a small expert set (Guo, Ban, Xie, Section 4.4, Table 6). A MAE of ImageNet is fine-tuned on the
# set as it is (none), after MAE on the set (mae), and after MLO-MAE on the set (mlo); mlo-only is MLO-MAE on the set from
# random weights. At the end a table: top-1 and balanced accuracy. The recipes: configs/mlo_mae.
#
#   START=mae_pretrain_vit_base.pth bash scripts/mlo_mae/continued.sh OUT --data PAD-UFES-20
#   START=RUN/checkpoint-799.pth MODEL=vit_large_patch16 bash scripts/mlo_mae/continued.sh OUT --data DIR --only "none mlo"
#   bash scripts/mlo_mae/continued.sh OUT --cpu_small    (all in 2.5 minutes of CPU time; makes its own START and set)
#
# --data is a folder with metadata.csv (PAD-UFES-20), of which a fifth of the patients is for evaluation; or class folders,
# with train/ and val/, or without (PDDB): then a fifth of each class is for evaluation. START is a released MAE or a
# checkpoint of main_pretrain.py, MODEL its encoder (default vit_base_patch16). Unrolling is that of the paper's ImageNet
# runs (Table 12); it gives no other setting of these runs, so lengths and learning rates are ours. More in
# scripts/_sweep.sh.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
SET="${START:-}${MODEL:+ $MODEL}"  # with another start, finished runs would be others
. "$(dirname "${BASH_SOURCE[0]}")/../_sweep.sh"

[ -z "$gpu_hour" ] || { echo "error: $0 has no --gpu_hour: shorten the pretraining with --epochs" >&2; exit 2; }
[ -n "$list$cpu_small${START:-}" ] ||
    { echo "error: START is needed: a released MAE (mae_pretrain_vit_base.pth) or a checkpoint of main_pretrain.py" >&2; exit 2; }

by_patient() { # FOLDER: set the flags that read its metadata.csv
    data_flags=(--dataset filelist --data_path "$1" --train_list "$1/metadata.csv" --group_column patient_id --val_fraction 0.2)
}

start=${START:-} model=${MODEL:-vit_base_patch16} recipes="$configs/mlo_mae"
batch=$(per_process "$(images_of "$recipes/continued_mae.yaml")")
if [ -f "$data/metadata.csv" ]; then
    by_patient "$data"
else
    data_flags=(--data_path "$data")
    [ -d "$data/train" ] || data_flags+=(--val_fraction 0.2)
fi
data_flags+=(--num_workers 12)
pretrain=(--model "mae_$model" --batch_size "$batch")
finetune=(--config "$recipes/continued_finetune.yaml" --batch_size "$batch")
linprobe=()  # the table has fine-tuning alone
encoder=(--model "$model" --global_pool)
mae=(--config "$recipes/continued_mae.yaml") mlo=(--config "$recipes/continued_mlo.yaml")
if [ -n "$cpu_small" ]; then
    small_recipe
    linprobe=() start="$out/start/checkpoint-9.pth"
    by_patient "$out/set"
    data_flags+=(--input_size 16 --num_workers 1)
    pretrain+=(--aug mae --epochs 10)
    finetune+=(--epochs 10 --eval_freq 10)
    mae=() mlo=(--mlo_mae --mlo_labels same --mlo_unroll 1 --mlo_hidden 64 --mlo_mask_lr 0.1)
    if [ -z "$list" ]; then
        [ -e "$out/set/metadata.csv" ] || rm -rf "$out/set"
        once "$out/set/metadata.csv" "$python" "$root/tools/make_lesions.py" "$out/set" --patients 300 --size 16
        # Digits on photographs stand for ImageNet.
        once "$out/start/encoder.safetensors" main main_pretrain.py --dataset scenes --scene_count 1000 --scene_size 24 \
            --input_size 16 --num_workers 1 --data_cache ram "${pretrain[@]}" --aug none --epochs 10 --keep 1 \
            --output_dir "$out/start" --resume auto
    fi
fi

scratch none "$start"
run mae "${mae[@]}" --init_from "$start"
run mlo-only "${mlo[@]}"
run mlo "${mlo[@]}" --init_from "$start"
[ -n "$list" ] || "$python" "$root/tools/collect.py" "$out"/finetune-*-seed* --by run --strip finetune- \
    --metric eval/acc1 eval/balanced_acc
