"""RC-MAE: besides the pixels, the student reconstructs what a moving average of itself predicts.

Source: Lee, Hwang, Lee and others, "Exploring the Role of Mean Teachers in Self-supervised Masked Auto-Encoders"
(ICLR 2023). The teacher is a moving average of the whole student, encoder and decoder, and sees the same visible
patches.

Shapes: N images, L patches, P predicted patches, F values per prediction.
"""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from methods.base import Method
from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.compute.ema import Frozen, ema_update
from util.compute.precision import widened
from util.data.sample_rng import sample_noise
from util.errors import UserError
from util.parallel.distributed import all_reduce_sum, get_rank, get_world_size

# The mathematics ----------------------------------------------------------------------------------------------------


def consistency_loss(out: MaskedOutput, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference per patch between the student's `out.pred` and the teacher's predictions of
    the same patches, both (N, P, F), averaged over the removed patches."""
    return out.mean_over_predicted(((widened(out.pred) - widened(teacher.detach())) ** 2).mean(dim=-1))


def momentum_at(step: int, steps: int, base: float, schedule: str = "cosine") -> float:
    """Return the teacher's momentum after optimizer step `step` (from 0) of a run of `steps`: a cosine from `base` to 1
    over the whole run, or constantly `base`."""
    if schedule == "constant":
        return base
    return 1 + 0.5 * (base - 1) * (1 + math.cos(math.pi * min(step, steps) / steps))


def predict(model: MaskedAutoencoderViT, head: nn.Module, imgs, scores, out: MaskedOutput) -> torch.Tensor:
    """Return the prediction of `model` through `head` for the patches that `out` predicts: (N, P, F). The model sees
    the patches with the lowest `scores` (N, L); with `out.scores`, those that the student sees."""
    same = scores is out.scores and not out.all_patches
    teacher = model.forward_pretrain(imgs, out.mask_ratio, scores, head=head, all_patches=not same)
    return teacher.pred if same else out.select_predicted(teacher.pred)


def gradient_cosine(one: torch.Tensor, other: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """Return the cosine between the gradients of two scalars of the same graph (Fig. 3b). The gradients are summed over
    all ranks first. NaN if one of them is zero."""
    flat = []
    for loss, retain in ((one, True), (other, False)):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=retain, materialize_grads=True)
        flat.append(all_reduce_sum(torch.cat([g.flatten().float() for g in gradients])))
    return flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm())


# The method ---------------------------------------------------------------------------------------------------------


class RCMAE(Method):
    """Adds `rc_gamma` times the consistency loss. The teacher is stored as `model_ema` in checkpoints: a complete MAE,
    which the paper fine-tunes."""

    name, switch = "rc_mae", Option("rc_mae", False, "turn this method on")
    title = "RC-MAE (Lee et al., ICLR 2023)"
    summary = (
        "Also match the reconstruction of an EMA teacher that sees the same patches. Choose it for better results in "
        "fewer epochs, for dense tasks, or for averaged weights: the paper evaluates the teacher, "
        "--checkpoint_key model_ema. Costs one more forward pass on the visible patches."
    )
    options = (
        Option("rc_gamma", 1.0, "weight of the consistency loss"),
        Option(
            "rc_momentum",
            0.996,
            "initial momentum of the teacher: the share that it keeps in a step; lower follows the student faster",
        ),
        Option(
            "rc_schedule",
            "cosine",
            "momentum: rising to 1 over the whole run, or constant (as the released code in effect does)",
            choices=("cosine", "constant"),
            rare=True,
        ),
        Option(
            "rc_mask",
            "same",
            "the teacher sees the student's patches, or draws its own; in the paper same is better on detection",
            choices=("same", "different"),
            rare=True,
        ),
        Option(
            "log_grad_cosine",
            0,
            "every F steps, log the cosine between the gradients of the two losses (an extra pass); 0: never",
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
            raise UserError("--log_grad_cosine needs whole gradients, which --fsdp never holds: leave one of them out")
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
        self.heads = nn.ModuleDict()  # method name -> the teacher's copy of its prediction head

    def begin(self, model, methods, steps: int) -> None:
        self.steps = steps
        self._students = {m.name: m.prediction_head() for m in methods if m.prediction_head() is not None}
        self.heads.update({name: Frozen(deepcopy(head)) for name, head in self._students.items()})

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        return {"consistency": self.gamma * self.consistency(imgs, out)}

    def consistency(self, imgs: torch.Tensor, out: MaskedOutput) -> torch.Tensor:
        teacher, self.ratio = self.teacher.network, out.mask_ratio
        scores = out.redraw() if self.own_mask else out.scores
        head = self.heads[out.head].network if out.head else teacher.decoder_pred
        with torch.no_grad():
            prediction = predict(teacher, head, imgs, scores, out)
        return consistency_loss(out, prediction)

    def scheduled_numbers(self, step: int) -> dict[str, float]:
        self.momentum = momentum_at(step, self.steps, self.base, self.schedule)
        return {"rate": 1 - self.momentum}

    def after_update(self, model, imgs, step: int, applied: torch.Tensor) -> None:
        rate = self.scheduled["rate"]
        ema_update(self.teacher.network, model, rate, applied)
        for name, head in self.heads.items():
            ema_update(head.network, self._students[name], rate, applied)

    def graph_obstacle(self) -> str:
        return ""  # the momentum is a scheduled number

    def diagnostics(self, pretrainer: Any, imgs: torch.Tensor, step: int) -> dict[str, torch.Tensor | None]:
        model: MaskedAutoencoderViT = pretrainer.model
        # Numbered over all ranks, so that the masks do not depend on the number of processes.
        indices = torch.arange(len(imgs), device=imgs.device) * get_world_size() + get_rank()
        noise = sample_noise(step, 0, indices, model.patch_embed.num_patches, stream=2)
        losses, out = pretrainer.forward_with_output(imgs, self.ratio, noise)
        target = next(iter(losses.values()))  # the loss of the predictions comes first
        shared = [parameter for parameter in model.parameters() if parameter.requires_grad]
        scale = out.pred.numel()  # sums instead of means: gradients of means underflow in fp16
        with torch.autocast(imgs.device.type, enabled=False):
            cosine = gradient_cosine(target * scale, losses["consistency"] * scale, shared)
        # In the first step, with a learning rate of 0, teacher and student are equal and the second gradient is zero.
        return {"grad_cosine": cosine if torch.isfinite(cosine) else None}

    def metrics(self) -> dict[str, float]:
        return {"teacher_momentum": self.momentum}

    def exported(self) -> dict[str, nn.Module]:
        return {"model_ema": self.teacher.network}
