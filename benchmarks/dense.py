"""Cost of a training step for segmentation and detection, relative to that of a classifier with the same encoder.

python benchmarks/dense.py                                                     ViT-S at 512 px on the CPU, one image
python benchmarks/dense.py --model vit_base_patch16 --rounds 1 --only upernet "mask r-cnn"
python benchmarks/dense.py --model vit_base_patch16 --input_size 1024 --batch_size 8 --device cuda --rounds 10 --steps 5

Steps are forward pass, backward pass and AdamW on random images with seven objects, in rounds that visit every
variant. The table has seconds per image, ratios of medians to the classifier, quartiles of the ratios per round, and
the ratio of FLOPs of matrix products (of a full batch of regions, `planning/dense.py`). The encoders without a head
show what windows save.
"""

import argparse
import statistics
import sys
import time
from functools import partial

import _measure
import torch

import models_detect
import models_segment
import models_vit
from models_grid import GridViT, build_grid, quarters
from planning.dense import detection_loss, segmentation_loss
from planning.simulate import trace
from util.architectures import ENCODERS, look_up
from util.compute.kernels import attention_is_fused
from util.compute.precision import choose_amp_dtype
from util.errors import UserError, user_errors

OBJECTS = 7  # in an image, the mean of COCO
CLASSES = {"classify": 1000, "segment": 150, "detect": 80}
# Name: (task, arguments of the model, type; None: that of --amp_dtype).
VARIANTS = {
    "classifier": ("classify", {}, None),
    "classifier, fp32": ("classify", {}, "fp32"),
    "upernet": ("segment", {"rel_pos": True}, None),
    "upernet, fp32": ("segment", {"rel_pos": True}, "fp32"),
    "linear head, frozen": ("segment", {"head": "linear"}, None),
    "encoder, windows": ("encode", {"window": 14}, None),
    "encoder, global attention": ("encode", {}, None),
    "mask r-cnn": ("detect", {}, None),
    "mask r-cnn, fp32": ("detect", {}, "fp32"),
    "mask r-cnn, global attention": ("detect", {"window": 0}, None),
    "mask r-cnn, fpn": ("detect", {"pyramid": "fpn", "window": 16}, None),
    "faster r-cnn": ("detect", {"detector": "faster"}, None),
}
FIRST = "classifier"


def build(name: str, options):
    """Build the model of a variant. Layer norm in the heads, because batch norm needs two images."""
    task, settings, _ = VARIANTS[name]
    if task == "classify":
        return models_vit.build_model(options.model, img_size=options.input_size, drop_path_rate=0.1)
    if task == "encode":
        depth = look_up(ENCODERS, options.model)["depth"]
        settings = {**settings, "global_blocks": quarters(depth) if settings else []}
        grid = {"img_size": options.input_size, "drop_path_rate": 0.1, "rel_pos": "decomposed", "with_cls": False}
        return build_grid(GridViT, options.model, feature_blocks=[depth - 1], **grid, **settings)
    module = models_segment if task == "segment" else models_detect
    size = (options.input_size, options.input_size)
    common = {"img_size": size, "head_norm": "layer", "drop_path_rate": 0.1}
    model = module.build_model(options.model, CLASSES[task], **common, **settings)
    if settings.get("head") == "linear":
        model.train_last_blocks(0)
    return model


