"""MLO-MAE: a network that learns which patches to remove, from how well the encoder then serves a labelled task.

Source: Guo, Ban and Xie, "Downstream Task Guided Masking Learning in Masked Autoencoders Using Multi-Level
Optimization". Three nested problems: (I) the autoencoder learns to reconstruct what the masking network T removes, each
patch weighted by its probability; (II) a head learns the task on the encoder's features; (III) T moves so that the loss
of both on held-out training images falls. The mathematics is in `hypergrad`, the task in `guide`, stages II and III
in `mlo_stages`; here they are put together. docs/mlo.md has the derivation and what is exact.

Shapes: N images, L patches, D encoder width. theta is the autoencoder, h the head, T the masking network.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.func import functional_call

from methods.base import Method
from methods.mlo import flags
from methods.mlo.hypergradient import (
    Residuals,
    Tensors,
    Tokens,
    dot,
    exact_arithmetic,
    mask_gradient,
    norm,
    rates_fd,
    rates_jvp,
    weighted_loss,
)
from methods.mlo.inner_problems import (
    JointHead,
    LinearHead,
    TunedEncoder,
    adamw,
    averaged,
    descend,
    set_rate,
    step_along,
    trained,
)
from methods.mlo.labelled_task import Classification
from methods.mlo.masking_network import MaskingNetwork, load_mask_net
from methods.mlo.solved_head import SolvedHead
from methods.options import Option
from models_encoder import scatter_tokens
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.compute.precision import autocast, choose_amp_dtype
from util.report.pictures import mask_picture

# What is remembered of stage I ---------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one micro-batch of stage I saw, so that its errors can be computed again."""

    imgs: torch.Tensor
    ids_keep: torch.Tensor
    ids_removed: torch.Tensor

    def of_image(self, values) -> torch.Tensor:
        """Of the removed patches (N, L - V) or of all (N, L) -> (N, L), 0 elsewhere."""
        length = self.ids_keep.shape[1] + self.ids_removed.shape[1]
        return values if values.shape[1] == length else scatter_tokens(values, self.ids_removed, length)

    @property
    def mask(self) -> torch.Tensor:
        return self.of_image(torch.ones_like(self.ids_removed, dtype=torch.float32))


@dataclass
class InnerStep:
    """One step of stage I as it was taken: where it began, on what, and how far it went."""

    weights: Tensors  # of the autoencoder before it
    batches: list[Batch] = field(default_factory=list)
    lr: float = 0.0
    applied: torch.Tensor | None = None  # 0 where the step was skipped


# The method ---------------------------------------------------------------------------------------------------------


