"""Whether two checkouts of this project compute the same bits: ten optimizer steps of every method from one seed.

    git worktree add /tmp/before REVISION
    python benchmarks/same_numbers.py /tmp/before .

Runs each line of `RUNS` in both checkouts, on the CPU with one thread, and compares what they leave behind: every
tensor and number of the checkpoint (weights, optimizer, methods, random numbers), the flags stored in it, every metric
of log.txt, and every scalar of TensorBoard. Exits with 1 if anything differs. Speeds, times and revisions are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = "--dataset digits --input_size 16 --num_workers 0 --device cpu --seed 3 --save_freq 1 --print_freq 1"
# The digits are 1,437 training images: five batches of 287 an epoch, two epochs, ten steps.
PRETRAIN = f"{SMALL} --model mae_vit_micro_patch4 --decoder_embed_dim 64 --decoder_depth 1 --decoder_num_heads 2"
PRETRAIN += " --batch_size 287 --epochs 2 --warmup_epochs 1 --lr 1e-3 --vis_freq 1 --mask_ratio 0.6 --amp_dtype fp32"
MLO = "--mlo_mae --mlo_labels same --mlo_batch_size 64 --batch_size 229"
RUNS = {
    "teacher": f"main_pretrain {PRETRAIN}",
    "norm_pix": f"main_pretrain {PRETRAIN} --norm_pix_loss --mask_ratio_end 0.8 --aug crop --knn_freq 1",
    "bf16": f"main_pretrain {PRETRAIN} --amp_dtype bf16",
    "accumulated": f"main_pretrain {PRETRAIN} --batch_size 70 --accum_iter 4 --clip_grad 0.5 --spike_factor 2",
    "cross": f"main_pretrain {PRETRAIN} --decoder cross",
    "cache": f"main_pretrain {PRETRAIN} --data_cache ram --aug mae --grad_checkpoint",
    "mae_k": f"main_pretrain {PRETRAIN} --mae_k 1",
    "ema_mae": f"main_pretrain {PRETRAIN} --ema_mae --wse 1 --ema_update step --bootstrap_layers 2",
    "rc_mae": f"main_pretrain {PRETRAIN} --rc_mae --log_grad_cosine 2",
    "rc_mae different": f"main_pretrain {PRETRAIN} --rc_mae --rc_mask different",
    "dmae": f"main_pretrain {PRETRAIN} --dmae_teacher {{teacher}}/checkpoint-1.pth",
    "three": f"main_pretrain {PRETRAIN} --mae_k 1 --rc_mae --dmae_teacher {{teacher}}/checkpoint-1.pth --dmae_proj mlp",
    "mlo_mae": f"main_pretrain {PRETRAIN} {MLO}",
    "mlo_mae jvp": f"main_pretrain {PRETRAIN} {MLO} --mlo_hypergrad jvp --mlo_ste --mlo_head_norm --mlo_update_every 2",
    "mlo_mae finetune": f"main_pretrain {PRETRAIN} {MLO} --mlo_stage2 finetune --mlo_prox 0.1",
    "mlo_mae solve": f"main_pretrain {PRETRAIN} {MLO} --mlo_stage2 solve",
    "blo_mae": f"main_pretrain {PRETRAIN} {MLO} --mlo_levels 2",
    "finetune": f"main_finetune {SMALL} --finetune {{teacher}}/checkpoint-1.pth --batch_size 288 --epochs 2 "
    "--warmup_epochs 1 --mixup 0.8 --keep 0",
    "last block": f"main_finetune {SMALL} --finetune {{teacher}}/checkpoint-1.pth --batch_size 287 --epochs 2 "
    "--warmup_epochs 1 --trainable_blocks 1 --keep 0",
    "linprobe": f"main_linprobe {SMALL} --finetune {{teacher}}/checkpoint-1.pth --batch_size 287 --epochs 2 "
    "--warmup_epochs 1",
    "attentive": f"main_linprobe {SMALL} --finetune {{teacher}}/checkpoint-1.pth --batch_size 287 --epochs 2 "
    "--warmup_epochs 1 --head attentive",
    "cached probe": f"main_linprobe {SMALL} --finetune {{teacher}}/checkpoint-1.pth --epochs 4 --cache_features",
}
IGNORED_FLAGS = {"output_dir", "log_dir", "dmae_teacher", "finetune"}  # paths of this comparison
IGNORED_FLAGS |= {"u_mae"}  # a switch that older checkouts do not have, off in all runs here
TIMES = ("seconds", "speed/", "final/", "_hparams_")  # prefixes of what depends on the clock or repeats other values


def run(checkout: Path, name: str, folder: Path) -> None:
    main, flags = RUNS[name].format(teacher=folder / "teacher").split(" ", 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, f"{main}.py", *flags.split(), "--output_dir", str(folder / name)]
    done = subprocess.run(command, cwd=checkout, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{name} failed in {checkout}:\n{done.stdout}")


def left_behind(folder: Path) -> dict:
    """What a run wrote, as nested dicts and lists of tensors, numbers and texts."""
    content = {}
    for path in sorted(folder.glob("*.pth")):
        content[path.name] = torch.load(path, weights_only=True)
        content[path.name].pop("origin", None)
        args = content[path.name]["args"]
        content[path.name]["args"] = {key: value for key, value in args.items() if key not in IGNORED_FLAGS}
        content[path.name].get("data", {}).get("meter", {}).pop("seconds", None)
        for key in ("teacher", "sha256"):  # the path of a file that holds paths and flags
            content[path.name].get("methods", {}).get("dmae._extra_state", {}).pop(key, None)
    lines = (folder / "log.txt").read_text().splitlines()
    content["log.txt"] = [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    content["scalars"] = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(TIMES)
    }
    content["pictures"] = {
        tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)]
        for tag in events.Tags()["images"]
    }
    return content


def differences(one, other, where: str = "") -> list[str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (
            one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
        return [] if same else [f"{where}: tensors differ"]
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{where}/{key}: only in one of them" for key in one.keys() ^ other.keys()]
        return missing + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other)) for d in differences(*pair, f"{where}[{i}]")]
    return [] if one == other else [f"{where}: {str(one)[:60]} and {str(other)[:60]}"]


def count(content) -> int:
    if isinstance(content, torch.Tensor):
        return content.numel()
    items = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else None
    return 1 if items is None else sum(map(count, items))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="runs to compare")
    args = parser.parse_args()
    names = [name for name in RUNS if name in args.only or name == "teacher"]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / "before", Path(folder) / "after"]
        for name in names:
            for checkout, target in zip((args.before, args.after), folders):
                target.mkdir(exist_ok=True)
                run(checkout.resolve(), name, target)
            contents = [left_behind(target / name) for target in folders]
            found = differences(*contents)
            wrong += bool(found)
            print(
                f"{name:18s} {count(contents[0]):9,d} values: {'the same bits' if not found else 'DIFFERENT'}",
                flush=True,
            )
            for line in sorted(found)[:8]:
                print(f"    {line}")
    print(f"{len(names) - wrong} of {len(names)} runs are the same to the bit")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
