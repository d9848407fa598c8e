"""MLO-MAE: a network learns which patches to remove, from the loss of a labelled task on the encoder's features.

Source: Guo, Ban and Xie, "Downstream Task Guided Masking Learning in Masked Autoencoders Using Multi-Level
Optimization". Three nested problems: (I) the autoencoder learns to reconstruct the patches that the masking network T
removes, each weighted by its probability; (II) a head learns the task on the encoder's features; (III) T is updated to
lower the loss of both on held-out training images. Gradients are in `hypergradient.py`, the tasks are in
`labelled_task.py` and `segmentation_task.py`, stages II and III are in `inner_problems.py` and `solved_head.py`; this
file puts them together.
docs/mlo.md has the derivation and lists what is exact.

Shapes: N images, L patches, V visible patches, D encoder width. theta is the autoencoder, h the head, T the masking
network.
"""

import argparse
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.func import functional_call

from methods.base import Method
from methods.mlo import flags
from methods.mlo.hypergradient import (
    Residuals,
    Tensors,
    Tokens,
    directional_derivative_fd,
    directional_derivative_jvp,
    dot,
    exact_arithmetic,
    mask_gradient,
    norm,
    weighted_loss,
)
from methods.mlo.inner_problems import (
    JointHead,
    LinearHead,
    TunedEncoder,
    adamw,
    gradient_step,
    mean_over_ranks,
    precondition,
    set_learning_rate,
    trainable,
)
from methods.mlo.labelled_task import Classification
from methods.mlo.masking_network import MaskingNetwork, load_mask_net
from methods.mlo.segmentation_task import Segmentation
from methods.mlo.solved_head import SolvedHead
from methods.options import Option
from models_encoder import scatter_tokens
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.compute.precision import autocast, choose_amp_dtype
from util.report.pictures import mask_sheet, mask_tiles

# Recorded steps of stage I -------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Images and masks of one micro-batch of stage I, to compute its patch errors again."""

    imgs: torch.Tensor
    ids_keep: torch.Tensor
    ids_removed: torch.Tensor

    def in_image_order(self, values) -> torch.Tensor:
        """Return values (N, L - V) of the removed patches, or (N, L) of all, in the order of the image: (N, L), 0
        elsewhere."""
        length = self.ids_keep.shape[1] + self.ids_removed.shape[1]
        return values if values.shape[1] == length else scatter_tokens(values, self.ids_removed, length)

    @property
    def mask(self) -> torch.Tensor:
        return self.in_image_order(torch.ones_like(self.ids_removed, dtype=torch.float32))


@dataclass
class InnerStep:
    """One optimizer step of stage I: the weights before it, its batches, its learning rate."""

    weights: Tensors  # of the autoencoder, before the step
    batches: list[Batch] = field(default_factory=list)
    lr: float = 0.0
    applied: torch.Tensor | None = None  # 0 if the step was skipped, else 1; None before it is applied


# The method ---------------------------------------------------------------------------------------------------------


