#!/usr/bin/env bash
# The encoders of MAE, EMA-MAE (bootstrapped) and RC-MAE compared with a random one on a small CIFAR-10
# (_cifar10_small.sh): linear probe, few-shot, robustness of the probe under 15 corruptions, the similarity ratio of test
# features, and their t-SNE. Pretrained as in cifar10_methods_study.sh; runs in its OUT are reused when OUT is the same.
#
#   bash scripts/cifar10_representation_study.sh OUT --data CIFAR10        (train/<class>/ and val/<class>/)
#
# IMAGES (500) is how many test images are corrupted, 75 ways each. More in scripts/_sweep.sh: --only, --list, SEEDS (here
# 0 1 2).
# shellcheck disable=SC2034,SC2154,SC1091  # arrays are read by _sweep.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/_cifar10_small.sh"

evaluate() { # NAME CHECKPOINT SEED KEY: replaces the function of _sweep.sh
    local common=("${data_flags[@]}" "${encoder[@]}" --seed "$3") corrupt="$out/robustness-$1"
    [ -z "$2" ] || common+=(--finetune "$2" --checkpoint_key "$4")
    once "$out/linear-$1/results.jsonl" main main_linprobe.py "${common[@]}" "${linprobe[@]}" \
        --output_dir "$out/linear-$1" --overwrite
    tool fewshot "$1" json "${common[@]}"
    tool tsne "$1" png "${data_flags[@]}" "${encoder[@]}" --seed "$3" --checkpoint_key "$4" "${2:-random}"
    tool robustness "$1" json "${data_flags[@]}" --seed "$3" --amp_dtype fp32 "$out/linear-$1/probe.pth" --corrupt \
        --images "${IMAGES:-500}" --picture "$corrupt/corruptions.png"
}

tool() { # COMMAND NAME ENDING FLAGS…
    local folder="$out/$1-$2" command=$1 ending=$3
    shift 3
    once "$folder/results.jsonl" "$python" "$root/tools/$command.py" "$@" --out "$folder/$command.$ending"
}

run mae
run emamae --ema_mae --wse 3 --tau 0.005
run rcmae --rc_mae
scratch random
[ -z "$list$only" ] || exit 0

first=${SEEDS%% *}
"$python" "$root/tools/tsne.py" "${data_flags[@]}" "${encoder[@]}" --seed "$first" --out "$out/tsne.png" \
    random "$out"/{mae,emamae,rcmae}-seed"$first/checkpoint-8.pth" --titles random MAE EMA-MAE RC-MAE
# The seed draws the test images of t-SNE and of the corruptions, hence --allow_differing.
"$python" "$root/tools/collect.py" "$out"/{linear,fewshot,tsne,robustness}-*-seed* --by run \
    --strip linear- fewshot- tsne- robustness- --metric linear:eval/acc1 eval/fewshot1_acc1 eval/fewshot2_acc1 \
    eval/fewshot5_acc1 eval/fewshot10_acc1 eval/ratio eval/clean_error eval/corrupted_error \
    --allow_differing data.test data.imagefolder --out "$out/representation.md"
cat "$out/representation.md"
