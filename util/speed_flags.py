"""The flags for speed and memory, and their checks."""

from util.compute.kernels import ATTENTION
from util.errors import UserError
from util.parser import rare


def add_speed_arguments(parser, trains_blocks: bool = True, cached: bool = False) -> None:
    """Add the flags for speed and memory. `trains_blocks`: whether the command trains transformer blocks. `cached`:
    whether it has `--data_cache` and `--fsdp`, which the group's description then recommends."""
    laptop = ", and --data_cache ram where the images fit into memory" * cached
    gpu = "--data_cache device for small images, " * cached
    pixels = ", except that --cache_size and --nvjpeg change pixels and that --data_cache" * cached
    pixels += " draws other crops than --sample_rng v1" * cached
    again = ["--recompute cheap", "--grad_checkpoint"] * trains_blocks
    memory = ", ".join(["--accum_iter", *again, *["then --fsdp"] * cached])
    group = parser.add_argument_group(
        "speed and memory",
        f"These flags change results only by rounding{pixels}. On a laptop: the defaults{laptop}. On one GPU: {gpu}"
        f"--compile for runs of more than an hour. On one node: torchrun or "
        f"scripts/, one process per GPU; {memory} if memory is short. On a cluster: scripts/mae/slurm.sh, or torchrun "
        f"--max_restarts 3, with --resume auto.",
    )
    group.add_argument(
        "--attention",
        default="auto",
        choices=ATTENTION,
        help="fused: one kernel; matmul: two matrix products and a softmax; auto: the faster one in our measurements",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile encoder and decoder (torch.compile): takes a minute or more at the start, then saves time",
    )
    if cached:
        group.add_argument(
            "--cuda_graph",
            action="store_true",
            help="on one GPU, launch all kernels of a step at once (a CUDA graph): for small networks and images, "
            "whose steps wait for launches; the first such step is checked against an ordinary one",
        )
    if trains_blocks:
        group.add_argument(
            "--grad_checkpoint",
            action="store_true",
            help="recompute blocks in the backward pass: a third more time, far less memory",
        )
        group.add_argument(
            "--recompute",
            default="none",
            choices=["none", "cheap"],
            help="cheap: recompute norms and GELUs in the backward pass, which saves a third of the activations for a "
            "few percent of time; every number stays the same",
        )
    rare(
        group.add_argument(
            "--log_mfu",
            action="store_true",
            help="log the FLOPs per second of training, as a percentage of those that matrix products reach on this "
            "device",
        )
    )


def check_recompute(args) -> None:
    """Raise UserError for `--recompute cheap` beside a flag that recomputes as much or more."""
    if getattr(args, "recompute", "none") == "none":
        return
    if args.grad_checkpoint:
        raise UserError("--grad_checkpoint recomputes whole blocks, norms and GELUs included: leave --recompute out")
    if args.compile:
        raise UserError("--recompute has no effect on compiled blocks, which choose what they recompute: leave it out")


def check_speed_flags(args, trains: bool, condition: str) -> None:
    """Raise UserError for `--compile`, `--grad_checkpoint`, `--recompute` or `--log_mfu` if the network is not trained.
    `condition` is the end of the message, such as "with --eval"."""
    for name in ("compile", "grad_checkpoint", "recompute", "log_mfu"):
        if not trains and getattr(args, name, False) not in (False, "none"):
            raise UserError(f"--{name} has no effect {condition}")
