"""A main for `launch.ranks` on dense tasks: a detector in DDP with a static graph (`detect`), a segmenter and a
detector whose two ranks train as one process does (`segment`, `objects`), scores of both tasks gathered (`scores`).
Output lines start with "rank R:"."""

import json
import sys
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

import main_pretrain
import models_detect
import models_segment
from evaluation.detect_scores import CocoScores, VocScores
from evaluation.segment_scores import SegmentScores
from util.parallel import distributed


def say(text):
    sys.stdout.write(f"rank {distributed.get_rank()}: {text}\n")  # one write, so that lines of ranks do not mix
    sys.stdout.flush()


def rank_texts(output, ranks=2):
    """What `say` printed on each rank, one line a rank."""
    lines = dict(line.split(": ", 1) for line in output.splitlines() if line.startswith("rank "))
    return [lines[f"rank {rank}"] for rank in range(ranks)]


def start():
    distributed.init_distributed_mode(main_pretrain.get_args_parser().parse_args(["--device", "cpu"]))


def detect():
    """Print the sum of the weights after three steps; rank 1 never sees an object, rank 0 in the first step only."""
    start()
    torch.manual_seed(0)
    sizes = dict(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, window=3, global_blocks=[1], head_width=16
    )
    model = models_detect.build_model("vit_micro_patch4", 3, **sizes)
    ddp = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + distributed.get_rank())
    for step in range(3):
        count = 1 if (distributed.get_rank(), step) == (0, 0) else 0
        target = {"boxes": torch.tensor([[8.0, 8, 24, 32]] * count).reshape(-1, 4), "labels": torch.ones(count).long()}
        target["masks"] = torch.ones(count, 64, 64, dtype=torch.uint8)
        optimizer.zero_grad()
        sum(ddp(torch.randn(1, 3, 64, 64), [target]).values()).backward()
        optimizer.step()
    say(sum(p.double().sum() for p in model.parameters()).item())
    distributed.shut_down()


def objects_problem():
    """A small detector that samples all proposals, so that no random number matters, and four images. The last two,
    which are those of rank 1, have no objects; the first ones have different numbers of them."""
    torch.manual_seed(0)
    sizes = dict(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, window=3, global_blocks=[1], head_width=16
    )
    every = dict(rpn_batch_size_per_image=10**6, box_batch_size_per_image=10**6)
    model = models_detect.build_model("vit_micro_patch4", 3, rcnn=every, **sizes)
    boxes = torch.tensor([[8.0, 8, 24, 32], [20, 4, 40, 20], [30, 30, 60, 64]])
    targets = []
    for count in (1, 3, 0, 0):
        masks = torch.zeros(count, 64, 64, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes[:count], "labels": 1 + torch.arange(count), "masks": masks})
    return model, torch.randn(4, 3, 64, 64), targets


def segment_problem():
    """A small segmenter without dropout and with layer norm, four images and their labels; half of one is ignored."""
    torch.manual_seed(0)
    sizes = dict(img_size=16, embed_dim=32, depth=4, num_heads=2, head_norm="layer", dropout=0.0, aux_width=8)
    model = models_segment.build_model("vit_micro_patch4", 3, **sizes).double()
    labels = torch.randint(0, 3, (4, 16, 16))
    labels[0, 8:] = 255
    return model, torch.randn(4, 3, 16, 16).double(), labels


def say_gradients(problem):
    """Print the norms of the gradients of two ranks with two of the four images each."""
    start()
    model, imgs, targets = problem()
    mine = slice(2 * distributed.get_rank(), 2 * distributed.get_rank() + 2)
    ddp = DistributedDataParallel(model, static_graph=True)
    sum(ddp(imgs[mine], targets[mine]).values()).backward()
    say(json.dumps([p.grad.norm().item() for p in model.parameters() if p.requires_grad]))
    distributed.shut_down()


def detections(count: int = 12, classes: int = 3):
    """Detections and targets of made-up images: boxes and masks near the objects, and some elsewhere. The last image
    has no object, and not every class occurs in each."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator)

    def boxes_and_masks(boxes):
        masks = torch.zeros(len(boxes), 120, 150, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist()):
            mask[top:bottom, left:right] = 1
        return {"boxes": boxes, "masks": masks}

    found, targets = [], []
    for number in range(count):
        objects = 0 if number == count - 1 else 5
        corner, side = 60 * draw(objects, 2), 5 + 55 * draw(objects, 2) ** 2
        boxes = torch.cat([corner, corner + side], dim=1)
        labels = 1 + (classes * draw(objects)).long()
        targets.append({"image_id": 10 * number, "labels": labels, **boxes_and_masks(boxes)})
        targets[-1] |= {"iscrowd": (draw(objects) < 0.1).long(), "difficult": draw(objects) < 0.2}
        near = torch.cat([boxes.repeat(2, 1) + 6 * draw(2 * objects, 4) - 3, 20 + 60 * draw(3, 4).sort(dim=1)[0]])
        near = near.clamp(min=0)
        labels = torch.cat([labels.repeat(2), torch.tensor([1, 2, 3])])
        found.append({"labels": labels, "scores": draw(len(near)), **boxes_and_masks(near)})
    return found, targets


def maps(count: int = 6, classes: int = 5):
    """Predicted and true classes of made-up images; the last class neither occurs nor is predicted, the one before is
    predicted and does not occur."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes - 2, (count, 9, 11), generator=generator)
    predicted = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, truth * 0 + 3)
    truth[:, :2] = 255
    return predicted, truth


def scored(scores, predicted, targets, bad=()):
    """Return the scores of this rank's images, every second one, given as batches of two."""
    mine = list(range(len(targets)))[distributed.get_rank() :: distributed.get_world_size()]
    for first in range(0, len(mine), 2):
        batch = mine[first : first + 2]
        good = torch.tensor([number not in bad for number in batch])
        scores.add([predicted[i] for i in batch], [targets[i] for i in batch], good)
    stats = scores.read()
    return stats, scores.details(None), scores.summary(stats)


def all_scores():
    device = torch.device("cpu")
    return [
        scored(CocoScores(device, masks=True), *detections(), bad=(4,)),
        scored(VocScores(device), *detections(), bad=(4,)),
        scored(SegmentScores(device, 5), *maps(), bad=(2,)),
    ]


def scores():
    start()
    say(json.dumps(all_scores()))
    distributed.shut_down()


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def main(words):
    parts = {"detect": detect, "scores": scores}
    parts |= {"objects": lambda: say_gradients(objects_problem), "segment": lambda: say_gradients(segment_problem)}
    parts[words[0]]()
