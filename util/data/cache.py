"""Images decoded once and kept as one uint8 tensor: in memory that all processes of a node share, or on the GPU."""

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
from torchvision.io import ImageReadMode, decode_jpeg

from util.data.batch_aug import BatchTransform
from util.data.images import BROKEN_IMAGE, open_image, open_regular, say_unreadable, shown
from util.data.loader import EpochBatches, Loader, loader_options
from util.data.sample_rng import sample_noise
from util.data.samples import Sample, UnreadableData
from util.data.sources import Images
from util.data.transforms import ResizeShortSide, to_channels
from util.errors import UserError
from util.parallel.distributed import gather_objects, get_rank

CACHES = ["none", "ram", "device"]
_REPLACEMENTS = 32  # of sample_noise's streams: draws in place of unreadable images


class CachedImages(Images):
    """`images`, decoded: `pixels` (N, C, H, W) uint8, and which ones are `good`."""

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
    """`images` as `--data_cache` asks for. The processes of a node share one file in memory, which has no name any more
    when decoding begins, so that it goes with the last of them; each decodes its share with `--num_workers` threads.
    UserError for a stream, for images of several sizes without `--cache_size`, and where the memory is not there."""
    if not isinstance(images, Images):
        raise UserError(f"--data_cache {args.data_cache} needs images that can be indexed: {args.dataset} is a stream")
    if args.nvjpeg and device.type != "cuda":
        raise UserError(f"--nvjpeg decodes on a GPU, and this run is on the {device.type}: leave it out")
    node = _node()
    here = [rank for rank, other in enumerate(gather_objects(node)) if other == node]
    share = here.index(get_rank())
    pixels = _shared_memory(images, args, first=share == 0, node=node)
    good, problem = torch.ones(len(images), dtype=torch.bool), ""
    try:
        decoder = Decoder(images, args.in_chans, args.cache_size, device if args.nvjpeg else None)
        decoder.fill(pixels, good, range(share, len(images), len(here)), max(1, args.num_workers))
        if args.data_cache == "device" and device.type == "cuda":
            _check_room(pixels.shape, "device", str(device), torch.cuda.mem_get_info(device)[0])
    except (UserError, OSError, MemoryError) as error:
        problem = str(error) or type(error).__name__
    found = gather_objects((good, problem))
    problems = [text for _, text in found if text]
    if problems:
        raise UserError(problems[0])
    good = torch.stack([found[rank][0] for rank in here]).all(dim=0)
    if args.data_cache == "device":
        pixels = pixels.to(device)
    count, _, height, width = pixels.shape
    size = pixels.numel() / 2**20
    print(f"{count} images of {height}x{width} decoded into {size:.0f} MiB (--data_cache {args.data_cache})")
    return CachedImages(images, pixels, good)


