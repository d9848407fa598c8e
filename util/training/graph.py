"""`--cuda_graph`: a whole training step on the device, replayed as one CUDA graph.

The first steps run eagerly. Then one step is recorded, and replayed beside an eager step from the same state. If both
agree, all further steps are replayed; if not, the run says so and stays eager. What the host decides in a step
(learning rates, momenta) is written into scalars on the device before it.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from util.compute.cuda_graph import Recorder
from util.data.sample_rng import get_rng_state, set_rng_state
from util.training.batches import MicroBatch

WARM_UP = 3  # eager steps before a recording: optimizer states and the libraries' workspaces exist then
# Largest differences between the replayed and the eager step: of loss and gradient norm relative to their size, of
# states relative to their change in this step. Sums with atomics have another order in each run, and Adam's first
# steps turn rounding of a tiny gradient into a change of its sign: such differences stay below these. A stale input or
# number, or a missing update, gives one near 1.
TOLERANCE = {"loss": 1e-3, "gradient norm": 1e-2, "weights": 0.1, "frozen weights": 0.1, "optimizer": 0.1}
Losses = dict[str, Tensor]
States = dict[str, dict[str, Tensor]]


class Work(Protocol):
    """What a training step computes beside backward pass and optimizer, as functions of the step's input tensors."""

    def losses(self, *inputs: Any) -> Losses:
        """Return the weighted losses by name."""
        ...

    def update(self, applied: Tensor, *inputs: Any) -> None:
        """Update what follows the weights after the optimizer's step, with the numbers given to `use`."""

    def schedule(self, step: int) -> dict[str, float]:
        """Return the numbers of `update` that change from step to step. Called once for every step."""
        ...

    def use(self, numbers: Mapping[str, float | Tensor]) -> None:
        """Set the numbers that `update` reads: those of `schedule`, or scalars on the device."""

    def branch(self) -> Hashable:
        """Return what decides which operations `losses` and `update` consist of; a change needs a new recording."""


