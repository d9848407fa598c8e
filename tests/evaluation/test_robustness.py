"""Corruptions, corruption errors and evaluation sets: published constants, known answers, real commands, mistakes."""

import colorsys
import itertools
import json

import numpy as np
import pytest
import torch
from helpers.launch import scalars
from PIL import Image

import main_finetune
import main_linprobe
from evaluation import corruptions
from evaluation.corruptions import NAMES, SEVERITIES, corrupt
from evaluation.robustness import ALEXNET, ALEXNET_CLEAN, Classes, corruption_error, detection_aupr, open_folder
from tools import robustness
from util.errors import UserError
from util.report import ledger

FLAGS = "--num_workers 0 --device cpu --seed 3"


def run(*flags) -> dict:
    return robustness.main(robustness.get_args_parser().parse_args([*map(str, flags), *FLAGS.split()]))


def photograph(side: int, seed: int = 0) -> Image.Image:
    """Clouds in three colours of middle brightness: edges and smooth parts, as a photograph has."""
    rng = np.random.default_rng(seed)
    colours = [corruptions.plasma(side, side, 1.6, rng) for _ in range(3)]
    return Image.fromarray((255 * (0.25 + 0.5 * np.stack(colours, axis=2))).round().astype(np.uint8))


def distance(img, name: str, severity: int, index: int, **more) -> float:
    out = np.asarray(corrupt(img, name, severity, 0, index, **more), dtype=float)
    assert out.shape == np.asarray(img).shape
    return float(np.sqrt(((out - np.asarray(img, dtype=float)) ** 2).mean()))


# The corruptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("name", NAMES)
def test_severity_is_distance(name, side):
    """The mean distance from the clean image rises with severity, wherever the published parameters say so: the affine
    part of elastic_transform shrinks, the blurs of glass_blur and of fog's finer scales go up and down; frost replaces
    the image by something equally bright; motion_blur 3 and 4 at 32 pixels differ in the cut of the same Gaussian."""
    images = [photograph(side, seed) for seed in range(3 if side == 224 else 24)]
    severities = SEVERITIES if side < 224 else (1, 5)
    found = [np.mean([distance(img, name, s, i) for i, img in enumerate(images)]) for s in severities]
    assert found[0] > 0.3  # levels of 255: the weakest is defocus_blur at 32 pixels
    if name == "elastic_transform":
        return
    if name in ("glass_blur", "frost", "fog", "motion_blur"):
        assert found[-1] > found[0]
    else:
        assert all(later > earlier for earlier, later in itertools.pairwise(found)), found


@pytest.mark.parametrize(("side", "table"), [(32, 0), (64, 1), (224, 2)])
def test_noise_has_the_published_size(side, table):
    """On grey 128, where little is clipped, within the sampling error of 5 deviations; and rounding to whole levels."""
    img = Image.new("RGB", (side, side), (128, 128, 128))
    clean, n = 128 / 255, side * side * 3
    for severity in (1, 2):
        deviation = corruptions._TABLES["gaussian_noise"][table][severity - 1]
        values = np.asarray(corrupt(img, "gaussian_noise", severity, 0, 0)) / 255 - clean
        assert values.std() == pytest.approx(deviation, rel=5 / np.sqrt(2 * n) + 1e-3)
        photons = corruptions._TABLES["shot_noise"][table][severity - 1]
        values = np.asarray(corrupt(img, "shot_noise", severity, 0, 0)) / 255
        # Poisson: variance clean * photons / photons²; its kurtosis widens the error of the deviation a little.
        assert values.std() == pytest.approx(np.sqrt(clean / photons), rel=6 / np.sqrt(2 * n) + 2e-3)
    for severity in SEVERITIES:
        share = corruptions._TABLES["impulse_noise"][table][severity - 1]
        values = np.asarray(corrupt(img, "impulse_noise", severity, 0, 0))
        for level in (0, 255):  # half of the struck values each
            assert (values == level).mean() == pytest.approx(share / 2, abs=5 * np.sqrt(share / 2 / n))
        assert np.isin(values, (0, 128, 255)).all()


