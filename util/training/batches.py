"""Micro-batches and the accumulation windows that they form."""

from dataclasses import dataclass

from util.data.samples import Sample


@dataclass
class MicroBatch:
    """The images of one forward pass of this process: one micro-batch of an accumulation window."""

    samples: Sample  # collated: images (N, C, H, W); targets, indices in the data set, flags of unreadable images: (N,)
    position: int  # in the epoch, from 0
    window: int  # number of micro-batches in the window; the last window of an epoch may be shorter
    is_first_of_window: bool
    is_last_of_window: bool  # after this one the optimizer steps


def accumulation_window(position: int, total: int, accum_iter: int) -> tuple[int, bool, bool]:
    """Return (size of its window, is it the first, is it the last) for micro-batch `position` of the `total` of an
    epoch."""
    first = position - position % accum_iter
    size = min(accum_iter, total - first)
    return size, position == first, position == first + size - 1
