"""The whole workflow on small data: pretrain, draw reconstructions, and compare the encoder with an untrained one by
few-shot accuracy, nearest neighbours and a linear probe.

Started by `scripts/quickstart.sh`. It runs the commands of the project as a user would, and prints them.
"""

import random
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation import command_line, runs
from util.data.file_lists import images_below
from util.errors import UserError, user_errors
from util.interrupts import run_command
from util.parser import Parser

ROOT = Path(__file__).resolve().parent.parent
DIGITS_IMAGES = 1437  # of the training split
DIGITS_EPOCHS = 22
IMAGES_SEEN = 32_000  # about 22 epochs of the digits: minutes on two cores
MOST_IMAGES = 20_000
PROBE_BLRS = ("0.3", "1", "3", "10", "30", "100")
SHOTS = (1, 2, 5, 10)
NEIGHBOURS = (1, 5, 10, 20)
SHOWN_NEIGHBOURS = (1, 20)  # the ledger has all of them
ENCODERS = {"random": "untrained", "pretrained": "pretrained"}  # folder: title of the column
ADVICE = (
    "Read the few-shot rows first: they show what pretraining is worth where labels are few, while the linear probe\n"
    "uses every training label and can hide the difference."
)
NO_LABELS = (
    "These images have no labels, so there is no accuracy to compare: judge the reconstructions in the picture and\n"
    "the loss in TensorBoard. For accuracies, sort labelled images into DIR/train/<class>/ and DIR/val/<class>/."
)


def get_args_parser():
    parser = Parser("Pretrain a small masked autoencoder and evaluate its encoder.")
    parser.add_argument("--data_path", default="", help="folder of images; without it scikit-learn's digits")
    parser.add_argument(
        "--output_dir", default="output/quickstart", help="folder for the results, replaced in each run"
    )
    parser.add_argument("--epochs", type=int, help="epochs of pretraining; the default takes minutes on two cores")
    command_line.add_device_flag(parser)
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read images")
    return parser


def _fits_a_line(path: str) -> bool:
    """Return whether a path has neither tabs nor line breaks and is valid UTF-8."""
    return not any(char in "\t\r\n" or "\ud800" <= char <= "\udfff" for char in path)


