"""Corruption errors and evaluation sets: published constants, known results, whole commands, and their errors."""

import json

import numpy as np
import pytest
import torch
from helpers.launch import scalars
from helpers.photographs import photograph
from PIL import Image

import main_finetune
import main_linprobe
from evaluation.corruptions import NAMES, SEVERITIES, corrupt
from evaluation.robustness import (
    ALEXNET,
    ALEXNET_CLEAN,
    Classes,
    Corrupted,
    Shape,
    corruption_error,
    detection_aupr,
    open_folder,
)
from tools import robustness
from util.data.sources import Arrays, Subset
from util.data.transforms import Converter, eval_transform
from util.errors import UserError
from util.report import ledger

FLAGS = "--num_workers 0 --device cpu --seed 3"


def run(*flags) -> dict:
    return robustness.main(robustness.get_args_parser().parse_args([*map(str, flags), *FLAGS.split()]))


# Errors ---------------------------------------------------------------------------------------------------------------


def test_mean_corruption_error():
    """AlexNet's errors give 100, half of them 50. The 15 corruptions have equal weights, and so have the severities."""
    alexnet = {name: [error] * 5 for name, error in ALEXNET.items()}
    assert corruption_error(alexnet) == pytest.approx(100)
    half = {name: [0, error, error / 2, error / 2, error / 2] for name, error in ALEXNET.items()}
    assert corruption_error(half) == pytest.approx(50)
    assert corruption_error({**alexnet, "fog": [0] * 5}) == pytest.approx(100 * 14 / 15)
    assert corruption_error(alexnet, ALEXNET_CLEAN) == pytest.approx(100)
    assert corruption_error({name: [30.0] * 5 for name in NAMES}, clean=30.0) == pytest.approx(0)
    # With all errors 50: the mean of 50 divided by each of the 15 published numbers.
    published = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7]
    expected = np.mean([5000 / error for error in published])
    assert corruption_error({name: [50.0] * 5 for name in NAMES}) == pytest.approx(expected)


def test_detection():
    assert detection_aupr(np.array([0.9, 0.8]), np.array([0.2, 0.1, 0.3])) == pytest.approx(100)
    # Ordered by confidence, lowest first: outside, inside, outside. Precision 1 at recall 1/2, then 2/3 at recall 1.
    assert detection_aupr(np.array([0.5]), np.array([0.1, 0.9])) == pytest.approx(100 * (1 / 2 * 1 + 1 / 2 * 2 / 3))


# Class folders --------------------------------------------------------------------------------------------------------


def test_class_indices_of_folders(tmp_path):
    classes = Classes(4, ["n04", "n01", "n03", "n02"], "model.pth")
    assert classes.output_indices(["n02", "n04"], "here").tolist() == [3, 0]
    assert classes.output_indices(["0", "3", "1"], "here").tolist() == [0, 3, 1]  # ImageNet-V2
    digits = Classes(3, ["2", "0", "1"], "model.pth")  # these numbers are names of classes, not indices
    assert digits.output_indices(["0", "1", "2"], "here").tolist() == [1, 2, 0]
    with pytest.raises(UserError, match=r"here has the class 'n05', which is none of the 4 classes of model.pth"):
        classes.output_indices(["n04", "n05"], "here")
    with pytest.raises(UserError, match="has the class '0'"):
        classes.output_indices(["0", "4"], "here")
    with pytest.raises(UserError, match=r"model.pth does not name its 4 classes: give --classes"):
        Classes(4, None, "model.pth").output_indices(["n01"], "here")
    assert Classes(4, None, "model.pth").output_indices(["2", "3"], "here").tolist() == [2, 3]


COLOURS = {"blue": (30, 40, 220), "green": (40, 200, 50), "grey": (128, 128, 128), "red": (220, 40, 30)}


