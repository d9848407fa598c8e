"""Prediction of the time of pretraining on many GPUs, and the fastest setup that fits into their memory; nothing is
measured.

docs/scaling.md has the reasons for the formulas, and lists what is measured and what is assumed.
"""

import math
from dataclasses import dataclass, field, replace

from planning.footprint import GIB, Setup, Sizes, learned, parts, peak, teacher_weights
from util.errors import UserError

OPTIMIZER = 28  # bytes that AdamW moves per weight: weight and two moments are read and written, the gradient read

# Time ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Assumptions about the hardware. Rates are per second."""

    gpu_mem: float = 80.0  # GiB
    tflops: float = 700.0  # reached by large matrix products
    mfu: float = 40.0  # percent of `tflops`, as measured by `--log_mfu`
    memory_rate: float = 2000.0  # GB/s, of the GPU's memory
    bandwidth: float = 300.0  # GB/s, of a collective inside a node
    network: float = 100.0  # GB/s, between two nodes, over all adapters
    node: int = 8  # GPUs per node
    cores: int = 16  # CPU cores per GPU
    decoded: float = 290.0  # images that a core decodes and augments (benchmarks/README.md, 375x500 JPEGs to 224 px)
    context: float = 2.0  # GiB, for CUDA, NCCL and workspaces
    fragmentation: float = 0.05  # share of the allocated memory
    hop: float = 5e-6  # s, for a message from one GPU to the next
    launch: float = 6e-4  # s, to launch the kernels of a block (forward and backward, not compiled)
    bucket: float = 25 * 2**20  # bytes of a DDP message

    @property
    def usable(self) -> float:
        """Bytes that tensors can use."""
        return max(0.0, self.gpu_mem - self.context) * GIB / (1 + self.fragmentation)


def flops_per_image(sizes: Sizes, setup: Setup) -> dict[str, int]:
    """Return the FLOPs of matrix products in a training step, per image: forward once, backward twice (except for the
    input of the patch kernel), blocks once more with `grad_checkpoint`, and the teacher's forward pass."""
    listed = parts(sizes, setup)
    forward = sum(part.flops for part in listed)
    counted = {"forward and backward": 3 * forward - listed[0].flops}
    if setup.grad_checkpoint:
        counted["computed again"] = sum(part.again for part in listed)
    if setup.teacher == "autoencoder":
        counted["teacher"] = forward
    elif setup.teacher == "encoder":
        whole = replace(sizes, visible=sizes.patches)
        counted["teacher"] = sum(part.flops for part in parts(whole, setup)[: 1 + sizes.depth])
    return counted


@dataclass(frozen=True)
class Seconds:
    """The time of one optimizer step, in seconds."""

    compute: float
    exposed: float  # communication that does not overlap with computation
    launching: float  # part of `compute` in which the GPU waits for the host to launch kernels
    decoding: float  # time of the data workers for the images of the step

    @property
    def step(self) -> float:
        return max(self.compute + self.exposed, self.decoding)

    @property
    def limit(self) -> str:
        """The main cause of time beyond arithmetic: "data", "communication", "few images a GPU", or "compute" if there
        is none above 10 %."""
        if self.decoding > self.compute + self.exposed:
            return "data"
        waste = {"communication": self.exposed, "few images a GPU": self.launching}
        name = max(waste, key=waste.get)
        return name if waste[name] > 0.1 * self.step else "compute"


def seconds(sizes: Sizes, setup: Setup, machine: Machine) -> Seconds:
    """Return the time of one optimizer step of `setup.accum` micro-batches."""
    listed, counted = parts(sizes, setup), flops_per_image(sizes, setup)
    blocks = sum(part.block for part in listed)
    arithmetic = setup.batch * sum(counted.values()) / (machine.tflops * 1e12 * machine.mfu / 100)
    passes = 4 if setup.grad_checkpoint else 3
    micro = max(arithmetic, blocks * machine.launch * passes / 3)
    # The backward pass is two thirds of forward and backward, and recomputation happens in it.
    backward_flops = counted["forward and backward"] * 2 / 3 + counted.get("computed again", 0)
    backward = micro * backward_flops / sum(counted.values())
    message, hidden, times = collective(sizes, setup, machine), backward, 1
    if setup.fsdp:
        hidden, times = micro, setup.accum
    update = OPTIMIZER * learned(sizes) / (setup.gpus if setup.fsdp else 1) / (machine.memory_rate * 1e9)
    return Seconds(
        compute=setup.accum * micro + update,
        exposed=times * max(0.0, message - hidden),
        launching=setup.accum * (micro - arithmetic),
        decoding=setup.batch * setup.accum / (machine.cores * machine.decoded),
    )


