"""Transforms that move image and annotation together, and the samples and batches made with them."""

import re

import numpy as np
import pytest
import torch
from helpers.dense_sets import SIZE, coco_set, dense_flags, image, mask, masks_set, plain_args, voc_set, voc_xml
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from util.data.dense.annotated import Objects, no_objects
from util.data.dense.detection import read_detection
from util.data.dense.paired import PairedDataset, build_paired_loader
from util.data.dense.scenes import DetectedScenes, SegmentedScenes
from util.data.dense.segmentation import read_segmentation
from util.data.dense.transforms import (
    DetectionEvaluation,
    DetectionTraining,
    SegmentationEvaluation,
    SegmentationTraining,
    resize_image,
    resize_masks,
    scaled_shape,
    short_side_shape,
)
from util.data.loader import next_batch
from util.data.sample_rng import seeded
from util.errors import UserError

PLAIN = (0.0,) * 3, (1.0,) * 3  # pixels in [0, 1]
SCENES = SegmentedScenes(0, True, 20, 64, [0, 1, 7])
OBJECTS = DetectedScenes(0, True, 20, 64, [0, 1, 7])


def painted(height=48, width=80, classes=7, block=16):
    """Return an image and its labels, in blocks; the colour of a pixel says its label: 30 * label + 10."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, classes, (height // block, width // block))
    labels = np.kron(blocks, np.ones((block, block), int)).astype(np.int32)
    return Image.fromarray(np.repeat((30 * labels + 10).astype(np.uint8)[:, :, None], 3, axis=2)), labels


# Masks and shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (32, 64), (128, 112), (24, 40)])
def test_masks_are_resized_as_by_pillow(shape):
    """And by NEAREST_EXACT, for sizes in which no centre of a pixel lies between two: there the three round
    differently."""
    labels = np.random.default_rng(1).integers(0, 300, (24, 40)).astype(np.int32)
    expected = np.array(Image.fromarray(labels).resize(shape[::-1], Image.Resampling.NEAREST))
    assert (resize_masks(torch.from_numpy(labels), shape).numpy() == expected).all()
    small = (labels[None] % 2).astype(np.uint8).repeat(3, axis=0)
    assert (resize_masks(torch.from_numpy(small), shape).numpy() == expected[None] % 2).all()
    exact = F.resize_image(torch.from_numpy(small), list(shape), interpolation=InterpolationMode.NEAREST_EXACT)
    assert torch.equal(resize_masks(torch.from_numpy(small), shape), exact)
    assert resize_masks(torch.from_numpy(small[:0]), shape).shape == (0, *shape)
    area = slice(2, 6), slice(1, 400)
    assert torch.equal(resize_masks(torch.from_numpy(small), shape, area), exact[:, *area])


def test_large_labels_survive_resizing():
    labels = torch.tensor([[65535, 65534], [0, 255]], dtype=torch.int32)
    assert resize_masks(labels, (4, 4)).unique().tolist() == [0, 255, 65534, 65535]


def test_images_are_resized_as_by_pillow():
    """Up to one level: the kernels for uint8 round in fixed point."""
    img = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    ours = resize_image(torch.from_numpy(np.array(img)).permute(2, 0, 1), (31, 47))
    theirs = np.array(img.resize((47, 31), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours.permute(1, 2, 0).numpy() - theirs).max() <= 1


def test_shapes():
    """mmsegmentation's rule: scale 2048 x 512, and rounding to the nearest pixel."""
    assert short_side_shape((512, 683), 512, 2048) == (512, 683)
    assert short_side_shape((300, 3000), 512, 2048) == (205, 2048)
    assert scaled_shape((480, 640), (1024, 1024)) == (768, 1024)
    assert scaled_shape((1, 1000), (10, 10)) == (1, 10)


# Segmentation ---------------------------------------------------------------------------------------------------------


