"""Prediction of the memory of pretraining from the sizes of the model; nothing is built or run.

docs/scaling.md has the reasons for the formulas, and measurements to compare with.

Symbols: L patches, V visible patches, P = L - V predicted patches, D and d widths of encoder and decoder, F values of a
patch. A number in matrix products has `element` bytes (2 in bf16 and fp16, 4 in fp32). Weights, AdamW's moments,
gradients and the residual stream are always fp32.
"""

from dataclasses import dataclass

from util.architectures import check_geometry
from util.errors import UserError

TEACHERS = ["none", "encoder", "autoencoder"]
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """The sizes of a masked autoencoder that time and memory depend on."""

    width: int
    depth: int
    heads: int
    narrow: int  # decoder width
    decoder_depth: int
    decoder_heads: int
    patches: int  # L
    visible: int  # V
    values: int  # F

    @property
    def predicted(self) -> int:
        return self.patches - self.visible

    @property
    def frozen(self) -> int:
        """Number of values in the two position tables, which are not trained."""
        return (1 + self.patches) * (self.width + self.narrow)


def sizes_of(config: dict, mask_ratio: float = 0.75, in_chans: int = 3) -> Sizes:
    """Return the sizes of a model with these constructor arguments (the `config` of an entry of `models_mae.MODELS`).
    Raises UserError for sizes or a mask ratio that are impossible."""
    check_geometry(config)
    size, patch = config["img_size"], config["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    patches = (height // patch) * (width // patch)
    visible = int(patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
    if not 0 < visible < patches:
        raise UserError(f"--mask_ratio {mask_ratio} must leave and remove at least one of {patches} patches")
    return Sizes(
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        config["decoder_embed_dim"],
        config["decoder_depth"],
        config["decoder_num_heads"],
        patches,
        visible,
        in_chans * patch**2,
    )


@dataclass(frozen=True)
class Setup:
    """How the model is trained."""

    batch: int  # images per process and forward pass
    gpus: int = 1
    accum: int = 1
    element: int = 2
    fused: bool = True  # attention by one kernel; else two products and a softmax in `element` bytes, as on a CPU
    grad_checkpoint: bool = False
    fsdp: bool = False
    teacher: str = "none"  # "encoder" (whole images: MAE-K, EMA-MAE), "autoencoder" (visible patches: RC-MAE)

    @property
    def name(self) -> str:
        mode = "one GPU" if self.gpus == 1 else "fsdp" if self.fsdp else "ddp"
        return mode + (" + grad_checkpoint" if self.grad_checkpoint else "")


@dataclass(frozen=True)
class Part:
    """A part of the network, in the order of the forward pass; bytes and FLOPs are per image."""

    weights: int  # number of trained weights
    saved: int = 0  # bytes kept from the forward to the backward pass
    passing: int = 0  # further bytes during its backward pass
    flops: int = 0  # of the forward pass
    again: int = 0  # FLOPs that `grad_checkpoint` repeats
    matrix: int = 0  # values of its largest weight matrix, whose gradient exists in two types for a moment
    block: bool = False


# Parts of the network ------------------------------------------------------------------------------------------------


def block_saved(tokens: int, ends: int, width: int, heads: int, element: int, fused: bool) -> int:
    """Return the bytes per image that a block with `tokens` inputs and `ends` outputs keeps for the backward pass:
    inputs of both norms with their mean and standard deviation; inputs of qkv and fc1; q, k, v; the output of
    attention; input and output of GELU; and of the attention weights one number per row (fused) or all."""
    queries = tokens if fused else ends  # the kernel keeps views of all queries, the product a copy of those used
    kept = tokens * (4 * width + 8) + ends * (4 * width + 8)
    kept += element * width * (tokens + 2 * tokens + queries + 10 * ends)
    return kept + heads * ends * (4 if fused else element * tokens)


def block_passing(ends: int, width: int, element: int) -> int:
    """Return the bytes at the peak of a block's backward pass, at GELU: gradients of the residual stream, of fc2's
    output if its type differs, and of fc2's input."""
    return ends * width * (4 + (element if element < 4 else 0) + 4 * element)


def block(tokens: int, width: int, heads: int, setup: Setup, ends: int | None = None) -> Part:
    """Return a block on `tokens` tokens that computes all of them, or only `ends`, with all tokens as keys and
    values."""
    ends = tokens if ends is None else ends
    saved = block_saved(tokens, ends, width, heads, setup.element, setup.fused)
    passing = block_passing(ends, width, setup.element)
    if setup.grad_checkpoint:  # only the input is kept; the rest exists during the block's backward pass
        saved, passing = 4 * tokens * width, passing + saved - 4 * tokens * width
    flops = tokens * 6 * width**2 + ends * (18 * width**2 + 4 * tokens * width)
    again = (flops - ends * 8 * width**2) if setup.grad_checkpoint else 0  # the output of fc2 is not needed
    return Part(12 * width**2 + 13 * width, saved, passing, flops, again, 4 * width**2, block=True)


def stem(sizes: Sizes, setup: Setup) -> Part:
    """Return the embedding of the visible patches, and [cls]."""
    weights = sizes.values * sizes.width + 2 * sizes.width
    pixels = sizes.visible * sizes.values
    return Part(weights, setup.element * pixels, 0, 2 * pixels * sizes.width)


def bridge(sizes: Sizes, setup: Setup) -> Part:
    """Return the encoder's norm, the projection to the decoder's width, and the mask token."""
    tokens, D, d = 1 + sizes.visible, sizes.width, sizes.narrow
    return Part(2 * D + D * d + 2 * d, tokens * (4 * D + 8 + setup.element * D), 0, 2 * tokens * D * d)


def head(sizes: Sizes, setup: Setup) -> Part:
    """Return the decoder's norm, predictions and loss. During this part the tensors that the forward pass returns exist
    as well: pixels of all patches, predictions, outputs of both norms; and three copies of the predicted patches'
    pixels."""
    P, d, F = sizes.predicted, sizes.narrow, sizes.values
    saved = P * (4 * d + 8 + setup.element * d + 4 * F)
    passing = 4 * sizes.patches * F + setup.element * P * F + 12 * P * F
    if setup.element < 4:
        passing += 4 * P * d + 4 * (1 + sizes.visible) * sizes.width
    return Part(2 * d + d * F + F, saved, passing, 2 * P * d * F)


def parts(sizes: Sizes, setup: Setup) -> list[Part]:
    """Return the parts of the network in the order of the forward pass."""
    encoder = block(1 + sizes.visible, sizes.width, sizes.heads, setup)
    narrow = (1 + sizes.patches, sizes.narrow, sizes.decoder_heads, setup)
    decoder = [block(*narrow)] * (sizes.decoder_depth - 1)
    if sizes.decoder_depth:  # the last block computes only the predicted patches
        decoder += [block(*narrow, ends=sizes.predicted)]
    return [stem(sizes, setup), *[encoder] * sizes.depth, bridge(sizes, setup), *decoder, head(sizes, setup)]


def learned(sizes: Sizes) -> int:
    """Return the number of trained weights."""
    return sum(part.weights for part in parts(sizes, Setup(1)))


def teacher_weights(sizes: Sizes, teacher: str) -> int:
    """Return the number of values in a method's teacher."""
    if teacher == "none":
        return 0
    if teacher == "autoencoder":
        return learned(sizes) + sizes.frozen
    block_ = 12 * sizes.width**2 + 13 * sizes.width
    return sizes.depth * block_ + (sizes.values + 2 + 2 + 1 + sizes.patches) * sizes.width


# Memory --------------------------------------------------------------------------------------------------------------


def resident(sizes: Sizes, setup: Setup) -> dict[str, float]:
    """Return the bytes that a process holds all the time, by content."""
    share = setup.gpus if setup.fsdp else 1
    weights, teacher = learned(sizes), teacher_weights(sizes, setup.teacher)
    return {
        "weights": 4 * (weights + sizes.frozen) / share,
        "AdamW": 8 * weights / share,
        "teacher": 4 * teacher / share,
        "images": 4 * setup.batch * sizes.patches * sizes.values,
    }


def gathered(sizes: Sizes, setup: Setup) -> float:
    """Return the bytes that FSDP gathers during a step (`util/parallel/fsdp.py`): all weights outside blocks, in fp32;
    and of the largest block two sets of weights (one prefetched) with one message, a gradient, and fp32 buffers of two
    reductions."""
    listed = parts(sizes, setup)
    largest = max((part.weights for part in listed if part.block), default=0)
    return 4 * sum(p.weights for p in listed if not p.block) + (4 * setup.element + 2 * 4) * largest


def whole(sizes: Sizes, setup: Setup) -> float:
    """Return the bytes of all weights, a teacher's included, which a process gathers between epochs for previews and
    kNN."""
    return setup.element * (learned(sizes) + sizes.frozen + teacher_weights(sizes, setup.teacher))


def moments(sizes: Sizes, setup: Setup) -> dict[str, dict[str, float]]:
    """Return the bytes of a process by content, at those moments of a step that may be the peak."""
    listed, batch = parts(sizes, setup), setup.batch
    weights, there = learned(sizes), resident(sizes, setup)
    gradients = 4 * weights / (setup.gpus if setup.fsdp else 1)
    # With DDP, gradients are views of buckets that always exist; otherwise they are freed after the step.
    always = setup.accum > 1 or (setup.gpus > 1 and not setup.fsdp)
    if setup.element < 4 and not setup.fsdp:  # autocast caches them for the step; FSDP gathers in bf16
        there["bf16 weights"] = setup.element * (weights - listed[0].weights)
    made, kept, by_moment = 0.0, sum(part.saved for part in listed), {}
    for index, part in reversed(list(enumerate(listed))):
        moment = "loss" if index == len(listed) - 1 else "backward"
        now = there | {
            "activations": batch * kept,
            "gathered": gathered(sizes, setup) if setup.fsdp else 0,
            "gradients": gradients if always else gradients * (made + part.matrix) / weights,
            "in passing": batch * part.passing + (setup.element * part.matrix if setup.element < 4 else 0),
        }
        if moment not in by_moment or sum(now.values()) > sum(by_moment[moment].values()):
            by_moment[moment] = now
        kept, made = kept - part.saved, made + part.weights
    by_moment["optimizer"] = there | {"gradients": gradients}
    if setup.fsdp:
        by_moment["between epochs"] = there | {"gathered": whole(sizes, setup)}
    if setup.teacher != "none":
        by_moment |= _teacher_moments(sizes, setup, there, gradients if always else 0.0, by_moment["loss"])
    return by_moment


def _teacher_moments(sizes: Sizes, setup: Setup, there: dict, gradients: float, loss: dict) -> dict:
    """Return the moments of a teacher: its forward pass, while the student's activations exist, and its update, which
    creates the difference to the student in one tensor."""
    tokens = 1 + (sizes.patches if setup.teacher == "encoder" else sizes.visible)
    wide = tokens * sizes.width
    if setup.teacher == "autoencoder":
        wide = max(wide, (1 + sizes.patches) * sizes.narrow)
    # A block without gradients at GELU: residual stream, its norm, input and output of GELU.
    forward = setup.batch * wide * (8 + 8 * setup.element)
    return {
        "teacher's pass": loss | {"in passing": loss["in passing"] + forward},
        "teacher's update": there | {"gradients": gradients, "in passing": there["teacher"]},
    }


def peak(sizes: Sizes, setup: Setup) -> tuple[str, dict[str, float]]:
    """Return (moment, bytes by content) at the peak of a step of one process, without the memory of CUDA and the
    allocator (`Machine.usable`)."""
    return max(moments(sizes, setup).items(), key=lambda item: sum(item[1].values()))
