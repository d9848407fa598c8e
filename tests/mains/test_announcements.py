"""What the mains print at the start and at the end: the facts of the run, and commands that work as they are."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from helpers.launch import ranks

import main_detect
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from util import next_commands
from util.report.blocks import counted
from util.training.announcements import result_rows

DATA = "--dataset digits --num_workers 0 --device cpu --amp_dtype fp32"
PRETRAIN = f"{DATA} --model mae_vit_micro_patch4 --input_size 16 --batch_size 240 --warmup_epochs 1 --blr 0.01"


def run(main, words: str, capsys) -> tuple[dict[str, str], dict[str, str], str]:
    """Run a main; return the rows of its first and of its last block by title, and the whole text."""
    main.main(main.get_args_parser().parse_args(shlex.split(words)))
    text = capsys.readouterr().out
    last = (re.search(r"^finished ", text, re.M) or re.search(r"^files ", text, re.M)).start()
    start = rows_of(text[text.index("\ndata  ") : last])
    return start, rows_of(text[last:]), text


def rows_of(text: str) -> dict[str, str]:
    """Return the rows of the block at the start of `text` by title; the lines of a row are joined by newlines."""
    rows, title = {}, ""
    for line in text.strip("\n").splitlines():
        if len(line) > 15 and line[14] == " " and line[15] != " ":
            title = line[:14].strip() or title
            rows[title] = "\n".join(filter(None, [rows.get(title), line[15:]]))
        else:
            break
    return rows


def run_next(command: str, *more: str):
    """Run a proposed command in this process."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = ".".join(Path(words[at]).with_suffix("").parts[-2:] if "tools" in words[at] else [Path(words[at]).stem])
    module = importlib.import_module(name)
    return module.main(module.get_args_parser().parse_args([*words[at + 1 :], *more]))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("announced") / "mae"
    words = f"{PRETRAIN} --epochs 1 --warmup_epochs 0 --vis_freq 0 --output_dir {folder}"
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(words.split()))
    return folder / "checkpoint-0.pth"


def test_pretraining(tmp_path, capsys):
    out = tmp_path / "a b"  # quoted in the commands
    flags = f"--epochs 2 --accum_iter 2 --rc_mae --rc_gamma 0.5 --norm_pix_loss --knn_freq 1 --output_dir '{out}'"
    start, end, text = run(main_pretrain, f"{PRETRAIN} {flags} --print_freq 1", capsys)
    block = text[: text.index("epoch 1/2")]
    assert max(map(len, block.splitlines())) <= 80 or len(str(out)) > 60
    assert start["data"] == "digits, 1,437 training images, 360 evaluation images, 10 classes"
    assert start["pixels"] == "mean 0.305, standard deviation 0.376 (training set of digits)"
    assert start["model"].startswith("mae_vit_micro_patch4, 1.04 M parameters, 16 x 16 px,")
    assert re.search(r"16 patches of 4 x 4, 4 visible, [\d.]+ MFLOPs a forward pass$", start["model"])
    method = start["method"].replace("\n", " ")
    assert method.startswith("RC-MAE, mask ratio 0.75, normalised pixels, --rc_mae, --rc_gamma 0.5, --rc_")
    assert start["batch"] == "480 images = 240 per process x 2 accumulated"
    assert start["steps"] == "3 per epoch, 6 steps in 2 epochs"
    rate = "0.0187 (base 0.01), 1 epoch of warm-up, cosine to 0, weight decay 0.05"  # 0.01 * 480 / 256
    assert start["learning rate"].replace("\n", " ") == rate
    assert start["device"].startswith("cpu (") and "float32, 1 process" in start["device"].replace("\n", " ")
    assert start["output"] == str(out)
    assert re.fullmatch(r"about 0:\d\d:\d\d without evaluation, until \w{3} \d\d:\d\d", start["duration"])

    assert end["finished"].startswith("2 epochs, 6 steps, 2,400 images seen, in 0:0")
    assert re.search(r"loss [\d.]+", end["last epoch"]) and "knn" in end["last epoch"]
    assert re.search(r"knn\w* [\d.]+ \(epoch [12]\)", end["best"])
    listed = [line.split()[0] for line in end["files"].splitlines()[1:]]
    expected = ["checkpoint-1.pth", "encoder.safetensors", "encoder_ema.safetensors", "log.txt", "results.jsonl"]
    assert listed == [*expected, "events.out.*"]
    assert end["files"].splitlines()[0] == f"in {out}" and "1 earlier" in end["files"]

    finetune, probe, board = end["next"].splitlines()
    assert shlex.split(board)[-2:] == ["--logdir", str(out)]
    stats = run_next(finetune, *"--epochs 1 --warmup_epochs 0 --num_workers 0 --batch_size 128".split())
    assert 0 <= stats["acc1"] <= 100 and Path(f"{out}-finetune/checkpoint-best.pth").is_file()
    run_next(probe, "--epochs", "2")
    assert Path(f"{out}-probe/probe.pth").is_file()


