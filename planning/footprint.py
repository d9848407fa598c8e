"""Prediction of the memory of pretraining from the sizes of the model; nothing is built or run.

docs/scaling.md explains the formulas and compares them with measurements.

Symbols: L patches, V visible patches, P = L - V predicted patches, D and d widths of encoder and decoder, F values per
patch. A number in matrix products has `element` bytes (2 in bf16 and fp16, 4 in fp32). Weights, AdamW's moments,
gradients and the residual stream are always fp32.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from util.architectures import check_geometry
from util.errors import UserError

TEACHERS = ["none", "encoder", "autoencoder"]
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """The sizes of a masked autoencoder that determine time and memory."""

    width: int
    depth: int
    heads: int
    decoder_width: int
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
        """The number of values in the two position tables, which are not trained."""
        return (1 + self.patches) * (self.width + self.decoder_width)

    # The members of a `Workload`:

    @property
    def trained(self) -> int:
        return trained_weights(self)

    @property
    def blocks(self) -> int:
        return self.depth + self.decoder_depth

    def teacher_weights(self, teacher: str) -> int:
        return teacher_weights(self, teacher)

    def flops(self, setup: "Setup") -> dict[str, int]:
        return flops_per_image(self, setup)

    def moments(self, setup: "Setup") -> dict[str, dict[str, float]]:
        return moments(self, setup)


def sizes_of(config: dict, mask_ratio: float = 0.75, in_chans: int = 3) -> Sizes:
    """Return the sizes of the model with the constructor arguments `config` (as of an entry of `models_mae.MODELS`).
    Raises UserError for impossible sizes and for a mask ratio that removes no patch or all."""
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
    """The configuration of a training run."""

    batch: int  # images per process in a micro-batch
    gpus: int = 1
    accum: int = 1  # micro-batches per optimizer step
    element: int = 2  # bytes of a number in matrix products
    fused: bool = True  # attention in one kernel; else two products and a softmax in `element` bytes, as on a CPU
    grad_checkpoint: bool = False
    recompute: bool = False  # of norms and GELUs (`--recompute cheap`)
    fsdp: bool = False
    teacher: str = "none"  # "encoder" (whole images: MAE-K, EMA-MAE), "autoencoder" (visible patches: RC-MAE)

    @property
    def name(self) -> str:
        mode = "one GPU" if self.gpus == 1 else "fsdp" if self.fsdp else "ddp"
        return mode + (" + grad_checkpoint" if self.grad_checkpoint else " + recompute" if self.recompute else "")


class Workload(Protocol):
    """What `planning.plan` needs to know of the training of a network: `Sizes`, for pretraining, and
    `planning.dense.DenseTraining`."""

    trained: int  # weights
    blocks: int  # of transformers

    def teacher_weights(self, teacher: str) -> int:
        """Return the number of weights of a teacher, 0 for "none"."""
        ...

    def flops(self, setup: Setup) -> dict[str, int]:
        """Return the FLOPs of matrix products per image and training step, by pass: "forward and backward", and with
        `grad_checkpoint` "recomputed"."""
        ...

    def moments(self, setup: Setup) -> dict[str, dict[str, float]]:
        """Return the bytes of a process by content, at every moment that may be the peak."""
        ...


@dataclass(frozen=True)
class Part:
    """A part of the network, such as a block. Bytes and FLOPs are per image."""

    weights: int  # number of trained weights
    saved: int = 0  # bytes kept from the forward to the backward pass
    temporary: int = 0  # additional bytes during its backward pass
    flops: int = 0  # of the forward pass
    recomputed: int = 0  # FLOPs that `grad_checkpoint` repeats in the backward pass
    matrix: int = 0  # values of its largest weight matrix, whose gradient exists briefly in two types
    block: bool = False


# Parts of the network ------------------------------------------------------------------------------------------------


def block_saved(tokens: int, outputs: int, width: int, heads: int, setup: Setup) -> int:
    """Return the bytes per image that a block with `tokens` input tokens and `outputs` output tokens keeps for the
    backward pass: the inputs of both norms with their mean and standard deviation; the inputs of qkv and fc1; q, k and
    v; the output of attention; the input and output of GELU; and the attention weights (if fused, one number per
    row). With `recompute` the outputs of norms and GELU, which are the inputs of qkv, fc1 and fc2, are not kept."""
    element, fused = setup.element, setup.fused
    queries = tokens if fused else outputs  # the kernel keeps views of all queries, the product a copy of those used
    kept = tokens * (4 * width + 8) + outputs * (4 * width + 8)
    kept += element * width * (tokens + 2 * tokens + queries + 10 * outputs)
    if setup.recompute:
        kept -= element * width * (tokens + 5 * outputs)
    return kept + heads * outputs * (4 if fused else element * tokens)


def block_temporary(outputs: int, width: int, element: int) -> int:
    """Return the temporary bytes per image at the peak of a block's backward pass, which is at GELU: the gradients of
    the residual stream, of fc2's output if its type differs, and of fc2's input."""
    return outputs * width * (4 + (element if element < 4 else 0) + 4 * element)


def block(tokens: int, width: int, heads: int, setup: Setup, outputs: int | None = None) -> Part:
    """Return a transformer block with `tokens` input tokens, all of which are keys and values, and `outputs` output
    tokens (None: all)."""
    outputs = tokens if outputs is None else outputs
    saved = block_saved(tokens, outputs, width, heads, setup)
    temporary = block_temporary(outputs, width, setup.element)
    if setup.grad_checkpoint:  # only the input is kept; the rest exists during the block's backward pass
        saved, temporary = 4 * tokens * width, temporary + saved - 4 * tokens * width
    flops = tokens * 6 * width**2 + outputs * (18 * width**2 + 4 * tokens * width)
    recomputed = (flops - outputs * 8 * width**2) if setup.grad_checkpoint else 0  # all but the output of fc2
    return Part(12 * width**2 + 13 * width, saved, temporary, flops, recomputed, 4 * width**2, block=True)


def stem(sizes: Sizes, setup: Setup) -> Part:
    """Return the first part: the embedding of the visible patches, and the [cls] token."""
    weights = sizes.values * sizes.width + 2 * sizes.width
    pixels = sizes.visible * sizes.values
    return Part(weights, setup.element * pixels, 0, 2 * pixels * sizes.width)


def bridge(sizes: Sizes, setup: Setup) -> Part:
    """Return the part between the blocks: the encoder's norm, the projection to the decoder's width, the mask token."""
    tokens, D, d = 1 + sizes.visible, sizes.width, sizes.decoder_width
    return Part(2 * D + D * d + 2 * d, tokens * (4 * D + 8 + setup.element * D), 0, 2 * tokens * D * d)


def head(sizes: Sizes, setup: Setup) -> Part:
    """Return the last part: the decoder's norm, the prediction layer and the loss.

    Its temporary bytes include the tensors that the forward pass returns (the pixels of all patches, the predictions,
    the outputs of both norms) and three copies of the predicted patches' pixels.
    """
    P, d, F = sizes.predicted, sizes.decoder_width, sizes.values
    saved = P * (4 * d + 8 + setup.element * d + 4 * F)
    temporary = 4 * sizes.patches * F + setup.element * P * F + 12 * P * F
    if setup.element < 4:
        temporary += 4 * P * d + 4 * (1 + sizes.visible) * sizes.width
    return Part(2 * d + d * F + F, saved, temporary, 2 * P * d * F)


def parts(sizes: Sizes, setup: Setup) -> list[Part]:
    """Return the parts of the network in the order of the forward pass."""
    encoder = block(1 + sizes.visible, sizes.width, sizes.heads, setup)
    arguments = (1 + sizes.patches, sizes.decoder_width, sizes.decoder_heads, setup)
    decoder = [block(*arguments)] * (sizes.decoder_depth - 1)
    if sizes.decoder_depth:  # the last block computes only the predicted patches
        decoder += [block(*arguments, outputs=sizes.predicted)]
    return [stem(sizes, setup), *[encoder] * sizes.depth, bridge(sizes, setup), *decoder, head(sizes, setup)]


def trained_weights(sizes: Sizes) -> int:
    """Return the number of trained weights."""
    return sum(part.weights for part in parts(sizes, Setup(1)))


def teacher_weights(sizes: Sizes, teacher: str) -> int:
    """Return the number of weights of a teacher, its position tables included."""
    if teacher == "none":
        return 0
    if teacher == "autoencoder":
        return trained_weights(sizes) + sizes.frozen
    block_weights = 12 * sizes.width**2 + 13 * sizes.width
    return sizes.depth * block_weights + (sizes.values + 2 + 2 + 1 + sizes.patches) * sizes.width


def flops_per_image(sizes: Sizes, setup: Setup) -> dict[str, int]:
    """Return the FLOPs of matrix products per image and training step, by pass.

    The backward pass takes twice the FLOPs of the forward pass, except for the patch kernel, whose input needs no
    gradient. `grad_checkpoint` adds recomputation of the blocks, and a teacher adds its forward pass.
    """
    listed = parts(sizes, setup)
    forward = sum(part.flops for part in listed)
    counted = {"forward and backward": 3 * forward - listed[0].flops}
    if setup.grad_checkpoint:
        counted["recomputed"] = sum(part.recomputed for part in listed)
    if setup.teacher == "autoencoder":
        counted["teacher"] = forward
    elif setup.teacher == "encoder":
        unmasked = replace(sizes, visible=sizes.patches)
        counted["teacher"] = sum(part.flops for part in parts(unmasked, setup)[: 1 + sizes.depth])
    return counted


# Memory --------------------------------------------------------------------------------------------------------------


def resident(sizes: Sizes, setup: Setup) -> dict[str, float]:
    """Return the bytes that a process holds all the time, by content. Gradients, which some setups also keep between
    steps, are counted in `moments`.

    FSDP shards all weights of these teachers, because they are submodules of their methods. (Of a network outside its
    method, such as DMAE's teacher, it shards only the blocks.)
    """
    share = setup.gpus if setup.fsdp else 1
    weights, teacher = trained_weights(sizes), teacher_weights(sizes, setup.teacher)
    return {
        "weights": 4 * (weights + sizes.frozen) / share,
        "AdamW": 8 * weights / share,
        "teacher": 4 * teacher / share,
        "images": 4 * setup.batch * sizes.patches * sizes.values,
    }


def gathered(sizes: Sizes, setup: Setup) -> float:
    """Return the approximate bytes that FSDP gathers during a step (`util/parallel/fsdp.py`): all trained weights
    outside blocks, in fp32; and for the largest block two sets of weights (one prefetched), a message, a gradient, and
    the fp32 buffers of two reductions."""
    listed = parts(sizes, setup)
    largest = max((part.weights for part in listed if part.block), default=0)
    return 4 * sum(p.weights for p in listed if not p.block) + (4 * setup.element + 2 * 4) * largest


def gathered_between_epochs(sizes: Sizes, setup: Setup) -> float:
    """Return the approximate bytes of all weights, a teacher's included, which FSDP gathers in every process between
    epochs for previews and kNN. Weights outside blocks stay in fp32, but are counted with `element` bytes here: they
    are few."""
    return setup.element * (trained_weights(sizes) + sizes.frozen + teacher_weights(sizes, setup.teacher))


def moments(sizes: Sizes, setup: Setup) -> dict[str, dict[str, float]]:
    """Return the bytes of a process by content, at every moment that may be the peak: the loss, the backward pass, the
    optimizer's step; with a teacher its forward pass and its update; with FSDP also "between epochs"."""
    listed, batch = parts(sizes, setup), setup.batch
    weights, held = trained_weights(sizes), resident(sizes, setup)
    gradients = 4 * weights / (setup.gpus if setup.fsdp else 1)
    # With DDP, gradients are views of buckets, which always exist. With accumulation, those of the first micro-batch
    # exist during the next one. Otherwise they appear in the backward pass and are freed after the step.
    gradients_persist = setup.accum > 1 or (setup.gpus > 1 and not setup.fsdp)
    if setup.element < 4 and not setup.fsdp:  # autocast caches them for the step; FSDP gathers in bf16
        held["bf16 weights"] = setup.element * (weights - listed[0].weights)
    computed, kept, by_moment = 0.0, sum(part.saved for part in listed), {}  # weights with gradients; activations
    for index, part in reversed(list(enumerate(listed))):
        moment = "loss" if index == len(listed) - 1 else "backward"
        now = held | {
            "activations": batch * kept,
            "gathered": gathered(sizes, setup) if setup.fsdp else 0,
            "gradients": gradients if gradients_persist else gradients * (computed + part.matrix) / weights,
            "temporary": batch * part.temporary + (setup.element * part.matrix if setup.element < 4 else 0),
        }
        if moment not in by_moment or sum(now.values()) > sum(by_moment[moment].values()):
            by_moment[moment] = now
        kept, computed = kept - part.saved, computed + part.weights
    by_moment["optimizer"] = held | {"gradients": gradients}
    if setup.fsdp:
        by_moment["between epochs"] = held | {"gathered": gathered_between_epochs(sizes, setup)}
    if setup.teacher != "none":
        gradients = gradients if gradients_persist else 0.0
        by_moment |= _teacher_moments(sizes, setup, held, gradients, by_moment["loss"])
    return by_moment


def _teacher_moments(sizes: Sizes, setup: Setup, held: dict, gradients: float, loss: dict) -> dict:
    """Return the moments of a teacher: its forward pass, during which the student's activations exist, and its update,
    in which the differences of all its weights from the student's exist."""
    tokens = 1 + (sizes.patches if setup.teacher == "encoder" else sizes.visible)
    values = tokens * sizes.width
    if setup.teacher == "autoencoder":
        values = max(values, (1 + sizes.patches) * sizes.decoder_width)
    # In a block without gradients, at GELU: the residual stream, its norm, the input and output of GELU.
    forward = setup.batch * values * (8 + 8 * setup.element)
    return {
        "teacher forward": loss | {"temporary": loss["temporary"] + forward},
        "teacher update": held | {"gradients": gradients, "temporary": held["teacher"]},
    }


def peak(work: Workload, setup: Setup) -> tuple[str, dict[str, float]]:
    """Return (moment, bytes by content) at the predicted peak of a process. Memory of CUDA and the allocator, which
    `Machine.usable` deducts, is not included."""
    return max(work.moments(setup).items(), key=lambda item: sum(item[1].values()))
