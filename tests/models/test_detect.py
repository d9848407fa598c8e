"""Detectors: the pyramid against recorded numbers of detectron2's ViTDet, training, predictions, loading."""

import json
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.dense_script import objects_problem, rank_texts
from helpers.launch import ranks
from helpers.tolerances import TOL32, close
from torch import nn
from torchvision.ops import box_iou

import models_mae
import models_vit
from models_detect import Detector, at_original_size, build_model, paste_mask
from util.errors import UserError
from util.lr_decay import param_groups_lrd
from util.pos_embed import interpolate_grid
from util.weights.load import load_into, read_weights

STEPS = {"2": (["0", "1", "3"], "4", "5"), "3": (["0"], "1", "2"), "4": ([], "0", "1"), "5": ([], "1", "2")}


def from_detectron2(state):
    """The state dict of detectron2's simple feature pyramid in our names, without [cls], which it does not have."""
    renamed = {re.sub(r"^net\.", "", name): value.double() for name, value in state.items() if name.startswith("net.")}
    renamed["pos_embed"] = interpolate_grid(renamed["pos_embed"], (6, 6), (8, 8))
    for level, (name, (resizes, narrow, smooth)) in enumerate(STEPS.items()):
        layers = {step: step for step in resizes}
        first = {"2": 4, "3": 1, "4": 1, "5": 1}[name]  # ours have an identity or a pool first
        for step, ours in ((narrow, first), (smooth, first + 2)):
            layers |= {f"{step}.norm": f"{ours + 1}", step: f"{ours}"}
        for step, ours in layers.items():
            for part in ("weight", "bias"):
                value = state.get(f"simfp_{name}.{step}.{part}")
                if value is not None:
                    renamed[f"pyramid.{level}.{ours}.{part}"] = value.double()
    return renamed


@pytest.mark.parametrize("fused", [True, False])
def test_pyramid_is_that_of_detectron2(golden, fused):
    """Windows of 3 on a grid of 8, which are padded, and two global blocks; all with relative positions."""
    ref = golden("vitdet_sfp")
    model = Detector(
        classes=2, img_size=128, patch_size=16, embed_dim=32, depth=4, num_heads=4, head_width=16, window=3,
        global_blocks=[1, 3], norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double()  # fmt: skip
    missing, unexpected = model.load_state_dict(from_detectron2(ref.group("sd/")), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"cls_token", "rpn", "roi_heads"}
    for block in model.blocks:
        block.attn.fused_attn = fused
    maps = model.pyramid(model.forward_maps(ref["imgs"].double(), model.feature_blocks))
    for level, ours in enumerate(maps.values()):
        close(ours, ref[f"out/p{level + 2}"])
    loss = sum((1 + level) * ours.square().mean() for level, ours in enumerate(maps.values()))
    loss.backward()
    close(loss, ref["loss"])
    close(model.patch_embed.proj.weight.grad, ref["grad/patch"])


SMALL = dict(img_size=64, window=3, global_blocks=[3], head_width=16, patch_size=8)


def small(**options):
    torch.manual_seed(0)
    return build_model("vit_micro_patch4", 3, **{**SMALL, **options})


def batch(masks=True, empty=(2,)):
    """Three padded images with up to two boxes; those of `empty` have none."""
    targets = []
    for index in range(3):
        boxes = torch.tensor([[8.0, 8, 24, 32], [20, 4, 40, 20]])[: 0 if index in empty else 2]
        full = torch.zeros(len(boxes), 64, 64, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(full, boxes.int().tolist()):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3])[: len(boxes)], "size": (40, 48)})
        targets[-1] |= {"masks": full} if masks else {}
    return torch.randn(3, 3, 64, 64), targets


@pytest.mark.parametrize("pyramid", ["simple", "fpn"])
@pytest.mark.parametrize("detector", ["mask", "faster"])
@pytest.mark.parametrize("head_norm", ["layer", "batch"])
@pytest.mark.parametrize("empty", [(2,), (0, 1, 2)])
def test_every_trained_parameter_gets_a_gradient(pyramid, detector, head_norm, empty):
    """Also if no image has an object: DDP waits for every gradient."""
    model = small(pyramid=pyramid, detector=detector, head_norm=head_norm).train()
    losses = model(*batch(detector == "mask", empty))
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert set(losses) == names | ({"loss_mask"} if detector == "mask" else set())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [] and not model.cls_token.requires_grad and model.roi_heads.training


