"""The transforms of pretraining for images with masks, and the counts of labels in patches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

from util.data.dense.patch_labels import PairedSteps, PatchLabels, patch_counts
from util.data.draws import VERSIONS, SampleRng
from util.data.samples import keeps_depth
from util.data.transforms import LARGEST, eval_transform, pretrain_transform

PLAIN = (0.0,) * 3, (1.0,) * 3  # pixels in [0, 1]
IGNORED = 255


def painted(height, width, classes=6, block=16):
    """Return an image and its labels, in blocks; the colour of a pixel says its label: 40 * label + 20."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, classes, (-(-height // block), -(-width // block)))
    labels = np.kron(blocks, np.ones((block, block), int))[:height, :width].astype(np.int32)
    return Image.fromarray(np.repeat((40 * labels + 20).astype(np.uint8)[:, :, None], 3, axis=2)), labels


TRANSFORMS = {aug: pretrain_transform(aug, (32, 48), *PLAIN) for aug in ("mae", "crop", "three", "none")}
TRANSFORMS |= {
    "square": eval_transform((32, 32), *PLAIN, 0.875),
    "padded": transforms.Compose([transforms.CenterCrop((90, 120)), *eval_transform((32, 32), *PLAIN).transforms[-2:]]),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_masks_follow_images(name, version):
    """The image is that of the transform of images, bit for bit, and the colours of pixels tell their labels, except at
    the borders of blocks, where bicubic resizing mixes them."""
    img, labels = painted(64, 96)
    transform, seen = TRANSFORMS[name], set()
    paired, rng = PairedSteps(transform, (32, 48), IGNORED), SampleRng(0, version)
    for epoch in range(20):
        with rng.sample(epoch, 0):
            alone = transform(img)
        with rng.sample(epoch, 0):
            tensor, mask = paired(img, labels)
        assert torch.equal(tensor, alone) and mask.dtype == torch.int64 and mask.shape == tensor.shape[1:]
        seen.add(tensor.sum().item())
        if name == "three":  # colours change, places do not
            continue
        inside = F.max_pool2d(mask[None].float(), 5, 1, 2) == -F.max_pool2d(-mask[None].float(), 5, 1, 2)
        told = torch.where(tensor[0] == 0, IGNORED, (255 * tensor[0] - 20) / 40)  # padding is black
        assert inside.sum() > 300 and (told - mask).abs()[inside[0]].max() < 0.1
        assert (mask == IGNORED).any() == (name in ("crop", "padded")) or name == "crop"
    assert len(seen) > 1 or name in ("none", "square", "padded")


def test_photometric_steps_keep_the_places():
    """3-Augment crops and mirrors before it changes colours: with the same random numbers the mask is that of the plain
    augmentation."""
    img, labels = painted(64, 96)
    masks = []
    for aug in ("mae", "three"):
        with SampleRng(0).sample(3, 1):
            masks.append(PairedSteps(TRANSFORMS[aug], (32, 48), IGNORED)(img, labels)[1])
    assert torch.equal(*masks)


@pytest.mark.parametrize("shape", [(2, 20000), (20000, 2)])
def test_strips(shape):
    """Of a strip whose resized version would be too large, image and mask are the same part."""
    labels = np.zeros(shape, np.int32)
    middle = shape[0] // 2, shape[1] // 2
    labels[middle[0] :, middle[1] if shape[1] > 2 else 0 :] = 1
    if shape[1] > 2:
        labels[:, middle[1] :] = 1
    img = Image.fromarray(np.repeat((200 * labels).astype(np.uint8)[:, :, None], 3, axis=2))
    transform = eval_transform((128, 128), *PLAIN)
    assert not transform.transforms[0].fits(*shape) and LARGEST < 128 * 128 * 10000
    tensor, mask = PairedSteps(transform, (128, 128), IGNORED)(img, labels)
    assert ((tensor[0] > 0.4) == (mask == 1)).float().mean() > 0.98 and 0.4 < mask.float().mean() < 0.6


def test_unknown_steps_are_refused():
    with pytest.raises(TypeError, match="may move pixels"):
        PairedSteps(transforms.Compose([transforms.RandomRotation(10)]), (8, 8))


def test_grey_images_keep_their_depth():
    """As the transform of images does: 16-bit images are floats up to the tensor."""
    assert keeps_depth(PatchLabels(TRANSFORMS["mae"], (32, 48), IGNORED, (4, 4), 3))
    assert not keeps_depth(PatchLabels(TRANSFORMS["three"], (32, 48), IGNORED, (4, 4), 3))


@pytest.mark.parametrize(("patch", "ignore"), [((4, 4), 255), ((2, 8), 255), ((4, 4), 1)])
def test_counts(patch, ignore):
    """Every pixel is counted once, in the patch and under the label that it has; an ignored label may be a class."""
    labels = torch.randint(5, (8, 16)).masked_fill(torch.rand(8, 16) < 0.2, ignore)
    counts = patch_counts(labels, patch, 5, ignore)
    (height, width), columns = patch, 16 // patch[1]
    assert counts.dtype == torch.int32 and counts.shape == (8 * 16 // (height * width), 6)
    expected = torch.zeros_like(counts)
    for row in range(8):
        for column in range(16):
            label = labels[row, column].item()
            expected[row // height * columns + column // width, 5 if label == ignore else label] += 1
    assert torch.equal(counts, expected) and (counts.sum(1) == height * width).all()
