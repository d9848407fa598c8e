"""Images decoded once and kept as one uint8 tensor, in memory shared by all processes of a node or on the GPU."""

import io
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from util.data.bands import Bands
from util.data.batch_aug import BatchTransform
from util.data.images import BROKEN_IMAGE, open_image, open_regular, printable, warn_unreadable
from util.data.jpeg_decoder import JpegDecoder
from util.data.loader import EpochBatches, Loader, in_shared_memory, loader_options
from util.data.sample_rng import sample_noise
from util.data.samples import Sample, UnreadableData
from util.data.sources import Images
from util.data.transforms import Converter, ResizeShortSide
from util.errors import UserError
from util.parallel.distributed import gather_objects, get_rank

CACHES = ["none", "ram", "device"]
_REPLACEMENTS = 32  # first stream of sample_noise for the draws that replace unreadable images


class CachedImages(Images):
    """Decoded `images`: `pixels` (N, C, H, W) uint8; `good` (N,) bool marks those that could be read."""

    def __init__(self, images: Images, pixels: torch.Tensor, good: torch.Tensor):
        self.images, self.pixels, self.good = images, pixels, good
        self.targets, self.classes = [images.target(i) for i in range(len(images))], images.classes

    def load(self, index):
        if not self.good[index]:
            raise OSError("unreadable when the cache was made")
        pixels = self.pixels[index].permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def name(self, index):
        return self.images.name(index)


def cache_images(images, args, device: torch.device) -> CachedImages:
    """Decode `images` into the cache that `--data_cache` selects.

    The processes of a node share one memory-mapped file. It is unlinked before decoding begins, so its memory is freed
    with the last process. Each process decodes its share with `--num_workers` threads. Raises UserError for a stream,
    for images of different sizes without `--cache_size`, when there is not enough memory, and when `--nvjpeg` cannot
    decode on the device.
    """
    if not isinstance(images, Images):
        raise UserError(f"--data_cache {args.data_cache} needs images that can be indexed: {args.dataset} is a stream")
    if args.nvjpeg and device.type != "cuda":
        raise UserError(f"--nvjpeg decodes on a GPU, but this run uses the {device.type}: remove the flag")
    node = _node()
    here = [rank for rank, other in enumerate(gather_objects(node)) if other == node]
    share = here.index(get_rank())
    pixels = _shared_memory(images, args, first=share == 0, node=node)
    good, problem, jpegs = torch.ones(len(images), dtype=torch.bool), "", None
    try:
        decoder = _decoder(images, args, device if args.nvjpeg else None)
        decoder.fill(pixels, good, range(share, len(images), len(here)), max(1, args.num_workers))
        jpegs = decoder.jpegs
        if args.data_cache == "device" and device.type == "cuda":
            _check_room(pixels.shape, "device", str(device), torch.cuda.mem_get_info(device)[0])
    except (UserError, OSError, MemoryError) as error:
        problem = str(error) or type(error).__name__
    results = gather_objects((good, problem))
    problems = [text for _, text in results if text]
    if problems:
        raise UserError(problems[0])
    good = torch.stack([results[rank][0] for rank in here]).all(dim=0)
    if args.data_cache == "device":
        pixels = pixels.to(device)
    count, _, height, width = pixels.shape
    size = pixels.numel() / 2**20
    print(f"{count} images of {height}x{width} decoded into {size:.0f} MiB (--data_cache {args.data_cache})")
    if args.nvjpeg:
        _report_jpegs(jpegs, good, here)
    return CachedImages(images, pixels, good)


def _decoder(images: Images, args, device: torch.device | None = None) -> "Decoder":
    return Decoder(images, args.in_chans, args.cache_size, device, getattr(args, "pixel_range", None))


