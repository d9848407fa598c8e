"""The flags for reading images: shards, normalisation, value range, bands and data workers."""

from util.data.bands import ORDERS
from util.data.pixel_range import range_word
from util.parallel.cores import MOST_WORKERS
from util.parser import rare

CHANNELS = "channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; or the number of bands of TIFF, .npy and .npz files"


def _add_shard_arguments(group) -> None:
    group.add_argument(
        "--shuffle_buffer",
        type=int,
        default=1000,
        help="wds: encoded images in the shuffle buffer of each worker; the shards of tools/make_shards.py are already "
        "shuffled; for shards sorted by class, use as many as memory allows; 1 keeps their order",
    )
    rare(
        group.add_argument(
            "--shard_samples",
            type=int,
            help="wds: images in each shard; needed for remote shards without an _info.json (local ones are counted)",
        )
    )


def add_reading_arguments(group) -> None:
    """Add the flags for reading shards and for reading and normalising images."""
    _add_shard_arguments(group)
    group.add_argument(
        "--jpeg_draft",
        action="store_true",
        help="decode a JPEG at 1/2, 1/4 or 1/8 of its size where the random crop is larger than the input by that "
        "factor: faster for small inputs from large photographs; pixels differ slightly (benchmarks/README.md)",
    )
    rare(
        group.add_argument(
            "--fast_resize",
            action="store_true",
            help="resize random crops by torch, four times as fast as pillow; 0.3 %% of the values differ, by at most "
            "2 of 255 (benchmarks/README.md)",
        )
    )
    group.add_argument("--download", action="store_true", help="download the data set, if its reader supports it")
    group.add_argument(
        "--mean", type=float, nargs="+", help="per-channel means in [0, 1]; without it those of the data set"
    )
    group.add_argument("--std", type=float, nargs="+", help="per-channel standard deviations; see tools/mean_std.py")
    group.add_argument(
        "--pixel_range",
        type=range_word,
        nargs="+",
        metavar="VALUE",
        help="LOW HIGH: the stored values that become black and white, for grey images of more than 8 bits; auto: the "
        "lowest and highest value of a sample of the training set. Without it 16-bit images have the range 0..65535, "
        "and those of floats or 32-bit integers one of unit (0..1), 8bit (0..255), 16bit, found over a sample",
    )
    rare(
        group.add_argument(
            "--band_axis",
            default="auto",
            choices=ORDERS,
            help="axis of an array (.npy, .npz) that has the bands: first (C, H, W), last (H, W, C), or auto: the one "
            "whose length is --in_chans",
        )
    )
    rare(
        group.add_argument(
            "--crop_pct",
            type=float,
            help="evaluation: share of the resized side that is kept; without it 0.875 at 160-224 px, else 1",
        )
    )
    group.add_argument(
        "--num_workers",
        type=int,
        help="processes that read images; 0 reads in the main process; without it one per core that this process may "
        f"use, at most {MOST_WORKERS}, and {MOST_WORKERS} for wds and timm's streams, whose order depends on it",
    )
    rare(group.add_argument("--pin_mem", action="store_true", help="pin memory for faster copies to the GPU"))
    rare(group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="do not pin memory"))
    group.set_defaults(pin_mem=True)
    rare(
        group.add_argument(
            "--max_bad_fraction",
            type=float,
            default=0.01,
            help="fail when a larger share of the images is unreadable",
        )
    )
