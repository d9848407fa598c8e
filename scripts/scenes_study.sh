#!/usr/bin/env bash
# MAE, MAE-K and RC-MAE on made-up scenes, evaluated by segmentation and detection, three seeds: no download. Each
# encoder is pretrained on the images alone, then frozen (nearest neighbours and a linear head on its patch tokens),
# fine-tuned for segmentation with UPerNet, and for detection with Faster R-CNN. `random` is an encoder without
# pretraining. About 17 minutes a seed on one core that multiplies bf16 fast; started again, it continues where it was
# stopped.
#
#   bash scripts/scenes_study.sh OUT
#
# More in scripts/_sweep.sh: --only, --list, SEEDS (here 0 1 2).
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
SEEDS=${SEEDS:-0 1 2}
. "$(dirname "${BASH_SOURCE[0]}")/_sweep.sh" --cpu_small "$@"  # small, and without --data

data_flags=(--dataset scenes --scene_size 24 --scene_sides 0.5 0.85 --scene_most 2 --input_size 24 --patch_size 4
    --num_workers 0)
# Small digits are harder: with sides of 0.25 to 0.5 and patches of 8 pixels, strokes are thinner than a patch, and an
# encoder that was pretrained for 3,000 steps was no better than an untrained one.
pretrain=(--model mae_vit_micro_patch4 --scene_count 2500 250 --aug none --norm_pix_loss --mask_ratio 0.6 --batch_size 32
    --lr 1.5e-3 --epochs 40 --warmup_epochs 4 --save_freq 5 --vis_freq 40 --data_cache ram)
labelled=(--scene_digits 0 1 7 --scene_count 300 250)
# With --head_norm batch the loss in training was as low, but running statistics of batches of 8 were so far from those of
# a batch that evaluation saw background alone. In so few steps, changes of size and dropped blocks only delay learning.
segment=(--head_width 48 --head_norm layer --batch_size 8 --epochs 16 --lr 3e-3 --scale 1 1 --drop_path 0 --eval_freq 16)
# In half as many steps of twice as many images box AP was below 4.
detect=(--detector faster --head_width 32 --window 0 --rois_per_image 64 --batch_size 4 --epochs 14 --lr 1e-3
    --lsj 0.7 1.4 --drop_path 0 --eval_freq 14)

evaluate() { # NAME CHECKPOINT SEED KEY: frozen, segmentation, detection
    local start=(--model vit_micro_patch4 --seed "$3") folder
    [ "$4" = model ] || return 0  # RC-MAE's teacher is an average over 250 steps: too many for so short a run
    [ -z "$2" ] || start+=(--finetune "$2" --checkpoint_key "$4")
    once "$out/frozen-$1/dense.json" "$python" "$root/tools/dense_probe.py" "${2:-random}" --model vit_micro_patch4 \
        --checkpoint_key "$4" "${data_flags[@]}" "${labelled[@]}" --seed "$3" --out "$out/frozen-$1/dense.json"
    folder="$out/segment-$1"
    once "$folder/scores.json" main main_segment.py "${data_flags[@]}" "${labelled[@]}" "${start[@]}" "${segment[@]}" --keep 1 \
        --output_dir "$folder" --resume auto
    folder="$out/detect-$1"
    once "$folder/scores.json" main main_detect.py "${data_flags[@]}" "${labelled[@]}" "${start[@]}" "${detect[@]}" --keep 1 \
        --output_dir "$folder" --resume auto
}

table() {
    [ -n "$list" ] || "$python" "$root/tools/collect.py" "$out"/{frozen,segment,detect}-*-seed* --by run \
        --strip frozen- segment- detect- --metric segment:eval/mIoU detect:eval/box_AP detect:eval/box_AP50 \
        linear_mIoU knn_mIoU
}

scratch random
run mae
run maek --mae_k 10
run rcmae --rc_mae
table
