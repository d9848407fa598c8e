"""Micro-batches and the accumulation windows that they form."""

from dataclasses import dataclass

from util.data.samples import Sample


@dataclass
class MicroBatch:
    """One micro-batch of an accumulation window: the images of one forward pass of this process."""

    samples: Sample  # collated: images (N, C, H, W), targets (N,), indices (N,), unreadable images (N,)
    position: int  # in its epoch, from 0
    window: int  # micro-batches in its window; the last window of an epoch may be shorter
    is_first_of_window: bool
    is_last_of_window: bool  # the optimizer steps after this one


def accumulation_window(position: int, total: int, accum_iter: int) -> tuple[int, bool, bool]:
    """(micro-batches in its window, is it the first, is it the last) of micro-batch `position` of `total`."""
    first = position - position % accum_iter
    size = min(accum_iter, total - first)
    return size, position == first, position == first + size - 1