def test_digital_corruptions_against_their_formulas():
    img = photograph(64)
    x = np.asarray(img) / 255
    for severity, kept, added in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), (0.1, 0.2, 0.3, 0.4, 0.5)):
        expected = (x - x.mean((0, 1))) * kept + x.mean((0, 1))
        found = np.asarray(corrupt(img, "contrast", severity, 0, 0)) / 255
        assert np.abs(found - expected).max() <= 0.51 / 255  # rounding
        found = np.asarray(corrupt(img, "brightness", severity, 0, 0)) / 255
        for row, column in ((0, 0), (10, 50), (63, 63)):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[row, column])
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
            assert np.abs(found[row, column] - expected).max() <= 0.51 / 255
    black = np.asarray(corrupt(Image.new("RGB", (64, 64)), "brightness", 3, 0, 0))
    assert (black == round(0.3 * 255)).all()
    small = np.asarray(corrupt(img, "pixelate", 5, 0, 0))  # a half of the side: squares of 2
    assert (small == small[::2, ::2].repeat(2, 0).repeat(2, 1)).all()


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "elastic_transform"])
def test_blurs_keep_what_is_flat(name):
    """Weights sum to one (defocus_blur's to 0.994) and borders are continued: an even image stays as it is."""
    for side in (32, 64, 224):
        assert distance(Image.new("RGB", (side, side), (200, 100, 30)), name, 5, 0) <= (
            1.3 if name == "defocus_blur" else 0.6
        )


def test_frost_by_photographs(tmp_path):
    """An even photograph: the published weighted sum, to the rounding of the photograph's own levels."""
    Image.new("RGB", (300, 240), (100, 150, 200)).save(tmp_path / "a.png")
    photographs = corruptions.read_frost(str(tmp_path))
    img = photograph(224)
    found = np.asarray(corrupt(img, "frost", 3, 0, 0, photographs), dtype=float)
    expected = np.clip(0.7 * np.asarray(img) + 0.7 * np.array([100, 150, 200]), 0, 255)
    assert np.abs(found - expected).max() <= 0.51
    Image.new("RGB", (300, 100)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b.png is smaller than 224"):
        corruptions.read_frost(str(tmp_path))
    with pytest.raises(UserError, match="holds no"):
        corruptions.read_frost(str(tmp_path / "none"))


def test_frost_texture_is_as_bright_as_the_photographs():
    textures = [corruptions.frost_texture(96, 96, 0.3, np.random.default_rng(seed)) for seed in range(40)]
    # The benchmark's five: means 0.48 to 0.81 (0.64 in the middle), deviations 0.07 to 0.17, bluish.
    assert np.mean([t.mean() for t in textures]) == pytest.approx(
        0.64, abs=0.05
    )  # 40 draws of deviation 0.1: 3 of 0.016
    assert all(0.04 < t.mean(2).std() < 0.18 for t in textures)
    assert np.mean([t[..., 2].mean() - t[..., 0].mean() for t in textures]) > 0.05


def test_same_image_same_corruption():
    """Of (seed, index, corruption, severity); and of nothing else, the state of numpy's generator, say."""
    img = photograph(32)
    for name in NAMES:
        first = corrupt(img, name, 4, 1, 7)
        np.random.seed(0)
        assert first.tobytes() == corrupt(img, name, 4, 1, 7).tobytes()
        others = [corrupt(img, name, 4, 2, 7), corrupt(img, name, 4, 1, 8)]
        is_random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
        assert all((first.tobytes() != other.tobytes()) == is_random for other in others)


@pytest.mark.parametrize("size", [(8, 8), (50, 33), (20, 90), (64, 150)])
def test_any_size_and_grey(size):
    for mode in ("L", "RGB"):
        img = photograph(150).convert(mode).crop((0, 0, *size))
        for name in NAMES:
            for severity in (1, 5):
                out = corrupt(img, name, severity, 0, 0)
                assert out.size == size and out.mode == mode


# Errors ---------------------------------------------------------------------------------------------------------------


def test_mean_corruption_error():
    """AlexNet has 100; whoever errs half as often has 50; one corruption of 15 counts a fifteenth; severities count
    alike."""
    alexnet = {name: [error] * 5 for name, error in ALEXNET.items()}
    assert corruption_error(alexnet) == pytest.approx(100)
    half = {name: [0, error, error / 2, error / 2, error / 2] for name, error in ALEXNET.items()}
    assert corruption_error(half) == pytest.approx(50)
    assert corruption_error({**alexnet, "fog": [0] * 5}) == pytest.approx(100 * 14 / 15)
    assert corruption_error(alexnet, ALEXNET_CLEAN) == pytest.approx(100)
    assert corruption_error({name: [30.0] * 5 for name in NAMES}, clean=30.0) == pytest.approx(0)
    # By hand, all errors 50: the mean of 50 over the fifteen published numbers.
    by_hand = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7]
    assert corruption_error({name: [50.0] * 5 for name in NAMES}) == pytest.approx(np.mean([5000 / e for e in by_hand]))


