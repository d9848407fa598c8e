# shellcheck shell=bash disable=SC2154,SC2034
# Sourced by the scripts of this folder: the stages of a chain. All features are [cls] tokens.

share() { # A B: print their product without trailing zeros
    awk -v a="$1" -v b="$2" 'BEGIN { printf "%.6g", a * b }'
}

newest() { # FOLDER: print the last checkpoint of a run
    find "$1" -name 'checkpoint-*.pth' ! -name '*best*' | sort -V | tail -1
}

evaluation_recipes() { # set the arrays of the third stage to the recipes of He et al. 2022
    local tuning="$configs/mae/finetune_vit_base.yaml" probing="$configs/mae/linprobe_vit_base.yaml"
    finetune=(--config "$tuning" --accum_iter "$(accumulation_of "$tuning")")
    linprobe=(--config "$probing" --accum_iter "$(accumulation_of "$probing")")
}

judge() { # NAME CHECKPOINT SEED: run stage three, the evaluations on the labelled images
    local common=(--data_path "$labelled" "${statistics[@]}" "${encoder[@]}" --finetune "$2" --seed "$3")
    local again=(--resume auto)
    case " ${linprobe[*]} " in *" --cache_features "*) again=(--overwrite) ;; esac
    once "$out/finetune-$1/results.jsonl" main main_finetune.py "${common[@]}" --cls_token "${finetune[@]}" \
        --keep 1 --output_dir "$out/finetune-$1" --resume auto
    once "$out/linear-$1/results.jsonl" main main_linprobe.py "${common[@]}" --cls_token "${linprobe[@]}" \
        --output_dir "$out/linear-$1" "${again[@]}"
    once "$out/fewshot-$1/fewshot.json" "$python" "$root/tools/fewshot.py" "${common[@]}" --finetune "${2:-random}" --cls_token \
        --out "$out/fewshot-$1/fewshot.json"
}

figures() { # BY X NAME: print a table, and draw three curves over X
    [ -z "$list" ] || return 0
    local kind metric
    "$python" "$root/tools/collect.py" "$out"/{finetune,linear,fewshot}-*-seed* --strip finetune- linear- fewshot- \
        --by "$1" --metric finetune:eval/acc1 linear:eval/acc1 eval/fewshot10_acc1 --out "$out/$3.md"
    cat "$out/$3.md"
    for kind in finetune linear fewshot; do
        metric=eval/acc1
        [ "$kind" != fewshot ] || metric=eval/fewshot10_acc1
        "$python" "$root/tools/collect.py" "$out/$kind"-*-seed* --strip "$kind-" --by "$1" --metric "$metric" \
            --plot "$out/$3-$kind.png" --x "$2" --out "$out/$3-$kind.md"
    done
    echo "curves: $out/$3-{finetune,linear,fewshot}.png"
}
