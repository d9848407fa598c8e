"""The interface of a pretraining method: the hooks that `methods/pretrainer.py` calls."""

import argparse
from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import nn

from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.data.sources import Images

# Names in the log that no term of a loss, metric or diagnostic of a method may have.
RESERVED_NAMES = {"loss", "lr", "gradient", "grad_norm", "skipped_steps", "bad_images", "seconds"}


class Method(nn.Module):
    """A pretraining method: an `nn.Module` that changes the mask or the loss of the masked autoencoder.

    Write a subclass in a new file of `methods/` and add it to `METHODS` in `methods/__init__.py`. It needs

    - `name`, its key in checkpoints, and `title`, the heading of its flags in `--help`;
    - `switch`, the flag that turns it on; `options`, its other flags; `check`, which refuses bad values;
    - `__init__(self, args, model)`, where `args` are the flags and `model` is the autoencoder;
    - the core hooks that it uses. One training step calls them in this order::

          scores        decides which patches are removed
          patch_loss    compares the predictions with a target
          terms         adds further losses
          after_update  runs after the optimizer step

    The defaults of all hooks leave plain MAE unchanged. Submodules, parameters and buffers of the method are trained,
    moved between devices and stored in checkpoints (under `methods`), as those of any module. A teacher must not be
    trained: hold it in `util.compute.ema.Frozen`. docs/adding_a_method.md builds a complete method step by step.

    Shapes: N images, C channels, (H, W) pixels, L patches, P predicted patches, d decoder width (`MaskedOutput`).
    """

    name: str
    title: str  # heading of its flags in --help: name and paper
    summary = ""  # text below the title: what the method does, when to choose it
    switch: Option
    options: tuple[Option, ...] = ()  # refused unless a method that declares them is on
    flag: str  # "--" and the name of `switch`, for messages; set automatically
    # What the method decides: "target" (what is predicted), "mask" (which patches are removed), or None (it only adds
    # terms). At most one enabled method may have each slot.
    slot: str | None = None
    excludes: tuple[str, ...] = ()  # `name`s of methods that it cannot be combined with
    exclusive = False  # whether it cannot be combined with any other method

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "switch" in vars(cls):
            cls.flag = f"--{cls.switch.name}"

    # Flags --------------------------------------------------------------------------------------------------------

    @classmethod
    def enabled(cls, args: argparse.Namespace) -> bool:
        """Return whether the flags turn this method on."""
        return getattr(args, cls.switch.name) != cls.switch.default

    @classmethod
    def schedule_in_epochs(cls, args: argparse.Namespace) -> bool:
        """Return whether the method does something at an epoch that the flags name. `--max_steps` is then refused: the
        number of epochs is not known when the flags are checked."""
        return False

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        """Check the flags when the method is enabled. Raises UserError for a bad value or a flag without effect."""

    # Core hooks ---------------------------------------------------------------------------------------------------

    def scores(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor | None:
        """Return scores (N, L) of the patches; those with the highest scores are removed. Slot "mask".

        The scores are a ranking: exactly `visible_patches(L, mask_ratio)` patches stay in every image. Patches are in
        rows and columns of `model.patch_embed.grid_size`, row by row. `imgs` (N, C, H, W) are normalised. `noise` (N,
        L) is uniform in [0, 1) and a function of (seed, epoch, image). A mask that is drawn from `noise` (not from
        torch's generator) stays the same after a resume and with any number of processes. None makes `noise` itself the
        scores: a random mask.
        """

    def patch_loss(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> torch.Tensor | None:
        """Return the loss of the predictions `out.pred`, a scalar that replaces MAE's loss on pixels. None: MAE's loss.
        Slot "target" or "mask".

        The scalar is logged under `loss_name`.
        """

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        """Return further losses by name: scalars that already include their weights. They are added to the loss of the
        predictions, and logged under these names, which must differ from those of all other terms (and from
        `RESERVED_NAMES`)."""
        return {}

    def after_update(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, step: int, applied: torch.Tensor) -> None:
        """Update what follows the student (a moving average, say), after optimizer step number `step` (from 0). `imgs`
        is the last micro-batch of the step.

        `applied` is a scalar on the device: 0 if the step was skipped (its gradient or, without the loss scaling of
        fp16, an earlier one was not finite), else 1.
        Multiply update rates by it instead of branching on it, which would wait for the device.
        """

    # Further hooks ------------------------------------------------------------------------------------------------
    # Setup

    def split_images(self, images) -> "tuple[object, Images] | None":
        """Return (images to pretrain on, images for previews and kNN), or None for all images and the validation set.
        Called once, before the data loader is made. If the method returns preview images, the validation set is not
        opened."""

    def begin(self, model: MaskedAutoencoderViT, methods: "list[Method]", steps: int) -> None:
        """Called once, after all enabled `methods` were made. `steps` is the number of optimizer steps of the whole
        run."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once, with the optimizer that trains the autoencoder and the methods."""

    def no_weight_decay(self) -> set[str]:
        """Return the names of the method's parameters that get no weight decay."""
        return set()

    def external_networks(self) -> list[nn.Module]:
        """Return networks that the method uses but that are not its submodules, so that no checkpoint contains them.
        `--compile` and `--fsdp` reach them through this list."""
        return []

    # Training

    loss_name = "pixels"  # name of `patch_loss` in the log
    # True if `patch_loss` or `terms` also reads predictions of visible patches, which are not computed otherwise.
    needs_all_patches = False

    def blocks(self) -> tuple[int, ...]:
        """Return the encoder blocks (from 0) whose outputs `patch_loss` and `terms` read from `out.blocks`."""
        return ()

    def prediction_head(self) -> nn.Module | None:
        """Return the method's layer from decoder tokens (N, P, d) to predictions, or None for the pixel layer. Slot
        "target"."""

    @property
    def head_in_use(self) -> bool:
        """Whether the loss now compares the output of `prediction_head`, and not pixels. By default, if there is
        one."""
        return self.prediction_head() is not None

    def first_batch(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> None:
        """Called once per process, before the first forward pass, for example to check a teacher."""

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> str | None:
        """Called once at the start of every epoch (from 0); not again when a run is resumed inside the epoch.

        Return a sentence if something changes now that explains a jump in a curve, such as another target. It is
        printed, and shown in TensorBoard's TEXT tab at this step."""

    # What `scheduled_numbers` returned for the present step.
    scheduled: ClassVar[dict[str, float | torch.Tensor]] = {}

    # CUDA graphs (`--cuda_graph`): the kernels of a step are recorded once, and its Python code does not run again.

    def graph_obstacle(self) -> str:
        """Return why the steps of this method cannot be recorded, "" if they can: a clause for a message.

        They can be if its hooks of the training step wait for no value, and if what Python computes in them is the same
        in every step, except for `scheduled_numbers` and for changes of `graph_branch`. By default that is
        assumed of methods without an `after_update` and a `before_epoch` of their own."""
        for name in ("after_update", "before_epoch"):
            if getattr(type(self), name) is not getattr(Method, name):
                return f"its {name} may do something else in every step"
        return ""

    def graph_branch(self) -> Hashable:
        """Return the values that decide which operations a step consists of. When they change, the step is recorded
        anew."""

    def scheduled_numbers(self, step: int) -> dict[str, float]:
        """Called once for every optimizer step, before `after_update`, also if that is replayed: count here. Return the
        numbers of `after_update` that change from step to step. It finds them in `self.scheduled`: as numbers, or with
        `--cuda_graph` as float64 scalars on the device."""
        return {}

    # Reporting

    diagnostics_every = 0  # call `diagnostics` every so many optimizer steps (0: never)

    def metrics(self) -> dict[str, torch.Tensor | float | None]:
        """Return cheap values to log after every step. The names may change from step to step, but must be the same on
        all ranks; a rank without a value gives None and is left out of the mean."""
        return {}

    def diagnostics(self, pretrainer: nn.Module, imgs: torch.Tensor, step: int) -> dict[str, torch.Tensor | None]:
        """Return costly values to log, every `diagnostics_every` steps. Their time is not counted in the run's speed.
        The rules for names are those of `metrics`."""
        return {}

    def preview_scores(
        self, model: MaskedAutoencoderViT, imgs: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the scores (N, L) of preview images, as `scores` does. TensorBoard's reconstructions,
        `eval/fixed_images_loss` and tools/visualize.py show these masks. Called on the main process only, without a
        graph, in eval mode. Override it if `scores` changes the method: a preview must not change the run. Slot
        "mask"."""
        return self.scores(model, imgs, noise)

    def pictures(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return RGB pictures (3, height, width) in [0, 1] of the preview images for TensorBoard, by name. `shown` are
        the images `imgs` before normalisation, in [0, 1]."""
        return {}

    def distributions(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return values computed from the preview images, by name, whose histograms go to TensorBoard."""
        return {}

    # Checkpoints (beside the module's own `state_dict`)

    @classmethod
    def from_checkpoint(
        cls, path: str, args: argparse.Namespace, model: MaskedAutoencoderViT, state: dict[str, torch.Tensor]
    ) -> "Method":
        """Return the method of a finished run, of which a tool calls only `preview_scores`. `args` are the flags of the
        run that wrote the checkpoint `path`, `model` is its autoencoder, `state` the method's own `state_dict`.
        Override it if the constructor needs more than that. Slot "mask"."""
        method = cls(args, model)
        method.load_state_dict(state)
        return method

    def rank_state(self) -> object:
        """Return state that only this process has (its images, say): CPU tensors in lists and dicts, or None. State
        that is the same on every rank belongs in `state_dict`."""

    def load_rank_state(self, state: object) -> None:
        """Restore `rank_state`. Not called if the checkpoint was written by another number of processes."""

    def exported(self) -> dict[str, nn.Module]:
        """Return complete models of the method (an EMA teacher, say) to store beside `model` in checkpoints, by keys
        that begin with `model_`. Their tensor names are those of `model`."""
        return {}


def zero_term(module: nn.Module) -> torch.Tensor | float:
    """Return 0 with zero gradients for the parameters of `module`. Add it to a loss that does not use them in a step:
    DDP waits for the gradient of every parameter."""
    return sum(0.0 * parameter.sum() for parameter in module.parameters())
