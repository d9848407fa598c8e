"""Segmentation by frozen patch tokens: nearest neighbours and a linear head, both from a sample of labelled patches.

Shapes: N images, L patches each, M patches, D encoder width, K classes, (rows, columns) the patch grid.

The label of a patch is its histogram of classes. With logits that are constant in a patch, the cross-entropy of its
pixels is that of the histogram, so the linear head is what gradient descent on pixels would reach; the problem is
convex, and L-BFGS solves it. The neighbours vote as in `evaluation.features.knn_predict`, each with its histogram.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from evaluation.segment_scores import SegmentScores
from evaluation.slide import labels_at_size
from util.data.dense.patch_labels import patch_counts
from util.data.loader import Loader

Setting = int | float  # k, or an L2 penalty
CHUNK = 1024  # patches whose neighbours are searched together
STEPS = 500  # of L-BFGS, at most


def pixel_loss(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of all labelled pixels, from the logits (M, K) of patches and the `counts` (M, K)
    of their pixels."""
    return -(counts * F.log_softmax(logits, dim=1)).sum() / counts.sum()


# The sample of patches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bank:
    """Labelled patches: tokens (M, D) and counts (M, K), float32; `images` is the number of readable images that they
    were drawn from."""

    tokens: torch.Tensor
    counts: torch.Tensor
    images: int

    def __len__(self) -> int:
        return len(self.tokens)


@torch.no_grad()
def collect(encode: Callable, loader: Loader, patch: Sequence[int], classes: int, most: int, seed: int) -> Bank:
    """Return a random sample of at most `most` patches that have a labelled pixel. `encode` gives the tokens (N, L, D)
    of images; targets of the loader are labels of the input's size.

    A patch has a random number from (seed, image, place), and those with the lowest are chosen: the same ones for
    every encoder with that patch grid, for any batch size, and among those of a larger sample.
    """
    parts, buffered, images = [], 0, 0
    for batch in _progress(loader, "encoding training images"):
        good = batch.bad == 0
        images += int(good.sum())
        if not good.any():
            continue
        counts = patch_counts(batch.target[good], patch, classes, loader.dataset.images.ignore_label)[..., :-1]
        drawn = [np.random.default_rng([seed, index]).random(counts.shape[1]) for index in batch.index[good].tolist()]
        numbers, labelled = torch.from_numpy(np.stack(drawn)), counts.sum(dim=2) > 0
        tokens = encode(batch.image[good]).cpu()
        parts.append((numbers[labelled], tokens[labelled], counts[labelled].float()))
        buffered += len(parts[-1][0])
        if buffered > 2 * most:
            parts = [_lowest(parts, most)]
            buffered = most
    if not parts:
        return Bank(torch.empty(0, 0), torch.empty(0, classes), images)
    _, tokens, counts = _lowest(parts, most)
    return Bank(tokens, counts, images)


def _lowest(parts: list[tuple[torch.Tensor, ...]], most: int) -> tuple[torch.Tensor, ...]:
    """Return the `most` rows with the lowest numbers, in their order; numbers are the first column."""
    columns = [torch.cat(column) for column in zip(*parts)]
    chosen = columns[0].argsort()[:most]
    return tuple(column[chosen] for column in columns)


def _progress(loader: Loader, title: str):
    return tqdm(loader.begin(0), desc=title, unit=" batches", disable=None, leave=False, dynamic_ncols=True)


# Predictors -----------------------------------------------------------------------------------------------------------


class Neighbours:
    """The nearest patches of a bank: cosine similarity, votes of weight exp(similarity / temperature) (Wu et al. 2018).
    Settings are values of k."""

    def __init__(self, bank: Bank, settings: Sequence[int], device, temperature: float = 0.07):
        self.settings, self.temperature = list(settings), temperature
        self.tokens = F.normalize(bank.tokens.to(device), dim=1)
        self.shares = F.normalize(bank.counts.to(device), p=1, dim=1)  # the labels of a patch sum to 1

    def only(self, setting: int) -> "Neighbours":
        """Keep one setting."""
        self.settings = [setting]
        return self

    def __call__(self, tokens: torch.Tensor) -> dict[Setting, torch.Tensor]:
        """Tokens (M, D) -> by setting the votes (M, K), which sum to 1."""
        parts = [self._votes(part) for part in F.normalize(tokens, dim=1).split(CHUNK)]
        return {k: torch.cat([votes[k] for votes in parts]) for k in self.settings}

    def _votes(self, tokens):
        similarity, nearest = (tokens @ self.tokens.T).topk(max(self.settings), dim=1)
        weights = ((similarity - similarity[:, :1]) / self.temperature).exp()  # the nearest has weight 1
        votes = {}
        for k in self.settings:
            share = F.normalize(weights[:, :k], p=1, dim=1)
            votes[k] = torch.einsum("mk,mkc->mc", share, self.shares[nearest[:, :k]])
        return votes


