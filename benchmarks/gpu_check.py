"""What scripts/gpu_check.sh runs: tests, benchmarks and small studies on a GPU, in stages that can be started alone."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import _measure  # puts the repository on the path
import torch

from util.errors import UserError, user_errors
from util.report.ledger import revision

STAGE_SECONDS = 540
TAIL = 40  # lines of a log that are kept in the JSON file


@dataclass(frozen=True)
class Job:
    """A command of a stage. It is done when it has ended with 0; `results` are the JSON and JSON-lines files with its
    numbers."""

    name: str
    command: list[str]
    results: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Setting:
    """Where and how large the jobs are."""

    out: Path
    data: str
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def benchmark(self, name: str, script: str, flags: str) -> Job:
        """Return a job of a script in benchmarks/ that writes JSON."""
        file = self.out / f"{name.replace(' ', '-')}.json"
        small = "--model mae_vit_micro_patch4 --batch_size 4 --rounds 1" if self.rehearse else ""
        words = [str(_measure.ROOT / "benchmarks" / script), *flags.split(), "--device", self.device, *small.split()]
        return Job(name, [sys.executable, *words, "--out", str(file)], (file,))

    def main(self, name: str, main: str, flags: str) -> Job:
        """Return a job of a main, which continues where it was stopped. A cached probe starts anew."""
        folder = self.out / name.replace(" ", "-")
        resume = "--overwrite" if "--cache_features" in flags else "--resume auto --save_freq 5 --keep 1"
        words = f"{self.images} {flags} --device {self.device} --output_dir {folder} {resume}"
        command = [sys.executable, str(_measure.ROOT / main), *words.split()]
        return Job(name, command, (folder / "results.jsonl", folder / "log.txt", folder / "probe.json"))

    @property
    def images(self) -> str:
        """Flags of the data set of trainings."""
        if self.rehearse:
            return "--dataset digits --input_size 16 --in_chans 1"
        reader = "imagefolder" if (Path(self.data) / "train").is_dir() else "cifar10"
        stats = "--mean 0.49140 0.48216 0.44653 --std 0.24703 0.24349 0.26159"
        return f"--dataset {reader} --data_path {self.data} {stats}"


def tests(setting: Setting) -> Iterator[Job]:
    """Tests on the device: the numbers of the CPU, no waiting host, resuming, --deterministic."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_measure.ROOT / "tests" / "cuda")]
    yield Job("tests", [*command, "-k", "planted"] if setting.rehearse else command)


def steps(setting: Setting) -> Iterator[Job]:
    """Seconds and memory of a step: each optimisation, compiled blocks, other implementations, the floor."""
    sizes = {"deit_tiny_patch4": 512, "vit_base_patch16": 128, "vit_large_patch16": 64}
    for model, batch in dict(list(sizes.items())[:1] if setting.rehearse else sizes).items():
        flags = f"--model mae_{model} --batch_size {batch} --rounds 8"
        compiled = "" if setting.rehearse else "--compile"
        yield setting.benchmark(f"peers {model}", "peers.py", f"{flags} --types bf16 {compiled}")
        yield setting.benchmark(f"step {model}", "step.py", f"{flags} --steps 3 {compiled}")
    if not setting.rehearse:
        script, flags = str(_measure.ROOT / "benchmarks" / "dense.py"), "--model vit_base_patch16 --input_size 1024"
        yield Job("dense", [sys.executable, script, *flags.split(), *"--batch_size 4 --rounds 5 --device cuda".split()])


def methods(setting: Setting) -> Iterator[Job]:
    """Cost of every method relative to MAE."""
    yield setting.benchmark("methods tiny", "methods.py", "--batch_size 512 --steps 3")
    yield setting.benchmark("mlo tiny", "mlo.py", "--batch_size 512 --rounds 2")
    if not setting.rehearse:
        yield setting.benchmark("methods base", "methods.py", "--model mae_vit_base_patch16 --batch_size 64 --steps 3")
        script = str(_measure.ROOT / "benchmarks" / "attention.py")
        yield Job("attention", [sys.executable, script, "--device", "cuda"])


def data(setting: Setting) -> Iterator[Job]:
    """Whole epochs by every way to the batch: images per second, and the share of time that training waits."""
    model = "mae_vit_micro_patch4" if setting.rehearse else "mae_deit_tiny_patch4 --batch_size 512"
    ways = {"files": "", "ram": "--data_cache ram", "device": "--data_cache device"}
    ways["graph"] = "--data_cache device --cuda_graph"
    if not setting.rehearse and "imagefolder" in setting.images:
        ways["nvjpeg"] = "--data_cache device --nvjpeg"
    for way, flags in ways.items():
        yield setting.main(f"data {way}", "main_pretrain.py", f"--model {model} --epochs 3 {flags}")


STUDY = {
    "mae": "",
    "maek20": "--mae_k 20",
    "emamae": "--ema_mae --wse 20 --tau 0.005",
    "rcmae": "--rc_mae",
    "maek10": "--mae_k 10",
}
"""Methods of the study and their flags, the most telling first."""