def write(folder, colours, count: int = 3, noise: float = 12.0):
    rng = np.random.default_rng(len(colours))
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + rng.normal(0, noise, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a classifier of four colours, 100 % accurate on clean images, and with its training data."""
    folder = tmp_path_factory.mktemp("colours")
    write(folder / "data" / "train", COLOURS, 16)
    write(folder / "data" / "val", COLOURS, 6)
    flags = (
        f"--data_path {folder}/data --model vit_micro_patch4 --input_size 16 --num_workers 0 --device cpu --epochs 6 "
        "--warmup_epochs 0 --batch_size 16 --lr 1e-3 --layer_decay 1 --drop_path 0 --reprob 0 --smoothing 0 --aug crop "
        f"--output_dir {folder}/out --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25"
    ).split()
    args = main_finetune.get_args_parser().parse_args([*flags, "--aa", "none"])
    assert main_finetune.main(args)["acc1"] == 100
    return folder


def test_a_perfect_classifier_and_its_subsets(toy, tmp_path):
    """The checkpoint stores its classes, so class folders may be in any order, a subset of the classes, or numbers."""
    best, last = (torch.load(toy / "out" / f"checkpoint-{name}.pth", weights_only=True) for name in ("best", 5))
    assert best["classes"] == last["classes"] == ["blue", "green", "grey", "red"]
    numbers = {str(index): COLOURS[name] for index, name in enumerate(sorted(COLOURS))}
    sets = {
        "all": COLOURS,
        "some": {name: COLOURS[name] for name in ("red", "green")},
        "numbers": numbers,
        "wrong": {"red": COLOURS["green"]},
    }
    folders = [write(tmp_path / name, colours) for name, colours in sets.items()]
    result = run(toy / "out" / "checkpoint-best.pth", "--folders", *folders, "--out", tmp_path / "out" / "r.json")
    # The last folder has a single class, so every prediction is red.
    assert result == {"all_acc1": 100, "some_acc1": 100, "numbers_acc1": 100, "wrong_acc1": 100}
    result = run(toy / "out" / "checkpoint-best.pth", "--folders", *folders, "--all_classes")
    assert result == {"all_acc1": 100, "some_acc1": 100, "numbers_acc1": 100, "wrong_acc1": 0}
    (row,) = ledger.read(tmp_path / "out" / "results.jsonl")
    assert row["command"] == "robustness" and row["metrics"]["eval/some_acc1"] == 100
    assert row["images_seen"] == 3 * (4 + 2 + 4 + 1) and row["data"]["some"]["images"] == 6
    assert scalars(tmp_path / "out" / "tensorboard-robustness", "eval/all_acc1")[0][1] == 100


def test_restricted_to_the_classes_of_the_folder(toy, tmp_path):
    """Predictions are among the folder's two classes, so the output for grey has no effect."""
    folder = write(tmp_path / "two", {"red": (255, 70, 60), "green": (60, 230, 70)})
    bench = robustness.open_bench(robustness.get_args_parser().parse_args([str(toy / "out" / "checkpoint-best.pth")]))
    evaluation = open_folder(folder, bench.classes)
    assert evaluation.output_indices.tolist() == [1, 3]
    bench.judged.args.num_workers = 0
    right, confidence = bench.predict(evaluation)
    assert right.all() and (confidence > 0.5).all()  # the larger probability of two classes
    bench.judged.model.head.bias.data[2] += 100.0  # grey
    assert bench.predict(evaluation)[0].all()
    bench.judged.args.all_classes = True
    assert not bench.predict(evaluation)[0].any()


def test_out_of_distribution_images(toy, tmp_path):
    """Of the --in_distribution images only those of the classes in the --ood folder are used. The AUPR equals a direct
    computation."""
    foreign = write(tmp_path / "o", {"red": (150, 120, 90), "blue": (140, 128, 160)}, count=5, noise=60)
    result = run(toy / "out" / "checkpoint-best.pth", "--ood", foreign, "--in_distribution", toy / "data" / "val")
    bench = robustness.open_bench(robustness.get_args_parser().parse_args([str(toy / "out" / "checkpoint-best.pth")]))
    bench.judged.args.num_workers = 0
    outside = bench.predict(open_folder(foreign, bench.classes))[1]
    known = write(tmp_path / "known", {})
    for name in ("red", "blue"):
        (known / name).parent.mkdir(exist_ok=True)
        (known / name).symlink_to(toy / "data" / "val" / name)
    inside = bench.predict(open_folder(known, bench.classes))[1]
    assert len(inside) == 12 and result == {"o_aupr": detection_aupr(inside, outside)}
    assert result["o_aupr"] > 100 * 10 / 22  # chance is the share of --ood images


def test_recorded_images_of_a_detection(toy, tmp_path):
    """The ledger has the images that were compared: those that --images drew, of the classes of the --ood folder."""
    foreign = write(tmp_path / "o", {"red": (150, 120, 90), "blue": (140, 128, 160)}, count=5, noise=60)
    common = (toy / "out" / "checkpoint-best.pth", "--ood", foreign, "--in_distribution", toy / "data" / "val")
    run(*common, "--images", 8, "--out", tmp_path / "r.json")
    run(*common, "--out", tmp_path / "r.json")
    counts = [{name: split["images"] for name, split in row["data"].items()} for row in lines(tmp_path)]
    assert counts == [{"foreign": 8, "known": 8}, {"foreign": 10, "known": 12}]


def lines(folder) -> list[dict]:
    return ledger.read(folder / "results.jsonl")


def test_out_of_distribution_folders_of_other_names(toy, tmp_path, capsys):
    """--ood folders that have no names of classes are compared with all images of the data set."""
    best, known = toy / "out" / "checkpoint-best.pth", toy / "data" / "val"
    foreign = write(tmp_path / "o", {"a": (128, 100, 90), "b": (140, 128, 60), "c": (90, 90, 40)}, count=5, noise=60)
    result = run(best, "--ood", foreign, "--in_distribution", known)
    assert "predictions are among all 4" in capsys.readouterr().out
    assert 100 * 15 / (15 + 24) < result["o_aupr"] <= 100
    with pytest.raises(UserError, match=r"has the class 'a', which is none of the 4"):
        write(foreign, {"red": COLOURS["red"]}, 1)
        run(best, "--ood", foreign, "--in_distribution", known)


# Corrupted sets -------------------------------------------------------------------------------------------------------


def test_corrupt_a_data_set(toy, tmp_path, capsys):
    """There are no errors on clean images. The JSON file contains the whole table, the ledger its means, the picture a
    row for each corruption."""
    out = tmp_path / "c" / "corrupt.json"
    flags = [toy / "out" / "checkpoint-best.pth", "--data_path", toy / "data", "--corrupt", "--images", 12]
    result = run(*flags, "--out", out, "--picture", tmp_path / "c" / "picture.png")
    content = json.loads(out.read_text())
    published = {f"eval/{name}": value for name, value in result.items()}
    assert content["result"] == published and result["clean_error"] == 0
    assert list(content["errors"]["imagefolder"]) == list(NAMES)
    table = np.array(list(content["errors"]["imagefolder"].values()))
    assert table.shape == (15, 5) and result["corrupted_error"] == pytest.approx(table.mean())
    assert result["jpeg_compression_error"] == 0  # the classes differ in colour, which JPEG preserves
    width, height = Image.open(tmp_path / "c" / "picture.png").size
    assert height > width > 1000
    (row,) = ledger.read(out.parent / "results.jsonl")
    assert row["metrics"] == published and row["images_seen"] == 12 * (1 + 75)
    assert "frost (synthetic)" in capsys.readouterr().out
    some = run(*flags, "--corruptions", "fog", "contrast")
    assert {name: result[name] for name in some if name != "corrupted_error"} == {
        name: value for name, value in some.items() if name != "corrupted_error"
    }


def test_corrupted_before_and_after_the_size(tmp_path):
    """Smaller images are corrupted before resizing, larger ones after; a subset is corrupted like the whole set."""
    images = Arrays(np.stack([np.asarray(photograph(32, seed)) for seed in range(3)]), [0, 1, 0], ["a", "b"])
    resized = eval_transform((64, 64), [0.5] * 3, [0.5] * 3).transforms[0]
    shape = Shape(resized, (64, 64), Converter(3))
    result = Corrupted(images, "gaussian_noise", 2, shape, 5).load(1)
    assert result.tobytes() == resized(corrupt(images.load(1), "gaussian_noise", 2, 5, 1)).tobytes()
    smaller = eval_transform((16, 16), [0.5] * 3, [0.5] * 3).transforms[0]
    result = Corrupted(images, "gaussian_noise", 2, Shape(smaller, (16, 16), Converter(3)), 5)
    assert result.load(1).tobytes() == corrupt(smaller(images.load(1)), "gaussian_noise", 2, 5, 1).tobytes()
    part = Corrupted(Subset(images, [1, 2]), "gaussian_noise", 2, Shape(smaller, (16, 16), Converter(3)), 5)
    assert part.load(0).tobytes() == result.load(1).tobytes() and part.target(0) == 1


def test_folder_like_imagenet_c(toy, tmp_path):
    """The mean corruption error is that of known errors: at severity s of the first two corruptions min(s, 3) of 6
    images are in wrong folders, elsewhere none."""
    root = tmp_path / "imagenet-c"
    for number, name in enumerate(NAMES):
        for severity in SEVERITIES:
            folder = root / ("noise" if number < 3 else "other") / name / str(severity)
            write(folder, {"red": COLOURS["red"], "green": COLOURS["green"]}, 3)
            for i in range(min(severity, 3) if number < 2 else 0):
                (folder / "red" / f"{i}.png").rename(folder / "green" / f"wrong{i}.png")
    (root / "extra" / "spatter" / "1").mkdir(parents=True)
    flags = [toy / "out" / "checkpoint-best.pth", "--folders", root, "--clean", toy / "data" / "val"]
    result = run(*flags, "--out", tmp_path / "r.json")
    percent = [100 * min(severity, 3) / 6 for severity in SEVERITIES]
    errors = json.loads((tmp_path / "r.json").read_text())["errors"]["imagenet-c"]
    assert errors["gaussian_noise"] == pytest.approx(percent) and errors["fog"] == [0] * 5
    expected = 100 * np.mean(percent) * (1 / 88.6 + 1 / 89.4) / 15
    assert result["imagenet-c_mce"] == pytest.approx(expected)
    assert result["imagenet-c_clean_error"] == 0
    expected = 100 * np.mean(percent) * (1 / (88.6 - 43.5) + 1 / (89.4 - 43.5)) / 15
    assert result["imagenet-c_relative_mce"] == pytest.approx(expected)
    (root / "noise" / "shot_noise").rename(root / "noise" / "other_noise")
    result = run(*flags)
    assert "imagenet-c_mce" not in result and result["imagenet-c_impulse_noise_error"] == 0
    (root / "other" / "fog" / "4").rename(root / "other" / "fog" / "six")
    with pytest.raises(UserError, match=r"fog/4 is missing: every corruption needs the severities 1 to 5"):
        run(*flags)


def test_a_probe_stores_its_classes(toy, tmp_path):
    flags = f"--data_path {toy}/data --finetune {toy}/out/checkpoint-best.pth --num_workers 0 --device cpu --epochs 3 \
        --batch_size 16 --blr 0.1 --warmup_epochs 0 --aug none --output_dir {tmp_path}"
    main_linprobe.main(main_linprobe.get_args_parser().parse_args([*flags.split(), "--global_pool"]))
    write(tmp_path / "set", {"red": COLOURS["red"], "blue": COLOURS["blue"]})
    result = run(tmp_path / "checkpoint-2.pth", "--folders", tmp_path / "set")
    assert result == {"set_acc1": 100}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("{best} ", "nothing to judge: give --folders"),
        ("--folders {val}", "give a CHECKPOINT with a classifier"),
        ("random --folders {val}", "give a CHECKPOINT with a classifier"),
        ("{bare} --folders {val}", "has no classifier: fine-tune it first"),
        ("{best} --folders {strange}", "has the class 'purple', which is none of the 4 classes"),
        ("{best} --folders {tmp}/none", "none is not a folder"),
        ("{best} --folders {val} {val}", "two folders of the same name, val"),
        ("{best} --folders {val} --classes {names}", "names 2 classes, and the classifier of .* has 4"),
        ("{best} --folders {val} --train_classes {strange}", "names 2 classes, and the classifier"),
        ("{best} --folders {val} --train_classes {strange} --classes {names}", "both name the classes"),
        ("{best} --folders {val} --classes {tmp}/none", "--classes .*none is not a text file"),
        ("{unnamed} --folders {val}", "does not name its 4 classes"),
        ("{best} --ood {val}", "--ood and --in_distribution go together"),
        ("{best} --folders {val} --images 0", "--images 0 must be positive"),
        ("{best} --folders {val} --frost {val}", "--frost is for --corrupt"),
        ("{best} --folders {val} --picture a.png", "--picture is for --corrupt"),
        ("{best} --folders {val} --corrupt --picture a.json", "--picture a.json must be a .png, .pdf or .svg file"),
        ("{best} --folders {val} --out a.png", "--out a.png must be a .json file"),
        ("{best} --corrupt --dataset digits", "--dataset digits has the class '[0-9]'"),
        ("{best} --corrupt --dataset folder --data_path {data}", "has no labels"),
    ],
)
def test_mistakes(toy, tmp_path, flags, message):
    state = torch.load(toy / "out" / "checkpoint-best.pth", weights_only=True)
    torch.save({**state, "classes": None}, tmp_path / "unnamed.pth")
    bare = {name: tensor for name, tensor in state["model"].items() if not name.startswith("head")}
    torch.save({**state, "model": bare}, tmp_path / "bare.pth")
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    write(tmp_path / "strange", {"purple": (200, 0, 200), "red": (200, 0, 0)}, 1)
    paths = dict(
        best=toy / "out" / "checkpoint-best.pth",
        bare=tmp_path / "bare.pth",
        val=toy / "data" / "val",
        strange=tmp_path / "strange",
        names=tmp_path / "names.txt",
        unnamed=tmp_path / "unnamed.pth",
        tmp=tmp_path,
        data=toy / "data",
    )
    with pytest.raises(UserError, match=message):
        run(*flags.format(**paths).split())
