#!/usr/bin/env bash
# MAE, MAE-K, EMA-MAE, RC-MAE and DMAE on CIFAR-10 with a laptop's means: 500 training images of each class for everything
# (pretraining, probing, fine-tuning), the whole test set, three seeds. One MAE run takes about two minutes on two cores.
#
#   bash scripts/cifar10_methods_study.sh DATA OUT      DATA holds train/<class>/ and val/<class>/ of CIFAR-10
#
#   SEEDS, RUNS     what to do (default: all); finished parts are skipped when it is started again
#   EPOCHS          of the runs with equal images (default 9)
#   LONGER          of `mae-equaltime`, MAE with at least the time that the dearest method takes, by the ratios of
#                   benchmarks/methods.py (default 16)
set -euo pipefail
usage="usage: cifar10_methods_study.sh DATA OUT"
source=$(cd "${1:?$usage}" && pwd)
out=${2:?$usage}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-random mae maek emamae rcmae dmae mae-equaltime}
EPOCHS=${EPOCHS:-9}
LONGER=${LONGER:-16}
mkdir -p "$out"

data="$out/data"
if [ ! -d "$data" ]; then
    rm -rf "$data.tmp"
    for class in "$source"/train/*/; do
        mkdir -p "$data.tmp/train/$(basename "$class")"
        find "$class" -type f | sort | sed -n 1,500p | xargs -d '\n' ln -s -t "$data.tmp/train/$(basename "$class")"
    done
    ln -s "$source/val" "$data.tmp/val"
    mv "$data.tmp" "$data"
fi

common=(--data_path "$data" --mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159 --num_workers 1)
teacher="$out/teacher"

declare -A flags=(
    [mae]=""
    [maek]="--mae_k 3"
    [emamae]="--ema_mae --wse 3 --tau 0.005"
    [rcmae]="--rc_mae"
    [dmae]="--dmae_teacher $teacher/checkpoint-39.pth --dmae_teacher_model mae_deit_tiny_patch4"
)

pretrain() { # folder, epochs, flags
    local folder=$1 epochs=$2
    shift 2
    [ -f "$folder/encoder.safetensors" ] && return
    "$python" "$here/main_pretrain.py" "${common[@]}" --norm_pix_loss --aug crop --batch_size 100 --lr 1.5e-3 \
        --warmup_epochs 1 --epochs "$epochs" --save_freq 1 --keep 1 --output_dir "$folder" --resume auto "$@"
}

evaluate() { # name, checkpoint or "", seed, key in the checkpoint
    local encoder=("${common[@]}" --model vit_micro_patch4 --finetune "$2" --checkpoint_key "${4:-model}" --global_pool
        --seed "$3" --amp_dtype fp32)
    local probe="$out/probe-$1-seed$3" finetune="$out/finetune-$1-seed$3"
    [ -f "$probe/probe.json" ] || "$python" "$here/main_linprobe.py" "${encoder[@]}" --cache_features \
        --output_dir "$probe" --overwrite
    [ -f "$probe/knn.json" ] || "$python" "$here/tools/knn.py" "${encoder[@]}" --k 20 --out "$probe/knn.json"
    [ -f "$finetune/checkpoint-3.pth" ] || "$python" "$here/main_finetune.py" "${encoder[@]}" --aug_preset small --aug crop \
        --smoothing 0 --reprob 0 --drop_path 0 --batch_size 50 --epochs 4 --warmup_epochs 1 --lr 4e-3 \
        --layer_decay 0.75 --save_freq 10 --keep 1 --eval_freq 4 \
        --output_dir "$finetune" --resume auto
}

run() { # name, epochs, flags of the method, seed
    local folder="$out/$1-seed$4"
    # shellcheck disable=SC2086
    pretrain "$folder" "$2" --model mae_vit_micro_patch4 --amp_dtype fp32 --vis_freq 5 --seed "$4" $3
    evaluate "$1" "$folder/checkpoint-$(($2 - 1)).pth" "$4"
    case $1 in rcmae*) evaluate "$1-ema" "$folder/checkpoint-$(($2 - 1)).pth" "$4" model_ema ;; esac  # its teacher
}

# The teacher of DMAE: a larger encoder, on the same images, for 40 epochs.
case " $RUNS " in *" dmae "* | *" teacher "*)
    pretrain "$teacher" 40 --model mae_deit_tiny_patch4 --decoder_embed_dim 96 --decoder_depth 2 \
        --decoder_num_heads 4 --vis_freq 10 --seed 100 ;;
esac
for seed in $SEEDS; do
    for name in $RUNS; do
        case $name in
            random) evaluate random "" "$seed" ;;
            teacher) ;;
            mae-equaltime) run mae-equaltime "$LONGER" "" "$seed" ;;
            *) run "$name" "$EPOCHS" "${flags[$name]}" "$seed" ;;
        esac
    done
done
"$python" "$here/tools/table.py" "$out"/probe-*-seed* "$out"/finetune-*-seed* --strip probe- finetune-
