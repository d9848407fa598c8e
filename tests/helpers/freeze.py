"""Freeze the format of checkpoints: tiny runs by the code of any revision, stopped half-way, with the numbers that the
same code then computed (tests/fixtures/frozen/README.md). tests/util/checkpoint/test_frozen.py compares today's code
with them.

    python tests/helpers/freeze.py                                   the format of this working tree, all runs
    python tests/helpers/freeze.py --only mae finetune               these runs
    python tests/helpers/freeze.py --revision 9db5653 --only mae_k   the code of an older commit
"""

import argparse
import copy
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FROZEN = ROOT / "tests" / "fixtures" / "frozen"
TEACHER = FROZEN / "cbfb22c" / "mae.tar.xz"  # of DMAE's runs

# A model of about 2,500 weights: most of a file is names.
TINY = dict(embed_dim=8, depth=1, num_heads=2)
COMMON = "--dataset digits --input_size 16 --in_chans 1 --epochs 2 --warmup_epochs 1 --num_workers 0 --device cpu"
COMMON += " --amp_dtype fp32 --print_freq 1"
PRETRAIN = f"{COMMON} --model mae_vit_micro_patch4 --decoder_embed_dim 8 --decoder_depth 1 --decoder_num_heads 2"
PRETRAIN += " --aug none --vis_freq 0 --lr 1e-3"
ALL = f"{PRETRAIN} --batch_size 128"
MLO = f"{PRETRAIN} --batch_size 12 --epochs 1 --warmup_epochs 0 --mlo_mae --mlo_labels same --mlo_hidden 4"
EMA_RC = "--ema_mae --wse 1 --ema_update step --rc_mae"
CLASSIFY = f"{COMMON} --model vit_micro_patch4 --batch_size 128"

# Name: main, flags, the step after which the run stops. An epoch has 11 steps (MLO-MAE: 95), in windows of 2.
KINDS = {
    "mae": ("main_pretrain", ALL, 6),
    "cross": ("main_pretrain", f"{ALL} --decoder cross", 11),
    "mae_k": ("main_pretrain", f"{ALL} --mae_k 1", 15),
    "ema_rc": ("main_pretrain", f"{ALL} {EMA_RC}", 15),
    "dmae": ("main_pretrain", f"{ALL} --dmae_teacher teacher.pth", 15),
    "u_mae": ("main_pretrain", f"{ALL} --u_mae", 15),
    "hpm": ("main_pretrain", f"{ALL} --hpm --hpm_start 0.5", 15),
    "automae": ("main_pretrain", f"{ALL} --automae --automae_width 16", 15),
    "attmask": ("main_pretrain", f"{ALL} --attmask hint", 15),
    "three": ("main_pretrain", f"{ALL} {EMA_RC} --dmae_teacher teacher.pth", 15),
    "mlo": ("main_pretrain", MLO, 80),
    "mlo_window": ("main_pretrain", MLO, 81),
    "mlo_tuned": ("main_pretrain", f"{MLO} --mlo_stage2 finetune --mlo_prox 0.1", 80),
    "mlo_norm": ("main_pretrain", f"{MLO} --mlo_head_norm", 81),
    "mlo_solve": ("main_pretrain", f"{MLO} --mlo_stage2 solve", 80),
    "mlo_joint": ("main_pretrain", f"{MLO} --mlo_levels 2", 80),
    "finetune": ("main_finetune", f"{CLASSIFY} --aug_preset small --mixup 0.8 --drop_path 0.2 --blr 0.01", 6),
    "linprobe": ("main_linprobe", f"{CLASSIFY} --aug crop", 11),
    "attentive": ("main_linprobe", f"{CLASSIFY} --aug crop --head attentive", 11),
    "fsdp": ("main_pretrain", f"{PRETRAIN} --batch_size 64 --fsdp {EMA_RC}", 15),
}


# One run, by the code in PYTHONPATH ---------------------------------------------------------------------------------


@contextmanager
def tiny_models():
    """Give the micro models `TINY` size, whether their module is imported already or not."""
    from util import architectures

    configs = [architectures.ENCODERS["vit_micro_patch4"]]
    for module, name in (("models_mae", "mae_vit_micro_patch4"), ("models_vit", "vit_micro_patch4")):
        configs += [sys.modules[module].MODELS[name].config] if module in sys.modules else []
    before = [dict(config) for config in configs]
    for config in configs:
        config.update(TINY)
    try:
        yield
    finally:
        for config, values in zip(configs, before):
            config.update(values)


def example():
    """Return the image (1, 1, 16, 16) whose features are recorded."""
    import torch

    return torch.arange(256.0).mul(0.37).sin().view(1, 1, 16, 16)


def is_linear(head) -> bool:
    """Return whether the head is a linear layer, perhaps behind a BatchNorm."""
    return type(next(head.children(), head)).__name__ in ("Linear", "BatchNorm1d") if head else False


