"""Segmentation scores against scikit-learn, and sliding windows against the whole image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.dense_script import maps, scored
from helpers.tolerances import TOL32, close
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score

from evaluation.segment_scores import SegmentScores
from evaluation.slide import labels_at_size, slide, starts
from util.data.dense.patch_labels import patch_counts

CPU = torch.device("cpu")


def test_scores_against_scikit_learn():
    predicted, truth = maps()
    stats, details, summary = scored(SegmentScores(CPU, 5), predicted, truth, bad=(2,))
    rows = [0, 1, 3, 4, 5]
    known = truth[rows] != 255
    ours, theirs = predicted[rows][known].numpy(), truth[rows][known].numpy()
    ious = 100 * jaccard_score(theirs, ours, average=None, labels=range(4), zero_division=0)
    assert list(details["iou"].values())[:4] == pytest.approx(ious) and details["iou"]["4"] is None
    assert stats["mIoU"] == pytest.approx(100 * jaccard_score(theirs, ours, average="macro", zero_division=0))
    assert stats["mIoU"] == pytest.approx(np.mean(ious)) and ious[3] == 0  # predicted, never right: it counts
    assert stats["mean_acc"] == pytest.approx(100 * balanced_accuracy_score(theirs[theirs < 3], ours[theirs < 3]))
    assert stats["pixel_acc"] == pytest.approx(100 * (ours == theirs).mean()) and stats["skipped"] == 1
    assert details["accuracy"]["3"] is None and sum(details["pixels"].values()) == known.sum()
    assert "(1 of 5 classes neither occur nor are predicted and are left out)" in summary
    scores = SegmentScores(CPU, 5)
    scores.add(predicted, truth, torch.tensor([i != 2 for i in range(6)]))
    scores.read()
    assert np.array_equal(scores.matrix, confusion_matrix(theirs, ours, labels=range(5)))
    assert scores.picture([f"c{i}" for i in range(5)]).dtype == np.uint8


def test_perfect_segmentation_and_images_of_different_sizes():
    truth = [torch.randint(0, 3, (7, 5)), torch.randint(0, 3, (4, 9))]
    stats, _, _ = scored(SegmentScores(CPU, 3), truth, truth)
    assert stats == {"mIoU": 100, "mean_acc": 100, "pixel_acc": 100, "skipped": 0}
    assert scored(SegmentScores(CPU, 3), truth, [torch.full_like(t, 255) for t in truth])[0]["mIoU"] == 0


def test_the_ignored_label_may_be_a_class_index():
    """In every score: pixels of class 0 count neither for nor against a class when 0 is the ignored label."""
    truth, ours = torch.tensor([[[0, 0, 0, 1]]]), torch.tensor([[[0, 1, 0, 1]]])
    scores = SegmentScores(CPU, 2, ignore_label=0)
    scores.add(ours, truth, torch.tensor([True]))
    scores.read()
    assert scores.matrix.tolist() == [[0, 0], [0, 1]]
    assert patch_counts(truth, (1, 4), 2, ignore_label=0)[..., :-1].tolist() == [[[0, 1]]]


@pytest.mark.parametrize("length, expected", [(10, [0]), (8, [0]), (11, [0, 1]), (20, [0, 6, 10]), (22, [0, 6, 12])])
def test_windows_cover_the_image(length, expected):
    assert starts(length, 10, 6) == expected


@pytest.mark.parametrize("size", [(40, 24), (24, 70), (17, 30), (9, 12)])
def test_sliding_a_pixelwise_model_gives_the_whole_image(size):
    """Also for images smaller than the window. All windows come in one batch."""
    torch.manual_seed(0)
    img, weight = torch.randn(3, *size), torch.randn(4, 3, 1, 1)
    batches = []

    def model(windows):
        batches.append(tuple(windows.shape))
        return F.conv2d(windows, weight)

    logits = slide(model, img, (16, 24), 10)
    assert len(batches) == 1 and batches[0][1:] == (3, 16, 24)
    close(logits, F.conv2d(img[None], weight)[0], TOL32)


def test_overlapping_windows_are_averaged():
    outputs = torch.tensor([1.0, 4.0])
    logits = slide(
        lambda windows: outputs[: len(windows), None, None, None] + 0 * windows[:, :1], torch.zeros(3, 4, 6), (4, 4), 2
    )
    assert logits[0, 0].tolist() == [1, 1, 2.5, 2.5, 4, 4]


@pytest.mark.parametrize("classes", [2, 16, 17, 50])
def test_labels_are_those_of_all_logits_resized_at_once(classes):
    logits = torch.randn(classes, 13, 9)
    whole = F.interpolate(logits[None], size=(31, 40), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert torch.equal(labels_at_size(logits, (31, 40)), whole)
