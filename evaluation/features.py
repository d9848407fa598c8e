"""Frozen features of a data set, and their nearest-neighbour accuracy."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from util.compute.precision import autocast
from util.parallel.distributed import gather_objects, gather_rows, is_main_process


@torch.no_grad()
def extract(encode, loader, device, amp_dtype, title: str = "") -> tuple[torch.Tensor | None, torch.Tensor]:
    """Apply `encode(imgs)` to a loader made with `train=False` -> features (M, D) float32 and labels (M,), on the CPU,
    of all ranks, in the order of the data set. Unreadable images are left out. Only the main process holds the features
    of all ranks; on the others they are None. A `title` adds a progress bar."""
    features, targets, indices = [], [], []
    hidden = None if title and is_main_process() else True  # None: shown on a terminal
    batches = loader.on(device).begin(0)
    for batch in tqdm(batches, desc=title, unit=" batches", disable=hidden, leave=False, dynamic_ncols=True):
        with autocast(device, amp_dtype):
            output = encode(batch.image)
        good = batch.bad == 0
        features.append(output.float().cpu()[good])
        targets.append(batch.target[good])
        indices.append(batch.index[good])
    # With fewer images than ranks a rank has no batch, so lists, which may be empty, are gathered and joined here.
    ranks = gather_objects((targets, indices))
    targets, indices = (torch.cat([part for rank in column for part in rank]) for column in zip(*ranks))
    features = gather_rows(torch.cat(features) if features else torch.empty(0, 0))
    order = torch.argsort(indices, stable=True)
    return None if features is None else features[order], targets[order]


def knn_predict(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, classes: int, k=20, temperature=0.07):
    """Compute weighted k-nearest-neighbour scores (M, classes): cosine similarity, votes of weight exp(similarity /
    temperature), as Wu et al. 2018 and Caron et al. 2021 (DINO, Section 4.1). Features are (M, D); similarities have
    their dtype, also under autocast."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    scores = []
    for part in test.split(1024):
        with torch.autocast(train.device.type, enabled=False):
            similarity, nearest = (part @ train.T).topk(min(k, len(train)), dim=1)  # (m, k)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        scores.append(votes)
    return torch.cat(scores)


def knn_accuracy(train, train_labels, test, test_labels, k: int = 20) -> float:
    """Return the top-1 accuracy of `knn_predict` in percent. Features are (M, D), labels (M,); of each at least one."""
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    predicted = knn_predict(train, train_labels, test, classes, k).argmax(dim=1)
    return 100.0 * (predicted == test_labels).float().mean().item()
