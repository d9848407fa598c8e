"""Names of the numbers of a run: `group/name`, the same in log.txt, results.jsonl, the JSON files and TensorBoard.

The group is `train` (loss, its terms, learning rate, gradients), `eval` (everything that an evaluation measures),
`speed` or `data` (numbers of images). Only `COUNTS` have no group. Earlier revisions had other names: whoever reads
such a file calls `renamed`.
"""

COUNTS = {"epoch", "step", "seconds", "images_seen"}

OLD_TERMS = {"reconstruction": "pixels"}  # terms of the loss, also in checkpoints that were written inside an epoch
_OLD = {f"train_{old}": f"train/{new}" for old, new in OLD_TERMS.items()} | {
    "knn_top1": "eval/knn20_acc1",
    "blr": "train/blr",
    "bad_images": "data/bad_images",
    "train_images": "data/train_images",
    "test_images": "data/test_images",
}
_OLD_GROUPS = {"train_": "train/", "test_": "eval/"}  # of the mains; all other old names are of evaluations


def present_name(name: str, of_main: bool = True) -> str:
    """Return the present name of a metric. `of_main`: it is one of a main, not of a command in tools/, whose names may
    begin with that of a folder, such as test_acc1."""
    name = name.removeprefix("final/")
    if "/" in name or name in COUNTS:
        return name
    if of_main and name in _OLD:
        return _OLD[name]
    old = next((prefix for prefix in _OLD_GROUPS if of_main and name.startswith(prefix)), "")
    return _OLD_GROUPS.get(old, "eval/") + name.removeprefix(old)


def renamed(metrics: dict, of_main: bool = True) -> dict:
    """Return `metrics` under the present names."""
    return {present_name(name, of_main): value for name, value in metrics.items()}