def objects(options) -> dict:
    """Return random boxes of an eighth to a half of the image's side, their labels and masks."""
    side = options.input_size
    corner = torch.rand(OBJECTS, 2) * side / 2
    boxes = torch.cat([corner, corner + side * (0.125 + 0.375 * torch.rand(OBJECTS, 2))], dim=1)
    masks = torch.zeros(OBJECTS, side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": torch.randint(1, CLASSES["detect"] + 1, (OBJECTS,)), "masks": masks}


def encoder_loss(model, imgs) -> torch.Tensor:
    """Return a loss that needs the gradient of every value of the last map."""
    return model.forward_maps(imgs, model.feature_blocks)[0].float().square().mean()


class Step:
    """Training steps of one variant."""

    def __init__(self, name: str, options):
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.task, _, dtype = VARIANTS[name]
        self.dtype = choose_amp_dtype(dtype or options.amp_dtype, self.device)
        self.model = build(name, options).to(self.device).train()
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = attention_is_fused("auto", self.device, self.dtype)
        shape = (options.batch_size, 3, options.input_size, options.input_size)
        self.imgs = torch.randn(shape, device=self.device)
        self.targets = self.truth(options)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.clock = time.process_time if options.cpu_time else time.perf_counter

    def truth(self, options):
        count, side = options.batch_size, options.input_size
        if self.task == "classify":
            return torch.randint(CLASSES["classify"], (count,), device=self.device)
        if self.task in ("encode", "segment"):
            return torch.randint(CLASSES["segment"], (count, side, side), device=self.device)
        return [{key: x.to(self.device) for key, x in objects(options).items()} for _ in range(count)]

    def loss(self) -> torch.Tensor:
        if self.task == "encode":
            return encoder_loss(self.model, self.imgs)
        if self.task == "classify":
            return torch.nn.functional.cross_entropy(self.model(self.imgs).float(), self.targets)
        return sum(self.model(self.imgs, self.targets).values())

    def step(self) -> float:
        """Return the seconds of one step."""
        self.wait()
        began = self.clock()
        with _measure.autocast(self.device, self.dtype):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.wait()
        return self.clock() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def flops(name: str, options) -> int:
    """Return the FLOPs of a step per image."""
    side, task = options.input_size, VARIANTS[name][0]
    losses = {"segment": segmentation_loss, "detect": detection_loss, "encode": encoder_loss}
    loss = losses.get(task, lambda model, imgs: model(imgs).sum())
    return trace(partial(build, name, options), loss, (3, side, side), 2, 4).flops // 2


def measured(names: list[str], options) -> dict[str, list[float]]:
    """Return by variant the seconds of a step in each round; the first round, which warms up, is left out."""
    times: dict[str, list[float]] = {name: [] for name in names}
    steps = {name: _measure.quietly(lambda name=name: Step(name, options)) for name in names}
    for round_ in range(options.rounds + 1):
        for name, step in steps.items():
            seconds = [step.step() for _ in range(options.steps if round_ else 1)]
            if round_:
                times[name].append(statistics.median(seconds))
    return times


def report(times: dict[str, list[float]], options) -> None:
    dtype = str(choose_amp_dtype(options.amp_dtype, torch.device(options.device))).split(".")[-1]
    print(
        f"{options.model}, {options.input_size} px, batch {options.batch_size}, {dtype} unless named, "
        f"{torch.get_num_threads()} threads{_measure.clocked(options)}, torch {torch.__version__}, "
        f"{options.rounds} rounds\n"
    )
    print("| variant | s per image | time of the classifier's | quartiles | FLOPs of the classifier's |")
    print("|---|---|---|---|---|")
    first = flops(FIRST, options)
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, times[FIRST]))
        median = statistics.median(own)
        print(
            f"| {name} | {median / options.batch_size:.2f} | {median / statistics.median(times[FIRST]):.2f} | "
            f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f} | "
            f"{flops(name, options) / first:.2f} |",
            flush=True,
        )


def main(options) -> None:
    if min(options.rounds, options.steps, options.batch_size, options.input_size) < 1:
        raise UserError("--rounds, --steps, --batch_size and --input_size must be positive")
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [FIRST] + [name for name in options.only or VARIANTS if name != FIRST]
    report(measured(names, options), options)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_small_patch16")
    parser.add_argument("--input_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=1)
    _measure.add_timing_flags(parser, rounds=2, steps=1)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, help="variants to measure besides the classifier")
    return parser


if __name__ == "__main__":
    with user_errors("dense.py"):
        sys.exit(main(get_args_parser().parse_args()))
