"""Monitoring a pretraining run between epochs: reconstructions of preview images, and the accuracies of kNN and of a
linear probe."""

from argparse import Namespace
from contextlib import nullcontext

import torch

from evaluation.cached_probe import chosen_head, hold_out
from evaluation.features import extract, knn_accuracy
from methods.pretrainer import Pretrainer
from util.compute.precision import widened
from util.data.build import build_loader
from util.data.image_format import image_shape, mean_std
from util.data.shards import Shards
from util.data.sources import Subset
from util.data.transforms import eval_transform
from util.parallel.distributed import barrier, from_main_process, is_main_process
from util.parallel.fsdp import whole
from util.report.pictures import (
    CAPTION,
    NORM_PIX,
    denormalized,
    fixed_noise,
    reconstruct,
    reconstruction_sheet,
    shown_channels,
)
from util.training.run import Run


class Monitor:
    """Reconstruction pictures, kNN and probe accuracies of fixed images, between epochs: the same images under the same
    masks on any number of processes. The masks are those of the method that decides them, or else random and fixed.
    Only the main process reads the preview images and draws the pictures."""

    COUNT = 8  # preview images
    NEIGHBOURS = 20  # of the kNN accuracy; tools/knn.py gives it the same name
    # The defaults of main_linprobe.py --cache_features, whose accuracy this is.
    PROBE = Namespace(
        **{"probe_blrs": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0], "probe_holdout": 0.1, "epochs": 90, "warmup_epochs": 10},
        **{"batch_size": 512, "weight_decay": 0.0, "min_lr": 0.0, "class_weights": "none"},
    )

    def __init__(self, args, run: Run, pretrainer: Pretrainer, images, held_out):
        self.args, self.run, self.pretrainer = args, run, pretrainer
        self.mean, self.std = mean_std(args.dataset, args.in_chans, args.mean, args.std)
        self.channels = shown_channels(args.in_chans, args.show_channels)
        self.transform = eval_transform(image_shape(args.input_size), self.mean, self.std, args.crop_pct)
        self.images, self.held_out = images, held_out
        self._loaders = None
        self.fixed = self._fixed_images() if args.vis_freq and is_main_process() else None

    def _fixed_images(self):
        images = self.held_out or self.images
        if hasattr(images, "load"):
            images = self._evenly_spaced(images, self.COUNT)
        elif not isinstance(images, Shards):
            return None  # a stream of timm's
        # Without workers: starting them takes longer than reading a few images.
        loader = build_loader(images, self.transform, self.args, self.COUNT, train=False, num_workers=0, split=False)
        batch = next(iter(loader.begin(0)))
        imgs = batch.image[batch.bad == 0].to(self.run.device)
        return (imgs, fixed_noise(self.pretrainer.model, len(imgs), 0, self.run.device)) if len(imgs) else None

    @staticmethod
    def _evenly_spaced(images, count: int):
        """Return `count` images, evenly spaced over the set, which is usually sorted by class."""
        if len(images) <= count:
            return images
        return Subset(images, torch.linspace(0, len(images) - 1, count).long().tolist())

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Draw previews and compute metrics if they are due after `epoch`; return the metrics by name."""
        row = {}
        last = self.run.ended
        preview_due = self.args.vis_freq and (last or epoch % self.args.vis_freq == 0)
        knn_due = self.args.knn_freq and (last or (epoch + 1) % self.args.knn_freq == 0)
        probe_due = self.args.probe_freq and (last or (epoch + 1) % self.args.probe_freq == 0)
        with whole(self.pretrainer) if preview_due or knn_due or probe_due else nullcontext():
            if preview_due and self.fixed and self.pretrainer.shows_pixels:
                row["eval/fixed_images_loss"] = self._preview(epoch + 1)
            if knn_due or probe_due:
                row |= self._accuracies(bool(knn_due), bool(probe_due))
            barrier()
        return row

    def _preview(self, epoch: int) -> float:
        """Write pictures and histograms of the fixed images; return their reconstruction loss."""
        (imgs, noise), ratio = self.fixed, self.args.mask_ratio
        scores = self.pretrainer.preview_scores(imgs, noise)
        pictures = reconstruct(self.pretrainer.model, imgs, ratio, scores, self.mean, self.std, self.channels)
        caption = f"{ratio:.0%} removed; {CAPTION}{NORM_PIX * self.pretrainer.model.norm_pix_loss}"
        self.run.board.image("reconstruction", reconstruction_sheet([pictures], caption=caption).tensor(), epoch)
        pixels = denormalized(imgs, self.mean, self.std, self.channels)
        for name, picture in self.pretrainer.pictures(imgs, pixels).items():
            self.run.board.image(name, picture.cpu(), epoch)
        for name, values in self.pretrainer.distributions(imgs).items():
            self.run.board.histogram(name, values, epoch)
        return evaluate_reconstruction(self.pretrainer, imgs, scores, ratio)

    def _accuracies(self, knn: bool, probe: bool) -> dict[str, float]:
        """Return the accuracies of kNN and of a linear probe by name, computed by the main process; nothing if no image
        of a split is readable. Both use the features of one pass: kNN the mean of the patches, the probe [cls]."""
        if self._loaders is None:
            splits = [self._evenly_spaced(images, self.args.knn_images) for images in (self.images, self.held_out)]
            self._loaders = [build_loader(i, self.transform, self.args, self.args.batch_size, False) for i in splits]
        model = self.pretrainer.model.eval()
        device, dtype = self.run.device, self.run.amp_dtype
        pools = ["avg"] * knn + ["cls"] * probe
        splits = [extract(lambda x: pooled(model, x, pools), loader, device, dtype) for loader in self._loaders]
        model.train()
        if not all(len(labels) for _, labels in splits):
            print("note: no accuracy of kNN or probe, because none of the --knn_images of a split could be read")
            return {}
        width, row, k = model.cls_token.shape[-1], {}, self.NEIGHBOURS
        if knn:
            (train, labels), (test, test_labels) = [(x if x is None else x[:, :width], y) for x, y in splits]
            row[f"eval/knn{k}_acc1"] = from_main_process(
                lambda: knn_accuracy(train, labels, test, test_labels, k=k, device=device)
            )
        return row | self._probe([(x if x is None else x[:, -width:], y) for x, y in splits]) if probe else row

    def _probe(self, splits) -> dict[str, float]:
        """Return the accuracy of a linear probe on the features and labels of both splits, the same as that of
        `main_linprobe.py --cache_features`; nothing, after a note, if there are too few images to hold any out."""
        (_, labels), _ = splits
        rest, held = hold_out(labels, self.PROBE.probe_holdout, self.args.seed)
        if len(rest) < 2 or not len(held):
            print(f"note: no accuracy of the probe, because {len(labels)} training images are too few to hold any out")
            return {}
        settings = {"seed": self.args.seed, "nb_classes": len(self.images.classes)}
        settings["lr"] = min(self.PROBE.batch_size, len(rest)) / 256
        flags, devices = Namespace(**vars(self.PROBE), **settings), [self.run.device] * (self.run.device.type == "cuda")
        with torch.random.fork_rng(devices=devices):  # the run's random numbers stay as they are
            *_, scores = chosen_head(*splits, rest, held, flags, self.run.device)
        return {"eval/probe_acc1": scores["acc1"]}


@torch.no_grad()
def pooled(model, imgs: torch.Tensor, pools: list[str]) -> torch.Tensor:
    """Return features (N, len(pools) * D) of images (N, C, H, W): those of `encoder_features` by each of `pools`, "avg"
    or "cls", side by side, from one pass."""
    latent = widened(model.encode(model.embed(imgs))[0])
    values = {"avg": lambda: latent[:, 1:].mean(dim=1), "cls": lambda: latent[:, 0]}
    return torch.cat([values[pool]() for pool in pools], dim=1)


@torch.no_grad()
def evaluate_reconstruction(pretrainer: Pretrainer, imgs, scores, mask_ratio: float) -> float:
    """Return MAE's loss on images (N, C, H, W) whose patches with the highest `scores` (N, L) are removed."""
    pretrainer.eval()
    loss, _, _ = pretrainer.model(imgs, mask_ratio=mask_ratio, noise=scores)
    pretrainer.train()
    return loss.item()
