"""Predicted memory and FLOPs against measurements of real training steps; and the plan that follows from them."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.launch import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory

import main_pretrain
from methods import Pretrainer
from models_mae import MODELS, build_model
from planning.footprint import Setup, flops_per_image, parts, peak, sizes_of, teacher_weights, trained_weights
from planning.gpus import GPUS
from planning.plan import Machine, candidates, plan, seconds, traffic
from tools import plan as tool
from util.compute.precision import DTYPES, autocast
from util.compute.recompute import recompute_cheap
from util.errors import UserError
from util.report.mfu import flop_counter

CPU = torch.device("cpu")
TINY, MICRO = MODELS["mae_deit_tiny_patch4"].config, MODELS["mae_vit_micro_patch4"].config
LARGE, LARGEST = (sizes_of(MODELS[f"mae_vit_{name}"].config) for name in ("large_patch16", "6.5b_patch14"))


def options(dtype: str) -> argparse.Namespace:
    flags = ["--model", "mae_deit_tiny_patch4"]
    chosen = {"model": "mae_deit_tiny_patch4", "amp_dtype": dtype, "mask_ratio": 0.75}
    return argparse.Namespace(**vars(memory.get_args_parser().parse_args(flags)) | chosen)


def model_of(config: dict, setup: Setup):
    model = build_model("mae_vit_micro_patch4", **config, norm_pix_loss=True)
    model.set_grad_checkpointing(setup.grad_checkpoint)
    if setup.recompute:
        recompute_cheap(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = setup.fused
    return model


def kept(model, setup: Setup) -> int:
    """Return the bytes of all storages that autograd keeps between forward and backward pass, each counted once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    imgs = torch.randn(setup.batch, 3, *model.patch_embed.img_size)
    dtype = torch.float32 if setup.element == 4 else torch.bfloat16
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(CPU, dtype):
        loss = sum(Pretrainer(model)(imgs).values())
    del loss
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("again", [{}, {"recompute": True}, {"grad_checkpoint": True}], ids=" ".join)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "matmul"])
@pytest.mark.parametrize("element", [4, 2], ids=["fp32", "bf16"])
def test_bytes_kept_for_the_backward_pass(element, fused, again):
    """Bytes per image to 0.1 %: the difference between two batch sizes, in which weights and their bf16 copies cancel.
    Only the few numbers that the loss keeps for a whole batch are left out."""
    few, more = (Setup(batch, element=element, fused=fused, **again) for batch in (2, 5))
    model = model_of(MICRO, few)
    per_image = (kept(model, more) - kept(model, few)) / 3
    assert sum(part.saved for part in parts(sizes_of(MICRO), few)) == pytest.approx(per_image, rel=1e-3)


