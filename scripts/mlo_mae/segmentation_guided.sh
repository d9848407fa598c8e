#!/usr/bin/env bash
# Masks learned from segmentation (Guo et al., Section 4.5, Table 9): MAE, and MLO-MAE guided by ADE20K's masks, both
# pretrained on ADE20K's images, then fine-tuned on it with UPerNet (configs/mlo_mae/ade20k_*.yaml).
#
#   bash scripts/mlo_mae/segmentation_guided.sh OUT --data ADE20K      (ADEChallengeData2016, or the folder that has it)
#   bash scripts/mlo_mae/segmentation_guided.sh OUT --cpu_small        rehearsal on made-up scenes, about two minutes
#
# Published mIoU: MAE 28.8, MLO-MAE 29.1. Of this experiment the paper states the data set only, in all stages. What it
# states elsewhere: ViT-B, batches of 256, mask ratio 0.75, unrolling 1, an 80/20 split (Table 12 and B.3, ImageNet);
# AdamW, UPerNet, 160,000 steps of batch 8, rate 1e-4 (B.6, from encoders of ImageNet). Our reading: a linear head on
# patch tokens as the task; fine-tuning directly from the pretraining; 800 epochs (EPOCHS), which are 62,400 steps, and
# 50,400 of MLO-MAE, whose epoch has the images that are not held out; MAE's base rate; the rest of the fine-tuning as in
# MAE's transfer to ADE20K.
#
# --only, --list, SEEDS and GPUS as in scripts/_sweep.sh; other flags are passed to every pretraining.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_sweep.sh"

[ -z "$gpu_hour" ] || { echo "error: $0 has no --gpu_hour: set its length by EPOCHS" >&2; exit 2; }
data_flags=(--dataset ade20k --data_path "$data" --num_workers 12)
recipes="$configs/mlo_mae" segmenting="$configs/mlo_mae/ade20k_segment.yaml"
mae=(--config "$recipes/ade20k_mae.yaml") mlo=(--config "$recipes/ade20k_mlo.yaml")
pretrain=(--batch_size "$(per_process "$(images_of "$recipes/ade20k_mae.yaml")")" ${EPOCHS:+--epochs "$EPOCHS"})
segment=(--config "$segmenting" --batch_size "$(per_process "$(images_of "$segmenting")")")
if [ -n "$cpu_small" ]; then
    data_flags=(--dataset scenes --scene_digits 0 1 7 --scene_count 320 32 --num_workers 0)
    pretrain+=(--model mae_vit_micro_patch4 --input_size 32 --batch_size 32 --epochs "${EPOCHS:-6}" --warmup_epochs 1
        --lr 1e-3)
    mlo+=(--mlo_hidden 64 --mlo_mask_lr 0.1)
    segment+=(--model vit_micro_patch4 --input_size 32 --short_side 32 --head_width 32 --stride 21 --max_steps 40
        --warmup_steps 4 --lr 3e-3)
fi

evaluate() { # NAME CHECKPOINT SEED KEY
    once "$out/segment-$1/results.jsonl" main main_segment.py "${data_flags[@]}" "${segment[@]}" --seed "$3" \
        --finetune "$2" --checkpoint_key "$4" --keep 1 --output_dir "$out/segment-$1" --resume auto
}

table() {
    [ -n "$list" ] || "$python" "$root/tools/collect.py" "$out"/segment-*-seed* --by run --strip segment- \
        --metric eval/mIoU eval/pixel_acc
}

run mae "${mae[@]}"
run mlo "${mlo[@]}"
table
