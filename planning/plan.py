"""Prediction of the time of training on many GPUs, and choice of the fastest setup that fits into their memory.

Nothing is measured here. docs/scaling.md explains the formulas, and lists measurements and assumptions.
"""

import math
from dataclasses import dataclass, field

from planning.footprint import GIB, Setup, Workload, peak
from util.errors import UserError

RECOMPUTE_TIME = 1.04  # assumed: a step with `--recompute cheap`, relative to one without it
OPTIMIZER_BYTES = 28  # moved by AdamW per weight: it reads and writes weight and two moments, and reads the gradient

# Time ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Assumptions about the hardware. Rates are per second."""

    gpu_mem: float = 80.0  # GiB
    tflops: float = 700.0  # reached by large matrix products
    mfu: float = 40.0  # percent of `tflops` that training reaches, as measured by `--log_mfu`
    memory_rate: float = 2000.0  # GB/s, of GPU memory
    bandwidth: float = 300.0  # GB/s, of a collective inside a node
    network: float = 100.0  # GB/s, between two nodes, all network adapters of a node together
    node: int = 8  # GPUs per node
    cores: int = 16  # CPU cores per GPU
    images_per_core: float = 290.0  # decoded and augmented (benchmarks/README.md: 375x500 JPEGs to 224 px)
    context: float = 2.0  # GiB, for CUDA, NCCL and workspaces
    fragmentation: float = 0.05  # relative to the memory of tensors
    hop_latency: float = 5e-6  # s, of a message from one GPU to the next
    launch_time: float = 6e-4  # s, to launch the kernels of a block (forward and backward, not compiled)
    bucket: float = 25 * 2**20  # bytes of a DDP message

    @property
    def usable(self) -> float:
        """Bytes per GPU that are available for tensors."""
        return max(0.0, self.gpu_mem - self.context) * GIB / (1 + self.fragmentation)


@dataclass(frozen=True)
class Seconds:
    """The time of one optimizer step, in seconds."""

    compute: float
    exposed: float  # communication that does not overlap with computation
    launching: float  # part of `compute` in which the GPU waits for the host to launch kernels
    decoding: float  # time in which the data workers prepare the images of the step, parallel to the rest

    @property
    def step(self) -> float:
        return max(self.compute + self.exposed, self.decoding)

    @property
    def limit(self) -> str:
        """What limits the speed: "data" if preparing the images takes longest; else "communication" or "too few images
        per GPU", whichever costs more time, if it costs over 10 % of the step; else "compute"."""
        if self.decoding > self.compute + self.exposed:
            return "data"
        overhead = {"communication": self.exposed, "too few images per GPU": self.launching}
        name = max(overhead, key=overhead.__getitem__)
        return name if overhead[name] > 0.1 * self.step else "compute"


def seconds(work: Workload, setup: Setup, machine: Machine) -> Seconds:
    """Return the time of one optimizer step of `setup.accum` micro-batches."""
    counted = work.flops(setup)
    arithmetic = setup.batch * sum(counted.values()) / (machine.tflops * 1e12 * machine.mfu / 100)
    arithmetic *= RECOMPUTE_TIME if setup.recompute else 1.0
    passes = 4 if setup.grad_checkpoint else 3
    micro = max(arithmetic, work.blocks * machine.launch_time * passes / 3)
    # The backward pass takes two thirds of the FLOPs of forward and backward, and includes the recomputation.
    backward_flops = counted["forward and backward"] * 2 / 3 + counted.get("recomputed", 0)
    backward = micro * backward_flops / sum(counted.values())
    # FSDP communicates during a whole micro-batch, DDP during the backward pass of the last one.
    overlap = micro if setup.fsdp else backward
    exposed = max(0.0, communication_time(work, setup, machine) - overlap)
    update = OPTIMIZER_BYTES * work.trained / (setup.gpus if setup.fsdp else 1) / (machine.memory_rate * 1e9)
    return Seconds(
        compute=setup.accum * micro + update,
        exposed=communications(setup) * exposed,
        launching=setup.accum * (micro - arithmetic),
        decoding=setup.batch * setup.accum / (machine.cores * machine.images_per_core),
    )


def communications(setup: Setup) -> int:
    """Return how often an optimizer step communicates: with FSDP in every micro-batch, with DDP once."""
    return setup.accum if setup.fsdp else 1


