#!/usr/bin/env bash
# "Exploring: Masked Autoencoders Are Scalable Vision Learners" (García, Senel, Frantzolas) on Tiny ImageNet: ViT-B with
# patches of 8 pixels at 64 px, batch 128, 500 epochs (50 of warm-up); fine-tuned for 300 epochs (10) with small and with
# full augmentation. Runs: no pretraining, the baseline (75 %, decoder 8 blocks of 512), mask ratios 50 and 90, decoder
# depth 1, decoder width 128, 3-Augment, and DMAE (Bai et al., CVPR 2023) from a ViT-L at mask ratios 75 and 90
# (configs/dmae).
#
#   TEACHER=mae_visualize_vit_large.pth bash scripts/dmae/sweep.sh OUT --data TINY_IMAGENET
#   bash scripts/dmae/sweep.sh OUT --data TINY_IMAGENET --only "mask75 mask90"
#   TEACHER=… bash scripts/dmae/sweep.sh OUT --data TINY_IMAGENET --gpu_hour
#   bash scripts/dmae/sweep.sh OUT --cpu_small                    (makes its own teacher)
#
# TEACHER is a released MAE ViT-L, with or without its decoder; it was trained on ImageNet's pixel statistics, so these are
# used throughout. More in scripts/_sweep.sh.
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../_sweep.sh"

imagenet=(--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225)
data_flags=(--dataset "$(imagefolder_or tiny_imagenet)" --data_path "$data" "${imagenet[@]}" --num_workers 12)
recipes="$configs/dmae"
batch=$(per_process "$(images_of "$recipes/mae.yaml")")
mae=(--config "$recipes/mae.yaml")
pretrain=(--batch_size "$batch")
finetune=(--config "$recipes/finetune.yaml" --batch_size "$batch")
finetune_small=("${finetune[@]}" --aug_preset small)
extra_finetunes=(finetune_small)
linprobe=(--cache_features)
encoder=(--model vit_base_patch8 --global_pool)
dmae=(--config "$recipes/dmae.yaml" --dmae_teacher "${TEACHER:-}")
if [ -n "$gpu_hour" ]; then  # 9 runs: pretraining 250, with the teacher 330; fine-tuning twice 45; starting, probing 80
    data_flags+=(--input_size 64)
    pretrain+=(--model mae_vit_small_patch16 --patch_size 8 --epochs 20 --warmup_epochs 2 --data_cache device)
    finetune+=(--epochs 5 --warmup_epochs 0.2 --eval_freq 5)
    finetune_small=("${finetune[@]}" --aug_preset small)
    encoder=(--model vit_small_patch16 --patch_size 8 --global_pool)
fi
if [ -n "$cpu_small" ]; then
    small_recipe
    extra_finetunes=()
    TEACHER="$out/teacher/checkpoint-29.pth"
    mae=() dmae=(--dmae_teacher "$TEACHER" --dmae_proj mlp)
    [ -n "$list" ] || once "$out/teacher/encoder.safetensors" main main_pretrain.py "${data_flags[@]}" "${pretrain[@]}" \
        --model mae_deit_tiny_patch4 --decoder_embed_dim 96 --decoder_depth 2 --decoder_num_heads 4 --norm_pix_loss \
        --epochs 30 --keep 1 --output_dir "$out/teacher" --resume auto
fi

scratch scratch
run mask75 "${mae[@]}"
run mask50 "${mae[@]}" --mask_ratio 0.5
run mask90 "${mae[@]}" --mask_ratio 0.9
run depth1 "${mae[@]}" --decoder_depth 1
run width128 "${mae[@]}" --decoder_embed_dim 128
run three-augment "${mae[@]}" --aug three
if [ -z "${TEACHER:-}" ] && [ -z "$list" ]; then
    ! wanted dmae75 || echo "note: DMAE is left out; name its teacher: TEACHER=mae_visualize_vit_large.pth"
else
    run dmae75 "${dmae[@]}"
    run dmae90 "${dmae[@]}" --mask_ratio 0.9
fi
table