def features(network, imgs) -> dict[str, list]:
    """Return the tokens after the last block, before any norm, [cls] first; for a classifier the logits too."""
    import torch

    network.eval()
    with torch.no_grad():
        x = network.patch_embed(imgs) + network.pos_embed[:, 1:]
        x = torch.cat([network.cls_token + network.pos_embed[:, :1], x], dim=1)
        for block in network.blocks:
            x = block(x)
        outputs = {"tokens": x[0]} | ({"logits": network(imgs)[0]} if is_linear(getattr(network, "head", None)) else {})
    return {name: [float(f"{value:.6g}") for value in values.flatten()] for name, values in outputs.items()}


def run_once(main: str, flags: str, stop_after: int = 0) -> dict | None:
    """Run a main in this process and return the features of its final networks. SIGTERM in step `stop_after`."""
    try:
        run = importlib.import_module("util.training.run")
    except ModuleNotFoundError:  # revisions before a90ce24
        run = importlib.import_module("util.run")
    module, steps, runs = importlib.import_module(main), [0], []
    adjust, init = run.adjust_learning_rate, run.Run.__init__

    def counted(*args):
        steps[0] += 1
        if steps[0] == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return adjust(*args)

    run.adjust_learning_rate = counted
    run.Run.__init__ = lambda self, *args, **named: (runs.append(self), init(self, *args, **named))[1]
    module.main(module.get_args_parser().parse_args(flags.split()))
    if "--fsdp" in flags:
        return None
    model = getattr(runs[0], "saved_model", None) or runs[0].model  # its name in older revisions
    outputs, network = {"model": features(model, example())}, copy.deepcopy(model)
    for key, teacher in (runs[0].exported() if hasattr(runs[0], "exported") else {}).items():
        state = teacher if isinstance(teacher, dict) else teacher.state_dict()  # a dict in older revisions
        network.load_state_dict(state)
        outputs[key] = features(network, example())
    return outputs


def scalars(folder: Path) -> list:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [[event.step, event.value] for event in events.Scalars("train/loss")]


def log_rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# Archives -------------------------------------------------------------------------------------------------------------


def start(code: Path, folder: Path, main: str, flags: str, stop_after: int = 0) -> None:
    """Start `run_once` in its own process (two with --fsdp) and write its features to `folder`/features.json."""
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if "--fsdp" in flags else []
    command = [sys.executable, *two, __file__, "--worker", main, flags, str(stop_after)]
    env = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{main}.py {flags}\n{done.stdout}{done.stderr}")


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive and return the path of its checkpoint."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return next(folder.glob("checkpoint-*"))


def pack(paths: list[Path], archive: Path) -> None:
    """Write an archive without owners and dates."""

    def nobodys(info):
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as file:
        for path in paths:
            file.add(path, path.name, filter=nobodys)


def freeze(code: Path, revision: str, kind: str) -> Path:
    """Write tests/fixtures/frozen/REVISION/KIND.tar.xz, the checkpoint, and KIND.json: the flags, the features of its
    networks, the losses of all later steps and the log of their epochs. Neither contains paths of this machine."""
    import torch

    main, flags, stop_after = KINDS[kind]
    archive = FROZEN / revision / f"{kind}.tar.xz"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "teacher.pth" in flags:
            unpack(TEACHER, folder / "teacher").rename(folder / "teacher.pth")
        start(code, folder, main, f"{flags} --output_dir run", stop_after)
        newest = max((folder / "run").glob("checkpoint-[0-9]*"), key=os.path.getmtime)
        shutil.move(newest, folder)
        shutil.rmtree(folder / "run")
        parts = [folder / newest.name]
        expected = {"main": main, "flags": flags, "torch": torch.__version__}
        expected["features"] = json.loads((folder / "features.json").read_text())
        start(code, folder, main, f"{flags} --output_dir run --resume {newest.name}")
        expected |= {"losses": scalars(folder / "run"), "log": log_rows(folder / "run")}
        if kind == "mae":
            parts.append(folder / "run" / "encoder.safetensors")
            expected["encoder"] = json.loads((folder / "features.json").read_text())["model"]
        pack(parts, archive)
    (FROZEN / revision / f"{kind}.json").write_text(json.dumps(expected) + "\n")
    return archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--revision", default="", help="freeze the checkpoints of this commit instead of the working tree"
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    args = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    revision = (
        args.revision
        or subprocess.check_output([*git, "describe", "--always", "--dirty=+", "--abbrev=7"], text=True).strip()
    )
    with tempfile.TemporaryDirectory() as temporary:
        code = Path(temporary) / "code" if args.revision else ROOT
        if args.revision:
            subprocess.run([*git, "worktree", "add", "-q", "--detach", code, args.revision], check=True)
        try:
            for kind in args.only:
                archive = freeze(code, revision, kind)
                print(f"{archive.relative_to(ROOT)}: {archive.stat().st_size / 1024:.0f} KiB", flush=True)
        finally:
            if args.revision:
                subprocess.run([*git, "worktree", "remove", "--force", code], check=True)


def worker(main: str, flags: str, stop_after: str) -> None:
    with tiny_models():
        Path("features.json").write_text(json.dumps(run_once(main, flags, int(stop_after))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
