"""RC-MAE: beside the pixels, agree with what an average of your own past would reconstruct.

Source: Lee, Hwang, Lee and others, "Exploring the Role of Mean Teachers in Self-supervised Masked Auto-Encoders" (ICLR
2023). The teacher is a moving average of the whole student, encoder and decoder; it sees the same visible patches.

Shapes: N images, L patches, V visible ones, F values per prediction.
"""

import math
from copy import deepcopy

import torch
from torch import nn

from methods.base import Method
from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.compute.ema import Frozen, ema_update
from util.compute.precision import widened
from util.data.sample_rng import redrawn, sample_noise
from util.errors import UserError
from util.parallel.distributed import all_reduce_sum, get_rank, get_world_size

# The mathematics ----------------------------------------------------------------------------------------------------


def consistency_loss(out: MaskedOutput, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference per patch, averaged over the removed patches, of the student's `out.pred` and what the
    teacher predicts for the same patches, both (N, P, F)."""
    return out.mean_over_predicted(((widened(out.pred) - widened(teacher.detach())) ** 2).mean(dim=-1))


def momentum_at(step: int, steps: int, base: float, schedule: str = "cosine") -> float:
    """Momentum of the teacher after optimizer step `step` (from 0) of a run of `steps`: from `base` towards 1 on a
    cosine over the whole run, or always `base`. It never starts again with an epoch."""
    if schedule == "constant":
        return base
    return 1 + 0.5 * (base - 1) * (1 + math.cos(math.pi * min(step, steps) / steps))


def predict(model: MaskedAutoencoderViT, head: nn.Module, imgs, scores, out: MaskedOutput) -> torch.Tensor:
    """The prediction of `model`, through `head`, for the patches that `out` predicts: (N, P, F). It sees the patches of
    lowest `scores` (N, L); where those are the student's own, it sees what the student sees."""
    same = scores is out.scores and not out.all_patches
    teacher = model.forward_pretrain(imgs, out.mask_ratio, scores, head=head, all_patches=not same)
    return teacher.pred if same else out.select_predicted(teacher.pred)


def gradient_cosine(one: torch.Tensor, other: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """Cosine between the gradients of two scalars of the same graph, averaged over all ranks before (Fig. 3b); NaN when
    one of them vanishes."""
    flat = []
    for loss, keep in ((one, True), (other, False)):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=keep, materialize_grads=True)
        flat.append(all_reduce_sum(torch.cat([g.flatten().float() for g in gradients])))
    return flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm())


# The method ---------------------------------------------------------------------------------------------------------