class LinearHeads:
    """Multinomial logistic regression on standardised tokens, one head for each L2 penalty: the setting times half
    the squared weights is added to `pixel_loss`. Settings are penalties."""

    def __init__(self, bank: Bank, settings: Sequence[float], device):
        self.settings = list(settings)
        tokens, counts = bank.tokens.to(device), bank.counts.to(device)
        self.mean, self.scale = tokens.mean(dim=0), (tokens.var(dim=0, correction=0) + 1e-6).rsqrt()
        self.heads = self._fit((tokens - self.mean) * self.scale, counts)

    def _fit(self, tokens, counts) -> dict[Setting, tuple[torch.Tensor, torch.Tensor]]:
        """Fit a head (K, D), (K,) for each setting; each starts from that of the next stronger penalty."""
        weight = tokens.new_zeros(counts.shape[1], tokens.shape[1], requires_grad=True)
        bias = tokens.new_zeros(counts.shape[1], requires_grad=True)
        heads = {}
        for penalty in sorted(self.settings, reverse=True):
            steps = minimise(
                lambda: pixel_loss(F.linear(tokens, weight, bias), counts) + penalty / 2 * weight.square().sum(),  # noqa: B023
                [weight, bias],
            )
            if steps >= STEPS:
                print(f"note: the linear head with --penalty {penalty:g} was stopped after {STEPS} steps")
            heads[penalty] = weight.detach().clone(), bias.detach().clone()
        return heads

    def only(self, setting: float) -> "LinearHeads":
        """Keep one setting."""
        self.settings = [setting]
        return self

    def __call__(self, tokens: torch.Tensor) -> dict[Setting, torch.Tensor]:
        """Tokens (M, D) -> by setting the logits (M, K)."""
        tokens = (tokens - self.mean) * self.scale
        return {penalty: F.linear(tokens, *self.heads[penalty]) for penalty in self.settings}


def minimise(loss: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Minimise a convex loss by L-BFGS, in place. Return the number of steps, at most `STEPS`."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=STEPS, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return optimizer.state[parameters[0]]["n_iter"]


# Scores ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def segment(
    encode: Callable, loader: Loader, grid: Sequence[int], predictors: Mapping[str, Callable], classes: int, title: str
) -> dict[str, dict[Setting, SegmentScores]]:
    """Return the scores of all `predictors` and their settings, at the original size of the images. The outputs of
    patches are resized bilinearly. The loader's transform is `SegmentationBatches`."""
    resize, ignore = loader.dataset.transform, loader.dataset.images.ignore_label
    scores = {
        name: {setting: SegmentScores(torch.device("cpu"), classes, ignore) for setting in predictor.settings}
        for name, predictor in predictors.items()
    }
    for batch in _progress(loader, title):
        tokens = encode(batch.image)
        for name, predictor in predictors.items():
            for setting, outputs in predictor(tokens.flatten(0, 1)).items():
                maps = outputs.unflatten(0, (len(tokens), *grid)).permute(0, 3, 1, 2)
                for own, target, bad in zip(maps, batch.target, batch.bad):
                    labels = target["labels"]
                    predicted = labels_of(own, resize.size, resize.shape(*labels.shape), labels.shape)
                    scores[name][setting].add([predicted], [labels], bad[None] == 0)
    return scores


def labels_of(
    outputs: torch.Tensor, size: Sequence[int], shape: Sequence[int], original: Sequence[int]
) -> torch.Tensor:
    """Return the class (H, W) of each pixel of an image of `original` size (H, W), from the outputs (K, rows, columns)
    of its patches. `size` is that of the input, whose upper left part, of `shape`, has the image."""
    logits = F.interpolate(outputs[None], size=tuple(size), mode="bilinear")[0]
    return labels_at_size(logits[:, : shape[0], : shape[1]], original)
