"""Whether two checkouts of this project train equally fast: whole epochs of main_pretrain.py, in turn.

    git worktree add /tmp/before REVISION
    python benchmarks/same_speed.py /tmp/before .

Each round trains both checkouts on scikit-learn's digits, on the CPU with one thread, one after the other and in an
order that alternates. The figure of a run is the median of its epochs' seconds after the first epoch (`seconds` in
log.txt). Prints the ratio after/before of every round and their median for each line of `RUNS`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = "--dataset digits --input_size 16 --model mae_vit_micro_patch4 --batch_size 64 --num_workers 0 --device cpu"
FLAGS += " --aug none --vis_freq 0 --warmup_epochs 1 --save_freq 100 --epochs 6"
RUNS = {
    "mae": "",
    "accumulated": "--batch_size 16 --accum_iter 4",
    "ema_mae, rc_mae": "--ema_mae --wse 0 --ema_update step --rc_mae",
}


def seconds_per_epoch(checkout: Path, flags: str) -> float:
    """Train one run; return the median seconds of an epoch, without the first one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main_pretrain.py", *f"{FLAGS} {flags} --output_dir {folder}".split()]
        subprocess.run(command, cwd=checkout, env=env, check=True, capture_output=True)
        lines = (Path(folder) / "log.txt").read_text().splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name, flags in RUNS.items():
        ratios, times = [], []
        for number in range(args.rounds):
            pair = [args.before.resolve(), args.after.resolve()]
            order = (0, 1) if number % 2 == 0 else (1, 0)
            seconds = {index: seconds_per_epoch(pair[index], flags) for index in order}
            ratios.append(seconds[1] / seconds[0])
            times.append(seconds[0])
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{name:16s} after/before {statistics.median(ratios):.3f}  (rounds {shown}; {min(times):.2f} s an epoch)")


if __name__ == "__main__":
    main()
