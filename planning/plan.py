"""Time of pretraining on many GPUs, and the fastest way to run it that fits into their memory; nothing is measured.

docs/scaling.md has the reasons behind the formulas, and says what is measured and what assumed.
"""

import math
from dataclasses import dataclass, field, replace

from planning.footprint import GIB, Setup, Sizes, learned, parts, peak, teacher_weights
from util.errors import UserError

OPTIMIZER = 28  # bytes that AdamW reads and writes for a weight: itself, its gradient, two moments; all but one twice

# Time ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What is assumed of the hardware. Rates are per second."""

    gpu_mem: float = 80.0  # GiB
    tflops: float = 700.0  # that large matrix products reach
    mfu: float = 40.0  # percent of it, as `--log_mfu` measures
    memory_rate: float = 2000.0  # GB/s, of the GPU's own memory
    bandwidth: float = 300.0  # GB/s of a collective inside a node
    network: float = 100.0  # GB/s between two nodes, all their adapters together
    node: int = 8  # GPUs
    cores: int = 16  # CPU cores of a GPU
    decoded: float = 290.0  # images that a core prepares (benchmarks/README.md, 375x500 JPEGs to 224 px)
    context: float = 2.0  # GiB of CUDA, NCCL and workspaces
    fragmentation: float = 0.05  # of what is allocated
    hop: float = 5e-6  # s, of a message from one GPU to the next
    launch: float = 6e-4  # s, to launch the kernels of a block, forward and backward, not compiled
    bucket: float = 25 * 2**20  # bytes of a DDP message

    @property
    def usable(self) -> float:
        """Bytes for tensors."""
        return max(0.0, self.gpu_mem - self.context) * GIB / (1 + self.fragmentation)


def flops_per_image(sizes: Sizes, setup: Setup) -> dict[str, int]:
    """Of matrix products in a training step: forward once, backward twice (the patch kernel's input needs none), blocks
    once more with `grad_checkpoint`, and the teacher's forward pass."""
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
    """A step of the optimizer."""

    compute: float
    exposed: float  # communication that nothing hides
    launching: float  # what `compute` exceeds the arithmetic by, because the host cannot launch kernels any faster
    decoding: float  # of the data workers, for the images of this step

    @property
    def step(self) -> float:
        return max(self.compute + self.exposed, self.decoding)

    @property
    def limit(self) -> str:
        """What takes most of the time that arithmetic does not."""
        if self.decoding > self.compute + self.exposed:
            return "data"
        waste = {"communication": self.exposed, "few images a GPU": self.launching}
        name = max(waste, key=waste.get)
        return name if waste[name] > 0.1 * self.step else "compute"


def seconds(sizes: Sizes, setup: Setup, machine: Machine) -> Seconds:
    """Of one step of `setup.accum` micro-batches."""
    listed, counted = parts(sizes, setup), flops_per_image(sizes, setup)
    blocks = sum(part.block for part in listed)
    arithmetic = setup.batch * sum(counted.values()) / (machine.tflops * 1e12 * machine.mfu / 100)
    passes = 4 if setup.grad_checkpoint else 3
    micro = max(arithmetic, blocks * machine.launch * passes / 3)
    # Two thirds of forward and backward are backward, and what is computed again is computed there.
    behind = counted["forward and backward"] * 2 / 3 + counted.get("computed again", 0)
    backward = micro * behind / sum(counted.values())
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
    """Bytes that a GPU sends: under DDP once a step, a ring all-reduce of fp32 gradients; under FSDP for every
    micro-batch weights gathered twice (forward, backward), fp32 gradients scattered, a teacher's weights gathered."""
    if setup.gpus == 1:
        return 0.0
    sent = 2 * 4 * learned(sizes)
    if setup.fsdp:
        sent = (2 * setup.element + 4) * learned(sizes) + setup.element * teacher_weights(sizes, setup.teacher)
    return (setup.gpus - 1) / setup.gpus * sent


def collective(sizes: Sizes, setup: Setup, machine: Machine) -> float:
    """Seconds of that, at the bandwidth of the slower of node and network, and the hops of every message: a ring's
    under FSDP, a tree's there and back under DDP."""
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
    """The fastest way that fits, or with `fits` False the one that needs least."""

    sizes: Sizes
    setup: Setup
    machine: Machine
    fits: bool
    moment: str
    memory: dict[str, float] = field(hash=False)  # bytes by what they hold, at the peak
    time: Seconds

    @property
    def gib(self) -> float:
        """Needed, with context and fragmentation."""
        return sum(self.memory.values()) * (1 + self.machine.fragmentation) / GIB + self.machine.context

    def hours(self, epochs: float, images: int) -> float:
        """Steps are whole: what an epoch leaves over is not trained on."""
        batch = self.setup.batch * self.setup.accum * self.setup.gpus
        return epochs * max(1, images // batch) * self.time.step / 3600


def candidates(effective: int, gpus: int, shards: bool = True, **how) -> list[Setup]:
    """Every way to train `effective` images a step on `gpus` GPUs; simpler ones and larger batches first; without FSDP
    where nothing `shards`. UserError where the GPUs cannot share them."""
    if effective % gpus:
        raise UserError(f"--effective_batch {effective} must be a multiple of --gpus {gpus}")
    own = effective // gpus
    batches = [batch for batch in range(own, 0, -1) if own % batch == 0]
    return [
        Setup(batch, gpus, own // batch, fsdp=fsdp, grad_checkpoint=again, **how)
        for fsdp in ([False, True] if gpus > 1 and shards else [False])
        for again in (False, True)
        for batch in batches
    ]


def plan(sizes: Sizes, machine: Machine, effective: int, gpus: int, **how) -> Plan:
    """The fastest of the `candidates` that fits into a GPU; of those within 5 % of it, the simplest: no prediction of
    time is better than that."""
    made = []
    for setup in candidates(effective, gpus, **how):
        moment, memory = peak(sizes, setup)
        fits = sum(memory.values()) <= machine.usable
        made.append(Plan(sizes, setup, machine, fits, moment, memory, seconds(sizes, setup, machine)))
    fitting = [one for one in made if one.fits]
    if not fitting:
        return min(made, key=lambda one: one.gib)
    fastest = min(one.time.step for one in fitting)
    return next(one for one in fitting if one.time.step <= 1.05 * fastest)
