"""Lines of ledgers, as the mains write them."""

from util.report import ledger


def write(
    folder, command="main_linprobe", seed=0, metrics=None, source=None, revision="abc", data="d", **flags
) -> dict:
    """Write a line as a main does."""
    row = {
        "command": command,
        "finished": "2030-01-01",
        "revision": revision,
        "images_seen": 5,
        "seconds": 1.0,
        "flags": {"blr": 0.1, "output_dir": str(folder), "num_workers": seed, **flags, "seed": seed},
        "data": {"test": {"images": 4, "sha256": data}},
        "hardware": {"amp_dtype": "bfloat16"},
        "source": source,
        "metrics": metrics or {"eval/acc1": 50.0},
    }
    ledger.append(folder, row)
    return row


def pretraining(mask_ratio=0.75, seed=0, source=None, **flags) -> dict:
    flags = {"mask_ratio": mask_ratio, "seed": seed, "rc_mae": False, **flags}
    return {"path": f"/x/mae-seed{seed}/c.pth", "sha256": str(seed), "epoch": 3, "flags": flags, "source": source}