def test_it_learns_where_the_object_is():
    """Overfitting one image with one object: the best detection has its box, class and mask, in the original image.
    Evaluation has as few proposals as training, which therefore has seen others like them. Measured on three seeds: IoU
    0.75 to 0.94 after 60 steps."""
    options = {f"rpn_{kind}_nms_top_n_{mode}": 64 for kind in ("pre", "post") for mode in ("train", "test")}
    options["box_batch_size_per_image"] = 32
    model = small(embed_dim=32, depth=2, num_heads=2, global_blocks=[1], rcnn=options).train()
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 8:32, 8:24] = 1
    target = {"boxes": torch.tensor([[8.0, 8, 24, 32]]), "labels": torch.tensor([2]), "masks": mask, "size": (40, 48)}
    imgs = 0.1 * torch.randn(1, 3, 64, 64) + 2 * mask
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(imgs, [target]).values()).backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()(imgs, [{"size": (40, 48), "original_size": (80, 144)}])
    assert found["labels"][0] == 2 and found["masks"].shape[1:] == (80, 144)
    ratio = box_iou(found["boxes"][:1], torch.tensor([[24.0, 16, 72, 64]]))
    truth = torch.zeros(80, 144, dtype=torch.bool)
    truth[16:64, 24:72] = True
    both = (found["masks"][0] & truth).sum() / (found["masks"][0] | truth).sum()
    assert ratio > 0.6 and both > 0.6