class MLOMAE(Method):
    """Removes the patches with the highest probability, weights their loss by it, and updates T in `after_update`."""

    name, slot = "mlo_mae", "mask"
    switch = Option("mlo_mae", False, "turn this method on")
    exclusive = True  # the hypergradient is that of the weighted pixel loss alone
    title = "MLO-MAE (Guo et al.)"
    summary = (
        "Learn from a labelled task which patches to remove: a masking network is trained to lower the loss of a "
        "linear head on held-out training images. Choose it if labels of the task are available during pretraining. "
        "Costs three times MAE's time (1.6 times with --mlo_update_every 5)."
    )
    options = flags.OPTIONS
    # Every so many updates of the masking network, the paths of the hypergradient are computed and logged separately.
    PATHS_EVERY = 20
    TASKS: ClassVar = {"classification": Classification, "segmentation": Segmentation}

    check = staticmethod(flags.check)

    @classmethod
    def schedule_in_epochs(cls, args) -> bool:
        return args.mlo_warmup_epochs > 0

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.args, self.frozen = args, args.mlo_frozen
        self.normalize, self.straight = args.mlo_normalize, args.mlo_ste
        self.unroll, self.every = args.mlo_unroll, args.mlo_update_every
        self.embedding = None
        patches, width = model.patch_embed.num_patches, model.cls_token.shape[-1]
        if args.mlo_mask_net:
            self.net, self.embedding = load_mask_net(args.mlo_mask_net, model)
        else:
            self.net = MaskingNetwork(patches, width, args.mlo_hidden)
        self.net.requires_grad_(False)  # keeps it out of the autoencoder's optimizer and of DDP
        self.optimizer = adamw(self.net.groups(), args.mlo_mask_lr, args.mlo_weight_decay)
        self.step = self.updates = self.warm = 0
        self.ratio = args.mask_ratio
        self.drawn = [0, 0]  # labelled batches used so far in stages II and III
        self.window: list[InnerStep] = []
        self._logged: dict[str, torch.Tensor | float | None] = {}
        self._model = [model]  # in a list, so that it is not a submodule

    def split_images(self, images):
        if self.frozen:
            return None
        task = self.TASKS[self.args.mlo_task](self.args, images, self._model[0])
        self.set_task(task)
        return task.pretrain_images, task.val_images

    def set_task(self, task) -> None:
        """Create the batches, the head and its inner problem for the labelled task."""
        every = self.unroll if self.args.mlo_levels == 3 else 1, self.unroll * self.every
        self.batches = task.batches(every)
        problems = {"linear": LinearHead, "finetune": TunedEncoder, "solve": SolvedHead}
        problem = JointHead if self.args.mlo_levels == 2 else problems[self.args.mlo_stage2]
        self.stage2 = problem(task, self._model[0], self.args)
        self.register_buffer("held_out", torch.tensor(task.held_out))
        self.register_load_state_dict_pre_hook(_same_split)

    def begin(self, model, methods, steps: int) -> None:
        window = self.unroll * self.every
        self.warm = math.ceil(steps / self.args.epochs * self.args.mlo_warmup_epochs / window) * window  # steps
        self.head_updates, self.mask_updates = steps // self.unroll, max(1, (steps - self.warm) // window)

    def attach(self, optimizer) -> None:
        self.inner = optimizer

    def graph_obstacle(self) -> str:
        return "its hooks keep images, draw labelled ones and log what they compute"

    # Stage I ----------------------------------------------------------------------------------------------------------

    def tokens(self, model, imgs) -> torch.Tensor:
        """Return the masking network's input (N, L, D) without a graph: the encoder is not trained through it."""
        return (self.embedding.network if self.embedding else model.embed)(imgs).detach()

    @torch.no_grad()
    def logits(self, model, imgs) -> torch.Tensor:
        """Return the logits (N, L) of being removed, in float32 also under autocast: rounding to half precision would
        make ties, whose order is arbitrary."""
        with torch.autocast(imgs.device.type, enabled=False):
            return self.net(self.tokens(model, imgs))

    def scores(self, model, imgs, noise):
        if self._recording() and (not self.window or self.window[-1].applied is not None):
            weights = {f"model.{name}": p.detach().clone() for name, p in trainable(model).items()}
            self.window.append(InnerStep(weights))
        return self.logits(model, imgs)

    def preview_scores(self, model, imgs, noise):
        return self.logits(model, imgs)  # `scores` also records the step

    def _recording(self) -> bool:
        """Whether the hypergradient of the next update of T goes through the coming step."""
        if self.frozen or self.step < self.warm or (self.step // self.unroll + 1) % self.every:
            return False
        return self.args.mlo_unroll_grad == "sum" or (self.step + 1) % self.unroll == 0

    def patch_loss(self, model, imgs, out: MaskedOutput):
        weights, self.ratio = out.scores.sigmoid(), out.mask_ratio
        if self._recording():
            self.window[-1].batches.append(Batch(imgs, out.ids_keep, out.ids_removed))
        # The weights alone can lower the loss, without a better reconstruction; logged to detect that.
        self._logged["mask_weight"] = (weights * out.mask).sum() / out.mask.sum()
        return weighted_loss(out.scatter_predicted(model.patch_errors(out)), weights, out.mask, self.normalize)

    def terms(self, model, imgs, out):
        if self.frozen or self.args.mlo_levels == 3:
            return {}
        return {"guide": self.stage2.term(model, self._draw(0))}

    # Stages II and III ------------------------------------------------------------------------------------------------

    def _draw(self, stage: int):
        """Return the next labelled batch of stage II (0) or III (1), on the device."""
        device = next(self.net.parameters()).device
        batch = self.batches[stage].on(device).batch(self.drawn[stage])
        self.drawn[stage] += 1
        # None without bad images: the mean is over batches that have some, and every rank logs the same names.
        self._logged["bad_labelled_images"] = float(batch.bad.sum()) or self._logged.get("bad_labelled_images")
        return batch._replace(target=batch.target.to(device, non_blocking=True))

    def after_update(self, model, imgs, step: int, applied: torch.Tensor) -> None:
        if self.window and self.window[-1].applied is None:
            self.window[-1].lr, self.window[-1].applied = self.inner.param_groups[0]["lr"], applied.clone()
        if self.step != step:  # resumed with other batch flags: the recorded steps are others
            self.window.clear()
        self.step = step + 1
        if self.frozen or self.step % self.unroll:
            return
        dtype = choose_amp_dtype(self.args.amp_dtype, imgs.device)
        # These gradients are not scaled and would underflow in fp16. One autocast context per call: torch 2.11 caches
        # casts that were made without a graph, and would reuse them in calls that need one.
        dtype = torch.float32 if dtype is torch.float16 else dtype
        if self.stage2.optimizer:
            set_learning_rate(
                self.stage2.optimizer, self.args.mlo_head_lr, self.step // self.unroll - 1, self.head_updates
            )
            with autocast(imgs.device, dtype):
                self._logged["stage2_loss"] = self.stage2.update(model, self._draw(0))
        if (self.step // self.unroll) % self.every or not self.window:
            return
        held_out, *others = (self._draw(stage) for stage in self.stage2.draws)
        with autocast(imgs.device, dtype):
            logged, paths = self.stage2.paths(model, held_out, *others)
        self._logged |= logged
        self._update_mask_net(model, held_out.image, paths)
        self.window.clear()

    def _update_mask_net(self, model, imgs, paths: dict[str, Tensors]) -> None:
        """Take a step of the masking network. `paths` are the gradients of L3 with respect to theta, by path."""
        if not (len(paths) > 1 and self.updates % self.PATHS_EVERY == 0):  # one hypergradient of the sum
            paths = {"all": {name: sum(path[name] for path in paths.values()) for name in paths["direct"]}}
        gradients = {path: self.hypergradient(model, direction) for path, direction in paths.items()}
        total = {name: sum(g[name] for g in gradients.values()) for name in next(iter(gradients.values()))}
        before = self.logits(model, imgs)
        set_learning_rate(self.optimizer, self.args.mlo_mask_lr, self.updates, self.mask_updates)
        applied = torch.stack([step.applied for step in self.window]).amax()
        skipped = gradient_step(self.optimizer, dict(self.net.named_parameters()), total, applied)
        self.updates += 1
        self._logged |= {"hypergrad_norm": norm(total), "mask_skipped": skipped}
        self._logged |= _mask_metrics(model, before, self.logits(model, imgs), self.ratio)
        if len(gradients) > 1:
            direct, head = gradients["direct"], gradients["head"]
            self._logged |= {f"hypergrad_{path}": norm(g) for path, g in gradients.items()}
            self._logged["hypergrad_cosine"] = dot(direct, head) / (norm(direct) * norm(head)).clamp_min(1e-30)

    def hypergradient(self, model, direction: Tensors) -> Tensors:
        """Return dL3/dT through the recorded steps, given dL3/dtheta' = `direction`; the mean over ranks."""
        scaled = precondition(self.inner, trainable(model), direction, self.args.mlo_precondition)
        scaled = {f"model.{name}": vector for name, vector in scaled.items()}
        total = {name: torch.zeros_like(p) for name, p in self.net.named_parameters()}
        # Adam's first moment also applies a gradient in later steps; gradient descent does not.
        adam = self.args.mlo_precondition == "adam"
        beta = self.inner.param_groups[0]["betas"][0] if adam else 0.0
        # Sum of learning rates with which this and later steps apply the step's gradient.
        reach = torch.zeros_like(next(iter(total.values()))[:1, 0])
        for step in reversed(self.window):
            assert step.applied is not None  # set by the `after_update` of its step
            applied = step.applied.to(reach.dtype)
            reach = torch.where(applied > 0, step.lr + beta * reach, reach)
            for batch in step.batches:  # empty after a resume with another number of processes
                factor = -applied * reach / len(step.batches)
                for sum_, gradient in zip(total.values(), self._mask_gradient(model, step.weights, batch, scaled)):
                    sum_ += factor * gradient
        return mean_over_ranks(total)

    def _mask_gradient(self, model, weights: Tensors, batch: Batch, direction: Tensors):
        """Return d/dT of the weighted loss with its patch errors replaced by their derivatives along `direction`."""
        inputs = batch.imgs, batch.ids_keep, batch.ids_removed
        residuals = Residuals(model, all_patches=self.straight)  # of the removed patches, or with --mlo_ste of all
        with exact_arithmetic(model):
            if self.args.mlo_hypergrad == "fd":
                rates = directional_derivative_fd(residuals, weights, direction, inputs, self.args.mlo_fd_alpha)
            else:
                rates = directional_derivative_jvp(residuals, weights, direction, inputs)
            rates = batch.in_image_order(rates)
            if self.embedding:
                tokens = self.embedding.network(batch.imgs)
            else:
                tokens = functional_call(Tokens(model), weights, (batch.imgs,))
            return mask_gradient(
                self.net, tokens, lambda p: weighted_loss(rates, p, batch.mask, self.normalize, self.straight)
            )

    # Logging and checkpoints ------------------------------------------------------------------------------------------

    def metrics(self):
        logged, self._logged = self._logged, {}
        return logged

    @torch.no_grad()
    def pictures(self, model, imgs, shown):
        tiles = mask_tiles(shown, self.logits(model, imgs), self.ratio, model)
        return {"masks": mask_sheet([tiles], caption=f"{self.ratio:.0%} of the patches removed, grey").tensor()}

    @torch.no_grad()
    def distributions(self, model, imgs):
        return {"mask_probability": self.logits(model, imgs).sigmoid().flatten()}

    def _optimizers(self) -> list:
        inner = None if self.frozen else self.stage2.optimizer
        return [optimizer for optimizer in (self.optimizer, inner) if optimizer]

    @classmethod
    def from_checkpoint(cls, path, args, model, state):
        """Read the masking network and its patch embedding from the file; the labelled task is not needed."""
        return cls(argparse.Namespace(**{**vars(args), "mlo_mask_net": path, "mlo_frozen": True}), model)

    def get_extra_state(self):
        return {
            "step": self.step,
            "rhythm": [self.unroll, self.every],
            "updates": self.updates,
            "drawn": list(self.drawn),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers()],
            "window": [{"weights": s.weights, "lr": s.lr, "applied": s.applied} for s in self.window],
        }

    def set_extra_state(self, state):
        self.step, self.updates, self.drawn = state["step"], state["updates"], list(state["drawn"])
        rhythm, device = [self.unroll, self.every], self.net.layers[0].weight.device
        for optimizer, saved in zip(self._optimizers(), state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.window = [
            InnerStep({n: w.to(device) for n, w in s["weights"].items()}, [], s["lr"], s["applied"].to(device))
            for s in (state["window"] if state.get("rhythm", rhythm) == rhythm else [])
        ]

    def rank_state(self):
        if not self.window:
            return None
        return [[{name: value.cpu() for name, value in vars(b).items()} for b in step.batches] for step in self.window]

    def load_rank_state(self, state):
        device = next(self.net.parameters()).device
        for step, batches in zip(self.window, state):
            step.batches = [Batch(**{name: value.to(device) for name, value in _removed(b).items()}) for b in batches]


# Checkpoints and metrics --------------------------------------------------------------------------------------------


def _removed(batch: Tensors) -> Tensors:
    """Return a batch of a checkpoint with `ids_removed`; checkpoints before revision 382ca59 have `ids_restore`
    instead."""
    if "ids_removed" in batch:
        return batch
    order = batch["ids_restore"].argsort(dim=1)  # visible patches first
    kept = batch["ids_keep"]
    return {"imgs": batch["imgs"], "ids_keep": kept, "ids_removed": order[:, kept.shape[1] :]}


def _same_split(module, state, prefix, *_) -> None:
    """Raise ValueError if a resumed run would train on images that were held out before."""
    before = state.get(f"{prefix}held_out")
    if before is not None and not torch.equal(before.cpu(), module.held_out.cpu()):
        raise ValueError("the labelled images, --mlo_val_fraction or --seed differ, so others would be held out")


def _mask_metrics(model, before, after, ratio: float) -> Tensors:
    """Return, from logits (N, L) before and after a step of T, the entropy of the probabilities and the share of
    removed patches that changed."""
    old, new = (model.choose_visible(logits, ratio)[1] for logits in (before, after))
    changed = ((old - new).abs().sum() / 2) / old.sum()  # for every patch newly removed, another is newly visible
    return {"mask_entropy": F.binary_cross_entropy_with_logits(after, after.sigmoid()), "mask_changed": changed}