def test_image_and_mask_move_together():
    """Wherever the crop, the scale and the flip put a pixel, its colour still says its label; outside the image the
    label is ignored and the pixel is the mean."""
    img, labels = painted()
    transform = SegmentationTraining((64, 64), (0.5,) * 3, (1.0,) * 3, scale=(0.5, 2.0), short_side=48, distort=False)
    padded = 0
    for seed in range(40):
        with seeded(seed):
            pixels, target = transform(img, labels)
        assert pixels.shape == (3, 64, 64) and target.shape == (64, 64) and target.dtype == torch.int64
        inside = target != 255
        assert (pixels[:, ~inside] == 0).all()
        implied = (((pixels[0] + 0.5) * 255 - 10) / 30)[inside]
        exact = (implied - target[inside]).abs() < 0.02
        assert exact.float().mean() > 0.6  # all pixels but those at edges, which bilinear resizing mixes
        padded += bool((~inside).any())
    assert padded > 5
    mirrored = SegmentationTraining((48, 80), *PLAIN, scale=(1, 1), short_side=48, flip=1.0, distort=False)
    straight = SegmentationTraining((48, 80), *PLAIN, scale=(1, 1), short_side=48, flip=0.0, distort=False)
    (a, b), (c, d) = mirrored(img, labels), straight(img, labels)
    assert (a == c.flip(-1)).all() and (b == d.flip(-1)).all()
    assert (d.numpy() == labels).all()


def test_flipping_commutes():
    """A flipped pair of image and mask, transformed, is the transformed pair flipped (whole images, any content)."""
    for index in range(5):
        img, labels = SCENES.load(index), SCENES.annotation(index, None)
        turned = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT), np.ascontiguousarray(labels[:, ::-1])
        for shape in ((64, 64), (128, 128)):
            flip, keep = (
                SegmentationTraining(shape, *PLAIN, scale=(1, 1), flip=share, distort=False) for share in (1, 0)
            )
            (a, b), (c, d) = flip(img, labels), keep(*turned)
            assert (b == d).all() and (a - c).abs().max() <= 1 / 255 + 1e-6  # a level, of rounding in the kernel


def test_no_class_fills_a_crop():
    """With one class on 90 % of the image, crops in which it has more than 75 % of the labelled pixels are avoided."""
    labels = np.zeros((64, 256), np.int32)
    labels[:, :24] = 1
    img = Image.fromarray(np.zeros((64, 256, 3), np.uint8))
    shares = {}
    for limit in (0.75, 1.0):
        transform = SegmentationTraining((64, 64), *PLAIN, scale=(1, 1), max_ratio=limit, distort=False)
        crops = []
        for seed in range(100):
            with seeded(seed):
                crops.append(transform(img, labels)[1])
        shares[limit] = np.mean([float((crop == 1).float().mean()) > 0.25 for crop in crops])
    assert shares[0.75] > 0.2 > 0.12 > shares[1.0]  # about 0.34, ten tries of 8/193 each, and 0.04


def test_distortion_changes_colours_alone():
    """It exchanges no channels (mmsegmentation's does not): a red image stays red, since its hue changes by at most 36
    degrees; labels stay."""
    img, labels = Image.new("RGB", (16, 16), (200, 60, 60)), np.ones((16, 16), np.int32)
    transform = SegmentationTraining((16, 16), *PLAIN, scale=(1, 1))
    seen = set()
    for seed in range(60):
        with seeded(seed):
            pixels, target = transform(img, labels)
        red, green, blue = pixels[:, 8, 8].tolist()
        assert red >= max(green, blue) and (target == 1).all()
        seen.add(round(red, 3))
    assert len(seen) > 10
    with pytest.raises(UserError, match="--in_chans 2"):
        SegmentationTraining((16, 16), (0.5,) * 2, (1.0,) * 2)
    SegmentationTraining((16, 16), (0.5,), (1.0,))(img.convert("L"), labels)


@pytest.mark.parametrize("short", [None, 32])
def test_evaluation_keeps_the_mask(short):
    """The target has the original size; the image is at the top left of the input, and the rest is the mean colour."""
    img, labels = painted()
    transform = SegmentationEvaluation((48, 64), (0.25,) * 3, (0.5,) * 3, short)
    pixels, target = transform(img, labels)
    assert (target.numpy() == labels).all() and target.dtype == torch.int64
    height, width = transform.shape(*target.shape)
    assert (height, width) == ((38, 64) if short is None else (32, 53)) and pixels.shape == (3, 48, 64)
    assert (pixels[:, height:] == 0).all() and (pixels[:, :, width:] == 0).all()
    assert (pixels[:, :height, :width] != 0).all()


def test_evaluation_of_a_larger_image():
    img, labels = painted(48, 240)
    transform = SegmentationEvaluation((48, 48), *PLAIN, 48)
    assert transform(img, labels)[0].shape == (3, 48, 192)  # at most four times the short side


# Detection ------------------------------------------------------------------------------------------------------------


