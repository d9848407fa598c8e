# shellcheck shell=bash disable=SC2154,SC2034
# Sourced by the scripts of this folder for --cpu_small: links a part of CIFAR-10 (train/<class>/ and val/<class>/) into
# OUT/data. Each class has 500 training images with hashtags for the first stages, 100 others with labels for the last one,
# and 200 test images; for --gpu_hour 4000, 1000 and 900. The hashtags are synthetic: another name of the class, and
# attributes that it shares with other classes, plus noise.
budget=--cpu_small weak_count=500 labelled_count=100 test_count=200 weak_test_count=20
[ -z "$gpu_hour" ] || budget=--gpu_hour weak_count=4000 labelled_count=1000 test_count=900 weak_test_count=100
[ -n "$list$data" ] || { echo "error: $budget needs --data CIFAR10, with train/<class>/ and val/<class>/" >&2; exit 2; }
[ -n "$list" ] || [ -d "$data/train/airplane" ] ||
    { echo "error: --data $data has no train/airplane/: $budget needs CIFAR-10 as class folders" >&2; exit 2; }

declare -A hashtags=([airplane]="plane,vehicle,sky,travel" [automobile]="car,vehicle,road" [bird]="bird,animal,sky"
    [cat]="kitten,animal,pet" [deer]="deer,animal,wild" [dog]="puppy,animal,pet" [frog]="frog,animal,wild"
    [horse]="pony,animal,farm" [ship]="boat,vehicle,sea,travel" [truck]="truck,vehicle,road")

link() { # FOLDER CLASS SPLIT FIRST LAST
    mkdir -p "$1/$2"
    find "$(realpath "$data/$3/$2")" -type f -print0 | sort -z | sed -zn "$4,$5p" | xargs -0 -r ln -s -t "$1/$2"
}

if [ -z "$list" ] && [ ! -d "$out/data" ]; then
    made="$out/data.tmp"
    rm -rf "$made"
    for class in "${!hashtags[@]}"; do
        link "$made/weak/train" "$class" train 1 "$weak_count"
        link "$made/weak/val" "$class" val $((test_count + 1)) $((test_count + weak_test_count))
        link "$made/labelled/train" "$class" train $((weak_count + 1)) $((weak_count + labelled_count))
        link "$made/labelled/val" "$class" val 1 "$test_count"
        for split in train val; do
            (cd "$made/weak" && find "$split/$class" -type l) | sort | sed "s/\$/\t${hashtags[$class]}/" >> "$made/$split.txt"
        done
    done
    mv "$made" "$out/data"
fi
weak=$out/data/weak weak_train=$out/data/train.txt weak_val=$out/data/val.txt labelled=$out/data/labelled
statistics=(--mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159 --num_workers 1 --amp_dtype fp32
    --allow_outside)  # because the links lead to --data
pretrain=(--model mae_vit_micro_patch4 --norm_pix_loss --aug crop --batch_size 100 --lr 1.5e-3 --vis_freq 0)
wsp=(--aug crop --aa none --smoothing 0 --reprob 0 --drop_path 0 --batch_size 100 --lr 1e-3 --layer_decay 1
    --label_noise "${NOISE:-0.3}")
# 1,000 images are 20 steps an epoch: after 80 steps with RandAugment fine-tuning was behind the linear probe.
finetune=(--aug_preset tiny --aug crop --batch_size 50 --epochs 20 --warmup_epochs 1 --lr 2e-3 --layer_decay 0.75
    --eval_freq 20)
linprobe=(--cache_features)
encoder=(--model vit_micro_patch4)
if [ -n "$gpu_hour" ]; then
    statistics=("${statistics[@]}" --num_workers 12 --amp_dtype auto)
    pretrain+=(--model mae_deit_tiny_patch4 --batch_size 500 --data_cache device)
    wsp+=(--batch_size 500 --drop_path 0.1)
    finetune+=(--aug_preset small --reprob 0 --batch_size 100 --drop_path 0.1)
    encoder=(--model deit_tiny_patch4)
fi
