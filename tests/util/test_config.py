"""`--config`: flags of a file are those of the command line, runs are repeated bit for bit, mistakes are named."""

import json
import shlex

import pytest
import torch
import yaml
from helpers.launch import SMALL, checkpoint, same_tensors
from helpers.parsers import parser_of

import main_finetune
import main_pretrain

DIGITS = f"--dataset digits --input_size 16 {SMALL} --batch_size 256 --warmup_epochs 0 --num_workers 0 --device cpu"
RUN = f"{DIGITS} --vis_freq 0 --amp_dtype fp32"


def parse(words: str, main=main_pretrain):
    return main.get_args_parser().parse_args(shlex.split(words))


def written(folder, content: str, name: str = "flags.yaml"):
    (folder / name).write_text(content)
    return folder / name


def test_flags_of_yaml_are_those_of_the_command_line(tmp_path):
    """Numbers, lists, switches in both directions, options of methods, dashes, aliases, and 1e-3, a string in YAML."""
    file = written(
        tmp_path,
        "model: mae_vit_tiny_patch4\nblr: 1e-3\nmean: [0.5]\nstd: 0.5\npin_mem: false\nnorm-pix-loss: true\nmae_k: 5\n"
        "warmup_epochs: 2.5\ndata_path: 3\nno_pin_mem: true\nvis_freq: 0\nepochs: 8\nclip_grad: null\nseed: 4\n",
    )
    words = "--model mae_vit_tiny_patch4 --blr 1e-3 --mean 0.5 --std 0.5 --no_pin_mem --norm_pix_loss --mae_k 5"
    words += " --warmup_epochs 2.5 --data_path 3 --vis_freq 0 --epochs 8"
    ours, theirs = parse(f"--seed 5 --config {file}"), parse(f"{words} --seed 5")  # the command line wins
    assert list(vars(ours).items()) == list(vars(theirs).items())
    assert all(type(one) is type(other) for one, other in zip(vars(ours).values(), vars(theirs).values()))
    alias = written(tmp_path, "task: faster_rcnn\nanchors: [8, 16, 32, 64, 128]\n", "alias.yaml")
    args = parser_of("main_detect.py").parse_args(["--config", str(alias)])
    assert (args.detector, args.anchors) == ("faster", [8, 16, 32, 64, 128])


def test_the_last_file_wins_and_required_flags_may_be_in_a_file(tmp_path):
    first, second = written(tmp_path, "epochs: 3\nseed: 3\n", "a.yaml"), written(tmp_path, "epochs: 4\n", "b.yaml")
    args = parse(f"--config {first} --config={second}")
    assert (args.epochs, args.seed) == (4, 3)
    defaults = written(tmp_path, "epochs: 400\nclip_grad: null\nnorm_pix_loss: false\nmae_k: null\n", "defaults.yaml")
    other = written(tmp_path, "epochs: 3\nclip_grad: 1\nnorm_pix_loss: true\nmae_k: 4\n", "c.yaml")
    assert vars(parse(f"--config {other} --config {defaults}")) == vars(parse(f"--config {defaults}"))
    parser = parser_of("tools/make_shards.py")
    required = [action for action in parser._actions if action.required]
    assert required
    file = written(tmp_path, "".join(f"{action.dest}: x\n" for action in required))
    args = parser.parse_args(["--config", str(file)])
    assert all(getattr(args, action.dest) == "x" for action in required)
    with pytest.raises(SystemExit):  # required as before
        parser.parse_args([])