def test_detection():
    assert detection_aupr(np.array([0.9, 0.8]), np.array([0.2, 0.1, 0.3])) == pytest.approx(100)
    # From the least confident on: foreign, known, foreign. Precision 1 at recall 1/2, then 2/3 at recall 1.
    assert detection_aupr(np.array([0.5]), np.array([0.1, 0.9])) == pytest.approx(100 * (1 / 2 * 1 + 1 / 2 * 2 / 3))


# Class folders --------------------------------------------------------------------------------------------------------


def test_places_of_folders(tmp_path):
    classes = Classes(4, ["n04", "n01", "n03", "n02"], "model.pth")
    assert classes.places(["n02", "n04"], "here").tolist() == [3, 0]
    assert classes.places(["0", "3", "1"], "here").tolist() == [0, 3, 1]  # ImageNet-V2
    digits = Classes(3, ["2", "0", "1"], "model.pth")  # names that are numbers are names
    assert digits.places(["0", "1", "2"], "here").tolist() == [1, 2, 0]
    with pytest.raises(UserError, match=r"here has the class 'n05', which is none of the 4 classes of model.pth"):
        classes.places(["n04", "n05"], "here")
    with pytest.raises(UserError, match="has the class '0'"):
        classes.places(["0", "4"], "here")
    with pytest.raises(UserError, match=r"model.pth does not name its 4 classes: give --classes"):
        Classes(4, None, "model.pth").places(["n01"], "here")
    assert Classes(4, None, "model.pth").places(["2", "3"], "here").tolist() == [2, 3]


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
def box(tmp_path_factory):
    """A classifier of four colours that is always right on clean images, and how it was trained."""
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


def test_a_perfect_classifier_and_its_subsets(box, tmp_path):
    """The checkpoint knows its classes: folders in any order, some of them, or numbers are judged right."""
    best, last = (torch.load(box / "out" / f"checkpoint-{name}.pth", weights_only=True) for name in ("best", 5))
    assert best["classes"] == last["classes"] == ["blue", "green", "grey", "red"]
    numbers = {str(place): COLOURS[name] for place, name in enumerate(sorted(COLOURS))}
    sets = {
        "all": COLOURS,
        "some": {name: COLOURS[name] for name in ("red", "green")},
        "numbers": numbers,
        "wrong": {"red": COLOURS["green"]},
    }
    folders = [write(tmp_path / name, colours) for name, colours in sets.items()]
    found = run(box / "out" / "checkpoint-best.pth", "--folders", *folders, "--out", tmp_path / "out" / "r.json")
    # Among the single class of the last folder, everything is red.
    assert found == {"all_acc1": 100, "some_acc1": 100, "numbers_acc1": 100, "wrong_acc1": 100}
    found = run(box / "out" / "checkpoint-best.pth", "--folders", *folders, "--all_classes")
    assert found == {"all_acc1": 100, "some_acc1": 100, "numbers_acc1": 100, "wrong_acc1": 0}
    (row,) = ledger.read(tmp_path / "out" / "results.jsonl")
    assert row["command"] == "robustness" and row["metrics"]["some_acc1"] == 100
    assert row["images_seen"] == 3 * (4 + 2 + 4 + 1) and row["data"]["some"]["images"] == 6
    assert scalars(tmp_path / "out" / "tensorboard-robustness", "robustness/all_acc1")[0][1] == 100


def test_restricted_to_the_classes_of_the_folder(box, tmp_path):
    """With the outputs of the folder's two classes alone, it does not matter what grey says."""
    folder = write(tmp_path / "two", {"red": (255, 70, 60), "green": (60, 230, 70)})
    bench = robustness.open_bench(robustness.get_args_parser().parse_args([str(box / "out" / "checkpoint-best.pth")]))
    evaluation = open_folder(folder, bench.classes)
    assert evaluation.places.tolist() == [1, 3]
    bench.judged.args.num_workers = 0
    right, confidence = bench.predict(evaluation)
    assert right.all() and (confidence > 0.5).all()  # of two classes, the larger probability
    bench.judged.model.head.bias.data[2] += 100.0  # grey
    assert bench.predict(evaluation)[0].all()
    bench.judged.args.all_classes = True
    assert not bench.predict(evaluation)[0].any()


