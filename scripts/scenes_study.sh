#!/usr/bin/env bash
# MAE, MAE-K and RC-MAE on made-up scenes, evaluated by segmentation and detection, three seeds: no download. Each
# encoder is pretrained on the images alone, then frozen (nearest neighbours and a linear head on its patch tokens),
# fine-tuned for segmentation with UPerNet, and for detection with Mask R-CNN. `random` is an encoder without
# pretraining. About 50 minutes a seed on one core that multiplies bf16 fast.
#
#   bash scripts/scenes_study.sh OUT
#
# More in scripts/_sweep.sh: --only, --list, SEEDS (here 0 1 2).
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
SEEDS=${SEEDS:-0 1 2}
. "$(dirname "${BASH_SOURCE[0]}")/_sweep.sh" --cpu_small "$@"  # small, and without --data

data_flags=(--dataset scenes --scene_digits 0 1 7 --scene_size 64 --scene_count 2500 250 --input_size 64 --num_workers 0)
pretrain=(--model mae_vit_micro_patch4 --norm_pix_loss --aug crop --batch_size 32 --lr 1.5e-3 --epochs 10
    --warmup_epochs 1 --save_freq 1 --vis_freq 5)
segment=(--head_width 48 --batch_size 8 --epochs 2 --lr 3e-3 --eval_freq 2)  # layer decay 0.65: from scratch, too, ahead of 0.9
detect=(--head_width 32 --window 8 --batch_size 4 --epochs 1 --lr 1e-3)

evaluate() { # NAME CHECKPOINT SEED KEY: frozen, segmentation, detection
    local start=(--model vit_micro_patch4 --seed "$3") folder
    [ -z "$2" ] || start+=(--finetune "$2" --checkpoint_key "$4")
    once "$out/frozen-$1/dense.json" "$python" "$root/tools/dense_probe.py" "${2:-random}" --model vit_micro_patch4 \
        --checkpoint_key "$4" "${data_flags[@]}" --seed "$3" --out "$out/frozen-$1/dense.json"
    folder="$out/segment-$1"
    once "$folder/checkpoint-1.pth" main main_segment.py "${data_flags[@]}" "${start[@]}" "${segment[@]}" --keep 1 \
        --output_dir "$folder" --resume auto
    folder="$out/detect-$1"
    once "$folder/checkpoint-0.pth" main main_detect.py "${data_flags[@]}" "${start[@]}" "${detect[@]}" --keep 1 \
        --output_dir "$folder" --resume auto
}

table() {
    [ -n "$list" ] || "$python" "$root/tools/collect.py" "$out"/{frozen,segment,detect}-*-seed* --by run \
        --strip frozen- segment- detect- --metric segment:eval/mIoU detect:eval/box_AP detect:eval/box_AP50 \
        detect:eval/mask_AP linear_mIoU knn_mIoU
}

scratch random
run mae
run maek --mae_k 5
run rcmae --rc_mae
table
