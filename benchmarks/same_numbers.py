"""Check that two checkouts of this project give bit-identical results: ten steps of every method from the same seed.

    git worktree add /tmp/before REVISION
    python benchmarks/same_numbers.py /tmp/before .

Runs each line of `RUNS` in both checkouts, on the CPU with one thread, and compares the files of the two runs: all
tensors, numbers and flags of the checkpoints (weights, states of optimizer, methods and random numbers), the metrics of
log.txt, and the scalars and images of TensorBoard. Speeds, times and revisions are not compared. The exit status is 1
if anything differs.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util.report.names import present_name, renamed

SMALL = "--dataset digits --input_size 16 --num_workers 0 --device cpu --seed 3 --save_freq 1 --print_freq 1"
# The digits have 1,437 training images: two epochs of five batches of 287 are ten steps.
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
IGNORED_FLAGS = {"output_dir", "log_dir", "dmae_teacher", "finetune"}  # paths in the temporary folder
IGNORED_FLAGS |= {"u_mae"}  # a flag that older checkouts do not have; it is off in all runs
# Prefixes of times, and of metrics that repeat others and that older checkouts do not have, or newer ones.
IGNORED_METRICS = ("seconds", "speed/", "final/", "_hparams_", "train/classification")
IGNORED_SUMS = ("train/seconds", "train/classification")


def run(checkout: Path, name: str, folder: Path) -> None:
    """Start run `name` in `checkout` with the output folder `folder`/`name`. Exits, with the run's output, if it
    fails."""
    main, flags = RUNS[name].format(teacher=folder / "teacher").split(" ", 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, f"{main}.py", *flags.split(), "--output_dir", str(folder / name)]
    process = subprocess.run(
        command, cwd=checkout, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if process.returncode:
        sys.exit(f"{name} failed in {checkout}:\n{process.stdout}")


def read_checkpoint(path: Path) -> dict:
    """Return the content of a checkpoint without paths, times and code revision."""
    content = torch.load(path, weights_only=True)
    content.pop("origin", None)
    content["args"] = {flag: value for flag, value in content["args"].items() if flag not in IGNORED_FLAGS}
    data = content.get("data", {})
    meter = renamed({f"train_{name}": pair for name, pair in data.get("meter", {}).items()})
    data["meter"] = {name: pair for name, pair in meter.items() if name not in IGNORED_SUMS}
    for key in ("teacher", "sha256"):  # path and hash of DMAE's teacher: the file contains paths
        content.get("methods", {}).get("dmae._extra_state", {}).pop(key, None)
    return content


def read_log(path: Path) -> list[dict]:
    """Return the metrics of log.txt by epoch, under their present names, without times."""
    lines = [renamed(json.loads(line)) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(IGNORED_METRICS)} for line in lines]


def read_tensorboard(folder: Path) -> dict:
    """Return all scalars and encoded images as lists of (step, value) by tag, without times."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = [tag for tag in events.Tags()["scalars"] if not tag.startswith(IGNORED_METRICS)]
    return {
        "scalars": {_present_tag(tag): [(event.step, event.value) for event in events.Scalars(tag)] for tag in scalars},
        "images": {
            tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)]
            for tag in events.Tags()["images"]
        },
    }


def _present_tag(tag: str) -> str:
    """Return the present name of a scalar of an older checkout."""
    return present_name(tag.replace("train/", "train_"))


def read_results(folder: Path) -> dict:
    """Return the files of a run as nested dicts and lists of tensors, numbers and strings."""
    checkpoints = {path.name: read_checkpoint(path) for path in sorted(folder.glob("*.pth"))}
    return {**checkpoints, "log.txt": read_log(folder / "log.txt"), **read_tensorboard(folder)}


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether type, shape and all values are equal. NaN counts as equal to NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def differences(one, other, path: str = "") -> list[str]:
    """Return a line, with the path, for each value that differs between two nested structures of dicts and lists."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if same_tensor(one, other) else [f"{path}: tensors differ"]
    if isinstance(one, dict) and isinstance(other, dict):
        lines = [f"{path}/{key}: only in one checkout" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            lines += differences(one[key], other[key], f"{path}/{key}")
        return lines
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other)) for line in differences(*pair, f"{path}[{i}]")]
    return [] if one == other else [f"{path}: {str(one)[:60]} and {str(other)[:60]}"]


def count_values(content) -> int:
    """Return the number of values in a nested structure of dicts, lists and tensors."""
    if isinstance(content, torch.Tensor):
        return content.numel()
    if isinstance(content, dict):
        return sum(map(count_values, content.values()))
    return sum(map(count_values, content)) if isinstance(content, (list, tuple)) else 1


def compare(name: str, checkouts: tuple[Path, Path], folders: tuple[Path, Path]) -> bool:
    """Run `name` in both checkouts, print the first differences, and return whether there are none."""
    for checkout, folder in zip(checkouts, folders):
        folder.mkdir(exist_ok=True)
        run(checkout.resolve(), name, folder)
    results = [read_results(folder / name) for folder in folders]
    lines = differences(*results)
    verdict = "DIFFERENT" if lines else "bit-identical"
    print(f"{name:18s} {count_values(results[0]):9,d} values: {verdict}", flush=True)
    for line in sorted(lines)[:8]:
        print(f"    {line}")
    return not lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="first checkout of the project")
    parser.add_argument("after", type=Path, help="second checkout")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="runs to compare")
    args = parser.parse_args()
    names = [name for name in RUNS if name in args.only or name == "teacher"]  # other runs start from the teacher
    with tempfile.TemporaryDirectory() as folder:
        folders = (Path(folder) / "before", Path(folder) / "after")
        identical = sum([compare(name, (args.before, args.after), folders) for name in names])
    print(f"{identical} of {len(names)} runs are bit-identical")
    sys.exit(identical < len(names))


if __name__ == "__main__":
    main()