def test_foreign_images(box, tmp_path):
    """Known: the images of the classes of the foreign folder alone. Chance and order as printed and by hand."""
    foreign = write(tmp_path / "o", {"red": (150, 120, 90), "blue": (140, 128, 160)}, count=5, noise=60)
    found = run(box / "out" / "checkpoint-best.pth", "--ood", foreign, "--in_distribution", box / "data" / "val")
    bench = robustness.open_bench(robustness.get_args_parser().parse_args([str(box / "out" / "checkpoint-best.pth")]))
    bench.judged.args.num_workers = 0
    outside = bench.predict(open_folder(foreign, bench.classes))[1]
    known = write(tmp_path / "known", {})
    for name in ("red", "blue"):
        (known / name).parent.mkdir(exist_ok=True)
        (known / name).symlink_to(box / "data" / "val" / name)
    inside = bench.predict(open_folder(known, bench.classes))[1]
    assert len(inside) == 12 and found == {"o_aupr": detection_aupr(inside, outside)}
    assert found["o_aupr"] > 100 * 10 / 22  # chance: the share of foreign images


def test_foreign_folders_called_otherwise(box, tmp_path, capsys):
    """Images that look like none of the classes, in folders of any name, against all images of the data set."""
    best, known = box / "out" / "checkpoint-best.pth", box / "data" / "val"
    foreign = write(tmp_path / "o", {"a": (128, 100, 90), "b": (140, 128, 60), "c": (90, 90, 40)}, count=5, noise=60)
    found = run(best, "--ood", foreign, "--in_distribution", known)
    assert "predictions are among all 4" in capsys.readouterr().out
    assert 100 * 15 / (15 + 24) < found["o_aupr"] <= 100
    with pytest.raises(UserError, match=r"has the class 'a', which is none of the 4"):
        write(foreign, {"red": COLOURS["red"]}, 1)
        run(best, "--ood", foreign, "--in_distribution", known)


# Corrupted sets -------------------------------------------------------------------------------------------------------


def test_corrupt_a_data_set(box, tmp_path, capsys):
    """Everything is right when clean; the JSON holds the whole table, the ledger its means, the picture all rows."""
    out = tmp_path / "c" / "corrupt.json"
    flags = [box / "out" / "checkpoint-best.pth", "--data_path", box / "data", "--corrupt", "--images", 12]
    found = run(*flags, "--out", out, "--picture", tmp_path / "c" / "picture.png")
    content = json.loads(out.read_text())
    assert content["result"] == found and found["clean_error"] == 0
    assert list(content["errors"]["imagefolder"]) == list(NAMES)
    table = np.array(list(content["errors"]["imagefolder"].values()))
    assert table.shape == (15, 5) and found["corrupted_error"] == pytest.approx(table.mean())
    assert found["jpeg_compression_error"] == 0  # colour is what it knows, and JPEG keeps it
    width, height = Image.open(tmp_path / "c" / "picture.png").size
    assert height > width > 1000
    (row,) = ledger.read(out.parent / "results.jsonl")
    assert row["metrics"] == found and row["images_seen"] == 12 * (1 + 75)
    assert "frost (synthetic)" in capsys.readouterr().out
    some = run(*flags, "--corruptions", "fog", "contrast")
    assert {name: found[name] for name in some if name != "corrupted_error"} == {
        name: value for name, value in some.items() if name != "corrupted_error"
    }


def test_corrupted_before_and_after_the_size(tmp_path):
    """A smaller image is corrupted as it is, a larger one in the size of the input; a part like the whole."""
    from evaluation.robustness import Corrupted, Shape
    from util.data.sources import Arrays, Subset
    from util.data.transforms import eval_transform

    images = Arrays(np.stack([np.asarray(photograph(32, seed)) for seed in range(3)]), [0, 1, 0], ["a", "b"])
    resized = eval_transform((64, 64), [0.5] * 3, [0.5] * 3).transforms[0]
    shape = Shape(resized, (64, 64), 3)
    found = Corrupted(images, "gaussian_noise", 2, shape, 5).load(1)
    assert found.tobytes() == resized(corrupt(images.load(1), "gaussian_noise", 2, 5, 1)).tobytes()
    smaller = eval_transform((16, 16), [0.5] * 3, [0.5] * 3).transforms[0]
    found = Corrupted(images, "gaussian_noise", 2, Shape(smaller, (16, 16), 3), 5)
    assert found.load(1).tobytes() == corrupt(smaller(images.load(1)), "gaussian_noise", 2, 5, 1).tobytes()
    part = Corrupted(Subset(images, [1, 2]), "gaussian_noise", 2, Shape(smaller, (16, 16), 3), 5)
    assert part.load(0).tobytes() == found.load(1).tobytes() and part.target(0) == 1