def traffic(work: Workload, setup: Setup) -> float:
    """Return the bytes that a GPU sends: with DDP per optimizer step, with FSDP per micro-batch.

    DDP reduces fp32 gradients over a ring. FSDP gathers the weights twice (forward and backward), gathers a teacher's
    weights, and scatters reduced fp32 gradients. Weights outside blocks, which FSDP gathers in fp32, are counted with
    `element` bytes, like those of blocks: they are few.
    """
    if setup.gpus == 1:
        return 0.0
    sent = 2 * 4 * work.trained
    if setup.fsdp:
        sent = (2 * setup.element + 4) * work.trained + setup.element * work.teacher_weights(setup.teacher)
    return (setup.gpus - 1) / setup.gpus * sent


def communication_time(work: Workload, setup: Setup, machine: Machine) -> float:
    """Return the seconds in which the bytes of `traffic` are sent, at the lower bandwidth of node and network, with the
    latency of every message: around a ring with FSDP, up and down a tree with DDP."""
    if setup.gpus == 1:
        return 0.0
    rate = machine.bandwidth if setup.gpus <= machine.node else min(machine.bandwidth, machine.network)
    if setup.fsdp:
        hops = 3 * (1 + work.blocks) * (setup.gpus - 1)
    else:
        hops = math.ceil(4 * work.trained / machine.bucket) * 2 * math.ceil(math.log2(setup.gpus))
    return traffic(work, setup) / (rate * 1e9) + hops * machine.hop_latency


# The plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A setup with its predicted memory and time. `fits` tells whether the memory of a GPU suffices."""

    work: Workload
    setup: Setup
    machine: Machine
    fits: bool
    moment: str  # of the peak
    memory: dict[str, float] = field(hash=False)  # bytes by content, at the peak
    time: Seconds

    @property
    def gib(self) -> float:
        """GiB per GPU at the peak, with context and fragmentation."""
        return sum(self.memory.values()) * (1 + self.machine.fragmentation) / GIB + self.machine.context

    def hours(self, epochs: float, images: int) -> float:
        """Return the hours of `epochs` epochs of a set of `images`. Epochs consist of whole steps; remaining images are
        not used."""
        batch = self.setup.batch * self.setup.accum * self.setup.gpus
        return self.hours_of(epochs * max(1, images // batch))

    def hours_of(self, steps: float) -> float:
        """Return the hours of so many optimizer steps."""
        return steps * self.time.step / 3600


def candidates(effective: int, gpus: int, allow_fsdp: bool = True, smallest: int = 1, **options) -> list[Setup]:
    """Return all setups that train `effective` images per step on `gpus` GPUs, in order of preference: first those
    without FSDP, then those that recompute nothing, norms and GELUs, whole blocks, then larger batches. A process
    trains at least `smallest` images at once. `options` are further fields of `Setup`. Raises UserError if the images
    cannot be divided evenly among the GPUs, or are too few for `smallest`."""
    if effective % gpus:
        raise UserError(f"--effective_batch {effective} must be a multiple of --gpus {gpus}")
    per_gpu = effective // gpus
    batches = [batch for batch in range(per_gpu, smallest - 1, -1) if per_gpu % batch == 0]
    if not batches:
        raise UserError(f"--effective_batch {effective} gives {per_gpu} images to each of --gpus {gpus}: too few")
    return [
        Setup(batch, gpus, per_gpu // batch, fsdp=fsdp, recompute=cheap, grad_checkpoint=blocks, **options)
        for fsdp in ([False, True] if gpus > 1 and allow_fsdp else [False])
        for cheap, blocks in ((False, False), (True, False), (False, True))
        for batch in batches
    ]


def plan(work: Workload, machine: Machine, effective: int, gpus: int, **options) -> Plan:
    """Return the plan with the fastest setup that fits or, since predicted times are not more accurate, with the first
    of the `candidates` that fits and takes at most 5 % longer. If none fits, return the plan that needs least memory,
    with `fits` False."""
    plans = []
    for setup in candidates(effective, gpus, **options):
        if (setup.recompute or setup.grad_checkpoint) and any(
            other.fits and other.setup.fsdp == setup.fsdp and other.setup.batch >= setup.batch for other in plans
        ):
            continue  # one with less recomputation, or none, fits and is faster
        moment, memory = peak(work, setup)
        fits = sum(memory.values()) <= machine.usable
        plans.append(Plan(work, setup, machine, fits, moment, memory, seconds(work, setup, machine)))
    fitting = [candidate for candidate in plans if candidate.fits]
    if not fitting:
        return min(plans, key=lambda candidate: candidate.gib)
    fastest = min(candidate.time.step for candidate in fitting)
    return next(candidate for candidate in fitting if candidate.time.step <= 1.05 * fastest)