def test_pretraining_without_labels(image_folder, tmp_path, capsys):
    """Nothing can be fine-tuned: the next commands draw and export."""
    words = (
        f"--dataset folder --data_path {image_folder} --model mae_vit_micro_patch4 --input_size 16 --mean 0.5 0.5 0.5"
    )
    words += " --std 0.2 0.2 0.3 --mask_ratio 0.5 --mask_ratio_end 0.75 --vis_freq 0 --num_workers 0 --device cpu"
    start, end, _ = run(main_pretrain, f"{words} --epochs 1 --batch_size 8 --output_dir {tmp_path}", capsys)
    assert "classes" not in start["data"] and f"folder in {image_folder}" in start["data"]
    assert start["pixels"] == "mean 0.5, standard deviation 0.2 0.2 0.3 (--mean, --std)"
    assert "8 to 4 visible" in start["model"] and start["method"] == "MAE, mask ratio 0.5 to 0.75, pixels"
    picture, export, _ = end["next"].splitlines()
    run_next(picture)
    run_next(export)
    assert {"reconstructions.png", "encoder-timm.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_fine_tuning_and_its_evaluation(pretrained, tmp_path, capsys):
    words = f"{DATA} --finetune {pretrained} --epochs 2 --warmup_epochs 0 --batch_size 240 --output_dir {tmp_path}"
    start, end, text = run(main_finetune, words, capsys)
    assert "mean of the patches" in start["model"] and start["weights"] == str(pretrained)
    assert start["fine-tuning"] == "targets single, layer decay 0.75"
    assert start["augmentation"].startswith("preset tiny, aug crop, aa none, reprob 0.0")
    assert "acc1" in end["last epoch"] and re.search(r"acc1 [\d.]+ \(epoch [12]\)", end["best"])
    evaluate, predict, _ = end["next"].splitlines()
    stats = run_next(evaluate)
    text = capsys.readouterr().out
    best = float(re.search(r"acc1 ([\d.]+) \(epoch", end["best"])[1])
    assert stats["acc1"] == pytest.approx(best, abs=0.005)  # printed with four digits
    evaluated = rows_of(text[text.index("\ndata  ") :])
    assert evaluated["data"] == "digits, 360 evaluation images, 10 classes"
    assert evaluated["weights"] == str(tmp_path / "checkpoint-best.pth") and "batch" not in evaluated
    assert "eval.json" in text and "tools/predict.py" in text
    run_next(predict, "--num_workers", "0")
    assert (tmp_path / "predictions.csv").is_file()


def test_a_resumed_run_says_what_is_done(tmp_path, capsys):
    words = (
        f"{DATA} --model vit_micro_patch4 --input_size 16 --batch_size 718 --warmup_epochs 0 --output_dir {tmp_path}"
    )
    start, _, _ = run(main_finetune, f"{words} --epochs 1", capsys)
    assert start["weights"] == "random (no --finetune: training from scratch)"
    start, end, _ = run(main_finetune, f"{words} --epochs 2 --resume auto", capsys)
    assert start["steps"] == "2 per epoch, 4 steps in 2 epochs, 2 steps done"
    assert end["finished"].startswith("2 epochs, 4 steps, 2,872 images seen")
    main_finetune.main(main_finetune.get_args_parser().parse_args(f"{words} --epochs 2 --resume auto".split()))
    text = capsys.readouterr().out  # already finished: nothing is announced
    assert "already finished" in text and "\nfinished " not in text and "\ndata " not in text


@pytest.mark.parametrize("head", ["", "--head attentive", "--cache_features --global_pool"])
def test_probes_and_their_evaluation(head, pretrained, tmp_path, capsys):
    words = f"{DATA} --finetune {pretrained} --epochs 2 --batch_size 720 --warmup_epochs 0 {head}"
    start, end, _ = run(main_linprobe, f"{words} --output_dir {tmp_path}", capsys)
    assert "frozen" in start["model"] and start["weights"] == str(pretrained)
    expected = {"": "linear, [cls] token, augmentation none", "--head attentive": "attentive, augmentation none"}
    assert start["head"] == expected.get(head, "linear, mean of the patches, on cached features")
    assert ("batch" in start) == ("cache" not in head)
    evaluate, *_ = end["next"].splitlines()
    assert 0 <= run_next(evaluate)["acc1"] <= 100


SCENES = "--dataset scenes --scene_digits 0 1 --scene_size 32 --scene_count 8 4 --input_size 32 --num_workers 0"
SCENES += " --device cpu --amp_dtype fp32 --model vit_micro_patch4 --head_width 16 --batch_size 4 --epochs 1"


def test_segmentation(tmp_path, capsys):
    words = f"{SCENES} --head_norm layer --stride 20 --output_dir {tmp_path}"
    start, end, _ = run(main_segment, words, capsys)
    assert start["data"] == "scenes, 8 training images, 4 evaluation images, 3 classes"
    assert start["head"] == "upernet, blocks 0 1 2 3, layer norm"
    assert start["evaluation"].startswith("windows of 32 x 32 px every 20 px")
    assert start["learning rate"].startswith("0.0001 (base") and "linear to 0" in start["learning rate"]
    assert "eval/mIoU" in end["last epoch"] and "checkpoint-best.pth" in end["files"]
    evaluate, picture, *_ = end["next"].splitlines()
    assert run_next(evaluate, "--num_workers", "0")["mIoU"] >= 0
    run_next(picture, "--num_workers", "0")
    assert (tmp_path / "predictions.png").is_file()


def test_detection(tmp_path, capsys):
    start, end, _ = run(main_detect, f"{SCENES} --window 4 --detector faster --output_dir {tmp_path}", capsys)
    assert start["data"] == "scenes, 8 training images, 4 evaluation images, 2 classes"
    assert start["detector"].startswith("Faster R-CNN, pyramid simple") and "windows of 4 x 4 patches" in " ".join(
        start.values()
    )
    assert "divided by 10 after 88.9 % and 96.3 %" in start["learning rate"].replace("\n", " ")
    assert "eval/" in end["last epoch"]
    assert "skipped" in run_next(end["next"].splitlines()[0], "--num_workers", "0")


def test_random_weights_are_named(tmp_path, capsys):
    words = f"{DATA} --model vit_micro_patch4 --input_size 16 --cache_features --epochs 1 --output_dir {tmp_path}"
    start, _, _ = run(main_linprobe, words, capsys)
    assert start["weights"] == "random (no --finetune)"


def test_without_a_folder_nothing_is_proposed(capsys):
    words = f"{PRETRAIN} --epochs 1 --warmup_epochs 0 --vis_freq 0 --output_dir ''"
    start, end, _ = run(main_pretrain, words, capsys)
    assert start["output"] == "nothing is written (--output_dir is empty)" and set(end) == {"finished"}


def test_several_processes(tmp_path):
    """The blocks are printed once, and the commands start as many processes."""
    words = f"{PRETRAIN} --epochs 1 --warmup_epochs 0 --vis_freq 0 --print_freq 1 --output_dir {tmp_path}"
    text = ranks("main_pretrain", words, 2)
    assert [text.count(f"\n{title} ") for title in ("data", "duration", "finished", "next")] == [1, 1, 1, 1]
    assert "480 images = 240 per process x 2 processes" in text and "float32, 2 processes" in text


def test_commands_are_quoted_and_have_the_data_flags(monkeypatch, tmp_path):
    words = ["--dataset", "filelist", "--train_list", "a b.txt", "--val_list", "v.txt", "--label_column", "x", "y"]
    words += ["--allow_outside", "--num_workers", "3", "--no_pin_mem", "--crop_pct", "0.9", "--targets", "multilabel"]
    args = main_finetune.get_args_parser().parse_args(words)
    args.pixel_range = [0, 4095]  # settled, and stored in the checkpoint
    kept = ["--dataset", "filelist", "--train_list", "a b.txt", "--val_list", "v.txt", "--label_column", "x", "y"]
    kept += ["--allow_outside", "--crop_pct", "0.9", "--no_pin_mem"]
    assert next_commands.data_words(args) == kept
    assert next_commands.data_words(args, labels=True) == [*kept, "--targets", "multilabel"]
    assert shlex.split(next_commands.command("main_finetune.py", *kept))[-len(kept) :] == kept
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "-m torch.distributed.run --nproc_per_node 4" in next_commands.command("main_finetune.py")
    assert "torch.distributed" not in next_commands.command("tools/knn.py")
    monkeypatch.chdir(tmp_path)  # elsewhere the script has its whole path
    script = shlex.split(next_commands.command("tools/knn.py"))[-1]
    assert Path(script).is_file()


def test_best_of_a_log():
    """Losses and errors are best where they are lowest; a value that is missing or not finite is skipped."""
    log = [
        {"epoch": 0, "train/loss": 3.0, "eval/loss": 0.5, "eval/acc1": 10.0, "eval/rmse": 2.0, "eval/skipped": 0},
        {"epoch": 1, "train/loss": 2.0, "eval/loss": 0.4, "eval/acc1": 30.0, "eval/rmse": 1.0},
        {"epoch": 2, "train/loss": 1.0, "eval/loss": 0.6, "eval/acc1": 20.0, "eval/rmse": 3.0, "eval/best_acc1": 30.0},
        {"epoch": 3, "train/loss": 0.9, "train/lr": 0.1, "eval/loss": None, "eval/acc1": 20.0, "eval/rmse": 3.0},
    ]
    (_, last), (_, best) = result_rows(log)
    assert " ".join(last) == "train/loss 0.9, eval/acc1 20, eval/rmse 3"
    assert " ".join(best) == "eval/loss 0.4 (epoch 2), eval/acc1 30 (epoch 2), eval/rmse 1 (epoch 2)"
    assert result_rows([]) == [] and result_rows(log[:1])[1][1] == []


def test_curves_of_neighbours_are_shown_together(tmp_path):
    """The folder of a run alone, and that of all runs where others have finished beside it."""
    (tmp_path / "one").mkdir()
    assert shlex.split(next_commands.tensorboard(str(tmp_path / "one")))[-1] == str(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "results.jsonl").touch()
    assert shlex.split(next_commands.tensorboard(str(tmp_path / "one")))[-1] == str(tmp_path)


def test_positions_are_counted_as_in_the_progress_lines(tmp_path, capsys):
    """From 1, unlike the names of checkpoints."""
    words = (
        f"{DATA} --model vit_micro_patch4 --input_size 16 --batch_size 359 --warmup_epochs 0 --output_dir {tmp_path}"
    )
    main_finetune.main(main_finetune.get_args_parser().parse_args(f"{words} --max_steps 6".split()))  # four an epoch
    main_finetune.main(main_finetune.get_args_parser().parse_args(f"{words} --epochs 2 --resume auto".split()))
    assert "checkpoint-1-2.pth: 2 batches of epoch 2 done\n" in capsys.readouterr().out
    main_finetune.main(main_finetune.get_args_parser().parse_args(f"{words} --epochs 3 --resume auto".split()))
    assert "checkpoint-1.pth: 2 epochs done\n" in capsys.readouterr().out


def test_evaluating_the_newest_checkpoint(pretrained, tmp_path, capsys):
    """`auto` is replaced by the file in what is shown and proposed; events in a --log_dir of their own are found."""
    words = f"{DATA} --finetune {pretrained} --epochs 1 --batch_size 720 --warmup_epochs 0 --output_dir {tmp_path}/out"
    _, end, _ = run(main_linprobe, f"{words} --log_dir {tmp_path}/events", capsys)
    assert shlex.split(end["next"].splitlines()[-1])[-1] == f"{tmp_path}/events"
    words = f"{DATA} --eval --resume auto --output_dir {tmp_path}/out"
    start, end, _ = run(main_linprobe, words, capsys)
    checkpoint = f"{tmp_path}/out/checkpoint-0.pth"
    assert start["weights"] == checkpoint and checkpoint in end["next"].splitlines()[0]


def test_a_resumed_probe_names_its_encoder(pretrained, tmp_path, capsys):
    words = (
        f"{DATA} --model vit_micro_patch4 --input_size 16 --batch_size 720 --warmup_epochs 0 --output_dir {tmp_path}"
    )
    run(main_linprobe, f"{words} --finetune {pretrained} --epochs 1", capsys)
    start, _, _ = run(main_linprobe, f"{words} --resume auto --epochs 2", capsys)
    assert start["weights"] == str(pretrained)


def test_numbers_in_words():
    assert counted(1, "image") == "1 image" and counted(1437, "image") == "1,437 images"
    assert counted(0.3478260869565217, "epoch") == "0.348 epochs" and counted(2.0, "epoch") == "2 epochs"