def study(setting: Setting) -> Iterator[Job]:
    """CIFAR-10, DeiT-Tiny, 200 epochs, batch 512: each method is pretrained, probed and fine-tuned in turn."""
    small, epochs = setting.rehearse, 2 if setting.rehearse else 200
    model = "vit_micro_patch4" if small else "deit_tiny_patch4"
    size = "--batch_size 256" if small else "--batch_size 512"
    for name, flags in STUDY.items():
        flags = flags.replace("20", "1").replace("10", "1") if small else flags
        pretrain = f"--model mae_{model} --norm_pix_loss --aug crop {size} --epochs {epochs} --data_cache device"
        pretrain += f" --warmup_epochs {epochs // 20} --vis_freq 0 {flags}"
        yield setting.main(f"study {name}", "main_pretrain.py", pretrain)
        encoder = f"--finetune {setting.out}/study-{name}/checkpoint-{epochs - 1}.pth --global_pool"
        yield setting.main(f"study {name} probe", "main_linprobe.py", f"{encoder} --cache_features")
        tune = f"{encoder} {size} --epochs {1 if small else 40} --warmup_epochs {0 if small else 4} --aug_preset small"
        yield setting.main(f"study {name} finetune", "main_finetune.py", f"{tune} --layer_decay 0.75")


def mlo(setting: Setting) -> Iterator[Job]:
    """MLO-MAE against MAE in the same time."""
    name, flags = ("equal_time", ["--data", setting.data])
    if setting.rehearse:
        name, flags = ("sweep", ["--cpu_small", "--only", "mae"])
    yield Job("mlo", ["bash", str(_measure.ROOT / f"scripts/mlo_mae/{name}.sh"), str(setting.out / "mlo"), *flags])


STAGES = {each.__name__: each for each in (tests, steps, methods, data, study, mlo)}


def run(job: Job, log: Path, seconds: float) -> dict:
    """Run a job for at most `seconds` -> its row in the JSON file. A signal first lets trainings save."""
    began = time.monotonic()
    env = {**os.environ, "PYTHON": sys.executable, "EPOCHS": os.environ.get("EPOCHS", "100")}
    with log.open("w") as file:
        process = subprocess.Popen(
            job.command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True, cwd=_measure.ROOT
        )
        code = wait(process, seconds)
    row = {"name": job.name, "command": shlex.join(job.command), "rc": code, "timed_out": code is None}
    row["seconds"] = round(time.monotonic() - began, 1)
    row["results"] = {path.name: read(path) for path in job.results if path.exists()}
    row["tail"] = log.read_text(errors="replace").splitlines()[-TAIL:]
    return row


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Return the exit code, None for a process that was ended after `seconds`."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def read(path: Path) -> object:
    """Return the content of a JSON file, or the rows of one with a line for each."""
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def run_stage(name: str, setting: Setting, ends: float) -> bool:
    """Run the jobs of a stage that are not done, until `ends`; return whether all are. Writes after every job."""
    file, stage_ends = setting.out / f"{name}.json", min(ends, time.monotonic() + STAGE_SECONDS)
    rows = {row["name"]: row for row in (read(file)["jobs"] if file.exists() else [])}
    for job in STAGES[name](setting):
        if job.name in rows and rows[job.name]["rc"] == 0:
            continue
        left = stage_ends - time.monotonic()
        if left < 5:
            print(f"{name}: the time is over before {job.name!r}; the same command continues here")
            return False
        rows[job.name] = row = run(job, setting.out / f"{job.name.replace(' ', '-')}.log", left)
        state = "time over" if row["timed_out"] else "ok" if row["rc"] == 0 else f"exit code {row['rc']}"
        print(f"{name}: {job.name:32} {row['seconds']:7.1f} s  {state}", flush=True)
        if row["rc"]:
            print("    " + "\n    ".join(row["tail"][-3:]))
        content = {"stage": name, "device": device_name(setting), "torch": torch.__version__, "revision": revision()}
        file.write_text(json.dumps({**content, "jobs": list(rows.values())}, indent=1) + "\n")
    return all(row["rc"] == 0 for row in rows.values())


def device_name(setting: Setting) -> str:
    return "cpu" if setting.rehearse else torch.cuda.get_device_name()


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("out", metavar="OUT", help="folder of the results")
    parser.add_argument("--data", default="", help="CIFAR-10, as class folders or torchvision's files")
    parser.add_argument("--minutes", type=float, default=25, help="end after so many minutes (default: 25)")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES), help="run these stages only")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: the same stages and files")
    parser.add_argument("--list", action="store_true", help="print the commands, do not run them")
    return parser


def main(args) -> int:
    """Return the exit code: 0 if all jobs of the stages are done. Raises UserError for flags that cannot work."""
    needs_data = not args.rehearse and {"data", "study", "mlo"} & set(args.stage)
    if needs_data and not Path(args.data or "-").is_dir():
        raise UserError(f"--data {args.data or '(missing)'} must be the folder of CIFAR-10 for: {' '.join(needs_data)}")
    if not args.rehearse and not args.list and not torch.cuda.is_available():
        raise UserError("there is no GPU: give --rehearse to try the stages on this machine")
    setting = Setting(Path(args.out).resolve(), args.data and str(Path(args.data).resolve()), args.rehearse)
    if args.list:
        for name in args.stage:
            for job in STAGES[name](setting):
                print(f"{name}: {shlex.join(job.command)}")
        return 0
    setting.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * args.minutes
    done = [run_stage(name, setting, ends) for name in args.stage]
    return 0 if all(done) else 1


if __name__ == "__main__":
    with user_errors("gpu_check.sh"):
        sys.exit(main(get_args_parser().parse_args()))
