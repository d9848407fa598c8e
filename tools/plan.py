"""Predict memory, flags and duration of a run on given GPUs: pretraining, segmentation or detection.

python tools/plan.py mae_vit_large_patch16 --gpus 8
python tools/plan.py mae_vit_large_patch16 mae_vit_2b_patch14 --gpus 8 64 512 --gpu a100-40     # a table
python tools/plan.py vit_base_patch16 --task detect --gpus 8                                    # scripts/detect

Memory is predicted to within a few per cent (FSDP: ten). Predicted time depends on the assumptions about the hardware,
above all on --mfu: measure it in a short run with --log_mfu. Formulas, checks and assumptions: docs/scaling.md.
"""

import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_detect
import models_mae
import models_segment
from planning.dense import DenseTraining, detection_loss, segmentation_loss
from planning.footprint import GIB, TEACHERS, Workload, sizes_of
from planning.gpus import GPUS
from planning.plan import Machine, Plan, communications, plan, traffic
from util.errors import UserError, user_errors
from util.parser import Parser

ASSUMED = Machine()
# Values of flags that are not given, by task. Images: ImageNet-1k, ADE20K, COCO with objects. Steps, batches and sizes:
# scripts/segment/mae_ade20k.sh and scripts/detect. Rates of a core: benchmarks/README.md. MFU of detection: that of
# detectron2's published times (docs/scaling.md); the others are assumed.
TASKS = {
    "pretrain": {"effective_batch": 4096, "images": 1281167, "decoded": ASSUMED.images_per_core, "mfu": ASSUMED.mfu},
    "segment": {
        "effective_batch": 16, "images": 20210, "decoded": 75.0, "mfu": 20.0, "input_size": 512, "max_steps": 160000,
    },
    "detect": {
        "effective_batch": 64, "images": 117266, "decoded": 28.0, "mfu": 10.0, "input_size": 1024, "max_steps": 184375,
    },
}  # fmt: skip
EPOCHS, MASK_RATIO = 800, 0.75  # of pretraining
CLASSES = {"segment": 150, "detect": 80}
FLAGS_OF_TASK = {  # of no effect with others
    "pretrain": ("mask_ratio", "teacher"),
    "segment": ("head",),
    "detect": ("detector", "pyramid", "window"),
}


def get_args_parser():
    parser = Parser("Predict memory, flags and hours of a run.")
    parser.add_argument(
        "model", nargs="+", help="e.g. mae_vit_large_patch16, or vit_base_patch16 with --task; several give a table"
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="pretrain",
        help="what is trained: an autoencoder, main_segment.py, main_detect.py; the defaults of the last two are the "
        "protocols of scripts/segment/mae_ade20k.sh and scripts/detect/vitdet_coco.sh",
    )
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
    _add_run_arguments(parser.add_argument_group("run"))
    _add_dense_arguments(parser.add_argument_group("segmentation and detection"))
    _add_hardware_arguments(parser.add_argument_group("hardware (assumptions, unless measured)"))
    return parser


def _default(name: str) -> str:
    """Return the text of the defaults of a flag in `TASKS`."""
    return "without it " + ", ".join(
        f"{values[name]:.10g} ({task})" for task, values in TASKS.items() if name in values
    )


def _add_run_arguments(group) -> None:
    group.add_argument(
        "--effective_batch",
        type=int,
        help=f"images per step, all GPUs together; {_default('effective_batch')}",
    )
    group.add_argument("--epochs", type=float, help=f"epochs of the run; without it {EPOCHS} (pretrain)")
    group.add_argument(
        "--max_steps", type=int, help=f"optimizer steps of the run, instead of --epochs; {_default('max_steps')}"
    )
    group.add_argument("--images", type=int, help=f"images of the training set, for --epochs; {_default('images')}")
    group.add_argument(
        "--input_size", type=int, help=f"side of the images in pixels; {_default('input_size')}, the model's (pretrain)"
    )
    group.add_argument("--patch_size", type=int, help="side of a patch in pixels; without it the model's")
    group.add_argument("--mask_ratio", type=float, help=f"share of the patches to remove; without it {MASK_RATIO}")
    group.add_argument(
        "--amp_dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="data type of matrix products"
    )
    group.add_argument(
        "--teacher",
        choices=TEACHERS,
        help="teacher of the method: encoder, on whole images (--mae_k, --ema_mae); autoencoder (--rc_mae)",
    )