def write_lists(root: Path, out: Path) -> tuple[list[str], int, bool]:
    """Write list files for a folder of any size -> (data flags, training images, whether there are labels).

    Folders train/<class>/ and val/<class>/ are used with labels; else every tenth image is for validation. Of large
    sets a fixed sample is taken.
    """
    if not root.is_dir():
        raise UserError(f"--data_path {root} is not a folder")
    labelled = all((root / split).is_dir() and any((root / split).glob("*/")) for split in ("train", "val"))
    if labelled:
        splits = {split: images_below(root / split) for split in ("train", "val")}
    else:
        paths = images_below(root)
        splits = {"train": [p for i, p in enumerate(paths) if i % 10], "val": paths[::10]}
    for split, paths in splits.items():
        most = MOST_IMAGES if split == "train" else MOST_IMAGES // 10
        listed = [path for path in paths if _fits_a_line(path)]
        if len(listed) < len(paths):
            print(f"note: {len(paths) - len(listed)} images for {split} are left out: a list cannot name them")
        if not listed:
            raise UserError(f"--data_path {root} holds no images for {split}")
        chosen = sorted(random.Random(0).sample(listed, min(most, len(listed))))
        rows = [Path(path).relative_to(root) for path in chosen]
        lines = [f"{row}\t{row.parts[1]}" if labelled else str(row) for row in rows]
        (out / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        splits[split] = chosen
    flags = ["--dataset", "filelist", "--data_path", str(root), "--allow_outside"]
    flags += ["--train_list", str(out / "train.txt"), "--val_list", str(out / "val.txt")]
    return flags, len(splits["train"]), labelled


def shots_that_fit(train_list: Path) -> list[int]:
    """Return the numbers of labels per class that a list of `write_lists` has images for; [] with fewer than two
    classes. If the smallest class has fewer images than SHOTS, its size is the last number."""
    lines = train_list.read_text(encoding="utf-8").rstrip("\n").split("\n")
    sizes = Counter(line.rpartition("\t")[2] for line in lines)
    if len(sizes) < 2:
        return []
    return sorted({min(k, min(sizes.values())) for k in SHOTS})


def run(script: str, *flags: str, optional: bool = False) -> None:
    """Print one of the project's commands and run it. If it fails, the quickstart exits with its code; an `optional`
    command may refuse its input (code 2), which leaves its rows of the table empty."""
    print(f"\n$ python {script} {shlex.join(flags)}", flush=True)
    code = run_command([sys.executable, str(ROOT / script), *flags])
    if code and not (optional and code == 2):
        sys.exit(code)


def compare(out: Path, common: list[str], checkpoint: str, batch: int, images: int, shots: list[int]) -> None:
    """Evaluate the untrained and the pretrained encoder, each into its folder below `out`."""
    for name, weights in zip(ENCODERS, ("", checkpoint)):
        encoder = ["--model", "vit_micro_patch4", "--finetune", weights]
        judged = [*encoder[:-1], weights or "random"]
        probe = ["--global_pool", "--cache_features", "--batch_size", str(batch), "--probe_blrs", *PROBE_BLRS]
        run("main_linprobe.py", *common, *encoder, *probe, "--output_dir", str(out / name), "--overwrite")
        k = [str(k) for k in NEIGHBOURS if k <= images]
        run("tools/knn.py", *common, *judged, "--k", *k, "--out", str(out / name / "knn.json"))
        if shots:
            few = ["--shots", *map(str, shots), "--out", str(out / name / "fewshot.json")]
            run("tools/fewshot.py", *common, *judged, *few, optional=True)  # it refuses an unreadable image


def table(results: dict[str, dict], shots: list[int]) -> str:
    """Return a Markdown table with a row for each measure and a column for each encoder, from {column: metrics of its
    ledger}. Measures without any value are left out."""
    measures = [(f"few-shot, {k} label{'s' * (k > 1)} a class", f"eval/fewshot{k}_") for k in shots]
    measures += [(f"{k}-NN, all labels", f"eval/knn{k}_") for k in SHOWN_NEIGHBOURS]
    measures += [("linear probe, all labels", "eval/")]
    rows = [["test accuracy in %", *results], ["---"] * (1 + len(results))]
    for title, name in measures:
        if any(f"{name}acc1" in metrics for metrics in results.values()):
            rows.append([title, *(_cell(metrics, name) for metrics in results.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows[1] = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def _cell(metrics: dict, name: str) -> str:
    value, half = metrics.get(f"{name}acc1"), metrics.get(f"{name}interval95")
    if value is None:
        return ""
    return f"{value:.2f}" + (f" ± {half:.2f}" if half else "")  # 0: each draw has all images


def main(args) -> None:
    """Run all commands and print the table of results."""
    began = time.monotonic()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if args.data_path:
        data, images, labelled = write_lists(Path(args.data_path).expanduser().resolve(), out)
        # An epoch must have at least one batch; smaller batches than 16 would make the gradient too noisy.
        batch, recipe = min(32, max(16, images // 8)), ["--aug", "mae"]
        epochs = args.epochs or max(1, min(100, round(IMAGES_SEEN / images)))
        shots = shots_that_fit(out / "train.txt") if labelled else []
    else:
        # Digits are neither flipped nor cropped: a 6 must stay a 6.
        data, labelled, batch, recipe = ["--dataset", "digits"], True, 32, ["--aug", "none", "--mask_ratio", "0.6"]
        images, shots = DIGITS_IMAGES, list(SHOTS)
        epochs = args.epochs or DIGITS_EPOCHS
    common = [*data, "--device", args.device, "--num_workers", str(args.num_workers)]
    recipe += ["--norm_pix_loss", "--lr", "1e-3", "--batch_size", str(batch)]
    recipe += ["--epochs", str(epochs), "--warmup_epochs", str(max(1, epochs // 10))]
    show = ["--vis_freq", "5", "--print_freq", "50", "--output_dir", str(out / "mae"), "--overwrite"]
    run("main_pretrain.py", *common, "--model", "mae_vit_micro_patch4", *recipe, *show)
    checkpoint = str(out / "mae" / f"checkpoint-{epochs - 1}.pth")
    picture = str(out / "reconstruction.png")
    run("tools/visualize.py", checkpoint, *data, "--num_workers", "0", "--out", picture)
    if labelled:
        compare(out, common, checkpoint, batch, images, shots)
    print(f"\nDone in {time.monotonic() - began:.0f} s.\n")
    print(summary(out, shots) if labelled else NO_LABELS)
    print(f"\npictures      {picture}\nTensorBoard   tensorboard --logdir {out / 'mae'}")


def summary(out: Path, shots: list[int]) -> str:
    """Return the table of the ledgers that `compare` wrote, and how to read it."""
    results = {}
    for folder, title in ENCODERS.items():
        finished = runs.read_runs([str(out / folder)])
        results[title] = {name: value for run in finished for name, value in run.row["metrics"].items()}
    lines = [table(results, shots)]
    if "±" in lines[0]:
        lines.append("± is the 95 % confidence interval of the mean over 10 draws of the labelled images.")
    return "\n".join([*lines, ADVICE] if shots else lines)


if __name__ == "__main__":
    with user_errors("quickstart.py"):
        main(get_args_parser().parse_args())