class GraphedStep:
    """Training steps of `run` on the device: eager at first, then replayed by `recorder`."""

    def __init__(self, run, work: Work, recorder: Recorder):
        self.run, self.work, self.recorder = run, work, recorder
        self.inputs: tuple[Tensor, ...] = ()  # what a recorded step reads, always in the same memory
        self.numbers: dict[str, Tensor] = {}
        self.lr = torch.zeros((), dtype=torch.float64, device=run.device)
        self.recorded: tuple[Losses, Tensor] | None = None  # results that a replay fills
        self.eager_steps, self.branch, self.failed = WARM_UP, None, False

    def step(self, batch: MicroBatch, *inputs: Tensor) -> None:
        """Train on one batch: forward and backward pass, optimizer step and updates. `Run.finish_step` must follow."""
        run = self.run
        numbers = self.work.schedule(run.step)
        run.set_learning_rate(batch.position)
        self._take(inputs, numbers)
        if self.failed or self.eager_steps or self._counts_flops():
            self.eager_steps = max(0, self.eager_steps - 1)
            losses, norm = self.recorder.warm_up(lambda: self._eager(batch, numbers))
        elif self.recorded is None:
            with run.untimed():
                losses, norm = self._record_and_check(batch, numbers)
        else:
            losses, norm = self._replay()
        run.count_batch(losses, batch)
        run.reporter.add_step(run.step, norm)

    def _counts_flops(self) -> bool:
        """Whether this step is the one whose FLOPs `--log_mfu` counts; a replay has no operations to count."""
        return self.run.stepper.flops is not None and not self.run.stepper.flops.counted

    def _take(self, inputs: tuple[Tensor, ...], numbers: dict[str, float]) -> None:
        """Copy what this step gets from the host into the memory that a recorded step reads."""
        branch = tuple((tensor.shape, tensor.dtype) for tensor in inputs), tuple(numbers), self.work.branch()
        if branch != self.branch:
            self.branch, self.recorded, self.eager_steps = branch, None, WARM_UP
            self.inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
            self.numbers = {name: torch.zeros_like(self.lr) for name in numbers}
        for ours, given in zip(self.inputs, inputs):
            ours.copy_(given, non_blocking=True)
        for name, number in numbers.items():
            self.numbers[name].fill_(number)
        self.lr.fill_(self.run.lr)

    # The step on the device ------------------------------------------------------------------------------------------

    def _compute(self, batch: MicroBatch) -> tuple[Losses, Tensor]:
        """Return the losses, their sum first, and the norm of the gradients."""
        stepper = self.run.stepper
        with stepper.autocast(batch):
            losses = self.work.losses(*self.inputs)
        total: Any = sum(losses.values())
        stepper.backward(total, batch)
        norm = stepper.step()
        self.work.update(stepper.scaler.applied, *self.inputs)
        return {"loss": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}, norm

    def _eager(self, batch: MicroBatch, numbers: dict[str, float]) -> tuple[Losses, Tensor]:
        self.work.use(numbers)
        return self._compute(batch)

    def _record(self, batch: MicroBatch) -> None:
        self.work.use(self.numbers)

        def compute():
            with self._learning_rates_on_device():
                return self._compute(batch)

        self.recorded = self.recorder.record(compute)

    @contextmanager
    def _learning_rates_on_device(self) -> Iterator[None]:
        """Let the optimizer read its learning rates from the device, computed from `lr` as `adjust_learning_rate` does.
        Checkpoints never see them: outside they are numbers again."""
        groups = self.run.optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        # The kernel of a GPU reads float32. On a CPU it reads any type, and float64 gives the bits of a number.
        dtype = torch.float32 if self.lr.device.type == "cuda" else torch.float64
        try:
            for group in groups:
                group["lr"], group["capturable"] = (self.lr * group.get("lr_scale", 1.0)).to(dtype), True
            yield
        finally:
            for group, (lr, capturable) in zip(groups, before):
                group["lr"], group["capturable"] = lr, capturable

    def _replay(self) -> tuple[Losses, Tensor]:
        """Replay the recorded step; return copies, because the next replay overwrites its results."""
        assert self.recorded is not None
        self.recorder.replay()
        losses, norm = self.recorded
        return {name: loss.clone() for name, loss in losses.items()}, norm.clone()

    # The check of the first replayed step ----------------------------------------------------------------------------

    def _record_and_check(self, batch: MicroBatch, numbers: dict[str, float]) -> tuple[Losses, Tensor]:
        """Take one step eagerly, and the same step again from a recording. Keep the replayed one if both agree."""
        before, random = self._states(), get_rng_state(self.run.device)
        eager = self._eager(batch, numbers)
        after, random_after = self._states(), get_rng_state(self.run.device)
        self._restore(before, random)
        self._record(batch)
        replayed = self._replay()
        differences = compare(before, (*eager, after), (*replayed, self._states()))
        wrong = [name for name, difference in differences.items() if not difference <= TOLERANCE[name]]
        shown = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
        if not wrong:
            self.run.note_change(f"--cuda_graph: a replayed step equals an eager one (relative differences: {shown})")
            return replayed
        self.failed, self.recorded = True, None
        self._restore(after, random_after)
        self.run.note_change(
            f"--cuda_graph: a replayed step differs from an eager one ({' and '.join(wrong)}; relative differences: "
            f"{shown}), so this run goes on without a graph"
        )
        return eager

    def _tensors(self) -> States:
        """Return all tensors that a step changes, by kind."""
        module, optimizer = self.run.train_module, self.run.optimizer
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        moments = {
            f"{index}.{name}": value
            for index, state in enumerate(optimizer.state.values())
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        return {
            "weights": {name: tensor for name, tensor in named.items() if tensor.requires_grad},
            "frozen weights": {name: tensor for name, tensor in named.items() if not tensor.requires_grad},
            "optimizer": moments,
            "scaler": self.run.stepper.scaler.tensors(),
        }

    def _states(self) -> States:
        """Return copies of these tensors on the host, which do not add to the peak of the GPU's memory."""
        return _mapped(self._tensors(), lambda tensor: tensor.detach().to("cpu", copy=True))

    @torch.no_grad()
    def _restore(self, states: States, random: dict) -> None:
        for kind, tensors in self._tensors().items():
            for name, tensor in tensors.items():
                tensor.copy_(states[kind][name])
        set_rng_state(random, self.run.device)


def _mapped(states: States, function: Callable[[Tensor], Tensor]) -> States:
    return {kind: {name: function(tensor) for name, tensor in of.items()} for kind, of in states.items()}


def compare(before: States, eager: tuple, replayed: tuple) -> dict[str, float]:
    """Return the relative differences of two steps from the state `before`, by the names of `TOLERANCE`. A step is
    (losses, gradient norm, state after it). Steps that are both not finite do not differ."""
    (losses, norm, after), (other_losses, other_norm, other_after) = eager, replayed
    differences = {
        "loss": max(_relative(losses[name].item(), other_losses[name].item()) for name in losses),
        "gradient norm": _relative(norm.item(), other_norm.item()),
    }
    for kind in ("weights", "frozen weights", "optimizer"):
        changes = _distance(after[kind], before[kind])
        difference = _distance(after[kind], other_after[kind])
        differences[kind] = difference / changes if difference else 0.0
    return differences


def _relative(one: float, other: float) -> float:
    equal = one == other or (one != one and other != other)
    return 0.0 if equal else abs(one - other) / max(abs(one), 1e-30)


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the Euclidean norm of the differences of all floating-point tensors; equal ones, NaN included, count 0."""
    total = 0.0
    for name, tensor in one.items():
        if tensor.is_floating_point() and not torch.equal(tensor, other[name]):
            difference = (tensor.double() - other[name].double()).square()
            total += difference.nan_to_num(0.0).sum().item()
    return total**0.5
