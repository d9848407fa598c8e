"""The loop: processes, accumulation and workers change nothing; faults stop it before an update; logs are right."""

import json
import math
import shutil

import pytest
import torch
from helpers.launch import SMALL, checkpoint, largest_difference, log_rows, ranks, same_tensors, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import param_groups_weight_decay

import main_finetune
import main_linprobe
import main_pretrain
from engine_finetune import evaluate
from evaluation.encoder import load_encoder
from models_mae import MaskedAutoencoderViT
from util.compute.precision import NativeScalerWithGradNormCount
from util.data.build import build_loader
from util.data.image_format import mean_std
from util.data.readers import read_images
from util.data.sample_rng import sample_noise, seeded
from util.data.transforms import pretrain_transform
from util.errors import RunFailed, UserError
from util.lr_sched import adjust_learning_rate
from util.training.batches import accumulation_window
from util.training.meters import EpochMeter
from util.weights.load import read_weights

# fp32 on every machine: where a CPU multiplies bf16 fast, `auto` is bf16, whose rounding is too coarse to compare.
BASE = f"{SMALL} --epochs 2 --warmup_epochs 1 --blr 0.01 --num_workers 0 --vis_freq 0 --print_freq 1 --device cpu"
BASE += " --amp_dtype fp32"


def pretrain(flags: str):
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))


def finetune(flags: str):
    return main_finetune.main(main_finetune.get_args_parser().parse_args(flags.split()))


def final_weights(folder):
    return checkpoint(folder, "checkpoint-1.pth")["model"]


@pytest.fixture(scope="module")
def plain_run(image_folder, tmp_path_factory):
    """Two epochs of three steps of 32 images: (folder, data flags)."""
    folder = tmp_path_factory.mktemp("plain")
    pretrain(f"{BASE} --data_path {image_folder} --batch_size 32 --output_dir {folder}")
    return folder, f"{BASE} --data_path {image_folder}"


def test_two_processes_equal_one(plain_run, tmp_path):
    """Same global batches, same masks: the loss curve agrees to 1e-5 (the order of summation differs)."""
    folder, flags = plain_run
    ranks("main_pretrain", f"{flags} --batch_size 16 --output_dir {tmp_path}", 2)
    one, two = scalars(folder, "train/loss"), scalars(tmp_path, "train/loss")
    assert [x for x, _ in one] == [x for x, _ in two] and len(one) == 6
    for (_, a), (_, b) in zip(one, two):
        assert b == pytest.approx(a, rel=1e-5)
    # Adam divides by the root of the second moment: where that is tiny, it enlarges rounding to a part of lr (1e-3).
    assert largest_difference(final_weights(folder), final_weights(tmp_path)) < 5e-4


