"""DMAE: besides the pixels, the student matches features of a larger, pretrained MAE on the same visible patches.

Source: Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers" (CVPR 2023); teachers of another patch
and image size after García, Senel and Frantzolas, "Exploring: Masked Autoencoders Are Scalable Vision Learners",
Section 3. The teacher encodes only the visible tokens, up to the last aligned block; its decoder is not run. Teachers
from timm (`methods/dmae_timm.py`) are an addition.

Shapes: N images, V visible patches, D student width, T teacher width, R x C grid of patches.
"""

import hashlib
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import models_mae
from methods.base import Method
from methods.dmae_timm import TimmTeacher, resized
from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput, masked_mean
from util.compute.ema import Frozen
from util.compute.precision import widened
from util.data.image_format import mean_std
from util.data.sample_rng import sample_noise
from util.errors import UserError
from util.pos_embed import get_2d_sincos_pos_embed
from util.weights.geometry import depth as block_count
from util.weights.geometry import geometry
from util.weights.load import Weights, load_into, read_weights
from util.weights.model_config import ENCODER, ModelConfig, resolve_config
from util.weights.names import is_decoder
from util.weights.timm_models import PREFIX, timm_model

# The mathematics ----------------------------------------------------------------------------------------------------


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor, distance: str = "l1", normalize=False) -> torch.Tensor:
    """Return the mean absolute (`l1`) or squared (`l2`) difference of features (N, 1 + V, T), [cls] included.
    `normalize` first scales each token of both to length one."""
    student, teacher = widened(student), widened(teacher.detach())
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return F.l1_loss(student, teacher) if distance == "l1" else F.mse_loss(student, teacher)