class RCMAE(Method):
    """Adds `rc_gamma` times the consistency loss; `model_ema` in the checkpoint is the teacher, a full MAE, which the
    paper fine-tunes."""

    name, switch = "rc_mae", Option("rc_mae", False, "turn this method on")
    title = "RC-MAE (Lee et al., ICLR 2023)"
    summary = (
        "Also agree with the reconstruction of an EMA teacher that sees the same patches. Choose it to get further in "
        "fewer epochs, for dense tasks, or for weights that are an average: the paper evaluates the teacher, "
        "--checkpoint_key model_ema. Costs one more forward pass of the visible patches."
    )
    options = (
        Option("rc_gamma", 1.0, "weight of the consistency loss"),
        Option(
            "rc_momentum",
            0.996,
            "momentum of the teacher at the start: its own share at every step; a lower one follows faster",
        ),
        Option(
            "rc_schedule",
            "cosine",
            "momentum: rising to 1 over the whole run, or constant (what the released code amounts to)",
            choices=("cosine", "constant"),
            rare=True,
        ),
        Option(
            "rc_mask",
            "same",
            "the teacher sees the student's patches, or draws its own; the paper: same is better on detection",
            choices=("same", "different"),
            rare=True,
        ),
        Option(
            "log_grad_cosine",
            0,
            "every F steps, log the cosine between the gradients of both losses; costs an extra pass; 0: never",
            metavar="F",
            rare=True,
        ),
    )

    @staticmethod
    def check(args) -> None:
        if args.rc_gamma < 0:
            raise UserError(f"--rc_gamma {args.rc_gamma} must not be negative")
        if not 0 <= args.rc_momentum <= 1:
            raise UserError(f"--rc_momentum {args.rc_momentum} must lie between 0 and 1, for example 0.996")
        if args.log_grad_cosine < 0:
            raise UserError(f"--log_grad_cosine {args.log_grad_cosine} must not be negative")
        if args.log_grad_cosine and getattr(args, "fsdp", False):
            raise UserError("--log_grad_cosine looks at whole gradients, which --fsdp never has: leave one of them out")
        for name, used in (("log_grad_cosine", args.log_grad_cosine), ("rc_mask", args.rc_mask == "different")):
            if used and not args.rc_gamma:
                raise UserError(f"--{name} has no effect with --rc_gamma 0: there is no consistency loss")

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.gamma, self.base, self.schedule = args.rc_gamma, args.rc_momentum, args.rc_schedule
        self.own_mask, self.diagnostics_every, self.ratio = (
            args.rc_mask == "different",
            args.log_grad_cosine,
            args.mask_ratio,
        )
        self.steps, self.momentum = 1, args.rc_momentum
        self.teacher = Frozen(deepcopy(model))
        self.heads = nn.ModuleDict()  # of methods that reconstruct something else than pixels: name -> the teacher's

    def begin(self, model, methods, steps: int) -> None:
        self.steps = steps
        self._students = {m.name: m.prediction_head() for m in methods if m.prediction_head() is not None}
        self.heads.update({name: Frozen(deepcopy(head)) for name, head in self._students.items()})

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        return {"consistency": self.gamma * self.consistency(imgs, out)}

    def consistency(self, imgs: torch.Tensor, out: MaskedOutput) -> torch.Tensor:
        teacher, self.ratio = self.teacher.network, out.mask_ratio
        scores = redrawn(out.scores) if self.own_mask else out.scores
        head = self.heads[out.head].network if out.head else teacher.decoder_pred
        with torch.no_grad():
            prediction = predict(teacher, head, imgs, scores, out)
        return consistency_loss(out, prediction)

    def after_update(self, model, imgs, step: int, applied: torch.Tensor) -> None:
        self.momentum = momentum_at(step, self.steps, self.base, self.schedule)
        ema_update(self.teacher.network, model, 1 - self.momentum, applied)
        for name, head in self.heads.items():
            ema_update(head.network, self._students[name], 1 - self.momentum, applied)

    def diagnostics(self, pretrainer, imgs: torch.Tensor, step: int) -> dict[str, torch.Tensor | None]:
        model = pretrainer.model
        # As one process would number the images of all ranks, so that an image has the same mask on any number of them.
        places = torch.arange(len(imgs), device=imgs.device) * get_world_size() + get_rank()
        noise = sample_noise(step, 0, places, model.patch_embed.num_patches, stream=2)
        losses, out = pretrainer.forward_with_output(imgs, self.ratio, noise)
        target = next(iter(losses.values()))  # the loss of the predictions comes first
        shared = [parameter for parameter in model.parameters() if parameter.requires_grad]
        scale = out.pred.numel()  # sums instead of means: under fp16 the gradients of means are zeros
        with torch.autocast(imgs.device.type, enabled=False):
            cosine = gradient_cosine(target * scale, losses["consistency"] * scale, shared)
        # While the teacher is still the student (a learning rate of 0 in the first step) there is no second gradient.
        return {"grad_cosine": cosine if torch.isfinite(cosine) else None}

    def metrics(self) -> dict[str, float]:
        return {"teacher_momentum": self.momentum}

    def exported(self) -> dict[str, nn.Module]:
        return {"model_ema": self.teacher.network}