def test_accumulation_equals_a_large_batch(plain_run, tmp_path):
    """4 x 8 = 32 images, equal up to the rounding of gradient sums, which Adam enlarges as above."""
    folder, flags = plain_run
    pretrain(f"{flags} --batch_size 8 --accum_iter 4 --output_dir {tmp_path}")
    for (_, a), (_, b) in zip(scalars(folder, "train/loss"), scalars(tmp_path, "train/loss"), strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    assert largest_difference(final_weights(folder), final_weights(tmp_path)) < 5e-4


def test_workers_change_nothing(plain_run, tmp_path):
    folder, flags = plain_run
    pretrain(f"{flags.replace('--num_workers 0', '--num_workers 2')} --batch_size 32 --output_dir {tmp_path}")
    assert same_tensors(final_weights(folder), final_weights(tmp_path))


@pytest.mark.parametrize("total,accum,sizes", [(11, 4, [4, 4, 3]), (8, 4, [4, 4]), (3, 5, [3]), (4, 1, [1] * 4)])
def test_windows(total, accum, sizes):
    windows = [accumulation_window(i, total, accum) for i in range(total)]
    assert [size for size, _, last in windows if last] == sizes
    assert sum(first for _, first, _ in windows) == len(sizes)


def test_last_partial_window_is_a_mean_too(image_folder, tmp_path):
    """12 micro-batches of 8 in windows of 5, 5 and 2 equal an explicit loop with batches of 40, 40 and 16."""
    flags = f"{BASE} --epochs 1 --warmup_epochs 0 --data_path {image_folder} --batch_size 8 --accum_iter 5"
    pretrain(f"{flags} --output_dir {tmp_path}")
    args = main_pretrain.get_args_parser().parse_args(flags.split())
    args.input_size, args.lr = 16, args.blr * 40 / 256
    with seeded(args.seed):
        model = main_pretrain.build(args)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95))
    transform = pretrain_transform("mae", (16, 16), *mean_std(args.dataset, args.in_chans))
    batches = list(build_loader(read_images(args, True), transform, args, 8, train=True).begin(0))
    for first, count in ((0, 5), (5, 5), (10, 2)):
        imgs = torch.cat([batch.image for batch in batches[first : first + count]])
        indices = torch.cat([batch.index for batch in batches[first : first + count]])
        adjust_learning_rate(optimizer, first / 12, args)
        optimizer.zero_grad()
        model(imgs, args.mask_ratio, sample_noise(args.seed, 0, indices, 16))[0].backward()
        optimizer.step()
    assert largest_difference(checkpoint(tmp_path, "checkpoint-0.pth")["model"], model.state_dict()) < 2e-4


def test_non_finite_loss_stops_before_the_update(plain_run, tmp_path, monkeypatch):
    """A NaN in step 4 (the second of epoch 1), read only at the end of the epoch: no later step moves a weight, and the
    checkpoint of epoch 0 is unchanged."""
    _, flags = plain_run
    seen, original = [], MaskedAutoencoderViT.reconstruction_loss

    def reconstruction_loss(self, *args):
        seen.append({key: value.clone() for key, value in self.state_dict().items()})
        return original(self, *args) * (math.nan if len(seen) == 5 else 1.0)

    monkeypatch.setattr(MaskedAutoencoderViT, "reconstruction_loss", reconstruction_loss)
    flags = flags.replace("--print_freq 1", "--print_freq 100").replace("--num_workers 0", "--num_workers 1")
    with pytest.raises(RunFailed, match=r"train/pixels became non-finite at step 4 \(epoch 1\)"):
        pretrain(f"{flags} --batch_size 32 --save_freq 1 --output_dir {tmp_path}")
    assert len(seen) == 6  # one more step was computed, which changed nothing:
    assert same_tensors(seen[4], seen[5])
    assert [path.name for path in tmp_path.glob("*.pth")] == ["checkpoint-0.pth"]


