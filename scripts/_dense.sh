# shellcheck shell=bash disable=SC2154
# Sourced by the recipes of scripts/segment and scripts/detect, which set two arrays: `data_flags`, the data set, and
# `recipe`, the flags of a protocol. `train_recipe MAIN EFFECTIVE LARGEST FLAGS…` starts a main with them; FLAGS come
# last and win.
#   EFFECTIVE     images per optimizer step on all GPUs together
#   LARGEST       images that a GPU of 80 GB trains at once (tools/plan.py); BATCH in the environment replaces it
#   --cpu_small   among FLAGS: rehearse the recipe with a tiny model on made-up scenes, in a minute on two cores

train_recipe() {
    local main=$1 effective=$2 largest=${BATCH:-$3} word split small='' flags=()
    shift 3
    for word in "$@"; do
        if [ "$word" = --cpu_small ]; then small=1; else flags+=("$word"); fi
    done
    if [ -n "$small" ]; then
        data_flags=(--dataset scenes --scene_digits 0 1 7 --num_workers 0)
        recipe+=(--model vit_micro_patch4 --input_size 64 --head_width 32 --max_steps 8 --warmup_steps 2)
        case $main in
            main_segment.py) recipe+=(--scene_count 64 8 --short_side 64 --stride 42) ;;
            main_detect.py) recipe+=(--scene_count 32 4 --patch_size 8) effective=4 ;;
        esac
    fi
    split=$(split_batch "$effective" "$largest")
    torchrun_main "$main" "${data_flags[@]}" "${recipe[@]}" --batch_size "${split% *}" --accum_iter "${split#* }" \
        --resume auto "${flags[@]}"
}