def _node() -> tuple[str, str]:
    """Which machine this is: containers of several may have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return os.uname().nodename, boot.read_text() if boot.exists() else ""


def _shared_memory(images: Images, args, first: bool, node) -> torch.Tensor:
    """Memory for all pixels (N, C, H, W), the same for all processes of a node; the `first` one makes it."""
    folder, mine = None, None
    try:
        if first:
            try:
                shape = (len(images), *Decoder(images, args.in_chans, args.cache_size).shape)
                place = _shared_folder()
                status = os.statvfs(place)
                _check_room(shape, args.data_cache, place, status.f_bavail * status.f_frsize)
                folder = Path(tempfile.mkdtemp(prefix="images-", dir=place))
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
        gather_objects(None)  # all have it open
        return pixels
    finally:
        if folder:
            shutil.rmtree(folder)


def _shared_folder() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def _check_room(shape, kind: str, place: str, free: int) -> None:
    needed = math.prod(shape)
    if needed > free:
        raise UserError(
            f"--data_cache {kind} needs {needed / 2**30:.1f} GiB for {shape[0]} images of {shape[2]}x{shape[3]}, and "
            f"{place} has {free / 2**30:.1f} free: a smaller --cache_size, or --data_cache none"
        )


_JPEG_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


class Decoder:
    """Images to pixels of one size; JPEG files on `device`, if one is given (nvJPEG on a GPU)."""

    def __init__(self, images: Images, in_chans: int, size: int | None, device: torch.device | None = None):
        self.device, self.mode = device, _JPEG_MODES.get(in_chans)
        self.images, self.in_chans, self.resize = images, in_chans, ResizeShortSide(size) if size else None
        self.side = size
        first = next((p for p in map(self._decoded, range(min(len(images), 20))) if p is not None), None)
        if first is None:
            raise UserError(f"the first 20 images are unreadable, {shown(images.name(0))} is one of them")
        self.shape = first.shape

    def _decoded(self, index: int) -> np.ndarray | None:
        """(C, H, W), None where the image cannot be read."""
        found = self._decoded_on_device(index) if self.device is not None else None
        if found is not None:
            return found
        try:
            image = to_channels(self.images.load(index), self.in_chans)
        except BROKEN_IMAGE as error:
            say_unreadable(self.images.name(index), error)
            return None
        if self.resize:
            image = self.resize(image)
            left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
            image = image.crop((left, top, left + self.side, top + self.side))
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _decoded_on_device(self, index: int) -> np.ndarray | None:
        """The same of a JPEG file, None where it is none, or one that only pillow reads (CMYK) or refuses."""
        try:
            path = self.images.file(index)
            if self.mode is None or not path.lower().endswith((".jpg", ".jpeg")):
                return None
            with open_regular(path) as file:
                content = file.read()
            open_image(io.BytesIO(content))  # refuses what is too large
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), self.mode, self.device)
        except BROKEN_IMAGE:
            return None
        if self.resize:
            pixels = self.resize.tensor(pixels)
            top, left = ((length - self.side) // 2 for length in pixels.shape[1:])
            pixels = pixels[:, top : top + self.side, left : left + self.side]
        return pixels.cpu().numpy()

    def fill(self, pixels: torch.Tensor, good: torch.Tensor, places: range, threads: int) -> None:
        """Decode the images at `places` into `pixels`; `good` (N,) becomes false where one cannot be read."""
        target = pixels.numpy()

        def some(places: range) -> None:
            for index in places:
                found = self._decoded(index)
                good[index] = found is not None
                if found is not None:
                    self._check_size(index, found.shape)
                    target[index] = found

        parts = [places[first : first + 64] for first in range(0, len(places), 64)]
        with ThreadPoolExecutor(threads) as pool:  # pillow decodes outside python's lock
            for _ in pool.map(some, parts):
                pass

    def _check_size(self, index: int, shape) -> None:
        if shape != self.shape:
            raise UserError(
                f"--data_cache needs images of one size, and {shown(self.images.name(index))} has "
                f"{shape[1]}x{shape[2]} where the first has {self.shape[1]}x{self.shape[2]}: give --cache_size, to "
                f"which the shorter side is resized and the longer one cut"
            )


class CachedBatches(Dataset):
    """Whole batches by their keys [(epoch, index), ...], augmented where the pixels are."""

    def __init__(self, images: CachedImages, transform: BatchTransform):
        self.images, self.transform = images, transform
        self.targets = torch.tensor(images.targets)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keys) -> Sample:
        epoch = keys[0][0]
        indices = torch.tensor([index for _, index in keys])
        places, bad = self._readable(epoch, indices)
        device = self.images.pixels.device
        pixels = self.images.pixels[places.to(device, non_blocking=True)]
        image = self.transform(pixels, epoch, indices.to(device, non_blocking=True))
        return Sample(image, self.targets[places], indices, bad)

    def _readable(self, epoch: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of images to take, unreadable ones replaced by drawn ones; and how many were bad before each."""
        places, bad = indices.clone(), torch.zeros_like(indices)
        for attempt in range(20):
            wrong = ~self.images.good[places]
            if not wrong.any():
                return places, bad
            draws = sample_noise(self.transform.seed, epoch, indices, 1, stream=_REPLACEMENTS + attempt)[:, 0]
            places = torch.where(wrong, (draws.double() * len(self.images)).long(), places)
            bad += wrong
        raise UnreadableData("20 images in a row could not be read; most of the data set is broken")


class CachedLoader(Loader):
    """Training batches from a cache: by workers from shared memory, or in this process on the device."""

    def __init__(
        self, images: CachedImages, transform: BatchTransform, batch_size: int, num_workers: int, pin_mem: bool = False
    ):
        self.dataset, self.batch_size = CachedBatches(images, transform), batch_size
        self.stream, self.shuffle, self.start = False, True, 0
        self.batches = EpochBatches(len(images), batch_size, transform.seed, shuffle=True)
        on_host = images.pixels.device.type == "cpu"
        common = loader_options(transform.seed, num_workers if on_host else 0, pin_mem and on_host)
        self.loader = DataLoader(self.dataset, sampler=self.batches, batch_size=None, **common)