def test_guard_and_loss_scaling():
    """fp16 scaling: `applied` is 0 for a step that overflows and is skipped, and 1 for the next one."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = NativeScalerWithGradNormCount(enabled=True)
    before = model.weight.clone()
    for factor, moved in ((math.inf, False), (1.0, True)):
        loss = (model(torch.ones(3, 4)) * factor).sum()
        scaler(loss, optimizer, parameters=model.parameters())
        optimizer.zero_grad()
        assert bool(scaler.applied) is moved
        assert torch.equal(model.weight, before) is not moved
    assert scaler.state_dict()["scale"] == 2.0**15


def test_scaler_in_a_custom_loop():
    """The helper under its official name, with an optimizer that is not fused: it steps, and refuses NaN gradients."""
    from util.misc import NativeScalerWithGradNormCount as NativeScaler

    model = torch.nn.Linear(4, 2)
    scaler, optimizer = NativeScaler(), torch.optim.AdamW(model.parameters(), lr=0.1)
    for factor, moved in ((1.0, True), (math.inf, False)):
        before = model.weight.detach().clone()
        scaler((model(torch.ones(3, 4)) * factor).sum(), optimizer, parameters=model.parameters(), update_grad=True)
        optimizer.zero_grad()
        assert torch.equal(model.weight, before) is not moved


def test_skipped_steps_are_counted(image_folder, tmp_path):
    """fp16: whether or not the first losses overflow at the initial scale, the logged norm is always finite."""
    pretrain(f"{BASE} --data_path {image_folder} --batch_size 32 --amp_dtype fp16 --output_dir {tmp_path}")
    rows = log_rows(tmp_path)
    assert all(math.isfinite(row["train/grad_norm"]) and 0 <= row["train/skipped_steps"] <= 1 for row in rows)


def test_clip_grad():
    model = torch.nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    before = model.weight.detach().clone()
    norm = NativeScalerWithGradNormCount()(model(torch.ones(1, 4)).sum(), optimizer, 0.5, model.parameters())
    assert norm.item() == pytest.approx(8**0.5)
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_trains(image_folder, tmp_path, dtype):
    pretrain(f"{BASE} --data_path {image_folder} --batch_size 32 --amp_dtype {dtype} --output_dir {tmp_path}")
    losses = [row["train/loss"] for row in log_rows(tmp_path)]
    assert losses[1] < losses[0] < 5


def test_evaluation_counts_every_image_once(image_folder, tmp_path):
    """20 images in batches of 3 on two ranks (10 each, the last batch of one image) give the result of one process."""
    flags = f"--data_path {image_folder} --model vit_micro_patch4 --input_size 16 --batch_size 16 --num_workers 0 "
    flags += "--aa none --device cpu "
    finetune(f"{flags} --epochs 1 --warmup_epochs 0 --output_dir {tmp_path}")
    run = f"{flags.replace('--batch_size 16', '--batch_size 3')} --eval --resume {tmp_path}/checkpoint-0.pth"
    outputs = [ranks("main_finetune", run, processes) for processes in (1, 2)]
    lines = [next(line for line in output.splitlines() if line.startswith("top-1")) for output in outputs]
    assert lines[0] == lines[1] and "on 20 images" in lines[0]


def test_evaluate_against_counting_by_hand(image_folder):
    flags = f"--data_path {image_folder} --num_workers 0 --batch_size 7"
    args = main_finetune.get_args_parser().parse_args(flags.split())
    args.input_size, args.in_chans = 16, 3
    loader = build_loader(read_images(args, False), main_finetune.build_transform(False, args), args, 7, train=False)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    batches = list(loader.begin(0))
    logits = model(torch.cat([batch.image for batch in batches]))
    targets = torch.cat([batch.target for batch in batches])
    stats = evaluate(loader, model, torch.device("cpu"))
    assert len(targets) == 20
    assert stats["acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert stats["acc5"] == 100.0  # there are only four classes
    assert stats["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)


def test_evaluation_every_second_epoch(image_folder, tmp_path):
    """Evaluation every second epoch and after the last; it does not change the weights."""
    flags = f"--data_path {image_folder} --model vit_micro_patch4 --input_size 16 --batch_size 32 --num_workers 0 "
    flags += "--epochs 5 --warmup_epochs 1 --device cpu --amp_dtype fp32 --save_freq 5 --keep 0 "
    finetune(f"{flags} --output_dir {tmp_path}/every")
    finetune(f"{flags} --eval_freq 2 --output_dir {tmp_path}/second")
    rows = log_rows(tmp_path / "second")
    assert ["eval/acc1" in row for row in rows] == [False, True, False, True, True]
    every, second = (checkpoint(tmp_path / name, "checkpoint-4.pth")["model"] for name in ("every", "second"))
    assert same_tensors(every, second)


def test_unreadable_images_are_counted_and_limited(tmp_path, image_folder):
    import shutil

    broken = tmp_path / "data"
    shutil.copytree(image_folder, broken)
    (broken / "train" / "class0" / "000.png").write_bytes(b"not a picture")
    flags = f"{BASE} --data_path {broken} --batch_size 32"
    with pytest.raises(UserError, match=r"--max_bad_fraction 0\.01"):
        pretrain(f"{flags} --output_dir {tmp_path}/strict")
    pretrain(f"{flags} --output_dir {tmp_path}/lenient --max_bad_fraction 0.1")
    # A replacement can be the broken image again with probability 1/96: usually 1 per epoch, hardly ever more.
    assert all(1 <= row["data/bad_images"] <= 3 for row in log_rows(tmp_path / "lenient"))


def test_log_and_tensorboard(image_folder, tmp_path):
    """TensorBoard has scalars at epoch x 1000, pictures, flags, and hparams with final metrics; log.txt has one object
    a line."""
    flags = BASE.replace("--vis_freq 0", "--vis_freq 1")
    pretrain(f"{flags} --data_path {image_folder} --batch_size 32 --knn_freq 1 --output_dir {tmp_path}")
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "train/pixels",
        "train/lr",
        "train/grad_norm",
        "speed/images_per_s",
        "speed/data_wait_percent",
        "eval/knn20_acc1",
    } <= set(tags["scalars"])
    assert [x for x, _ in scalars(tmp_path, "train/loss")] == [333, 666, 1000, 1333, 1666, 2000]
    assert len(events.Images("reconstruction")) == 2
    assert "flags/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert {"train/loss", "train/lr", "epoch", "eval/knn20_acc1"} <= set(rows[0])
    assert rows[1]["eval/knn20_acc1"] > 60  # four colours: chance is 25


def test_means_are_over_the_steps_that_have_a_value():
    meter = EpochMeter(torch.device("cpu"))
    for odd in (None, torch.tensor(4.0), None):
        meter.add({"loss": torch.tensor(1.5), "odd": odd})
    assert meter.read() == {"loss": 1.5, "odd": 4.0}
    meter.add({"odd": None})
    assert meter.read() == {} and meter.means() == {"loss": 1.5, "odd": 4.0}


def test_more_than_a_thousand_steps_an_epoch(tmp_path):
    """No x value is written twice, however many steps share it."""
    from util.report.tensorboard import Board

    board = Board(str(tmp_path))
    for step in range(2500):
        board.scalars({"loss": step}, step / 2500)
    board.close()
    xs = [x for x, _ in scalars(tmp_path, "loss")]
    assert xs == sorted(set(xs)) and len(xs) == 1000


def test_flags_cannot_write_markup(tmp_path):
    """TensorBoard shows text as Markdown: a file name must remain one cell of plain text."""
    from util.report.tensorboard import Board

    board = Board(str(tmp_path))
    board.flags({"data_path": "<img src=x onerror=alert(1)>", "train_list": "a`|</code> **b**\n| c | d |"})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("flags/text_summary")[0].tensor_proto.string_val
    rows = text.decode().splitlines()
    assert len(rows) == 4 and all(row.count("|") == 3 for row in rows)
    assert "<img" not in text.decode() and "`" not in text.decode() and text.decode().count("</code>") == 2


def test_linear_probe_on_images_and_on_cached_features(image_folder, tmp_path):
    """A probe on images and one on cached features, which chooses its learning rate without the test set."""
    flags = f"--data_path {image_folder} --model vit_micro_patch4 --input_size 16 --batch_size 32 --num_workers 0 "
    flags += "--epochs 30 --warmup_epochs 2 --device cpu --global_pool "
    parser = main_linprobe.get_args_parser()
    cached = main_linprobe.main(parser.parse_args(f"{flags} --cache_features --output_dir {tmp_path}/c".split()))
    assert cached["data/train_images"] == 88 and cached["data/test_images"] == 20  # 2 of each class held out
    assert cached["eval/acc1"] > 70  # any features separate the colours
    assert cached["train/blr"] in parser.get_default("probe_blrs")
    stored = json.loads((tmp_path / "c" / "probe.json").read_text())
    assert stored["result"] == cached
    seen = main_linprobe.main(parser.parse_args(f"{flags} --eval --resume {tmp_path}/c/probe.pth".split()))
    assert seen == main_linprobe.main(parser.parse_args(f"{flags} --eval --finetune {tmp_path}/c/probe.pth".split()))
    assert (seen["acc1"], seen["acc5"]) == pytest.approx((cached["eval/acc1"], cached["eval/acc5"]))
    weights = read_weights(f"{tmp_path}/c/probe.pth")  # as tools/robustness.py reads it
    assert weights.classes == [f"class{i}" for i in range(4)]
    assert load_encoder(weights, {})[0].head.weight.shape == (4, 128)
    live = main_linprobe.main(parser.parse_args(f"{flags} --blr 3 --output_dir {tmp_path}/l".split()))
    assert live["acc1"] > 70
    again = main_linprobe.main(
        parser.parse_args(f"{flags} --eval --resume {tmp_path}/l/checkpoint-29.pth --output_dir {tmp_path}/e".split())
    )
    assert again["acc1"] == live["acc1"]


def test_cached_features_on_two_ranks(image_folder, tmp_path):
    """The main process trains the heads; the result is that of one process, up to the batches of the encoder."""
    flags = f"--data_path {image_folder} --model vit_micro_patch4 --input_size 16 --batch_size 32 --num_workers 0 "
    flags += "--epochs 2 --warmup_epochs 0 --device cpu --amp_dtype fp32 --cache_features --output_dir"
    for processes in (1, 2):
        ranks("main_linprobe", f"{flags} {tmp_path}/{processes}", processes)
    one, two = (checkpoint(tmp_path / str(processes), "probe.pth")["model"] for processes in (1, 2))
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-4  # float32; batches of other sizes
    one, two = (json.loads((tmp_path / str(processes) / "probe.json").read_text())["result"] for processes in (1, 2))
    assert one == two


@pytest.mark.parametrize("split,message", [("train", "leaves 0 to choose"), ("val", "none of the 20 test images")])
def test_cached_features_of_unreadable_images(image_folder, tmp_path, split, message):
    shutil.copytree(image_folder, tmp_path / "data")
    for path in (tmp_path / "data" / split).glob("*/*.png"):
        path.write_bytes(b"no image")
    flags = f"--data_path {tmp_path}/data --model vit_micro_patch4 --input_size 16 --num_workers 0 --device cpu"
    with pytest.raises(UserError, match=message):
        main_linprobe.main(main_linprobe.get_args_parser().parse_args(f"{flags} --epochs 1 --cache_features".split()))


def test_a_frozen_encoder_stays_frozen(image_folder, tmp_path):
    flags = f"--data_path {image_folder} --model vit_micro_patch4 --input_size 16 --batch_size 32 --num_workers 0 "
    flags += f"--epochs 2 --warmup_epochs 0 --device cpu --blr 10 --save_freq 1 --keep 0 --output_dir {tmp_path}"
    main_linprobe.main(main_linprobe.get_args_parser().parse_args(flags.split()))
    first, last = (checkpoint(tmp_path, f"checkpoint-{epoch}.pth")["model"] for epoch in (0, 1))
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert moved == {
        "head.0.running_mean",
        "head.0.running_var",
        "head.0.num_batches_tracked",
        "head.1.weight",
        "head.1.bias",
    }


def test_init_from_takes_weights_only(plain_run, tmp_path):
    folder, flags = plain_run
    pretrain(f"{flags} --lr 0 --batch_size 32 --init_from {folder}/checkpoint-1.pth --output_dir {tmp_path}")
    state = checkpoint(tmp_path, "checkpoint-1.pth")
    assert same_tensors(state["model"], final_weights(folder)) and state["step"] == 6