def test_folder_like_imagenet_c(box, tmp_path):
    """At severity s of the first two corruptions up to 3 of 6 images are in wrong folders, elsewhere none: the errors
    are known, and the mean corruption error follows from them."""
    root = tmp_path / "imagenet-c"
    for number, name in enumerate(NAMES):
        for severity in SEVERITIES:
            folder = root / ("noise" if number < 3 else "other") / name / str(severity)
            write(folder, {"red": COLOURS["red"], "green": COLOURS["green"]}, 3)
            for i in range(min(severity, 3) if number < 2 else 0):
                (folder / "red" / f"{i}.png").rename(folder / "green" / f"wrong{i}.png")
    (root / "extra" / "spatter" / "1").mkdir(parents=True)
    flags = [box / "out" / "checkpoint-best.pth", "--folders", root, "--clean", box / "data" / "val"]
    found = run(*flags, "--out", tmp_path / "r.json")
    share = [100 * min(severity, 3) / 6 for severity in SEVERITIES]
    errors = json.loads((tmp_path / "r.json").read_text())["errors"]["imagenet-c"]
    assert errors["gaussian_noise"] == pytest.approx(share) and errors["fog"] == [0] * 5
    expected = 100 * np.mean(share) * (1 / 88.6 + 1 / 89.4) / 15
    assert found["imagenet-c_mce"] == pytest.approx(expected)
    assert found["imagenet-c_clean_error"] == 0
    expected = 100 * np.mean(share) * (1 / (88.6 - 43.5) + 1 / (89.4 - 43.5)) / 15
    assert found["imagenet-c_relative_mce"] == pytest.approx(expected)
    (root / "noise" / "shot_noise").rename(root / "noise" / "other_noise")
    found = run(*flags)
    assert "imagenet-c_mce" not in found and found["imagenet-c_impulse_noise_error"] == 0
    (root / "other" / "fog" / "4").rename(root / "other" / "fog" / "six")
    with pytest.raises(UserError, match=r"fog/4 is missing: every corruption needs the severities 1 to 5"):
        run(*flags)


def test_a_probe_knows_its_classes(box, tmp_path):
    flags = f"--data_path {box}/data --finetune {box}/out/checkpoint-best.pth --num_workers 0 --device cpu --epochs 3 \
        --batch_size 16 --blr 0.1 --warmup_epochs 0 --aug none --output_dir {tmp_path}"
    main_linprobe.main(main_linprobe.get_args_parser().parse_args([*flags.split(), "--global_pool"]))
    write(tmp_path / "set", {"red": COLOURS["red"], "blue": COLOURS["blue"]})
    found = run(tmp_path / "checkpoint-2.pth", "--folders", tmp_path / "set")
    assert found == {"set_acc1": 100}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("{best} ", "nothing to judge: give --folders"),
        ("--folders {val}", "name a CHECKPOINT with a classifier"),
        ("random --folders {val}", "name a CHECKPOINT with a classifier"),
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
        ("{best} --folders {val} --corrupt --picture a.json", "--picture a.json must be a .png file"),
        ("{best} --folders {val} --out a.png", "--out a.png must be a .json file"),
        ("{best} --corrupt --dataset digits", "--dataset digits has the class '[0-9]'"),
        ("{best} --corrupt --dataset folder --data_path {data}", "has no labels"),
    ],
)
def test_mistakes(box, tmp_path, flags, said):
    state = torch.load(box / "out" / "checkpoint-best.pth", weights_only=True)
    torch.save({**state, "classes": None}, tmp_path / "unnamed.pth")
    bare = {name: tensor for name, tensor in state["model"].items() if not name.startswith("head")}
    torch.save({**state, "model": bare}, tmp_path / "bare.pth")
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    write(tmp_path / "strange", {"purple": (200, 0, 200), "red": (200, 0, 0)}, 1)
    places = dict(
        best=box / "out" / "checkpoint-best.pth",
        bare=tmp_path / "bare.pth",
        val=box / "data" / "val",
        strange=tmp_path / "strange",
        names=tmp_path / "names.txt",
        unnamed=tmp_path / "unnamed.pth",
        tmp=tmp_path,
        data=box / "data",
    )
    with pytest.raises(UserError, match=said):
        run(*flags.format(**places).split())
