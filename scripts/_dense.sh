# shellcheck shell=bash disable=SC2154
# Sourced by the protocols of scripts/segment and scripts/detect. `train_recipe MAIN FILE LARGEST FLAGS…` starts a main with
# a recipe of configs/, whose --batch_size are the images per optimizer step on all GPUs together; FLAGS come last and win.
#   FILE          the recipe, without configs/ and .yaml
#   LARGEST       images that a GPU of 80 GB trains at once (tools/plan.py); BATCH in the environment replaces it
#   --cpu_small   among FLAGS: rehearse the recipe with a tiny model on made-up scenes, in a minute on two cores

train_recipe() {
    local main=$1 recipe=("$configs/$2.yaml") largest=${BATCH:-$3} word split config=() flags=()
    for word in "${@:4}"; do
        if [ "$word" = --cpu_small ]; then recipe[1]="$configs/small/${2%%/*}.yaml"; else flags+=("$word"); fi
    done
    for word in "${recipe[@]}"; do config+=(--config "$word"); done
    split=$(split_batch "$(images_of "${recipe[@]}")" "$largest")
    torchrun_main "$main" "${config[@]}" --batch_size "${split% *}" --accum_iter "${split#* }" --resume auto "${flags[@]}"
}
