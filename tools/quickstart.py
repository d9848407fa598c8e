"""The whole way on small data: pretrain, probe, nearest neighbours, pictures, each beside an untrained encoder.

Started by `scripts/quickstart.sh`. It runs the same commands that you would, and prints them.
"""

import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import _common
import _runs
import collect

from util.errors import UserError, user_errors
from util.listing import images_below

ROOT = Path(__file__).resolve().parent.parent
DIGITS_EPOCHS = 22
IMAGES_SEEN = 32_000  # about what 22 epochs of the digits are: minutes on two cores
MOST_IMAGES = 20_000
PROBE_BLRS = ("0.3", "1", "3", "10", "30", "100")


def get_args_parser():
    parser = _common.Parser("Pretrain a small masked autoencoder and look at what it learned.")
    parser.add_argument("--data_path", default="", help="a folder of images; scikit-learn's digits without it")
    parser.add_argument("--output_dir", default="output/quickstart", help="is written anew every time")
    parser.add_argument("--epochs", type=int, help="more is better; the default takes minutes on two cores")
    _common.add_device_flag(parser)
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read images")
    return parser


def _fits_a_line(path: str) -> bool:
    """Without tab and line break, and in UTF-8."""
    return not any(char in "\t\r\n" or "\ud800" <= char <= "\udfff" for char in path)


def write_lists(root: Path, out: Path) -> tuple[list[str], int, bool]:
    """List files for a folder of any size -> (data flags, training images, whether there are labels).

    With train/<class>/ and val/<class>/ these are used, with labels; else every tenth image validates. Of large sets
    a sample is taken, always the same.
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


def run(script: str, *flags: str) -> None:
    """One of the project's commands, shown as it could be typed. Its failure is ours."""
    print(f"\n$ python {script} {shlex.join(flags)}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / script), *flags]).returncode
    if code:
        sys.exit(code)


def main(args) -> None:
    began = time.monotonic()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if args.data_path:
        data, images, labelled = write_lists(Path(args.data_path).expanduser().resolve(), out)
        # Sixteen images are the smallest batch that is worth the name; an epoch must hold at least one.
        batch, recipe = min(32, max(16, images // 8)), ["--aug", "mae"]
        epochs = args.epochs or max(1, min(100, round(IMAGES_SEEN / images)))
    else:
        # Digits are neither mirrored nor cut: a 6 must stay a 6.
        data, labelled, batch, recipe = ["--dataset", "digits"], True, 32, ["--aug", "none", "--mask_ratio", "0.6"]
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
        for name, weights in (("random", ""), ("pretrained", checkpoint)):
            encoder = ["--model", "vit_micro_patch4", "--finetune", weights]
            probe = ["--global_pool", "--cache_features", "--batch_size", str(batch), "--probe_blrs", *PROBE_BLRS]
            run("main_linprobe.py", *common, *encoder, *probe, "--output_dir", str(out / name), "--overwrite")
            run("tools/knn.py", *common, *encoder, "--out", str(out / name / "knn.json"))
    print(f"\nDone in {time.monotonic() - began:.0f} s.")
    if labelled:
        judged = _runs.read_runs([str(out / "random"), str(out / "pretrained")])
        print(collect.markdown(collect.make_table(judged, ["run"], ["test_acc1", "knn20_acc1", "knn1_acc1"])))
    print(f"pictures      {picture}\nTensorBoard   tensorboard --logdir {out / 'mae'}")


if __name__ == "__main__":
    with user_errors("quickstart.py"):
        main(get_args_parser().parse_args())
