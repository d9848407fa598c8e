#!/usr/bin/env bash
# MAE, MAE-K, EMA-MAE, RC-MAE and DMAE on a small CIFAR-10: 500 training images of each class for pretraining,
# probing and fine-tuning, the whole test set, three seeds. One MAE run takes about two minutes on two cores.
#
#   bash scripts/cifar10_methods_study.sh OUT --data CIFAR10        (train/<class>/ and val/<class>/)
#
# More in scripts/_sweep.sh: --only, --list, SEEDS (here 0 1 2).
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/_cifar10_small.sh"

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
# MAE for at least the time of the most expensive method, by the ratios of benchmarks/methods.py.
run mae-equaltime --epochs 16
table