@pytest.mark.parametrize("method", ["", "--mae_k 1 --u_mae", "--max_steps 3 --accum_iter 2"])
def test_a_run_is_repeated(tmp_path, method):
    """From its args.json, bit for bit, in its own folder; a rate that was derived follows the batch."""
    main_pretrain.main(parse(f"{RUN} --epochs 2 {method} --resume auto --output_dir {tmp_path}/a"))
    again = parse(f"--config {tmp_path}/a/args.json --output_dir {tmp_path}/b")
    assert again.lr is None and again.log_dir is None and not again.resume
    main_pretrain.main(again)
    name = next(path.name for path in (tmp_path / "a").glob("checkpoint-*.pth"))
    ours, theirs = (checkpoint(tmp_path / folder, name) for folder in "ba")
    assert same_tensors(ours["model"], theirs["model"]) and same_tensors(ours["optimizer"], theirs["optimizer"])
    other = parse(f"--config {tmp_path}/a/args.json --seed 1 --batch_size 128 --output_dir {tmp_path}/c")
    main_pretrain.main(other)
    record = json.loads((tmp_path / "c/args.json").read_text())
    assert record["seed"] == 1 and record["lr"] == pytest.approx(record["blr"] * 128 * record["accum_iter"] / 256)
    theirs = checkpoint(tmp_path / "c", next(path.name for path in (tmp_path / "c").glob("checkpoint-*.pth")))
    assert not torch.equal(ours["model"]["mask_token"], theirs["model"]["mask_token"])


def test_a_given_rate_is_kept(tmp_path):
    main_pretrain.main(parse(f"{RUN} --epochs 1 --lr 2e-3 --output_dir {tmp_path}"))
    assert parse(f"--config {tmp_path}/args.json").lr == 2e-3


def test_print_config(tmp_path, capsys):
    """Nothing is written, and the flags that are printed give the same run."""
    words = f"{RUN} --epochs 2 --rc_mae --output_dir {tmp_path}/out"
    with pytest.raises(SystemExit) as ended:
        main_pretrain.main(parse(f"{words} --print_config"))
    assert ended.value.code == 0 and not (tmp_path / "out").exists()
    block, flags = capsys.readouterr().out.split("\nflags\n")
    assert "FLOPs a forward pass" in block and "10 steps in 2 epochs" in block and "256 images" in block
    assert {"rank", "world_size", "resume"}.isdisjoint(yaml.safe_load(flags))
    given = parse(f"--config {written(tmp_path, flags)}")
    main_pretrain.main(given)
    main_pretrain.main(parse(words.replace("/out", "/other")))
    assert same_tensors(*(checkpoint(tmp_path / name, "checkpoint-1.pth")["model"] for name in ("out", "other")))


def test_print_config_of_an_evaluation(tmp_path, capsys):
    """Also without a training loop."""
    words = "--dataset digits --input_size 16 --model vit_micro_patch4 --num_workers 0 --device cpu"
    words += f" --output_dir {tmp_path}"
    main_finetune.main(parse(f"{words} --epochs 1 --warmup_epochs 0 --batch_size 512", main_finetune))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main_finetune.main(parse(f"{words} --eval --resume auto --print_config", main_finetune))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "model: vit_micro_patch4" in capsys.readouterr().out.split("\nflags\n")[1]


MISTAKES = {
    "epoch: 3": "has no flag --epoch; did you mean --epochs?",
    "trainable_blocks: 2": "has no flag --trainable_blocks",
    "help: true": "has no flag --help",
    "epochs: [1]": "--epochs takes one value, not the list [1]",
    "epochs: true": "--epochs takes numbers or words, not True",
    "epochs: {a: 1}": "--epochs takes numbers or words, not {'a': 1}",
    "aug: mea": "--aug: invalid choice: 'mea'",
    "seed: 1.5": "--seed: invalid int value: '1.5'",
    "pin_mem: 3": "--pin_mem is a switch: true or false, not 3",
    "mean: []": "--mean takes at least one value",
    "epochs:": "--epochs needs a value; leave it out for 400",
    "- 1": "must have a line `flag: value` for each flag",
    "3: 1": "must have a line `flag: value` for each flag",
    "a: [": "is neither JSON nor YAML",
    "": "must have a line `flag: value` for each flag",
}


@pytest.mark.parametrize("content", MISTAKES)
def test_mistakes_are_named(content, tmp_path, capsys):
    file = written(tmp_path, content)
    with pytest.raises(SystemExit) as ended:
        parse(f"--config {file}")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and f"--config {file}" in error
    assert MISTAKES[content] in error


@pytest.mark.parametrize("words, message", [("--config", "needs a file"), ("--config missing.json", "No such file")])
def test_without_a_file(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err