def traffic(sizes: Sizes, setup: Setup) -> float:
    """Return the bytes that a GPU sends per step. DDP: a ring all-reduce of fp32 gradients. FSDP, for every
    micro-batch: weights gathered twice (forward, backward), fp32 gradients scattered, a teacher's weights gathered."""
    if setup.gpus == 1:
        return 0.0
    sent = 2 * 4 * learned(sizes)
    if setup.fsdp:
        sent = (2 * setup.element + 4) * learned(sizes) + setup.element * teacher_weights(sizes, setup.teacher)
    return (setup.gpus - 1) / setup.gpus * sent


def collective(sizes: Sizes, setup: Setup, machine: Machine) -> float:
    """Return the seconds of this traffic, at the bandwidth of node or network, whichever is slower, and the latency of
    every message: a ring's under FSDP, a tree's in both directions under DDP."""
    if setup.gpus == 1:
        return 0.0
    rate = machine.bandwidth if setup.gpus <= machine.node else min(machine.bandwidth, machine.network)
    if setup.fsdp:
        hops = 3 * (1 + sizes.depth + sizes.decoder_depth) * (setup.gpus - 1)
    else:
        hops = math.ceil(4 * learned(sizes) / machine.bucket) * 2 * math.ceil(math.log2(setup.gpus))
    return traffic(sizes, setup) / (rate * 1e9) + hops * machine.hop


# The plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The fastest setup that fits, or, with `fits` False, the setup that needs least memory."""

    sizes: Sizes
    setup: Setup
    machine: Machine
    fits: bool
    moment: str
    memory: dict[str, float] = field(hash=False)  # bytes by content, at the peak
    time: Seconds

    @property
    def gib(self) -> float:
        """GiB needed, with context and fragmentation."""
        return sum(self.memory.values()) * (1 + self.machine.fragmentation) / GIB + self.machine.context

    def hours(self, epochs: float, images: int) -> float:
        """Return the hours of so many epochs. Epochs consist of whole steps; remaining images are not used."""
        batch = self.setup.batch * self.setup.accum * self.setup.gpus
        return epochs * max(1, images // batch) * self.time.step / 3600


def candidates(effective: int, gpus: int, shards: bool = True, **options) -> list[Setup]:
    """Return all setups that train `effective` images per step on `gpus` GPUs, simpler ones and larger batches first,
    and with FSDP only if `shards`. Raises UserError if the GPUs cannot share the images evenly."""
    if effective % gpus:
        raise UserError(f"--effective_batch {effective} must be a multiple of --gpus {gpus}")
    per_gpu = effective // gpus
    batches = [batch for batch in range(per_gpu, 0, -1) if per_gpu % batch == 0]
    return [
        Setup(batch, gpus, per_gpu // batch, fsdp=fsdp, grad_checkpoint=again, **options)
        for fsdp in ([False, True] if gpus > 1 and shards else [False])
        for again in (False, True)
        for batch in batches
    ]


def plan(sizes: Sizes, machine: Machine, effective: int, gpus: int, **options) -> Plan:
    """Return the simplest of those `candidates` that fit and are at most 5 % slower than the fastest one: predictions
    of time are not more accurate than that. If none fits, the one that needs least memory."""
    plans = []
    for setup in candidates(effective, gpus, **options):
        moment, memory = peak(sizes, setup)
        fits = sum(memory.values()) <= machine.usable
        plans.append(Plan(sizes, setup, machine, fits, moment, memory, seconds(sizes, setup, machine)))
    fitting = [one for one in plans if one.fits]
    if not fitting:
        return min(plans, key=lambda one: one.gib)
    fastest = min(one.time.step for one in fitting)
    return next(one for one in fitting if one.time.step <= 1.05 * fastest)