def aligned_blocks(text: str | None, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Parse '9:18,12:24', counted from 1, into [(8, 17), (11, 23)], counted from 0. None aligns the blocks at three
    quarters of each depth. Raises UserError for other text, blocks out of range, and a student block aligned twice."""
    if text is None:
        return [(max(1, student_depth * 3 // 4) - 1, max(1, teacher_depth * 3 // 4) - 1)]
    try:
        pairs = [tuple(int(number) for number in pair.split(":")) for pair in text.split(",")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError
    except ValueError:
        raise UserError(f"--dmae_blocks {text} must be student:teacher pairs such as 9:18 or 6:12,9:18") from None
    for student, teacher in pairs:
        if not (1 <= student <= student_depth and 1 <= teacher <= teacher_depth):
            raise UserError(
                f"--dmae_blocks {student}:{teacher} is out of range: the student has blocks 1 to {student_depth}, the "
                f"teacher 1 to {teacher_depth}"
            )
    if len({student for student, _ in pairs}) < len(pairs):
        raise UserError(f"--dmae_blocks {text} aligns a block of the student twice: give each one teacher block")
    return [(student - 1, teacher - 1) for student, teacher in pairs]


def grid_offset(student: tuple[int, int], teacher: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the number of teacher tokens (above, left of) the student's grid, which is centred in the teacher's grid.

    The teacher is cut to the student's grid instead of padding images to the teacher's size: padded tokens would be
    dropped anyway. Raises UserError, with sizes that fit, if the student's grid is larger or cannot be centred.
    """
    mismatch = (
        f"the student's {student[0]}x{student[1]} patches do not fit into the teacher's {teacher[0]}x{teacher[1]}"
    )
    if (student[0] - student[1]) % 2 and teacher[0] == teacher[1]:
        raise UserError(
            f"{mismatch}: rows and columns that are both even or both odd are needed (--input_size, --patch_size)"
        )
    if student[0] > teacher[0] or student[1] > teacher[1]:
        raise UserError(
            f"{mismatch}: --dmae_teacher_size {max(student) * patch} resamples its positions to such a grid"
        )
    if (teacher[0] - student[0]) % 2 or (teacher[1] - student[1]) % 2:
        fits = f"--dmae_teacher_size {(teacher[0] - 1) * patch} or {(teacher[0] + 1) * patch} does"
        raise UserError(f"{mismatch} with a whole number of tokens on each side: {fits}")
    return (teacher[0] - student[0]) // 2, (teacher[1] - student[1]) // 2


def inner_positions(table: torch.Tensor, grid: tuple[int, int], inner: tuple[int, int], offset: tuple[int, int]):
    """Return the rows of a position table (1, 1 + R * C, T) that belong to a smaller grid inside, and the row of
    [cls]."""
    rows = table[:, 1:].reshape(1, *grid, -1)
    rows = rows[:, offset[0] : offset[0] + inner[0], offset[1] : offset[1] + inner[1]]
    return torch.cat([table[:, :1], rows.flatten(1, 2)], dim=1)


# The teacher --------------------------------------------------------------------------------------------------------


def load_teacher(args) -> tuple[MaskedAutoencoderViT, Weights]:
    """Return the whole teacher, in float32 on the CPU, and the weights it was loaded from. Raises UserError if its file
    and the flags leave its model open, contradict each other, or do not fit the student."""
    weights = read_weights(args.dmae_teacher)
    channels = geometry(weights.state).channels
    if channels != args.in_chans:
        raise UserError(f"{weights.path} takes {channels} channels, the student {args.in_chans}: give another teacher")
    given = {"model": args.dmae_teacher_model, "input_size": args.dmae_teacher_size}
    config = resolve_config(weights, given, inferred=ENCODER, model_flag="--dmae_teacher_model")
    _check_teacher_size(args.dmae_teacher_size, config.patch_size)
    weights = _without_unknown_decoder(weights, config)
    # MAE's decoder and epsilon, also where the file has others: the decoder serves the sanity check alone, and the load
    # report notes another epsilon.
    arguments = config.autoencoder_arguments() | {"decoder": "self"}
    teacher = models_mae.build_model(config.autoencoder_name, **arguments)
    report = load_into(teacher, weights, model_flag="--dmae_teacher_model")
    print(f"teacher {config.autoencoder_name}: {report.shown(getattr(args, 'verbose', False))}")
    return teacher, weights


def _check_teacher_size(size: int | None, patch: int) -> None:
    """Raise UserError, with sizes that fit, if --dmae_teacher_size is no multiple of the teacher's patch size."""
    if size is not None and (size < patch or size % patch):
        fits = max(1, size // patch) * patch
        raise UserError(
            f"--dmae_teacher_size {size} must be a multiple of the teacher's patch size {patch}: {fits} or "
            f"{fits + patch} would fit"
        )


def _without_unknown_decoder(weights: Weights, config: ModelConfig) -> Weights:
    """Return `weights` without a decoder that is neither the model's own nor described by the file's flags: its number
    of heads is unknown, and only the sanity check would run it."""
    if not weights.has_decoder:
        return weights
    width, depth = len(weights.state.get("decoder_embed.weight", ())), block_count(weights.state, "decoder_blocks")
    if (width, depth) == (config.decoder_embed_dim, config.decoder_depth):
        return weights
    print(f"note: the decoder in {weights.path} (width {width}, depth {depth}) is not its model's: left out")
    return replace(weights, state={name: tensor for name, tensor in weights.state.items() if not is_decoder(name)})


def warn_about_pixels(args, weights: Weights) -> None:
    """Print a warning if the teacher's pixels were normalised differently, or a note if its file does not tell."""
    ours, stored = mean_std(args.dataset, args.in_chans, args.mean, args.std), weights.args
    if stored:
        dataset = stored.get("dataset") or "imagefolder"
        other = mean_std(dataset, args.in_chans, stored.get("mean"), stored.get("std"))
        if any(abs(a - b) > 5e-3 for mine, its in zip(ours, other) for a, b in zip(mine, its)):
            print(
                f"warning: the teacher was trained on pixels with mean {_format(other[0])} and standard "
                f"deviation {_format(other[1])}, this run has {_format(ours[0])} and "
                f"{_format(ours[1])}: set --mean and --std alike"
            )
    else:
        print(f"note: {weights.path} stores no pixel mean and standard deviation; this run has mean {_format(ours[0])}")


def _format(values) -> str:
    return "/".join(f"{value:.3f}" for value in values)


@torch.no_grad()
def teacher_sanity_check(teacher: MaskedAutoencoderViT, imgs: torch.Tensor, mask_ratio: float) -> str:
    """Return a message with the teacher's reconstruction loss on up to 64 of these images, at its own image size and in
    float32, beside the loss of predicting zeros."""
    teacher = teacher.requires_grad_(False).to(imgs.device).eval()
    imgs = resized(imgs[:64], tuple(teacher.patch_embed.img_size))
    noise = sample_noise(0, 0, torch.arange(len(imgs), device=imgs.device), teacher.patch_embed.num_patches, stream=1)
    with torch.autocast(imgs.device.type, enabled=False):
        loss, _, mask = teacher(imgs, mask_ratio, noise)
    baseline = masked_mean((teacher.pixel_target(imgs) ** 2).mean(dim=-1), mask)
    verdict = (
        "" if loss < 0.9 * baseline else " (WARNING: hardly better: check the file and the normalisation of pixels)"
    )
    return f"teacher: reconstruction loss {loss:.4f} on the first batch, {baseline:.4f} if it predicted zeros{verdict}"


# The method ---------------------------------------------------------------------------------------------------------


class DMAE(Method):
    """Adds `dmae_alpha` times the alignment loss, summed over the aligned pairs. Checkpoints contain the path and hash
    of the teacher's file, not the teacher."""

    name = "dmae"
    switch = Option(
        "dmae_teacher",
        None,
        "checkpoint of the teacher, or any encoder of timm's (timm:NAME, timm:ARCHITECTURE=FILE); turns this method on",
        metavar="PATH",
    )
    title = "DMAE (Bai et al., CVPR 2023)"
    summary = (
        "Also match intermediate features of a larger, pretrained MAE on the same visible patches. Choose it where "
        "such a teacher exists (the released ViT-L, say); its patch and image size may differ; works at a mask ratio "
        "of 0.9. Costs part of a forward pass of the teacher on the visible patches."
    )
    options = (
        Option(
            "dmae_teacher_model",
            None,
            "the teacher's model if its file does not name it, e.g. mae_vit_large_patch16",
            metavar="NAME",
            rare=True,
        ),
        Option("dmae_alpha", 1.0, "weight of the alignment loss"),
        Option(
            "dmae_blocks",
            None,
            "student and teacher blocks to align, e.g. 9:18; without it at three quarters of each depth",
            metavar="S:T[,S:T...]",
        ),
        Option(
            "dmae_proj",
            "linear",
            "layer from the student's width to the teacher's; none needs equal widths",
            choices=("linear", "mlp", "none"),
            rare=True,
        ),
        Option("dmae_loss", "l1", "mean absolute or squared difference", choices=("l1", "l2"), rare=True),
        Option(
            "dmae_normalize",
            False,
            "scale tokens to length one before they are compared, as the paper's release does",
            rare=True,
        ),
        Option(
            "dmae_teacher_pos",
            "inner",
            "positions if the teacher's grid is larger: the inner part of its table, or a new sine-cosine table",
            choices=("inner", "fresh"),
            rare=True,
        ),
        Option(
            "dmae_teacher_size",
            None,
            "image size to whose grid the teacher's position embedding is resampled; without it the size that it was "
            "trained at",
            type=int,
            metavar="N",
            rare=True,
        ),
    )

    @staticmethod
    def check(args) -> None:
        if not args.dmae_teacher:
            raise UserError("--dmae_teacher must name a checkpoint of the teacher")
        if args.dmae_alpha <= 0:
            raise UserError(f"--dmae_alpha {args.dmae_alpha} must be positive")
        if args.dmae_teacher.startswith(PREFIX) and (args.dmae_teacher_model or args.dmae_teacher_pos != "inner"):
            flag = "--dmae_teacher_model" if args.dmae_teacher_model else f"--dmae_teacher_pos {args.dmae_teacher_pos}"
            raise UserError(f"{flag} has no effect with --dmae_teacher {args.dmae_teacher}: leave it out")

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.alpha, self.loss, self.normalize = args.dmae_alpha, args.dmae_loss, args.dmae_normalize
        self.ratio, self.path = args.mask_ratio, args.dmae_teacher
        grid, depth = tuple(model.patch_embed.grid_size), len(model.blocks)
        source = timm_model(str(self.path))
        # In tuples, so that neither is registered as a submodule: they are not trained and not in checkpoints.
        self._whole = None
        if source is not None:
            teacher = TimmTeacher(args, source, grid, lambda count: aligned_blocks(args.dmae_blocks, depth, count))
            self.pairs, self.hash, widths = teacher.pairs, teacher.sha256, teacher.widths
            self._teacher = (teacher,)
            print(f"teacher {source.name}: {teacher}")
        else:
            widths = self._load(args, grid, depth)
        self.projections = nn.ModuleList(
            [_projection(args.dmae_proj, model.norm.normalized_shape[0], widths[block]) for _, block in self.pairs]
        )

    def _load(self, args, grid: tuple[int, int], depth: int) -> dict[int, int]:
        """Read a teacher of our own architecture for a student of this grid and depth; return {aligned block:
        width}."""
        whole, weights = load_teacher(args)
        warn_about_pixels(args, weights)
        with open(self.path, "rb") as file:
            self.hash = hashlib.file_digest(file, "sha256").hexdigest()
        self.pairs = aligned_blocks(args.dmae_blocks, depth, len(whole.blocks))
        self._whole = (whole,) if weights.has_decoder else None
        self._teacher = (self._cut(whole, grid, args.dmae_teacher_pos),)
        if self._whole is None:
            print("teacher: the file has no decoder, so its reconstruction cannot be checked")
        return dict.fromkeys((block for _, block in self.pairs), whole.norm.normalized_shape[0])

    def _cut(self, whole: MaskedAutoencoderViT, grid: tuple[int, int], positions: str) -> Frozen:
        """Return the teacher's encoder for the student's grid, cut after its last aligned block."""
        patch, native = whole.patch_embed.patch_size, tuple(whole.patch_embed.grid_size)
        offset = grid_offset(grid, native, patch[0])
        table = inner_positions(whole.pos_embed, native, grid, offset)
        if positions == "fresh":
            values = get_2d_sincos_pos_embed(table.shape[-1], grid, cls_token=True)
            table = torch.from_numpy(values)[None].to(table)
        self.size = (grid[0] * patch[0], grid[1] * patch[1])
        depth = 1 + max(teacher for _, teacher in self.pairs)
        return Frozen(whole.encoder_copy(depth, img_size=self.size, pos_embed=table))

    def blocks(self) -> tuple[int, ...]:
        return tuple(student for student, _ in self.pairs)

    def teacher_features(self, imgs: torch.Tensor, ids_keep: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return {teacher block: its output (N, 1 + V, T)} for the patches that the student sees, in the same order;
        (N, V, T) of a teacher without [cls]."""
        if isinstance(self._teacher[0], TimmTeacher):
            return self._teacher[0].features(imgs, ids_keep)
        teacher = self._teacher[0].network
        with torch.no_grad():
            tokens = teacher.embed_patches(teacher.patchify(resized(imgs, self.size)), ids_keep)
            return teacher.encode(tokens, [block for _, block in self.pairs])[1]

    def external_networks(self) -> list[nn.Module]:
        return [self._teacher[0]]

    def first_batch(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> None:
        if self._whole is None:
            return
        print(teacher_sanity_check(self._whole[0], imgs, self.ratio))
        self._whole = None
        if imgs.is_cuda:  # the logged peak must be that of training
            torch.cuda.reset_peak_memory_stats(imgs.device)

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        features = self.teacher_features(imgs, out.ids_keep)
        losses = {}
        for (student, teacher), project in zip(self.pairs, self.projections):
            name = "distillation" if len(self.pairs) == 1 else f"distillation_{student + 1}"
            own = out.blocks[student][:, -features[teacher].shape[1] :]  # without [cls] if the teacher has none
            loss = alignment_loss(project(own), features[teacher], self.loss, self.normalize)
            losses[name] = self.alpha * loss
        return losses

    # Device, checkpoints.

    def _apply(self, fn, *args, **kwargs):
        """Move the teacher, which is not a submodule, to the same device and type."""
        self._teacher[0]._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def get_extra_state(self) -> dict:
        return {"teacher": str(self.path), "sha256": self.hash}

    def set_extra_state(self, state: dict) -> None:
        if state["sha256"] != self.hash:
            raise UserError(
                f"--dmae_teacher {self.path} is not the file this run began with ({state['teacher']}, sha256 "
                f"{state['sha256'][:12]}...): give that one"
            )


def _projection(layer: str, width: int, teacher_width: int) -> nn.Module:
    if layer == "none" and width != teacher_width:
        raise UserError(
            f"--dmae_proj none needs a student as wide as the teacher, not {width} and {teacher_width}: use linear"
        )
    if layer == "none":
        return nn.Identity()
    if layer == "linear":
        return nn.Linear(width, teacher_width)
    return nn.Sequential(nn.Linear(width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))
