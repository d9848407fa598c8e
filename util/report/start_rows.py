"""Rows of the block at the start of a run: data, model, device, output folder."""

import os
from collections.abc import Callable, Sequence

import torch

from util.data.image_format import image_shape, mean_std, mean_std_source
from util.parallel.distributed import get_world_size
from util.report.blocks import Row, counted, row
from util.report.ledger import device_name
from util.report.mfu import forward_flops


def data_rows(args, train, held_out, classes: Sequence[str] | None = None) -> list[Row]:
    """Return the rows of the images: how many there are for training and evaluation (either can be None), their
    `classes`, and the numbers that normalise their pixels."""
    counts = [
        counted(len(images), f"{use} image")
        for images, use in ((train, "training"), (held_out, "evaluation"))
        if images is not None and hasattr(images, "__len__")
    ]
    # A label can also be a quantity or one of several.
    noun = {"multilabel": "label", "regression": "target"}.get(getattr(args, "targets", "single"), "class")
    kinds = None if not classes else (f"{len(classes)} classes" if noun == "class" else counted(len(classes), noun))
    path = f"in {args.data_path}" if args.data_path else None
    mean, std = mean_std(args.dataset, args.in_chans, args.mean, args.std)
    source = mean_std_source(args.dataset, args.mean)
    return [
        row("data", " ".join(filter(None, [args.dataset, path])), *counts, kinds),
        row("pixels", f"mean {_channels(mean)}", f"standard deviation {_channels(std)} ({source})"),
    ]


def _channels(values: Sequence[float]) -> str:
    """Return one number per channel as text; a single one if all are equal."""
    return " ".join(f"{value:.3g}" for value in (values[:1] if len(set(values)) == 1 else values))


def model_row(args, model, *more: str | None, forward: Callable | None = None, part: str = "") -> Row:
    """Return the row of the network `model`, with the number of its patches and `more` values. `forward(model, imgs)`
    is the forward pass, or that of a `part`, whose FLOPs are shown; not those of a sharded model."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    height, width = image_shape(args.input_size)
    rows, columns = model.patch_embed.patch_size
    return row(
        "model",
        args.model,
        f"{total / 1e6:.2f} M parameters" + (f" ({trained / 1e6:.2f} M trained)" if trained < 0.98 * total else ""),
        f"{height} x {width} px",
        f"{model.patch_embed.num_patches} patches of {rows} x {columns}",
        *more,
        _flops(args, model, forward, part),
    )


def _flops(args, model, forward: Callable | None, part: str) -> str | None:
    if getattr(args, "fsdp", False):
        return None
    flops = forward_flops(model, forward or type(model).__call__, (args.in_chans, *image_shape(args.input_size)))
    unit, size = next((unit, size) for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1)) if flops >= size)
    return f"{flops / size:.3g} {unit}FLOPs a forward pass{part and f' of {part}'}"


def device_row(device: torch.device, dtype: torch.dtype) -> Row:
    """Return the row of the device, the type of matrix products and the number of processes."""
    threads = counted(torch.get_num_threads(), "thread") if device.type == "cpu" else None
    processes = "1 process" if get_world_size() == 1 else f"{get_world_size()} processes"
    return row("device", f"{device} ({device_name(device)})", str(dtype).split(".")[-1], processes, threads)


def output_row(args) -> Row:
    """Return the row of the output folder and that of the event files, if it is another one."""
    if not args.output_dir:
        return row("output", "nothing is written (--output_dir is empty)")
    elsewhere = args.log_dir and os.path.abspath(args.log_dir) != os.path.abspath(args.output_dir)
    return row("output", str(args.output_dir), f"TensorBoard events in {args.log_dir}" if elsewhere else None)