def test_weights_are_those_of_the_models():
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build()
        sizes = sizes_of(build.config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        fixed = model.pos_embed.numel() + model.decoder_pos_embed.numel()
        assert (trained_weights(sizes), sizes.frozen) == (trained, fixed)
        assert teacher_weights(sizes, "autoencoder") == sum(p.numel() for p in model.parameters()), name
        decoder = sum(p.numel() for key, p in model.named_parameters() if key.startswith(("decoder", "mask_token")))
        assert teacher_weights(sizes, "encoder") == teacher_weights(sizes, "autoencoder") - decoder


@pytest.mark.parametrize("teacher", ["none", "encoder", "autoencoder"])
@pytest.mark.parametrize("grad_checkpoint", [False, True], ids=["", "grad_checkpoint"])
def test_flops_are_those_that_torch_counts(teacher, grad_checkpoint):
    """FLOPs of matrix products are exact, except for the head of MAE-K, a product of below 1 % outside the formula."""
    setup = Setup(3, element=4, grad_checkpoint=grad_checkpoint, teacher=teacher)
    step = memory.Step(options("fp32"), setup, MICRO)
    with flop_counter() as counter:
        sum(step.called(step.imgs).values()).backward()
    expected = setup.batch * sum(flops_per_image(sizes_of(MICRO), setup).values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01 if teacher == "encoder" else 0)


SMALL = MODELS["mae_vit_small_patch16"].config  # at 224 px
DEEP = MICRO | {"depth": 24, "decoder_depth": 6}


def agree(setup: Setup, config: dict, tolerance: float = 0.05) -> str:
    """Compare predicted and measured peak. The aim is 15 %, measured is at most 1 %; a tolerance of 5 % allows for
    other versions of torch, and is less than any part that could be missing."""
    dtype = {size.itemsize: name for name, size in DTYPES.items() if name != "fp16"}[setup.element]
    moment, predicted, measured = memory.compared(options(dtype), setup, config)
    assert predicted == pytest.approx(measured, rel=tolerance)
    return moment


@pytest.mark.parametrize("again", [{}, {"recompute": True}, {"grad_checkpoint": True}], ids=" ".join)
@pytest.mark.parametrize("element", [4, 2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [TINY, DEEP], ids=["tiny", "deep"])
def test_peak_of_a_step(config, element, again):
    if "recompute" in again and element == 2:
        # Measured on a CPU that emulates bf16: 11 % above the plan; the cause is not known.
        pytest.xfail("the plan of --recompute cheap in bf16 is too low")
    for batch in (2, 8):
        agree(Setup(batch, element=element, fused=element == 4, **again), config)


@pytest.mark.parametrize(("element", "grad_checkpoint"), [(4, False), (2, True)], ids=["fp32", "bf16, grad_checkpoint"])
def test_peak_of_a_step_on_larger_images(element, grad_checkpoint):
    agree(Setup(2, element=element, fused=element == 4, grad_checkpoint=grad_checkpoint), SMALL)


@pytest.mark.parametrize("teacher", ["encoder", "autoencoder"])
def test_peak_with_a_teacher(teacher):
    agree(Setup(8, element=2, fused=False, teacher=teacher), TINY)


def test_peak_of_an_accumulated_step():
    """The gradients of the first micro-batch exist during the peak of the second."""
    one, two = (Setup(16, accum=accum, element=2, fused=False) for accum in (1, 2))
    agree(two, TINY)
    less, more = (sum(peak(sizes_of(TINY), setup)[1].values()) for setup in (one, two))
    assert more - less > 3 * trained_weights(sizes_of(TINY))


@pytest.fixture
def alone():
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_peak_under_ddp(alone, monkeypatch):
    """One process has the same buckets as several. Gradients exist all the time, once."""
    measured, predicted = memory.measured(memory.Step(options("bf16"), Setup(16, fused=False), TINY)), {}
    for gpus in (2, 8):
        predicted[gpus] = sum(peak(sizes_of(TINY), Setup(16, gpus=gpus, fused=False))[1].values())
    assert predicted[2] == predicted[8] == pytest.approx(measured, rel=0.05)


# The plan ------------------------------------------------------------------------------------------------------------


def test_sharded_memory_shrinks_with_the_processes():
    sharded = [peak(LARGEST, Setup(1, gpus=gpus, fsdp=True))[1] for gpus in (8, 64)]
    assert sharded[0]["weights"] + sharded[0]["AdamW"] == 8 * (sharded[1]["weights"] + sharded[1]["AdamW"])
    # Between epochs every process holds all weights in bf16, more than a block or two.
    moment, held = peak(LARGEST, Setup(1, gpus=512, fsdp=True))
    assert moment == "between epochs" and held["gathered"] == 2 * (trained_weights(LARGEST) + LARGEST.frozen)
    replicated = sum(peak(LARGEST, Setup(1, gpus=64))[1].values())
    assert replicated > 16 * trained_weights(LARGEST)  # fp32 weights, gradients, AdamW


def test_traffic():
    """Against the count for a ring: gather and reduce-scatter send N - 1 messages of 1/N each."""
    gpus, weights = 4, trained_weights(LARGE)
    pieces = (gpus - 1) * weights / gpus
    assert traffic(LARGE, Setup(1, gpus=gpus)) == pytest.approx(pieces * 4 + pieces * 4)
    assert traffic(LARGE, Setup(1, gpus=gpus, fsdp=True)) == pytest.approx(2 * pieces * 2 + pieces * 4)
    assert traffic(LARGE, Setup(1)) == 0
    teacher = traffic(LARGE, Setup(1, gpus=gpus, fsdp=True, teacher="autoencoder"))
    assert teacher == pytest.approx(2 * pieces * 2 + pieces * 4 + pieces * 2, rel=1e-2)  # and position tables


def test_time_is_arithmetic_where_nothing_else_is_slow():
    ideal = Machine(mfu=100, bandwidth=1e9, network=1e9, cores=10**9, hop_latency=0, launch_time=0, memory_rate=1e9)
    setup = Setup(32, gpus=16, accum=4)
    time = seconds(LARGE, setup, ideal)
    assert time.limit == "compute"
    assert time.step == pytest.approx(128 * sum(flops_per_image(LARGE, setup).values()) / 700e12, rel=1e-4)
    slow = seconds(LARGE, setup, replace(ideal, network=10))
    # At most hidden behind the backward pass of one micro-batch of four: two thirds of a quarter.
    assert slow.exposed == pytest.approx(traffic(LARGE, setup) / 10e9 - time.step / 4 * 2 / 3, rel=1e-2)
    assert slow.limit == "communication"
    assert seconds(LARGE, setup, replace(ideal, cores=1)).limit == "data"
    assert seconds(LARGE, setup, replace(ideal, launch_time=1.0)).limit == "too few images per GPU"
    inside = seconds(LARGE, replace(setup, gpus=8), replace(ideal, network=1e-3))
    assert inside.exposed == pytest.approx(0)  # one node has no network


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("sizes", [LARGE, LARGEST], ids=["large", "6.5b"])
def test_plan_fits_and_is_the_fastest(sizes, gpus):
    """The plan is the best of all candidates; more memory never makes it slower."""
    times = []
    for gpu_mem in (16.0, 80.0, 1000.0):
        machine = Machine(gpu_mem=gpu_mem)
        result = plan(sizes, machine, 4096, gpus)
        setup = result.setup
        assert setup.batch * setup.accum * setup.gpus == 4096 and (setup.gpus > 1 or not setup.fsdp)
        every = [(sum(peak(sizes, s)[1].values()), s) for s in candidates(4096, gpus)]
        fitting = [seconds(sizes, s, machine).step for size, s in every if size <= machine.usable]
        assert result.fits == bool(fitting) == (result.gib <= gpu_mem)
        if result.fits:
            assert result.time.step <= 1.05 * min(fitting)
            times.append(min(fitting))
    assert times == sorted(times, reverse=True)


def test_plan_by_available_memory():
    assert plan(LARGE, Machine(), 4096, 8).setup.name == "ddp"
    assert plan(LARGEST, Machine(), 4096, 8).setup.name == "fsdp"
    assert plan(LARGE, Machine(gpu_mem=8), 4096, 1).fits
    assert not plan(LARGEST, Machine(), 4096, 1).fits
    assert not plan(LARGEST, Machine(), 4096, 8, allow_fsdp=False).fits  # fp16, which --fsdp refuses


def run(flags: str):
    tool.main(tool.get_args_parser().parse_args(flags.split()))


def test_the_command_is_one_that_the_main_takes(capsys):
    run("mae_vit_large_patch16 --gpus 16 --gpu_mem 16 --epochs 100 --input_size 448")
    report = capsys.readouterr().out
    line = report.splitlines()[-1]
    assert line.startswith("torchrun --nnodes=2") and "--nproc_per_node=8" in line
    flags = line.split("main_pretrain.py")[1].replace("--fsdp", "").split()
    args = main_pretrain.get_args_parser().parse_args(flags)
    main_pretrain.check(args)
    assert args.batch_size * args.accum_iter * 16 == 4096 and args.input_size == [448] and args.epochs == 100
    # The parts of the memory add up to the printed sum (each rounded to 0.005).
    lines = [line.split() for line in report.splitlines() if line.startswith(" " * 16)]
    total = float(report.split("memory ")[1].split()[0])
    assert sum(float(words[0]) for words in lines) == pytest.approx(total, abs=0.005 * len(lines) + 0.05)
    assert total < 16


def test_printed_traffic_is_of_a_whole_step(capsys):
    """FSDP communicates in each of the micro-batches of a step, DDP once."""
    for model, gpu_mem in (("6.5b_patch14", 80), ("huge_patch14", 40)):
        result = plan(sizes_of(MODELS[f"mae_vit_{model}"].config), Machine(gpu_mem=gpu_mem), 4096, 8)
        setup = result.setup
        assert setup.accum > 1 and setup.fsdp == (model == "6.5b_patch14")
        run(f"mae_vit_{model} --gpus 8 --gpu_mem {gpu_mem}")
        sent = traffic(result.work, setup) * (setup.accum if setup.fsdp else 1)
        assert f"({sent / 1e9:.1f} GB sent per GPU)" in capsys.readouterr().out


def test_hours(capsys):
    """Hours of 800 epochs of whole steps."""
    result = plan(LARGE, Machine(), 4096, 8)
    assert result.hours(800, 1281167) == pytest.approx(800 * (1281167 // 4096) * result.time.step / 3600)
    run("mae_vit_large_patch16 mae_vit_6.5b_patch14 --gpus 1 8 --gpu_mem 40")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 4 and "does not fit" in rows[2] and "fsdp" in rows[3]
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("vit_enormous", "'vit_enormous' is not known; the known names are: .*mae_vit_6.5b_patch14"),
        ("mae_vit_large_patch16 --gpus 0", "--gpus 0 must be at least 1"),
        ("mae_vit_large_patch16 --gpus 12", "--gpus 12 must be a multiple of --gpus_per_node 8"),
        (
            "mae_vit_large_patch16 --gpus 8 --effective_batch 100",
            "--effective_batch 100 must be a multiple of --gpus 8",
        ),
        ("mae_vit_large_patch16 --gpu_mem -1", "--gpu_mem -1.0 must be positive"),
        ("mae_vit_large_patch16 --gpu_mem nan", "--gpu_mem nan must be positive"),
        ("mae_vit_large_patch16 --gpu_mem 1", "more than the 2.0 GiB"),
        ("mae_vit_large_patch16 --mfu 140", "--mfu 140.0 must be at most 100"),
        ("mae_vit_large_patch16 --mask_ratio 1", "--mask_ratio 1.0 must leave and remove at least one of 196"),
        ("mae_vit_large_patch16 --input_size 225", "--input_size 225 225 must be a multiple of the patch size 16"),
    ],
)
def test_bad_input(flags, message):
    with pytest.raises(UserError, match=message):
        run(flags)


def test_a_gpu_by_name(capsys):
    """--gpu sets memory and rates from the data sheet; of an h100 they are the defaults, within their two digits."""
    h100, default = GPUS["h100"].assumptions(), Machine()
    assert all(value == pytest.approx(getattr(default, name), rel=0.02) for name, value in h100.items())
    args = tool.get_args_parser().parse_args(["mae_vit_large_patch16", "--gpu", "a100-40"])
    rates = tool.machine_of(args)
    assert rates["gpu_mem"] == 40 and 200 < rates["tflops"] < 312
    args = tool.get_args_parser().parse_args(["mae_vit_large_patch16", "--gpu", "l40s", "--tflops", "250"])
    assert tool.machine_of(args) == {**GPUS["l40s"].assumptions(), "tflops": 250}
    assert capsys.readouterr().err == ""
    for name in GPUS:
        run(f"mae_vit_base_patch16 --gpu {name} --amp_dtype fp16 --effective_batch 1024")
        assert f"assumed of {name}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--gpu v100-32 has no matrix products in bf16: give --amp_dtype fp16"):
        run("mae_vit_base_patch16 --gpu v100-32")


def test_memory_alone_implies_no_rate_in_silence(capsys):
    run("mae_vit_large_patch16 --gpu_mem 40")
    assert "--gpu_mem 40 does not determine the speed: the hours are those of an H100" in capsys.readouterr().err
    run("mae_vit_large_patch16 --gpu_mem 40 --tflops 270")
    assert capsys.readouterr().err == ""


def test_the_page_has_every_gpu():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for name, gpu in GPUS.items():
        assert f"| `{name}` | {gpu.memory:g} | {gpu.tflops:g} | " in page and gpu.source in page
