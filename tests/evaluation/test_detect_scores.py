"""Detection scores: Pascal VOC's against recorded numbers of detectron2, COCO's against pycocotools on files, two ranks
against one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.dense_script import all_scores, detections, rank_texts, scored
from helpers.launch import ranks
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.detect_scores import COCO_METRICS, CocoScores, VocClass, VocScores, average_precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recorded():
    return json.loads((Path(__file__).parent.parent / "fixtures" / "voc_ap.json").read_text())


def images_of(recorded):
    """The recorded images. VOC's corners count from 1 and include the last pixel; ours count from 0 and do not."""

    def half_open(x1, y1, x2, y2):
        return [x1 - 1, y1 - 1, x2, y2]

    objects = {}
    for image, label, box, difficult in recorded["gts"]:
        objects.setdefault(image, []).append((label, half_open(*box), difficult))
    found = {}
    for image, label, box, score in recorded["dets"]:
        found.setdefault(image, []).append((label, half_open(*box), score))

    def columns(rows, names):
        return {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}

    numbers = sorted(objects.keys() | found.keys())
    return {
        number: {
            "target": columns(objects.get(number, []), ("labels", "boxes", "difficult")),
            "found": columns(found.get(number, []), ("labels", "boxes", "scores")),
        }
        for number in numbers
    }


def test_average_precision_of_voc(recorded):
    images = images_of(recorded)
    for key, expected in recorded["ap"].items():
        label, eleven, threshold = key.split("/")
        ap = VocClass(images, int(label)).ap(float(threshold), eleven == "True")
        assert ap == pytest.approx(expected, rel=0, abs=1e-12)  # measured 6e-17


@pytest.mark.parametrize("eleven", [True, False])
def test_curves_with_known_area(eleven):
    assert average_precision(np.array([0.5, 1.0]), np.array([1.0, 1.0]), eleven) == pytest.approx(1)
    assert average_precision(np.zeros(0), np.zeros(0), eleven) == 0
    half = average_precision(np.array([0.5, 0.5]), np.array([1.0, 0.5]), eleven)
    assert half == pytest.approx(6 / 11 if eleven else 0.5)


def test_perfect_detections_score_100():
    _, targets = detections()
    for target in targets:
        del target["iscrowd"], target["difficult"]
    found = [{**target, "scores": torch.ones(len(target["labels"]))} for target in targets]
    stats, details, _ = scored(CocoScores(CPU, masks=True), found, targets)
    best = [stats[f"{kind}_AP{size}"] for kind in ("box", "mask") for size in ("", "50", "75", "s", "m")]
    assert best == pytest.approx([100.0] * 10) and list(details["box_AP"].values()) == pytest.approx([100.0] * 3)
    stats, _, _ = scored(VocScores(CPU, "area"), found, targets)
    assert [stats[name] for name in ("AP50", "AP75", "AP", "AP50_07")] == pytest.approx([100.0] * 4)


def test_difficult_objects_do_not_count():
    target = {
        "image_id": 0,
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
        "labels": torch.ones(2).long(),
    }
    target["difficult"] = torch.tensor([False, True])
    found = {"boxes": target["boxes"].flip(0), "labels": target["labels"], "scores": torch.tensor([0.9, 0.5])}
    assert scored(VocScores(CPU), [found], [target])[0]["AP50"] == 100
    target["difficult"] = torch.tensor([True, True])
    stats, _, summary = scored(VocScores(CPU), [found], [target])
    assert "AP50" not in stats and "no object is annotated" in summary


def xywh(boxes):
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes.double().tolist()]


@pytest.mark.parametrize("kind, iou_type", [("box", "bbox"), ("mask", "segm")])
def test_coco_scores_are_those_of_pycocotools_on_files(tmp_path, kind, iou_type):
    """And those of faster-coco-eval, another implementation, on the same files."""
    found, targets = detections()
    annotations, results = [], []
    for detection, target in zip(found, targets):
        codes = [rle.encode(np.asfortranarray(mask.numpy())) for mask in target["masks"]]
        texts = [{**code, "counts": code["counts"].decode()} for code in codes]
        for i, box in enumerate(xywh(target["boxes"])):
            entry = {"id": len(annotations) + 1, "image_id": target["image_id"], "bbox": box, "segmentation": texts[i]}
            entry |= {"category_id": 7 * int(target["labels"][i]), "iscrowd": int(target["iscrowd"][i])}
            annotations.append({**entry, "area": float(rle.area(codes[i]))})
        for i, box in enumerate(xywh(detection["boxes"])):
            entry = {"image_id": target["image_id"], "category_id": 7 * int(detection["labels"][i])}
            code = rle.encode(np.asfortranarray(detection["masks"][i].numpy()))
            shape = {"bbox": box} if kind == "box" else {"segmentation": {**code, "counts": code["counts"].decode()}}
            results.append({**entry, **shape, "score": float(detection["scores"][i])})
    images = [{"id": target["image_id"], "height": 120, "width": 150} for target in targets]
    categories = [{"id": 7 * label} for label in (1, 2, 3)]
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (tmp_path / "found.json").write_text(json.dumps(results))
    truth = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    stats, details, summary = scored(CocoScores(CPU, masks=True), found, targets)
    expected = dict(zip(COCO_METRICS, evaluation.stats.tolist()))
    assert {name for name, value in expected.items() if value < 0} == {"APl", "ARl"}  # no object is large
    ours = {name: stats[f"{kind}_{name}"] for name in COCO_METRICS if f"{kind}_{name}" in stats}
    assert ours == {name: 100 * value for name, value in expected.items() if value >= 0}
    assert 20 < ours["AP"] < 80 and "(no large objects)" in summary
    others = pytest.importorskip("faster_coco_eval")
    truth = others.COCO(str(tmp_path / "truth.json"))
    other = others.COCOeval_faster(truth, truth.loadRes(str(tmp_path / "found.json")), iou_type)
    other.run()
    assert ours == pytest.approx({name: 100 * value for name, value in zip(COCO_METRICS, other.stats) if value >= 0})
    assert np.mean(list(details[f"{kind}_AP"].values())) == pytest.approx(ours["AP"])


def test_without_detections_and_without_objects():
    found, targets = detections(3)
    nothing = [{name: value[:0] for name, value in each.items()} for each in found]
    stats, _, summary = scored(CocoScores(CPU, masks=True), nothing, targets)
    assert stats["box_AP"] == stats["mask_AP50"] == 0 and summary.startswith("box AP 0.00")
    blank = [{**target, **{name: target[name][:0] for name in ("boxes", "labels", "masks")}} for target in targets]
    stats, _, summary = scored(CocoScores(CPU, masks=True), found, blank)
    assert stats == {"skipped": 0} and summary == "no AP, because no object is annotated in these images"


def test_two_ranks_score_as_one():
    one = json.loads(json.dumps(all_scores()))
    for text in rank_texts(ranks("helpers.dense_script", "scores", 2)):
        assert json.loads(text) == one
    assert [stats["skipped"] for stats, _, _ in one] == [1, 1, 1]