class MLOMAE(Method):
    """Removes the patches of highest probability, weights the loss by it, and moves T in `after_update`."""

    name, slot = "mlo_mae", "mask"
    switch = Option("mlo_mae", False, "turn this method on")
    exclusive = True  # the hypergradient is that of the weighted pixel loss alone
    title = "MLO-MAE (Guo et al.)"
    summary = (
        "Learn what to remove from a labelled task: a masking network moves so that the loss of a linear head on "
        "held-out training images falls. Choose it when the labels of the task are at hand during pretraining; costs "
        "three times MAE's time (1.6 times with --mlo_update_every 5)."
    )
    options = flags.OPTIONS
    # Masking-network updates between two in which the two paths of the hypergradient are computed separately.
    PATHS_EVERY = 20

    check = staticmethod(flags.check)

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
        self.net.requires_grad_(False)  # neither the autoencoder's optimizer nor DDP is to see it
        self.optimizer = adamw(self.net.groups(), args.mlo_mask_lr, args.mlo_weight_decay)
        self.step = self.updates = self.warm = 0
        self.ratio = args.mask_ratio
        self.drawn = [0, 0]  # batches of stages II and III
        self.window: list[InnerStep] = []
        self._logged: dict[str, torch.Tensor | float | None] = {}
        self._model = [model]  # in a list: not a part of this module

    def split_images(self, images):
        if self.frozen:
            return None
        guide = Classification(self.args, images)
        self.use(guide)
        return guide.pretrain_images, guide.val_images

    def use(self, guide) -> None:
        """Make stages II and III for the task."""
        every = self.unroll if self.args.mlo_levels == 3 else 1, self.unroll * self.every
        self.batches = guide.batches(every)
        kinds = {"linear": LinearHead, "finetune": TunedEncoder, "solve": SolvedHead}
        kind = JointHead if self.args.mlo_levels == 2 else kinds[self.args.mlo_stage2]
        self.stage2 = kind(guide, self._model[0], self.args)
        self.register_buffer("held_out", torch.tensor(guide.held_out))
        self.register_load_state_dict_pre_hook(_same_split)

    def begin(self, model, methods, steps: int) -> None:
        window = self.unroll * self.every
        self.warm = math.ceil(steps / self.args.epochs * self.args.mlo_warmup_epochs / window) * window  # steps
        self.head_updates, self.mask_updates = steps // self.unroll, max(1, (steps - self.warm) // window)

    def attach(self, optimizer) -> None:
        self.inner = optimizer

    # Stage I ----------------------------------------------------------------------------------------------------------

    def tokens(self, model, imgs) -> torch.Tensor:
        """What the masking network sees, without a graph: the encoder must not learn to please it."""
        return (self.embedding.network if self.embedding else model.embed)(imgs).detach()

    @torch.no_grad()
    def logits(self, model, imgs) -> torch.Tensor:
        """(N, L) in float32 whatever autocast is on: half precision would make ties, and ties an order."""
        with torch.autocast(imgs.device.type, enabled=False):
            return self.net(self.tokens(model, imgs))

    def scores(self, model, imgs, noise):
        if self._recording() and (not self.window or self.window[-1].applied is not None):
            weights = {f"model.{name}": p.detach().clone() for name, p in trained(model).items()}
            self.window.append(InnerStep(weights))
        return self.logits(model, imgs)

    def _recording(self) -> bool:
        """Whether the coming step belongs to those that the next move of the masking network looks back on."""
        if self.frozen or self.step < self.warm or (self.step // self.unroll + 1) % self.every:
            return False
        return self.args.mlo_unroll_grad == "sum" or (self.step + 1) % self.unroll == 0

    def patch_loss(self, model, imgs, out: MaskedOutput):
        weights, self.ratio = out.scores.sigmoid(), out.mask_ratio
        if self._recording():
            self.window[-1].batches.append(Batch(imgs, out.ids_keep, out.ids_removed))
        # Weights can shrink the loss without anybody reconstructing better: this shows it.
        self._logged["mask_weight"] = (weights * out.mask).sum() / out.mask.sum()
        return weighted_loss(out.scatter_predicted(model.patch_errors(out)), weights, out.mask, self.normalize)

    def terms(self, model, imgs, out):
        if self.frozen or self.args.mlo_levels == 3:
            return {}
        return {"guide": self.stage2.term(model, self._draw(0))}

    # Stages II and III ------------------------------------------------------------------------------------------------

    def _draw(self, stage: int):
        """The next labelled batch of stage II (0) or III (1), on the device."""
        batch = self.batches[stage].batch(self.drawn[stage])
        self.drawn[stage] += 1
        # None where all are good: the mean is over batches with bad images, and every rank logs the name.
        self._logged["bad_labelled_images"] = float(batch.bad.sum()) or self._logged.get("bad_labelled_images")
        device = self.net.layers[0].weight.device
        return batch._replace(
            image=batch.image.to(device, non_blocking=True), target=batch.target.to(device, non_blocking=True)
        )

    def after_update(self, model, imgs, step: int, applied: torch.Tensor) -> None:
        if self.window and self.window[-1].applied is None:
            self.window[-1].lr, self.window[-1].applied = self.inner.param_groups[0]["lr"], applied.clone()
        if self.step != step:  # resumed with other batch flags: what was recorded belongs to other steps
            self.window.clear()
        self.step = step + 1
        if self.frozen or self.step % self.unroll:
            return
        dtype = choose_amp_dtype(self.args.amp_dtype, imgs.device)
        # These gradients are not scaled, so half precision (not bfloat16) would lose them. One context a call: torch
        # 2.11 hands casts that were made without a graph on to calls that want one.
        dtype = torch.float32 if dtype is torch.float16 else dtype
        if self.stage2.optimizer:
            set_rate(self.stage2.optimizer, self.args.mlo_head_lr, self.step // self.unroll - 1, self.head_updates)
            with autocast(imgs.device, dtype):
                self._logged["stage2_loss"] = self.stage2.update(model, self._draw(0))
        if (self.step // self.unroll) % self.every or not self.window:
            return
        held_out, *others = (self._draw(stage) for stage in self.stage2.draws)
        with autocast(imgs.device, dtype):
            logged, paths = self.stage2.paths(model, held_out, *others)
        self._logged |= logged
        self._move(model, held_out.image, paths)
        self.window.clear()

    def _move(self, model, imgs, paths: dict[str, Tensors]) -> None:
        """A step of the masking network."""
        if not (len(paths) > 1 and self.updates % self.PATHS_EVERY == 0):  # the sum is one direction
            paths = {"all": {name: sum(path[name] for path in paths.values()) for name in paths["direct"]}}
        gradients = {path: self.hypergradient(model, direction) for path, direction in paths.items()}
        total = {name: sum(g[name] for g in gradients.values()) for name in next(iter(gradients.values()))}
        before = self.logits(model, imgs)
        set_rate(self.optimizer, self.args.mlo_mask_lr, self.updates, self.mask_updates)
        taken = torch.stack([step.applied for step in self.window]).amax()
        skipped = descend(self.optimizer, dict(self.net.named_parameters()), total, taken)
        self.updates += 1
        self._logged |= {"hypergrad_norm": norm(total), "mask_skipped": skipped}
        self._logged |= _about_masks(model, before, self.logits(model, imgs), self.ratio)
        if len(gradients) > 1:
            direct, head = gradients["direct"], gradients["head"]
            self._logged |= {f"hypergrad_{path}": norm(g) for path, g in gradients.items()}
            self._logged["hypergrad_cosine"] = dot(direct, head) / (norm(direct) * norm(head)).clamp_min(1e-30)

    def hypergradient(self, model, direction: Tensors) -> Tensors:
        """dL3/dT through the steps of the window, for dL3/dtheta' = `direction`; the mean over ranks."""
        scaled = step_along(self.inner, trained(model), direction, self.args.mlo_precondition)
        scaled = {f"model.{name}": vector for name, vector in scaled.items()}
        total = {name: torch.zeros_like(p) for name, p in self.net.named_parameters()}
        # Adam carries a gradient on into the steps after its own; gradient descent does not.
        adam = self.args.mlo_precondition == "adam"
        beta = self.inner.param_groups[0]["betas"][0] if adam else 0.0
        reach = torch.zeros_like(
            next(iter(total.values()))[:1, 0]
        )  # how far the coming steps carry this one's gradient
        for step in reversed(self.window):
            applied = step.applied.to(reach.dtype)
            reach = torch.where(applied > 0, step.lr + beta * reach, reach)
            for batch in step.batches:  # none after a resume on another number of processes
                factor = -applied * reach / len(step.batches)
                for sum_, gradient in zip(total.values(), self._mask_gradient(model, step.weights, batch, scaled)):
                    sum_ += factor * gradient
        return averaged(total)

    def _mask_gradient(self, model, weights: Tensors, batch: Batch, direction: Tensors):
        """d/dT of the loss whose patch errors are replaced by their rates of change along `direction`."""
        inputs = batch.imgs, batch.ids_keep, batch.ids_removed
        residuals = Residuals(model, all_patches=self.straight)  # otherwise those of the removed patches count alone
        with exact_arithmetic(model):
            if self.args.mlo_hypergrad == "fd":
                rates = rates_fd(residuals, weights, direction, inputs, self.args.mlo_fd_alpha)
            else:
                rates = rates_jvp(residuals, weights, direction, inputs)
            rates = batch.of_image(rates)
            if self.embedding:
                tokens = self.embedding.network(batch.imgs)
            else:
                tokens = functional_call(Tokens(model), weights, (batch.imgs,))
            return mask_gradient(
                self.net, tokens, lambda p: weighted_loss(rates, p, batch.mask, self.normalize, self.straight)
            )

    # Looking and saving -----------------------------------------------------------------------------------------------

    def metrics(self):
        logged, self._logged = self._logged, {}
        return logged

    @torch.no_grad()
    def pictures(self, model, imgs, shown):
        return {"masks": mask_picture(shown, self.logits(model, imgs), self.ratio, model)}

    @torch.no_grad()
    def distributions(self, model, imgs):
        return {"mask_probability": self.logits(model, imgs).sigmoid().flatten()}

    def _optimizers(self) -> list:
        inner = None if self.frozen else self.stage2.optimizer
        return [optimizer for optimizer in (self.optimizer, inner) if optimizer]

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
        device = self.net.layers[0].weight.device
        for step, batches in zip(self.window, state):
            step.batches = [Batch(**{name: value.to(device) for name, value in _removed(b).items()}) for b in batches]


# Flags and files ----------------------------------------------------------------------------------------------------


def _removed(batch: Tensors) -> Tensors:
    """A batch of a checkpoint. Once (until 382ca59) it said where every patch had gone, not which were removed."""
    if "ids_removed" in batch:
        return batch
    order = batch["ids_restore"].argsort(dim=1)  # visible patches first
    kept = batch["ids_keep"]
    return {"imgs": batch["imgs"], "ids_keep": kept, "ids_removed": order[:, kept.shape[1] :]}


def _same_split(module, state, prefix, *_) -> None:
    """A resumed run must not see, in stage I or II, what was held out before."""
    before = state.get(f"{prefix}held_out")
    if before is not None and not torch.equal(before.cpu(), module.held_out.cpu()):
        raise ValueError("the labelled images, --mlo_val_fraction or --seed differ, so others would be held out")


def _about_masks(model, before, after, ratio: float) -> Tensors:
    """Of logits (N, L) before and after a step: the entropy of the probabilities, and how much of the masks changed."""
    old, new = (model.choose_visible(logits, ratio)[1] for logits in (before, after))
    changed = ((old - new).abs().sum() / 2) / old.sum()  # a patch that comes in is a patch that goes out
    return {"mask_entropy": F.binary_cross_entropy_with_logits(after, after.sigmoid()), "mask_changed": changed}
