"""DMAE: beside the pixels, match the features of a bigger, pretrained MAE on the same visible patches.

Source: Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers" (CVPR 2023); teachers of another patch
and image size after García, Senel and Frantzolas, "Exploring: Masked Autoencoders Are Scalable Vision Learners",
Section 3. The teacher runs on visible tokens only, up to the aligned block, and never runs a decoder.

Shapes: N images, V visible patches, D student width, T teacher width, R x C the grid of patches.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

import models_mae
from methods.base import Method
from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput, masked_mean
from util.compute.ema import Frozen
from util.compute.precision import widened
from util.data.image_format import mean_std
from util.data.sample_rng import sample_noise
from util.errors import UserError
from util.pos_embed import get_2d_sincos_pos_embed
from util.weights.load import Weights, load_into, models_that_fit, read_weights
from util.weights.names import is_decoder

# The mathematics ----------------------------------------------------------------------------------------------------


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str = "l1", normalize=False) -> torch.Tensor:
    """Mean absolute (`l1`) or squared (`l2`) difference of features (N, 1 + V, T), [cls] among them, after scaling each
    token of both to length one with `normalize`."""
    student, teacher = widened(student), widened(teacher.detach())
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return F.l1_loss(student, teacher) if kind == "l1" else F.mse_loss(student, teacher)


def aligned_blocks(text: str | None, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """'9:18,12:24', counted from 1, -> [(8, 17), (11, 23)], counted from 0. None: three quarters of each depth."""
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
    """Tokens of the teacher's grid above and left of the student's, which lies in its middle.

    So padding the image to the teacher's size is never needed: the padding would be cut away, token by token.
    UserError, with sizes that fit, when the student's grid is larger or the middle is between two tokens.
    """
    shown = f"the student's {student[0]}x{student[1]} patches do not fit into the teacher's {teacher[0]}x{teacher[1]}"
    if (student[0] - student[1]) % 2 and teacher[0] == teacher[1]:
        raise UserError(
            f"{shown}: rows and columns that are both even or both odd are needed (--input_size, --patch_size)"
        )
    if student[0] > teacher[0] or student[1] > teacher[1]:
        raise UserError(f"{shown}: --dmae_teacher_size {max(student) * patch} resamples its positions to such a grid")
    if (teacher[0] - student[0]) % 2 or (teacher[1] - student[1]) % 2:
        fits = f"--dmae_teacher_size {(teacher[0] - 1) * patch} or {(teacher[0] + 1) * patch} does"
        raise UserError(f"{shown} with a whole number of tokens on each side: {fits}")
    return (teacher[0] - student[0]) // 2, (teacher[1] - student[1]) // 2


def inner_positions(table: torch.Tensor, grid: tuple[int, int], inner: tuple[int, int], offset: tuple[int, int]):
    """The rows of a position table (1, 1 + R * C, T) that belong to a smaller grid inside, with that of [cls]."""
    places = table[:, 1:].reshape(1, *grid, -1)
    places = places[:, offset[0] : offset[0] + inner[0], offset[1] : offset[1] + inner[1]]
    return torch.cat([table[:, :1], places.flatten(1, 2)], dim=1)


def resized(imgs: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear; smoothed where it shrinks."""
    if tuple(imgs.shape[-2:]) == size:
        return imgs
    shrinks = imgs.shape[-2] > size[0] or imgs.shape[-1] > size[1]
    return F.interpolate(imgs, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


# The teacher --------------------------------------------------------------------------------------------------------


def load_teacher(args) -> tuple[MaskedAutoencoderViT, Weights]:
    """The whole teacher as its file and flags describe it. UserError where they leave out or contradict something."""
    weights = read_weights(args.dmae_teacher)
    stored, fitting = weights.args, models_that_fit(weights)
    name = args.dmae_teacher_model or stored.get("model") or (fitting[0] if len(fitting) == 1 else None)
    if name is None:
        known = ", ".join(f"mae_{fit}" for fit in fitting) or "no known model has its width, depth and patch size"
        raise UserError(f"{weights.path} does not say which model it is: give --dmae_teacher_model ({known})")
    name = f"mae_{str(name).removeprefix('mae_')}"
    channels = weights.state["patch_embed.proj.weight"].shape[1]
    if channels != args.in_chans:
        raise UserError(
            f"{weights.path} sees {channels} channels, the student {args.in_chans}: give a teacher that fits"
        )
    try:
        config = models_mae.look_up(models_mae.MODELS, name).config
        decoder = _decoder_of(weights, config)
        patch, size = stored.get("patch_size") or config["patch_size"], args.dmae_teacher_size
        if size is not None and (size < patch or size % patch):
            fits = max(1, size // patch) * patch
            raise UserError(
                f"--dmae_teacher_size {size} must be a multiple of the teacher's patch size {patch}: {fits} or "
                f"{fits + patch} would fit"
            )
        teacher = models_mae.build_model(
            name,
            img_size=size or stored.get("input_size") or _own_size(weights, patch),
            patch_size=patch,
            in_chans=args.in_chans,
            norm_pix_loss=bool(stored.get("norm_pix_loss")),
            **decoder,
        )
        report = load_into(teacher, weights)
    except UserError as error:
        raise UserError(str(error).replace("--model", "--dmae_teacher_model")) from None
    print(f"teacher {name}: {report}")
    return teacher, weights


def _decoder_of(weights: Weights, config: dict) -> dict:
    """Sizes of the decoder. One of the file whose number of heads nobody knows is left out: it is only looked at."""
    names = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    sizes = {name: weights.args.get(name) or config[name] for name in names}
    if not weights.has_decoder:
        return sizes
    blocks = {name.split(".")[1] for name in weights.state if name.startswith("decoder_blocks.")}
    found = weights.state["decoder_embed.weight"].shape[0], len(blocks)
    if found != (sizes["decoder_embed_dim"], sizes["decoder_depth"]):
        print(f"note: the decoder in {weights.path} (width {found[0]}, depth {found[1]}) is not its model's: left out")
        weights.state = {name: tensor for name, tensor in weights.state.items() if not is_decoder(name)}
    return sizes


def _own_size(weights: Weights, patch: int) -> int | None:
    """Side of a square image with as many patches as the file has positions; None leaves it to the model."""
    table = weights.state.get("pos_embed")
    side = math.isqrt(table.shape[1] - 1) if table is not None and table.ndim == 3 else 0
    return side * patch if side and side * side == table.shape[1] - 1 else None


def warn_about_pixels(args, weights: Weights) -> None:
    """Say when the teacher learned from pixels that were normalised otherwise."""
    ours, stored = mean_std(args.dataset, args.in_chans, args.mean, args.std), weights.args
    if stored:
        dataset = stored.get("dataset") or "imagefolder"
        other = mean_std(dataset, args.in_chans, stored.get("mean"), stored.get("std"))
        if any(abs(a - b) > 5e-3 for mine, its in zip(ours, other) for a, b in zip(mine, its)):
            print(
                f"warning: the teacher was trained on pixels with mean {_shown(other[0])} and deviation "
                f"{_shown(other[1])}, this run has {_shown(ours[0])} and {_shown(ours[1])}: set --mean and --std alike"
            )
    else:
        print(f"note: {weights.path} does not say how its pixels were normalised; this run has mean {_shown(ours[0])}")


def _shown(values) -> str:
    return "/".join(f"{value:.3f}" for value in values)


@torch.no_grad()
def teacher_sanity_check(teacher: MaskedAutoencoderViT, imgs: torch.Tensor, mask_ratio: float) -> str:
    """The teacher's own reconstruction loss on these images (64 of them are enough), at its own size and in float32,
    beside that of predicting nothing."""
    teacher = teacher.requires_grad_(False).to(imgs.device).eval()
    imgs = resized(imgs[:64], tuple(teacher.patch_embed.img_size))
    noise = sample_noise(0, 0, torch.arange(len(imgs), device=imgs.device), teacher.patch_embed.num_patches, stream=1)
    with torch.autocast(imgs.device.type, enabled=False):
        loss, _, mask = teacher(imgs, mask_ratio, noise)
    nothing = masked_mean((teacher.pixel_target(imgs) ** 2).mean(dim=-1), mask)
    verdict = "" if loss < 0.9 * nothing else " (WARNING: hardly better: is it the right file, with the right pixels?)"
    return f"teacher: reconstruction loss {loss:.4f} on the first batch, {nothing:.4f} if it predicted zeros{verdict}"


# The method ---------------------------------------------------------------------------------------------------------


class DMAE(Method):
    """Adds `dmae_alpha` times the alignment loss, summed over the aligned pairs. The teacher is not in checkpoints: its
    path and hash are."""

    name = "dmae"
    switch = Option("dmae_teacher", None, "checkpoint of the teacher; turns this method on", metavar="PATH")
    title = "DMAE (Bai et al., CVPR 2023)"
    summary = (
        "Also match the middle features of a bigger, pretrained MAE on the same visible patches. Choose it where such "
        "a teacher exists (the released ViT-L, say), whatever its patch and image size; holds at a mask ratio of 0.9. "
        "Costs part of a forward pass of the teacher on the visible patches."
    )
    options = (
        Option(
            "dmae_teacher_model",
            None,
            "its model, where the file does not say, e.g. mae_vit_large_patch16",
            metavar="NAME",
        ),
        Option("dmae_alpha", 1.0, "weight of the alignment loss"),
        Option(
            "dmae_blocks",
            None,
            "student and teacher blocks to align, from 1; without it three quarters of each depth, such as 9:18",
            metavar="S:T[,S:T...]",
        ),
        Option(
            "dmae_proj",
            "linear",
            "layer from the student's width to the teacher's; none needs both the same",
            choices=("linear", "mlp", "none"),
            rare=True,
        ),
        Option("dmae_loss", "l1", "mean absolute or squared difference", choices=("l1", "l2"), rare=True),
        Option(
            "dmae_normalize",
            False,
            "compare directions only: tokens of length one, as the paper's release does",
            rare=True,
        ),
        Option(
            "dmae_teacher_pos",
            "inner",
            "position embedding where the teacher's grid is larger: the inner part of its own, or a sine-cosine table",
            choices=("inner", "fresh"),
            rare=True,
        ),
        Option(
            "dmae_teacher_size",
            None,
            "image size to whose grid the teacher's position embedding is resampled; without it the one it was "
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

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.alpha, self.loss, self.normalize = args.dmae_alpha, args.dmae_loss, args.dmae_normalize
        self.ratio, self.path = args.mask_ratio, args.dmae_teacher
        whole, weights = load_teacher(args)
        warn_about_pixels(args, weights)
        with open(self.path, "rb") as file:
            self.hash = hashlib.file_digest(file, "sha256").hexdigest()
        self.pairs = aligned_blocks(args.dmae_blocks, len(model.blocks), len(whole.blocks))
        # In tuples: neither is part of this method's parameters, nor of the checkpoint.
        self._whole = (whole,) if weights.has_decoder else None
        self._teacher = (self._cut(whole, tuple(model.patch_embed.grid_size), args.dmae_teacher_pos),)
        if self._whole is None:
            print("teacher: the file has no decoder, so its reconstruction cannot be looked at")
        widths = model.norm.normalized_shape[0], whole.norm.normalized_shape[0]
        if args.dmae_proj == "none" and widths[0] != widths[1]:
            raise UserError(
                f"--dmae_proj none needs a student as wide as the teacher, not {widths[0]} and {widths[1]}: use linear"
            )
        self.projections = nn.ModuleList([_projection(args.dmae_proj, *widths) for _ in self.pairs])

    def _cut(self, whole: MaskedAutoencoderViT, grid: tuple[int, int], positions: str) -> Frozen:
        """The teacher's encoder for the student's grid, up to its last aligned block."""
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
        """{teacher block: its output (N, 1 + V, T)} on the patches that the student sees, in the same order."""
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
        if imgs.is_cuda:  # the peak that is logged is that of training
            torch.cuda.reset_peak_memory_stats(imgs.device)

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        features = self.teacher_features(imgs, out.ids_keep)
        losses = {}
        for (student, teacher), project in zip(self.pairs, self.projections):
            name = "distillation" if len(self.pairs) == 1 else f"distillation_{student + 1}"
            loss = alignment_loss(project(out.blocks[student]), features[teacher], self.loss, self.normalize)
            losses[name] = self.alpha * loss
        return losses

    # Plumbing.

    def _apply(self, fn, *args, **kwargs):
        """Move the teacher along, to the device and type of everything else."""
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


def _projection(kind: str, width: int, teacher_width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, teacher_width)
    return nn.Sequential(nn.Linear(width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))
