"""A first hour with the project: three methods on the handwritten digits, from pretraining to a table.

    python tools/first_run.py --write docs/first_run.md

runs the commands of the page docs/first_run.md one after the other, as a user would, and writes the page from their
output. `--epochs` and `--stop_after` make a shorter pass, as the tests do.
"""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation import command_line
from util.errors import UserError, user_errors
from util.parser import Parser

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 3  # progress lines that the page keeps of a command; an ellipsis stands for the others


@dataclass(frozen=True)
class Step:
    """One section of the page: a heading, sentences, commands, and what is written below them."""

    title: str
    text: str
    commands: tuple[str, ...]
    after: str = ""


_DIGITS = "--dataset digits --model mae_vit_micro_patch4 --input_size 16 --aug none --mask_ratio 0.6 --norm_pix_loss"
_RECIPE = f"{_DIGITS} --batch_size 32 --lr 1e-3 --epochs EPOCHS --warmup_epochs 2 --knn_freq 2 --print_freq 20"
_METHODS = {"mae": "", "ema-mae": " --ema_mae --wse WARM", "rc-mae": " --rc_mae"}
_TRANSFER = "--dataset digits --epochs TRANSFER --warmup_epochs 1 --batch_size 64 --lr 1e-3"
_FEW = "--dataset digits --shots 1 10"


def _each(command: str, *names: str) -> tuple[str, ...]:
    return tuple(command.replace("NAME", name) for name in names)


STEPS = (
    Step(
        "Pretrain",
        "Every run begins with a block of facts. Read it before you leave the machine alone: most mistakes show here "
        "(the wrong folder, the mean of another data set, a batch that is not the paper's). `--knn_freq` measures the "
        "encoder while it trains, without labels in the loss. The last block lists the files and commands to paste.",
        (f"python main_pretrain.py {_RECIPE} --output_dir OUT/mae",),
    ),
    Step(
        "Two other methods",
        "A method is a flag; everything else stays as it is, so the runs can be compared. EMA-MAE reconstructs pixels "
        "for `--wse` epochs, then the features of a moving average of its encoder. RC-MAE adds a teacher.",
        tuple(f"python main_pretrain.py {_RECIPE}{flags} --output_dir OUT/{name}" for name, flags in _METHODS.items())[
            1:
        ],
    ),
    Step(
        "Look at the reconstructions",
        "One row of images for each checkpoint. EMA-MAE is not among them: after WARM epochs it predicts features.",
        ("python tools/visualize.py OUT/mae/LAST OUT/rc-mae/LAST --dataset digits --count 4 --out OUT/rows.png",),
        "![reconstructions of two checkpoints](first_run/rows.png)",
    ),
    Step(
        "Watch the curves",
        "`tensorboard --logdir OUT` shows all runs together, also while they train. CUSTOM SCALARS has the most "
        "important curves side by side, HPARAMS the flags with the results; the TEXT tab explains the names. The x "
        "axis is epoch * 1000. The pictures show the end of this session, with the fine-tuning below.",
        (),
        "![four curves of all runs](first_run/curves.png)\n\n![flags and results](first_run/hparams.png)",
    ),
    Step(
        "Fine-tune",
        "The same command for each encoder, and for an untrained one (without `--finetune`).",
        (
            *_each(
                f"python main_finetune.py --finetune OUT/NAME/LAST {_TRANSFER} --output_dir OUT/finetune-NAME",
                *_METHODS,
            ),
            f"python main_finetune.py --model vit_micro_patch4 --input_size 16 {_TRANSFER} "
            "--output_dir OUT/finetune-random",
        ),
    ),
    Step(
        "Few labels",
        "Fine-tuning uses all 1,437 labels. What pretraining is worth shows where labels are few: a linear classifier "
        "on frozen features, with one and with ten labelled images of each digit.",
        (
            *_each(f"python tools/fewshot.py OUT/NAME/LAST {_FEW} --out OUT/fewshot-NAME/fewshot.json", *_METHODS),
            f"python tools/fewshot.py random --model vit_micro_patch4 --input_size 16 {_FEW} "
            "--out OUT/fewshot-random/fewshot.json",
        ),
    ),
    Step(
        "A table",
        "Every finished run has a line in its folder's `results.jsonl`, with its flags and those of the pretraining.",
        (
            "python tools/collect.py OUT --strip finetune- fewshot- --by run "
            "--metric finetune:eval/acc1 fewshot:eval/fewshot1_acc1 fewshot:eval/fewshot10_acc1",
        ),
        "One seed is not a comparison. Repeat the runs with `--seed 1` and `--seed 2` in folders that end with "
        "`-seed1` and `-seed2`; the table then shows means and standard deviations.",
    ),
)


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", default="output/first", help="folder of the runs, which must not exist")
    parser.add_argument("--epochs", type=int, default=24, help="epochs of pretraining; a few are too short to compare")
    parser.add_argument("--transfer_epochs", type=int, default=10, help="epochs of fine-tuning")
    parser.add_argument("--stop_after", type=int, default=len(STEPS), metavar="N", help="sections to run")
    parser.add_argument("--write", default="", metavar="FILE", help="page to write (.md)")
    return parser