def test_boxes_are_the_extents_of_their_masks():
    """After any scale, crop and flip; objects that are cropped away are left out."""
    transform = DetectionTraining((64, 64), *PLAIN)
    sizes = []
    for seed in range(60):
        index = seed % 20
        with seeded(seed):
            pixels, target = transform(OBJECTS.load(index), OBJECTS.annotation(index, None))
        boxes, masks = target["boxes"], target["masks"]
        assert pixels.shape == (3, 64, 64) and masks.shape == (len(boxes), 64, 64) and masks.dtype == torch.uint8
        assert len(target["labels"]) == len(boxes) and int(target["image_id"]) == index
        for box, each in zip(boxes, masks):
            rows, columns = torch.nonzero(each, as_tuple=True)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [float(value) for value in extent]
        sizes += [float(box[2] - box[0]) for box in boxes]
    assert min(sizes) >= 1 and max(sizes) > 30 and {int(label) for label in target["labels"]} <= {1, 2, 3}


def test_boxes_without_masks_agree_with_those_of_masks():
    """The same draws give the same boxes, up to the pixel that resizing a mask rounds."""
    transform, compared = DetectionTraining((64, 64), *PLAIN, scale=(0.7, 2.0)), 0
    for seed in range(40):
        objects = OBJECTS.annotation(seed % 20, None)
        alone = Objects(**{**vars(objects), "masks": None})
        with seeded(seed):
            _, with_masks = transform(OBJECTS.load(seed % 20), objects)
        with seeded(seed):
            _, without = transform(OBJECTS.load(seed % 20), alone)
        assert "masks" not in without
        if len(with_masks["boxes"]) == len(without["boxes"]) == len(objects.labels):
            inside = (without["boxes"] > 0).all(dim=1) & (without["boxes"] < 64).all(dim=1)
            difference = (with_masks["boxes"] - without["boxes"]).abs()[inside]
            assert len(difference) == 0 or difference.max() <= 1
            compared += len(difference)
    assert compared > 20


def test_flipping_boxes_commutes():
    flip, keep = (DetectionTraining((64, 64), *PLAIN, scale=(1, 1), flip=share) for share in (1.0, 0.0))
    for index in range(5):
        for masks in (True, False):
            objects = OBJECTS.annotation(index, None)
            objects.masks = objects.masks if masks else None
            (a, target), (b, other) = (transform(OBJECTS.load(index), objects) for transform in (flip, keep))
            left, top, right, bottom = other["boxes"].unbind(1)
            assert (target["boxes"] == torch.stack([64 - right, top, 64 - left, bottom], dim=1)).all()
            assert (a == b.flip(-1)).all() and (not masks or (target["masks"] == other["masks"].flip(-1)).all())


def test_images_without_objects():
    img = Image.new("RGB", (30, 20))
    for empty in (no_objects(7, img.size), no_objects(7)):
        _, target = DetectionTraining((32, 32), *PLAIN)(img, empty)
        assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
        assert ("masks" in target) == (empty.masks is not None)
        assert target.get("masks", torch.zeros(0, 32, 32)).shape == (0, 32, 32)


def test_evaluation_of_boxes():
    """The image is at the top left of the input; the target says how large it was."""
    img, resize = Image.new("RGB", (100, 80), (255,) * 3), DetectionEvaluation((64, 64), *PLAIN)
    pixels, target = resize(img, no_objects(9))
    assert pixels.shape == (3, 64, 64) and (pixels[:, 51:] == 0).all() and (pixels[:, :51] == 1).all()
    assert target["size"].tolist() == [80, 100] and resize.shape(80, 100) == (51, 64)  # 80 * 0.64 = 51.2 rows, rounded


# Samples --------------------------------------------------------------------------------------------------------------


def loaded(images, transform, workers=0, size=4, train=True, epoch=0, **flags):
    loader = build_paired_loader(images, transform, plain_args(**flags), size, train, num_workers=workers)
    return list(loader.begin(epoch))


def test_samples_do_not_depend_on_workers_or_batches():
    transform = SegmentationTraining((32, 32), *PLAIN)
    one, two, large = (loaded(SCENES, transform, *options) for options in ((0, 4), (2, 4), (0, 10)))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(torch.cat([b.target for b in one]), torch.cat([b.target for b in large]))
    other = loaded(SCENES, transform, epoch=1)
    assert not torch.equal(one[0].target, other[0].target)
    assert one[0].image.shape == (4, 3, 32, 32) and one[0].target.dtype == torch.int64


def test_targets_of_objects_are_a_list():
    transform = DetectionTraining((32, 32), *PLAIN)
    one, two = (loaded(OBJECTS, transform, workers) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.image, b.image) and len(a.target) == len(b.target) == 4
        for x, y in zip(a.target, b.target):
            assert x.keys() == y.keys() == {"boxes", "labels", "masks", "image_id", "covered"}
            assert all(torch.equal(x[name], y[name]) for name in x)


