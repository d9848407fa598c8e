#!/usr/bin/env bash
# MAE on a small CIFAR-10: three seeds of pretraining, each linear probe beside that of a random encoder with the same
# architecture and seed. About 9 minutes a seed on two cores. Finished parts are skipped when started again.
#
#   bash scripts/mae/cifar10_study.sh DATA OUT        DATA holds train/<class>/ and val/<class>/
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_help.sh"
data=${1:?usage: cifar10_study.sh DATA OUT}
out=${2:?usage: cifar10_study.sh DATA OUT}
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python}
stats=(--mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159)

probe() { # name, checkpoint or "", seed
    [ -f "$out/$1/probe.json" ] && return
    "$python" "$here/main_linprobe.py" --data_path "$data" "${stats[@]}" --model vit_micro_patch4 --finetune "$2" \
        --global_pool --cache_features --seed "$3" --num_workers 2 --output_dir "$out/$1" --overwrite
}

for seed in 0 1 2; do
    run="$out/mae-seed$seed"
    if [ ! -f "$run/encoder.safetensors" ]; then
        "$python" "$here/main_pretrain.py" --data_path "$data" "${stats[@]}" --model mae_vit_micro_patch4 \
            --norm_pix_loss --aug crop --batch_size 128 --lr 1.5e-3 --epochs 3 --warmup_epochs 1 \
            --seed "$seed" --num_workers 1 --vis_freq 1 --save_freq 1 --keep 1 --output_dir "$run" --resume auto
    fi
    probe "probe-mae-seed$seed" "$run/checkpoint-2.pth" "$seed"
    probe "probe-random-seed$seed" "" "$seed"
done
"$python" "$here/tools/collect.py" "$out"/probe-*