def words(command: str, args) -> str:
    """Return a command of a step with this call's folder and epochs."""
    values = {
        "OUT": args.output_dir,
        "EPOCHS": str(args.epochs),
        "TRANSFER": str(args.transfer_epochs),
        "WARM": str(max(1, 2 * args.epochs // 3)),
        "LAST": f"checkpoint-{args.epochs - 1}.pth",
    }
    return re.sub(r"\b(OUT|EPOCHS|TRANSFER|WARM|LAST)\b", lambda match: values[match[1]], command)


def run(command: str) -> str:
    """Run a command of a page in the project's folder with this interpreter; print its output and return it. A failed
    one ends this program with its exit code."""
    print(f"\n$ {command}", flush=True)
    _, *rest = shlex.split(command)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # as in an activated one
    process = subprocess.Popen(
        [sys.executable, *rest],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        sys.exit(process.returncode)
    return "".join(lines)


def shortened(output: str) -> str:
    """Return the output without most of its progress lines and lines of epochs."""
    kept, skipped, count = [], False, 0
    for line in output.strip("\n").splitlines():
        progress = re.match(r"epoch |    \S|top-1 ", line) is not None
        count += progress
        if progress and count > SHOWN:
            if not skipped:
                kept.append("…")
            skipped = True
        else:
            kept.append(line)
    return "\n".join(kept)


def broken(command: str) -> str:
    """Return a command after a prompt, in lines that a page can show."""
    lines = textwrap.wrap(f"$ {command}", 100, break_long_words=False, break_on_hyphens=False)
    return " \\\n      ".join(lines)


def page(sections: list[tuple[Step, list[tuple[str, str]]]]) -> str:
    """Return the page in Markdown from the steps with their (command, output)."""
    texts = [HEAD]
    for step, results in sections:
        texts += [f"## {step.title}", textwrap.fill(step.text, 120)]
        if results:
            (command, output), *others = results
            texts.append(f"```\n{broken(command)}\n{shortened(output)}\n```")
            if others:
                texts.append("```\n" + "\n".join(broken(command) for command, _ in others) + "\n```")
        texts += [step.after if step.after.startswith("!") else textwrap.fill(step.after, 120)] if step.after else []
    return "\n\n".join(texts) + "\n"


HEAD = """# A first run

What a first hour looks like, from an empty folder to a table of three methods. This page is the output of
`python tools/first_run.py --write docs/first_run.md` on two CPU cores, shortened where an ellipsis stands. The tests
run its commands with fewer epochs. Install the project first, with [the quickstart](../README.md#quickstart), and
activate its environment with `source .venv/bin/activate`."""


def main(args) -> None:
    """Run the steps, and write the page. Raises UserError for an output folder that exists."""
    command_line.check_out(args, ".md", flag="write")
    if (ROOT / args.output_dir).exists():  # where the commands run
        raise UserError(f"--output_dir {args.output_dir} exists: delete it, or give another folder")
    sections = []
    for step in STEPS[: args.stop_after]:
        commands = [words(command, args) for command in step.commands]
        step = replace(step, text=words(step.text, args))
        sections.append((step, [(command, run(command)) for command in commands]))
    if args.write:
        Path(args.write).write_text(page(sections), encoding="utf-8")
        print(f"\nwritten: {args.write}")


if __name__ == "__main__":
    with user_errors("first_run.py"):
        main(get_args_parser().parse_args())