def _add_dense_arguments(group) -> None:
    group.add_argument("--head", choices=models_segment.HEADS, help="without it upernet; linear: on a frozen encoder")
    group.add_argument("--detector", choices=models_detect.DETECTORS, help="without it mask")
    group.add_argument(
        "--pyramid",
        choices=models_detect.PYRAMIDS,
        help="without it simple, as ViTDet's; fpn: as in scripts/detect/benchmarking_coco.sh, with batch norm",
    )
    group.add_argument("--window", type=int, help="side of the windows in patches; without it 14, with fpn 16; 0: none")
    group.add_argument("--nb_classes", type=int, help="without it 150 (segment), 80 (detect)")


def _add_hardware_arguments(group) -> None:
    group.add_argument(
        "--tflops",
        type=float,
        help="TFLOP/s that large matrix products reach; without it 71 %% of the data sheet of --gpu "
        f"(h100: {ASSUMED.tflops:g}); in fp32 a tenth of it",
    )
    group.add_argument(
        "--mfu", type=float, help=f"percent of --tflops that training reaches (--log_mfu); {_default('mfu')}"
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
    group.add_argument("--decoded", type=float, help=f"images that a core prepares per second; {_default('decoded')}")


def settle(args) -> None:
    """Set the flags of the run that were not given. Raises UserError for flags of another task."""
    for task, names in FLAGS_OF_TASK.items():
        for name in names:
            if getattr(args, name) is not None and args.task != task:
                raise UserError(f"--{name} has no effect with --task {args.task}: it is for {task}")
    if args.nb_classes is not None and args.task not in CLASSES:
        raise UserError(f"--nb_classes has no effect with --task {args.task}")
    if args.max_steps is not None and args.epochs is not None:
        raise UserError("--max_steps and --epochs both set the length of the run: give one of them")
    for name, value in TASKS[args.task].items():
        if getattr(args, name) is None and not (name == "max_steps" and args.epochs is not None):
            setattr(args, name, value)
    if args.max_steps is None and args.epochs is None:
        args.epochs = EPOCHS
    args.mask_ratio = MASK_RATIO if args.mask_ratio is None else args.mask_ratio
    args.teacher, args.nb_classes = args.teacher or "none", args.nb_classes or CLASSES.get(args.task)


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
    positive = (
        "gpu_mem effective_batch epochs max_steps images tflops mfu bandwidth network gpus_per_node cores decoded"
    )
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


def head_options(args) -> dict:
    """Return the arguments of the head for the models of segmentation and detection, which are flags of the mains."""
    if args.task == "segment":
        head = args.head or "upernet"
        return {"head": head, "rel_pos": head == "upernet"}
    pyramid = args.pyramid or "simple"
    window = args.window if args.window is not None else 16 if pyramid == "fpn" else 14
    norm = "batch" if pyramid == "fpn" else "layer"
    return {"detector": args.detector or "mask", "pyramid": pyramid, "window": window, "head_norm": norm}


def build_dense(args, model: str):
    """Build the model of segmentation or detection, with the drop path of the protocols."""
    module = models_segment if args.task == "segment" else models_detect
    options = {"img_size": (args.input_size,) * 2, "patch_size": args.patch_size, "drop_path_rate": 0.1}
    built = module.build_model(model, args.nb_classes, **options, **head_options(args))
    if args.head == "linear":
        built.train_last_blocks(0)
    return built


def make_work(args, model: str) -> Workload:
    """Return what is trained. Raises UserError for a model that is not known, or sizes that do not fit together."""
    if args.task != "pretrain":
        loss = segmentation_loss if args.task == "segment" else detection_loss
        return DenseTraining(partial(build_dense, args, model), loss, (3, args.input_size, args.input_size))
    changes = {"img_size": args.input_size, "patch_size": args.patch_size}
    config = models_mae.look_up(models_mae.MODELS, model).config
    return sizes_of(config | {name: value for name, value in changes.items() if value}, args.mask_ratio)


def make_plan(args, work: Workload, gpus: int, rates: dict[str, float]) -> Plan:
    """Return the plan for one model and one number of GPUs with the `rates` of `machine_of`."""
    values = {name: getattr(args, name) for name in ("mfu", "network", "cores")}
    machine = Machine(**values, **rates, node=args.gpus_per_node, images_per_core=args.decoded)
    element = 4 if args.amp_dtype == "fp32" else 2
    # --fsdp refuses fp16, because of its loss scaling. Batch norm in UPerNet needs two images in a process.
    allow_fsdp = args.task == "pretrain" and args.amp_dtype != "fp16"
    smallest = 2 if args.task == "segment" and args.head != "linear" and gpus == 1 else 1
    options = {"allow_fsdp": allow_fsdp, "smallest": smallest, "element": element, "teacher": args.teacher}
    return plan(work, machine, args.effective_batch, gpus, **options)


def command(args, model: str, result: Plan) -> str:
    """Return the command that starts the run on each node."""
    setup, node = result.setup, result.machine.node
    nodes = math.ceil(setup.gpus / node)
    launcher = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500" if nodes > 1 else "--standalone"
    start = f"torchrun {launcher} --nproc_per_node={min(setup.gpus, node)}" if setup.gpus > 1 else "python"
    flags = f"--batch_size {setup.batch} --accum_iter {setup.accum} --amp_dtype {args.amp_dtype}"
    for name in ("input_size", "patch_size", "epochs", "max_steps"):
        if getattr(args, name):
            flags += f" --{name} {getattr(args, name):.10g}"
    flags += "".join(f" --{name}" for name in ("fsdp", "grad_checkpoint") if getattr(setup, name))
    flags += " --recompute cheap" * setup.recompute
    if args.task == "pretrain":
        flags += f" --mask_ratio {args.mask_ratio:g} --norm_pix_loss --blr 1.5e-4"  # He et al., Table 8
    else:
        flags += "".join(
            f" --{name}" if value is True else f" --{name} {value}"
            for name, value in head_options(args).items()
            if value is not False
        )
        flags += " --trainable_blocks 0" * (args.head == "linear") + " --finetune CHECKPOINT"
    data = "IMAGENET" if args.task == "pretrain" else "DATA"
    return f"{start} main_{args.task}.py --model {model} {flags} --data_path {data} --output_dir OUT"


def format_count(weights: float) -> str:
    """Return a number of weights as text, such as "329 M"."""
    return f"{weights / 1e9:.2f} B" if weights >= 1e9 else f"{weights / 1e6:.3g} M"


def report(args, model: str, result: Plan) -> None:
    """Print the plan of one model on one number of GPUs."""
    setup, machine, time = result.setup, result.machine, result.time
    source = "--tflops" if args.tflops is not None else f"assumed of {args.gpu or 'h100'}"
    flops = result.work.flops(setup)
    print(
        f"{model}: {format_count(result.work.trained)} trained weights, "
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
    sent = communications(setup) * traffic(result.work, setup)
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
    hours = total_hours(args, result)
    length = f"{args.max_steps} steps" if args.max_steps else f"{args.epochs:g} epochs of {args.images} images"
    print(
        f"  time        {hours:.1f} hours ({hours * setup.gpus:.0f} GPU hours) for {length}, if training reaches "
        f"{machine.mfu:g} % of {machine.tflops:g} TFLOP/s ({source})"
    )
    print(f"\n{command(args, model, result)}")
    if args.teacher != "none":
        print("plus the flags of the method")


def total_hours(args, result: Plan) -> float:
    """Return the hours of the whole run."""
    return result.hours_of(args.max_steps) if args.max_steps else result.hours(args.epochs, args.images)


HINTS = {
    "data": ": images are prepared too slowly; try --data_cache ram, smaller JPEGs, shards, or more CPU cores",
    "communication": ": computation does not hide it; try fewer GPUs, a faster network, or a larger batch",
    "too few images per GPU": ": the GPU waits for kernel launches; try --compile, fewer GPUs, or a larger batch",
}


def row(args, model: str, result: Plan) -> str:
    """Return the row of one plan in the Markdown table."""
    setup, time = result.setup, result.time
    start = f"| {model} | {format_count(result.work.trained)} | {setup.gpus} | "
    if not result.fits:
        return f"{start}does not fit | | {result.gib:.0f} | | | | | |"
    rate = setup.batch * setup.accum / time.step
    return (
        f"{start}{setup.name} | {setup.batch} x {setup.accum} | {result.gib:.0f} | {time.step:.2f} | "
        f"{100 * time.exposed / time.step:.0f} % | {rate * min(setup.gpus, result.machine.node):.0f} | {time.limit} | "
        f"{total_hours(args, result):.1f} |"
    )


def main(args) -> None:
    """Print the report of one plan, or a table of several."""
    settle(args)
    check(args)
    pairs = [(model, gpus) for model in args.model for gpus in args.gpus]
    rates = machine_of(args)
    works = {model: make_work(args, model) for model in args.model}
    plans = [make_plan(args, works[model], gpus, rates) for model, gpus in pairs]
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