def test_unreadable_images_and_masks_are_replaced(tmp_path, capsys):
    """In training; in evaluation they are black, without a label, and marked."""
    masks_set(tmp_path, 6)
    (tmp_path / "train/images/1.jpg").write_bytes(b"no image")
    (tmp_path / "train/masks/2.png").write_bytes(b"no mask")
    images = read_segmentation(dense_flags("--dataset", "masks", "--data_path", tmp_path), True)
    transform = SegmentationTraining((8, 8), *PLAIN)
    batches = loaded(images, transform, size=2)
    assert sum(int(batch.bad.sum()) for batch in batches) >= 2
    named = capsys.readouterr().err
    assert "images/1.jpg: cannot identify" in named and "images/2.jpg: its mask" in named
    checked = loaded(images, SegmentationEvaluation((8, 8), *PLAIN), size=1, train=False)
    assert [int(batch.bad) for batch in checked] == [0, 1, 1, 0, 0, 0]
    assert all((batch.target == 255).all() for batch in checked[1:3]) and (checked[0].target < 3).all()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("train", [True, False])
def test_an_annotation_that_does_not_fit_ends_the_run(tmp_path, workers, train):
    """With one sentence, also out of a data worker, in training and in evaluation."""
    masks_set(tmp_path, 4)
    images = read_segmentation(dense_flags("--dataset", "masks", "--data_path", tmp_path), True)
    for index in range(4):
        mask(tmp_path / f"train/masks/{index}.png", 77, 1)
    transform = SegmentationTraining((8, 8), *PLAIN)
    message = failure(build_paired_loader(images, transform, plain_args(), 2, train, num_workers=workers), train)
    assert re.match(r"the mask .*masks/\d.png has the label 77, but the 3 classes are 0..2", message)
    assert "Traceback" not in message and "\n" not in message


def failure(loader, train: bool) -> str:
    """Return the message of the error that reading raises. The error itself would keep the data workers alive."""
    batches = iter(loader.begin(0))
    try:
        next_batch(batches) if train else list(batches)
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def test_objects_of_unreadable_images(tmp_path):
    coco_set(tmp_path)
    (tmp_path / "val2017/13.jpg").write_bytes(b"no image")
    args = dense_flags("--dataset", "coco", "--data_path", tmp_path, task="detection")
    batch = loaded(read_detection(args, False, True), DetectionEvaluation((16, 16), *PLAIN), size=3, train=False)[0]
    assert batch.bad.tolist() == [0, 0, 1] and [each["size"].tolist() for each in batch.target[:2]] == [[8, 10]] * 2
    assert batch.image.shape == (3, 3, 16, 16)


def test_boxes_beyond_the_image_are_clipped(tmp_path):
    voc_set(tmp_path, annotations={"1": voc_xml(("dog", 6, 3, 300, 200, 0))})
    args = dense_flags("--dataset", "voc", "--data_path", tmp_path, task="detection")
    images = read_detection(args, True, False)
    data = PairedDataset(images, DetectionTraining((8, 10), *PLAIN, scale=(1, 1), flip=0), 0, 3)
    assert data[0].target["boxes"].tolist() == [[5, 2, 10, 8]]


def test_images_of_several_sizes_form_no_batch(tmp_path):
    masks_set(tmp_path)
    image(tmp_path / "val/images/1.jpg", size=(20, 8))
    mask(tmp_path / "val/masks/1.png", 0, size=(20, 8))
    images = read_segmentation(dense_flags("--dataset", "masks", "--data_path", tmp_path), False)
    transform = SegmentationEvaluation((8, 8), *PLAIN, 8)
    with pytest.raises(UserError, match="evaluate one image at a time"):
        loaded(images, transform, size=2, train=False)
    sizes = [tuple(batch.target.shape[1:]) for batch in loaded(images, transform, size=1, train=False)]
    assert sizes == [SIZE[::-1], (8, 20), SIZE[::-1]]


def test_other_channels(tmp_path):
    images = read_segmentation(dense_flags("--dataset", "masks", "--data_path", masks_set(tmp_path)), True)
    data = PairedDataset(images, SegmentationTraining((8, 8), (0.5,), (0.5,)), 0, 1)
    assert data[0].image.shape == (1, 8, 8)
    with pytest.raises(UserError, match="fewer than one batch"):
        build_paired_loader(images, data.transform, plain_args(), 4, True)
