"""Predict memory, flags and duration of a pretraining run on given GPUs.

python tools/plan.py mae_vit_large_patch16 --gpus 8
python tools/plan.py mae_vit_large_patch16 mae_vit_2b_patch14 --gpus 8 64 512 --gpu a100-40     # a table

Memory is predicted to within a few per cent (FSDP: ten). Predicted time depends on the assumptions about the hardware,
above all on --mfu: measure it in a short run with --log_mfu. Formulas, checks and assumptions: docs/scaling.md.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_mae
from planning.footprint import GIB, TEACHERS, sizes_of, trained_weights
from planning.gpus import GPUS
from planning.plan import Machine, Plan, communications, flops_per_image, plan, traffic
from util.errors import UserError, user_errors
from util.parser import Parser

ASSUMED = Machine()


def get_args_parser():
    parser = Parser("Predict memory, flags and hours of a pretraining run.")
    parser.add_argument("model", nargs="+", help="e.g. mae_vit_large_patch16; several give a table")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[8], help="GPUs of all nodes together; several numbers give a table"
    )
    parser.add_argument(
        "--gpu",
        choices=GPUS,
        metavar="NAME",
        help=f"its memory, and rates derived from its data sheet (docs/scaling.md): {', '.join(GPUS)}; without it the "
        "rates of an h100. The flags below replace single values",
    )
    parser.add_argument(
        "--gpu_mem", type=float, help=f"memory per GPU in GiB; without it that of --gpu, else {ASSUMED.gpu_mem:g}"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--effective_batch", type=int, default=4096, help="images per step, all GPUs together")
    group.add_argument("--epochs", type=int, default=800, help="epochs of the run")
    group.add_argument(
        "--images", type=int, default=1281167, help="images of the training set; the default is ImageNet-1k's"
    )
    group.add_argument("--input_size", type=int, help="side of the images in pixels; without it the model's")
    group.add_argument("--patch_size", type=int, help="side of a patch in pixels; without it the model's")
    group.add_argument("--mask_ratio", type=float, default=0.75, help="share of the patches to remove")
    group.add_argument(
        "--amp_dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="data type of matrix products"
    )
    group.add_argument(
        "--teacher",
        default="none",
        choices=TEACHERS,
        help="teacher of the method: encoder, on whole images (--mae_k, --ema_mae); autoencoder (--rc_mae)",
    )
    group = parser.add_argument_group("hardware (assumptions, unless measured)")
    group.add_argument(
        "--tflops",
        type=float,
        help="TFLOP/s that large matrix products reach; without it 71 %% of the data sheet of --gpu "
        f"(h100: {ASSUMED.tflops:g}); in fp32 a tenth of it",
    )
    group.add_argument(
        "--mfu", type=float, default=ASSUMED.mfu, help="percent of --tflops that training reaches (--log_mfu)"
    )
    group.add_argument(
        "--bandwidth",
        type=float,
        help=f"GB/s of a collective inside a node; without it that of --gpu (h100: {ASSUMED.bandwidth:g})",
    )
    group.add_argument(
        "--network",
        type=float,
        default=ASSUMED.network,
        help="GB/s between nodes, all network adapters of a node together",
    )
    group.add_argument("--gpus_per_node", type=int, default=ASSUMED.node, help="GPUs per node")
    group.add_argument("--cores", type=int, default=ASSUMED.cores, help="CPU cores per GPU that prepare images")
    group.add_argument(
        "--decoded", type=float, default=ASSUMED.images_per_core, help="images that a core prepares per second"
    )
    return parser


def machine_of(args) -> dict[str, float]:
    """Return memory and rates per GPU: given flags first, then --gpu, then an H100. A note tells if a given memory is
    combined with the rates of an H100."""
    if args.gpu and args.amp_dtype == "bf16" and not GPUS[args.gpu].bf16:
        raise UserError(f"--gpu {args.gpu} has no matrix products in bf16: give --amp_dtype fp16")
    assumed = GPUS[args.gpu].assumptions() if args.gpu else {}
    values = {name: getattr(ASSUMED, name) for name in ("gpu_mem", "tflops", "memory_rate", "bandwidth")} | assumed
    given = {name: getattr(args, name) for name in ("gpu_mem", "tflops", "bandwidth")}
    given = {name: value for name, value in given.items() if value is not None}
    if "gpu_mem" in given and not args.gpu and "tflops" not in given:
        print(
            f"note: --gpu_mem {args.gpu_mem:g} does not determine the speed: the hours are those of an H100 "
            f"({ASSUMED.tflops:g} TFLOP/s); give --gpu ({', '.join(GPUS)}) or --tflops",
            file=sys.stderr,
        )
    return values | given


def check(args) -> None:
    """Raise UserError for values out of range."""
    positive = "gpu_mem effective_batch epochs images tflops mfu bandwidth network gpus_per_node cores decoded"
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name} {value} must be positive")
    for gpus in args.gpus:
        if gpus < 1:
            raise UserError(f"--gpus {gpus} must be at least 1")
        if gpus > args.gpus_per_node and gpus % args.gpus_per_node:
            raise UserError(f"--gpus {gpus} must be a multiple of --gpus_per_node {args.gpus_per_node}, or fewer")
    if args.mfu > 100:
        raise UserError(f"--mfu {args.mfu} must be at most 100, in percent")
    if args.gpu_mem is not None and args.gpu_mem <= ASSUMED.context:
        raise UserError(f"--gpu_mem {args.gpu_mem} must be more than the {ASSUMED.context} GiB that CUDA and NCCL need")


def make_plan(args, model: str, gpus: int, rates: dict[str, float]) -> Plan:
    """Return the plan for one model and one number of GPUs with the `rates` of `machine_of`."""
    changes = {"img_size": args.input_size, "patch_size": args.patch_size}
    config = models_mae.look_up(models_mae.MODELS, model).config
    sizes = sizes_of(config | {name: value for name, value in changes.items() if value}, args.mask_ratio)
    values = {name: getattr(args, name) for name in ("mfu", "network", "cores")}
    machine = Machine(**values, **rates, node=args.gpus_per_node, images_per_core=args.decoded)
    element = 4 if args.amp_dtype == "fp32" else 2
    allow_fsdp = args.amp_dtype != "fp16"  # --fsdp refuses fp16, because of its loss scaling
    return plan(
        sizes, machine, args.effective_batch, gpus, allow_fsdp=allow_fsdp, element=element, teacher=args.teacher
    )


def command(args, model: str, result: Plan) -> str:
    """Return the command that starts the run on each node."""
    setup, node = result.setup, result.machine.node
    nodes = math.ceil(setup.gpus / node)
    launcher = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500" if nodes > 1 else "--standalone"
    start = f"torchrun {launcher} --nproc_per_node={min(setup.gpus, node)}" if setup.gpus > 1 else "python"
    flags = f"--model {model} --mask_ratio {args.mask_ratio:g} --batch_size {setup.batch} --accum_iter {setup.accum}"
    for name in ("input_size", "patch_size"):
        if getattr(args, name):
            flags += f" --{name} {getattr(args, name)}"
    flags += f" --epochs {args.epochs} --norm_pix_loss --blr 1.5e-4 --amp_dtype {args.amp_dtype}"  # He et al., Table 8
    flags += "".join(f" --{name}" for name in ("fsdp", "grad_checkpoint") if getattr(setup, name))
    return f"{start} main_pretrain.py {flags} --data_path IMAGENET --output_dir OUT"


def format_count(weights: float) -> str:
    """Return a number of weights as text, such as "329 M"."""
    return f"{weights / 1e9:.2f} B" if weights >= 1e9 else f"{weights / 1e6:.0f} M"


def report(args, model: str, result: Plan) -> None:
    """Print the plan of one model on one number of GPUs."""
    setup, machine, time = result.setup, result.machine, result.time
    source = "--tflops" if args.tflops is not None else f"assumed of {args.gpu or 'h100'}"
    flops = flops_per_image(result.sizes, setup)
    print(
        f"{model}: {format_count(trained_weights(result.sizes))} weights, "
        f"{sum(flops.values()) / 1e9:.0f} GFLOPs per image and step"
    )
    memory = f"{machine.gpu_mem:g} GiB"
    verdict = f"fits in {memory}" if result.fits else f"does NOT fit in {memory}; the setup that needs least memory"
    print(f"{verdict}: {setup.name}" + f", {setup.gpus} GPUs" * (setup.gpus > 1))
    print(f"  batch       {setup.batch} per GPU x {setup.accum} accumulated x {setup.gpus} = {args.effective_batch}")
    print(f"  memory      {result.gib:.1f} GiB per GPU at the peak ({result.moment}):")
    lines = {name: size / GIB for name, size in result.memory.items() if size}
    lines["fragmentation (assumed)"] = machine.fragmentation * sum(lines.values())
    lines["CUDA, NCCL (assumed)"] = machine.context
    for name, size in sorted(lines.items(), key=lambda item: -item[1]):
        print(f"                {size:8.2f}  {name}")
    if not result.fits:
        print("  to reduce it: more GPUs, a smaller --input_size, or a smaller model")
        return
    sent = communications(setup) * traffic(result.sizes, setup)
    print(
        f"  step        {time.step:.3g} s: compute {time.compute:.3g} s, communication not overlapped with it "
        f"{time.exposed:.3g} s ({sent / 1e9:.1f} GB sent per GPU)"
    )
    rate = setup.batch * setup.accum / time.step
    cores = math.ceil(rate / machine.images_per_core)
    print(
        f"  data        {rate:.0f} images/s per GPU, {rate * min(setup.gpus, machine.node):.0f} per node: "
        f"{cores} core{'s' * (cores > 1)} per GPU at {machine.images_per_core:g} images/s"
    )
    print(f"  limit       {time.limit}" + HINTS.get(time.limit, ""))
    print(
        f"  time        {result.hours(args.epochs, args.images):.1f} hours for {args.epochs} epochs of {args.images} "
        f"images, if training reaches {machine.mfu:g} % of {machine.tflops:g} TFLOP/s "
        f"({source})"
    )
    print(f"\n{command(args, model, result)}")
    if args.teacher != "none":
        print("plus the flags of the method")


HINTS = {
    "data": ": images are prepared too slowly; try --data_cache ram, smaller JPEGs, shards, or more CPU cores",
    "communication": ": computation does not hide it; try fewer GPUs, a faster network, or a larger batch",
    "too few images per GPU": ": the GPU waits for kernel launches; try --compile, fewer GPUs, or a larger batch",
}


def row(args, model: str, result: Plan) -> str:
    """Return the row of one plan in the Markdown table."""
    setup, time = result.setup, result.time
    start = f"| {model} | {format_count(trained_weights(result.sizes))} | {setup.gpus} | "
    if not result.fits:
        return f"{start}does not fit | | {result.gib:.0f} | | | | | |"
    rate = setup.batch * setup.accum / time.step
    return (
        f"{start}{setup.name} | {setup.batch} x {setup.accum} | {result.gib:.0f} | {time.step:.2f} | "
        f"{100 * time.exposed / time.step:.0f} % | {rate * min(setup.gpus, result.machine.node):.0f} | {time.limit} | "
        f"{result.hours(args.epochs, args.images):.1f} |"
    )


def main(args) -> None:
    """Print the report of one plan, or a table of several."""
    check(args)
    pairs = [(model, gpus) for model in args.model for gpus in args.gpus]
    rates = machine_of(args)
    plans = [make_plan(args, *pair, rates) for pair in pairs]
    if len(pairs) == 1:
        report(args, args.model[0], plans[0])
        return
    names = "model, weights, GPUs, mode, batch per GPU, GiB, s per step, communication, images/s per node, limit, hours"
    print(f"| {names.replace(', ', ' | ')} |")
    print("|---" * len(names.split(",")) + "|")
    for (model, _), result in zip(pairs, plans):
        print(row(args, model, result))


if __name__ == "__main__":
    with user_errors("plan.py"):
        main(get_args_parser().parse_args())
