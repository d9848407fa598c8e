#!/usr/bin/env bash
# MAE, MAE-K and RC-MAE on made-up scenes, evaluated by segmentation and detection, three seeds: no download. Each
# encoder is pretrained on the images alone, then frozen (nearest neighbours and a linear head on its patch tokens),
# fine-tuned for segmentation with UPerNet, and for detection with Mask R-CNN. `random` is an encoder without
# pretraining. About an hour and a half a seed on one core that multiplies bf16 fast; started again, it
# continues where it was stopped.
#
#   bash scripts/scenes_study.sh OUT
#
# More in scripts/_sweep.sh: --only, --list, SEEDS (here 0 1 2).
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
SEEDS=${SEEDS:-0 1 2}
. "$(dirname "${BASH_SOURCE[0]}")/_sweep.sh" --cpu_small "$@"  # small, and without --data

data_flags=(--dataset scenes --scene_digits 0 1 7 --scene_size 64 --scene_count 2500 250 --input_size 64 --patch_size 8
    --num_workers 0)
# At a mask ratio of 0.75, too little of a digit is left to tell which one it is. Fine-tuned mIoU of seed 0: untrained 37.3,
# after 20 epochs 39.8, after 150 epochs 42.8.
pretrain=(--model mae_vit_micro_patch4 --aug crop --mask_ratio 0.6 --batch_size 64 --lr 2e-3 --epochs 100 --warmup_epochs 4
    --save_freq 5 --vis_freq 50 --data_cache ram)
# With --head_norm batch the loss in training was as low, but running statistics of batches of 8 were so far from those of
# a batch that evaluation saw background alone. In so few steps, changes of size and dropped blocks only delay learning.
segment=(--head_width 48 --head_norm layer --batch_size 8 --epochs 2 --lr 3e-3 --scale 1 1 --drop_path 0 --eval_freq 2)
# After half an epoch box AP was still below 1; after 1.3 epochs 31, with and without pretraining (seed 0).
detect=(--head_width 32 --window 0 --anchors 8 16 32 64 128 --batch_size 4 --epochs 2 --lr 1e-3 --lsj 0.5 2 --drop_path 0
    --eval_freq 2)

evaluate() { # NAME CHECKPOINT SEED KEY: frozen, segmentation, detection
    local start=(--model vit_micro_patch4 --seed "$3") folder
    [ "$4" = model ] || return 0  # RC-MAE's teacher is an average over 250 steps: too many for so short a run
    [ -z "$2" ] || start+=(--finetune "$2" --checkpoint_key "$4")
    once "$out/frozen-$1/dense.json" "$python" "$root/tools/dense_probe.py" "${2:-random}" --model vit_micro_patch4 \
        --checkpoint_key "$4" "${data_flags[@]}" --seed "$3" --out "$out/frozen-$1/dense.json"
    folder="$out/segment-$1"
    once "$folder/scores.json" main main_segment.py "${data_flags[@]}" "${start[@]}" "${segment[@]}" --keep 1 \
        --output_dir "$folder" --resume auto
    folder="$out/detect-$1"
    once "$folder/scores.json" main main_detect.py "${data_flags[@]}" "${start[@]}" "${detect[@]}" --keep 1 \
        --output_dir "$folder" --resume auto
}

table() {
    [ -n "$list" ] || "$python" "$root/tools/collect.py" "$out"/{frozen,segment,detect}-*-seed* --by run \
        --strip frozen- segment- detect- --metric segment:eval/mIoU detect:eval/box_AP detect:eval/box_AP50 \
        detect:eval/mask_AP linear_mIoU knn_mIoU
}

scratch random
run mae
run maek --mae_k 50
run rcmae --rc_mae
table