def _report_jpegs(jpegs: JpegDecoder, good: torch.Tensor, here: list[int]) -> None:
    """Print which images `--nvjpeg` left to pillow; all ranks call it. Counts are those of the main process's node."""
    everyone = gather_objects((jpegs.decoded, jpegs.refused, jpegs.example))
    decoded, refused = (sum(everyone[rank][column] for rank in here) for column in (0, 1))
    example = next((everyone[rank][2] for rank in here if everyone[rank][2]), "")
    by_pillow = int(good.sum()) - decoded
    print(
        f"--nvjpeg: {decoded} images decoded on {jpegs.device} by {jpegs.library or 'no library'}, {by_pillow} by "
        f"pillow" + (f"; JPEG files that it refused: {refused}, the first {example}" if refused else "")
    )


def _node() -> tuple[str, str]:
    """Return (host name, boot id): containers on different machines may have the same host name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return os.uname().nodename, boot.read_text() if boot.exists() else ""


def _shared_memory(images: Images, args, first: bool, node) -> torch.Tensor:
    """Return memory for all pixels (N, C, H, W), shared by the processes of a node; the `first` one allocates it."""
    folder, mine = None, None
    try:
        if first:
            try:
                shape = (len(images), *_decoder(images, args).shape)
                parent = _shared_folder()
                status = os.statvfs(parent)
                _check_room(shape, args.data_cache, parent, status.f_bavail * status.f_frsize)
                folder = Path(tempfile.mkdtemp(prefix="images-", dir=parent))
                with open(folder / "pixels", "wb") as file:
                    file.truncate(math.prod(shape))
                mine = node, str(folder / "pixels"), shape, ""
            except (UserError, OSError) as error:
                mine = node, "", (), str(error)
        made = [entry for entry in gather_objects(mine) if entry]
        problems = [text for *_, text in made if text]
        if problems:
            raise UserError(problems[0])
        _, path, shape, _ = next(entry for entry in made if entry[0] == node)
        pixels = torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.uint8).view(shape)
        gather_objects(None)  # wait until all processes have opened the file
        return pixels
    finally:
        if folder:
            shutil.rmtree(folder)


def _shared_folder() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def _check_room(shape, cache: str, location: str, free: int) -> None:
    needed = math.prod(shape)
    if needed > free:
        container = " (a container: docker run --shm-size)" if location == "/dev/shm" else ""
        raise UserError(
            f"--data_cache {cache} needs {needed / 2**30:.1f} GiB for {shape[0]} images of {shape[2]}x{shape[3]}, but "
            f"{location} has {free / 2**30:.1f} GiB free{container}: give a smaller --cache_size, or "
            "--data_cache none"
        )


class Decoder:
    """Decodes images to pixels of one size; JPEG files on `device` if it is given (nvJPEG on a GPU)."""

    def __init__(
        self,
        images: Images,
        in_chans: int,
        size: int | None,
        device: torch.device | None = None,
        pixel_range: list | None = None,
    ):
        self.jpegs = None  # the first image is decoded by pillow, and not counted
        self.images, self.resize = images, ResizeShortSide(size) if size else None
        images.expect_bands(in_chans)
        self.convert = Converter(in_chans, pixel_range)
        self.side = size
        first = next((p for p in map(self._decoded, range(min(len(images), 20))) if p is not None), None)
        if first is None:
            raise UserError(f"the first 20 images are unreadable, among them {printable(images.name(0))}")
        self.shape = first.shape
        self.jpegs = JpegDecoder(in_chans, device) if device is not None else None

    def _decoded(self, index: int) -> np.ndarray | None:
        """Return the pixels (C, H, W) of an image, or None when it cannot be read."""
        pixels = self._decoded_on_device(index) if self.jpegs is not None else None
        if pixels is not None:
            return pixels
        try:
            image = self.convert(self.images.load(index))
        except BROKEN_IMAGE as error:
            warn_unreadable(self.images.name(index), error)
            return None
        if self.resize:
            image = self.resize(image)
            left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
            image = image.crop((left, top, left + self.side, top + self.side))
        pixels = np.asarray(image)
        if isinstance(image, Bands):
            return np.rint(pixels).astype(np.uint8)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _decoded_on_device(self, index: int) -> np.ndarray | None:
        """Return the pixels of a JPEG file, or None for other files, for JPEGs that only pillow reads (CMYK) and for
        those that it refuses."""
        try:
            path = self.images.file(index)
            if not path.lower().endswith((".jpg", ".jpeg")):
                return None
            with open_regular(path) as file:
                content = file.read()
            open_image(io.BytesIO(content))  # raises for an image that is too large
        except BROKEN_IMAGE:
            return None
        assert self.jpegs is not None
        pixels = self.jpegs.decode(content, path)
        if pixels is None:
            return None
        if self.resize:
            if not self.resize.fits(*pixels.shape[1:]):
                return None
            pixels = self.resize.tensor(pixels)
            top, left = ((length - self.side) // 2 for length in pixels.shape[1:])
            pixels = pixels[:, top : top + self.side, left : left + self.side]
        return pixels.cpu().numpy()

    def fill(self, pixels: torch.Tensor, good: torch.Tensor, indices: range, threads: int) -> None:
        """Decode the images at `indices` into `pixels`, and set `good` (N,) to false for those that cannot be read."""
        target = pixels.numpy()

        def decode(chunk: range) -> None:
            for index in chunk:
                decoded = self._decoded(index)
                good[index] = decoded is not None
                if decoded is not None:
                    self._check_size(index, decoded.shape)
                    target[index] = decoded

        chunks = [indices[first : first + 64] for first in range(0, len(indices), 64)]
        with ThreadPoolExecutor(threads) as pool:  # pillow releases the GIL while it decodes
            for _ in pool.map(decode, chunks):
                pass

    def _check_size(self, index: int, shape) -> None:
        if shape != self.shape:
            raise UserError(
                f"--data_cache needs images of one size, but {printable(self.images.name(index))} has "
                f"{shape[1]}x{shape[2]} and the first has {self.shape[1]}x{self.shape[2]}: give --cache_size, which "
                f"resizes the shorter side and crops the longer one"
            )


class CachedBatches(Dataset):
    """Whole batches, indexed by their keys [(epoch, index), ...] and augmented on the device of the pixels. Images are
    pixels in 0..255, on a CPU uint8."""

    def __init__(self, images: CachedImages, transform: BatchTransform):
        self.images, self.transform = images, transform
        self.targets = torch.tensor(images.targets)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keys) -> Sample:
        epoch = keys[0][0]
        indices = torch.tensor([index for _, index in keys])
        chosen, bad = self._readable(epoch, indices)
        device = self.images.pixels.device
        pixels = self.images.pixels[chosen.to(device, non_blocking=True)]
        image = self.transform.augmented(pixels, epoch, indices.to(device, non_blocking=True))
        if device.type == "cpu":  # workers hand them over
            image = image.byte()
        return Sample(image, self.targets[chosen], indices, bad)

    def _readable(self, epoch: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices with those of unreadable images replaced by random draws, and for each the number of
        unreadable images before it."""
        chosen, bad = indices.clone(), torch.zeros_like(indices)
        for attempt in range(20):
            unreadable = ~self.images.good[chosen]
            if not unreadable.any():
                return chosen, bad
            draws = sample_noise(self.transform.seed, epoch, indices, 1, stream=_REPLACEMENTS + attempt)[:, 0]
            chosen = torch.where(unreadable, (draws.double() * len(self.images)).long(), chosen)
            bad += unreadable
        raise UnreadableData("20 images in a row could not be read; most of the data set is unreadable")


class CachedLoader(Loader):
    """Training batches from a cache: made by workers from shared memory, or by this process on the device."""

    def __init__(
        self, images: CachedImages, transform: BatchTransform, batch_size: int, num_workers: int, pin_mem: bool = False
    ):
        self.dataset, self.batch_size = CachedBatches(images, transform), batch_size
        self.stream, self.shuffle, self.start, self.normalise = False, True, 0, transform.normalised
        self.device = images.pixels.device
        self.batches = EpochBatches(len(images), batch_size, transform.seed, shuffle=True)
        on_host = images.pixels.device.type == "cpu"
        common = loader_options(transform.seed, num_workers if on_host else 0, pin_mem and on_host)
        self.loader = DataLoader(
            self.dataset, sampler=self.batches, batch_size=None, collate_fn=in_shared_memory, **common
        )