def test_strides_do_not_depend_on_the_padding():
    """Anchors and RoIs use the strides of the padded image, also if the first image fills only a part of it, and where
    the coarsest map has an odd side."""
    model = small(img_size=(48, 80)).eval()
    seen = []
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(torch.randn(1, 3, 48, 80), [{"size": (13, 17)}])
    assert model.roi_heads.box_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    (anchors,) = seen[0]
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).split(
        [3 * r * c for r, c in ((24, 40), (12, 20), (6, 10), (3, 5), (2, 3))]
    )
    assert [level.amax(0).tolist() for level in centres] == [[78, 46], [76, 44], [72, 40], [64, 32], [64, 32]]
    sides = (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt()
    assert sides.min() == pytest.approx(16, rel=0.05) and sides.max() == pytest.approx(256, rel=0.05)


def test_boxes_are_not_rounded_to_bf16():
    model = small().train()
    imgs, targets = batch()
    seen = []
    model.rpn.register_forward_hook(lambda module, inputs, output: seen.extend(output[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(imgs, targets)
    assert all(loss.dtype is torch.float32 and torch.isfinite(loss) for loss in losses.values())
    boxes = torch.cat(seen)
    assert boxes.dtype is torch.float32 and not torch.equal(boxes, boxes.bfloat16().float())


def test_detections_in_the_original_image():
    detections = {
        "boxes": torch.tensor([[4.0, 8, 12, 16], [0, 0, 20, 10]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": torch.ones(2, 1, 28, 28),
    }
    found = at_original_size(detections, (20, 40), (40, 120))
    assert found["boxes"].tolist() == [[12, 16, 36, 32], [0, 0, 60, 20]]
    for mask, (left, top, right, bottom) in zip(found["masks"], found["boxes"].int().tolist()):
        assert mask[top:bottom, left:right].all() and mask.sum() == (bottom - top) * (right - left)
    nothing = {name: value[:0] for name, value in detections.items()}
    assert at_original_size(nothing, (20, 40), (40, 120))["masks"].shape == (0, 40, 120)


def test_masks_are_pasted_at_pixel_centres():
    """Against the definition, one pixel at a time; boxes have fractions, and reach beyond the image."""
    mask = torch.rand(5, 4)
    for box in ([3.3, 2.6, 9.1, 7.9], [-4.0, 1.5, 5.0, 30.0], [2.2, 2.2, 2.4, 2.3], [11.0, 9.0, 20.0, 12.0]):
        pasted = paste_mask(mask, box, (10, 12))
        padded = F.pad(mask, (1, 1, 1, 1))
        for y, x in torch.cartesian_prod(torch.arange(10), torch.arange(12)).tolist():
            at = (y + 0.5 - box[1]) / (box[3] - box[1]) * 5 - 0.5, (x + 0.5 - box[0]) / (box[2] - box[0]) * 4 - 0.5
            value = 0.0
            if -1 < at[0] < 5 and -1 < at[1] < 4:
                (i, a), (j, b) = ((int(place + 1), (place + 1) % 1) for place in at)
                above, below = (padded[row, j] * (1 - b) + padded[row, j + 1] * b for row in (i, i + 1))
                value = above * (1 - a) + below * a
            if abs(value - 0.5) > 1e-5:
                assert pasted[y, x] == (value > 0.5), (box, y, x)


def test_layer_decay_groups_as_vitdet():
    model = small()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_lrd(model, 0.1, model.no_weight_decay(), 0.7)
    scales = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scales["blocks.3.attn.rel_pos_h"] == (pytest.approx(0.7), 0.1) and "cls_token" not in scales
    assert scales["pyramid.0.0.weight"] == scales["roi_heads.box_predictor.cls_score.weight"] == (1, 0.1)


def test_loading_an_autoencoder_and_taking_the_encoder_back(tmp_path):
    mae = models_mae.build_model("mae_vit_micro_patch4", img_size=16, patch_size=8)
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pth")
    model = small(window=0)
    report = load_into(model, read_weights(tmp_path / "mae.pth"))
    assert {n.split(".")[0] for n in report.missing if "rel_pos" not in n} == {"pyramid", "rpn", "roi_heads"}
    plain = small(window=0, rel_pos=False)
    load_into(plain, read_weights(tmp_path / "mae.pth"))
    imgs = torch.randn(1, 3, 64, 64)
    close(model.forward_maps(imgs, [3])[0], plain.forward_maps(imgs, [3])[0], TOL32)  # new tables are zero
    torch.save({"model": plain.state_dict()}, tmp_path / "detector.pth")
    vit = models_vit.build_model("vit_micro_patch4", img_size=64, patch_size=8, num_classes=0)
    report = load_into(vit, read_weights(tmp_path / "detector.pth"))
    assert {name.split(".")[0] for name in report.unexpected} == {"pyramid", "rpn", "roi_heads"}
    torch.save({"model": model.state_dict()}, tmp_path / "tables.pth")
    with pytest.raises(UserError, match=r"a detector of main_detect\.py; its encoder has .*rel_pos_h"):
        read_weights(tmp_path / "tables.pth")


REFUSED = {
    "odd grid": (dict(img_size=72), "--input_size 72 72 must be a multiple of two patches, 16"),
    "patch": (dict(img_size=60, patch_size=6), "--patch_size 6 must be a multiple of 4"),
    "anchors": (dict(anchors=[8, 16]), "--anchors 8 16: the pyramid needs 5 sizes"),
    "global": (dict(global_blocks=[4]), "--global_blocks 4: the encoder has the blocks 0 to 3"),
    "detector": (dict(detector="yolo"), "use mask or faster"),
    "pyramid": (dict(pyramid="bifpn"), "use simple or fpn"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refusals(mistake):
    options, message = REFUSED[mistake]
    with pytest.raises(UserError, match=re.escape(message)):
        small(**options)


def test_two_ranks_train_with_a_static_graph():
    """One rank sees images with objects, the other images without any; the weights stay the same on both."""
    first, second = rank_texts(ranks("helpers.dense_script", "detect", 2))
    assert first == second


def test_two_ranks_train_as_accumulation():
    """Gradients of two ranks are the mean of those of two micro-batches, although one rank has no object at all."""
    model, imgs, targets = objects_problem()
    for part in (slice(0, 2), slice(2, 4)):
        (sum(model(imgs[part], targets[part]).values()) / 2).backward()
    norms = [p.grad.norm().item() for p in model.parameters() if p.requires_grad]
    for text in rank_texts(ranks("helpers.dense_script", "objects", 2)):
        assert json.loads(text) == pytest.approx(norms, rel=1e-4, abs=1e-7)  # float32, in another order of sums
