"""`--val_fraction` and `--group_column`: divisions of one list or folder, the same for every command."""

import hashlib
import math
import os
from collections import Counter

import numpy as np
import pytest
from helpers.plain_images import class_folders, contents, finetune_flags, flags, save
from sklearn.model_selection import StratifiedGroupKFold

from evaluation import judging
from methods.mlo.labelled_task import stratified_split
from tools import knn, make_lesions, predict
from util.arguments import check_numbers
from util.data.compact import PathList, Repeated
from util.data.labels import read_labelled
from util.data.list_flags import note_other_split
from util.data.readers import read_images
from util.data.sources import Arrays
from util.data.splits import hold_out
from util.errors import UserError

# The division ---------------------------------------------------------------------------------------------------------


def patients(seed: int, images: int = 600, count: int = 300):
    """Groups of very different sizes, and labels of very different frequencies."""
    rng = np.random.default_rng(seed)
    weights = rng.pareto(2, count) + 0.3
    groups = [f"PAT_{i}" for i in rng.choice(count, images, p=weights / weights.sum())]
    return groups, rng.choice(list("abcdef"), images, p=[0.37, 0.32, 0.11, 0.1, 0.07, 0.03])


def worst(held, labels, fraction: float) -> float:
    """The largest difference between a label's share that is held out and `fraction`."""
    return max(abs(held[labels == label].mean() - fraction) for label in set(labels))


@pytest.mark.parametrize("seed", range(5))
def test_whole_groups_and_even_shares(seed):
    """As even as scikit-learn's split, up to one image of the rarest label (of about 18)."""
    groups, labels = patients(seed)
    held = hold_out(groups, [(label,) for label in labels], 0.2)
    assert not {g for g, h in zip(groups, held) if h} & {g for g, h in zip(groups, held) if not h}
    theirs = np.zeros(len(labels), bool)
    theirs[next(StratifiedGroupKFold(5).split(labels, labels, groups))[1]] = True
    assert worst(held, labels, 0.2) <= max(worst(theirs, labels, 0.2), 0.03) + 1 / Counter(labels)["f"]
    assert abs(held.mean() - 0.2) < 0.01
    # A random sample of the patients, not those with the most images or the fewest.
    assert abs(len({g for g, h in zip(groups, held) if h}) / len(set(groups)) - 0.2) < 0.06


def test_the_order_of_the_images_does_not_matter():
    groups, labels = patients(0)
    order = np.random.default_rng(1).permutation(len(groups))
    held = hold_out(groups, [(label,) for label in labels], 0.3)
    shuffled = hold_out([groups[i] for i in order], [(labels[i],) for i in order], 0.3)
    assert (shuffled == held[order]).all()
    assert (hold_out(groups, [(label,) for label in labels], 0.3, salt="1") != held).any()


def test_the_division_is_the_same_in_every_version():
    """Runs of different versions are compared, and a checkpoint may be evaluated years later: pinned."""
    groups = [f"PAT_{i % 17}" for i in range(40)]
    held = hold_out(groups, [("mole" if i % 3 else "wart",) for i in range(40)], 0.25)
    assert sorted({group for group, is_held in zip(groups, held) if is_held}) == PINNED


PINNED = ["PAT_0", "PAT_15", "PAT_16", "PAT_4"]


def plain_division(groups, labels, fraction: float, salt: str) -> np.ndarray:
    """The rule of `hold_out`, group by group: what earlier revisions computed."""
    content: dict[str, Counter] = {}
    for group, own in zip(groups, labels):
        content.setdefault(group, Counter()).update(set(own) or {None})
    size, spread = Counter(), Counter()
    for counts in content.values():
        size.update(counts)
        spread.update(counts.keys())
    excess = {
        label: -min(max(1, round(fraction * count)), count - 1) * (spread[label] > 1) for label, count in size.items()
    }
    held, moved = set(), True
    order = sorted(content, key=lambda group: hashlib.sha256(os.fsencode(salt + group)).digest())
    for _ in range(20):
        moved = False
        for group in order:
            sign = -1 if group in held else 1
            terms = [c * (2 * sign * excess[label] + c) / size[label] ** 2 for label, c in content[group].items()]
            if math.fsum(terms) < 0:
                moved = True
                held ^= {group}
                for label, count in content[group].items():
                    excess[label] += sign * count
        if not moved:
            break
    return np.array([group in held for group in groups], bool)


@pytest.mark.parametrize("seed", range(40))
def test_the_division_is_that_of_the_plain_rule(seed):
    """For images and for patients, with one label, several or none, however groups and labels are stored."""
    rng = np.random.default_rng(seed)
    count, salt = int(rng.integers(1, 150)), "ab"[seed % 2]
    numbers = np.arange(count) if seed % 3 == 0 else rng.integers(0, int(rng.integers(1, count + 3)), count)
    groups = [f"é{number}" for number in numbers]
    names = [f"c{int(value)}" for value in rng.integers(0, 6, count) ** 2 // 6]
    fraction = float(rng.uniform(0.02, 0.95))
    expected = plain_division(groups, [(name,) for name in names], fraction, salt)
    for stored in (groups, PathList(groups), Repeated(groups)):
        assert (hold_out(stored, [(name,) for name in names], fraction, salt) == expected).all()
        assert (hold_out(stored, Repeated(names), fraction, salt) == expected).all()
    several = [[name for name in "abcd" if rng.random() < 0.3] for _ in groups]
    expected = plain_division(groups, several, fraction, salt)
    assert (hold_out(groups, several, fraction, salt) == expected).all()


def test_one_image_in_each_group():
    """Then the first images of each label are held out, in the order of their names' hashes: the rule for class folders
    since there is --val_fraction."""
    names = [f"{i}.png" for i in range(200)]
    labels = [i * i % 7 for i in range(200)]
    expected = set()
    for label in set(labels):
        own = [name for name, other in zip(names, labels) if other == label]
        own.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        expected |= set(own[: round(0.3 * len(own))])
    assert {n for n, h in zip(names, hold_out(names, [(label,) for label in labels], 0.3)) if h} == expected


def test_rare_labels():
    """A label of one group is for training, one of two groups is on both sides, whatever their sizes."""
    groups = [f"p{i}" for i in range(100)] + ["one"] * 5 + ["two"] * 9 + ["three"]
    labels = ["common"] * 100 + ["single"] * 5 + ["pair"] * 10
    held = hold_out(groups, [(label,) for label in labels], 0.2)
    sides = {label: set(held[np.array(labels) == label]) for label in set(labels)}
    assert sides == {"common": {True, False}, "single": {False}, "pair": {True, False}}
    assert held[groups.index("three")] and held.sum() == 21


def test_sets_of_labels_and_images_without_labels():
    rng = np.random.default_rng(0)
    labels = [[name for name, p in zip("abc", (0.5, 0.2, 0.1)) if rng.random() < p] for _ in range(500)]
    held = hold_out([f"p{i // 2}" for i in range(500)], labels, 0.2)
    for chosen in ([bool({name} & set(own)) for own in labels] for name in "abc"):
        assert abs(held[chosen].mean() - 0.2) < 0.02
    assert abs(held[[not own for own in labels]].mean() - 0.2) < 0.02


# Lists ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """A table of 60 images of 20 patients in two folders, a fifth of them malignant."""
    rows = ["patient,picture,size,label,findings"]
    for i in range(60):
        save(tmp_path / "images" / f"part_{i % 2}" / f"{i}.png", i)
        label = "malignant" if i % 20 < 4 else "benign"
        rows.append(f"P{i % 20},{i}.png,{i / 7:.3f},{label},{'a|b' if i % 2 else 'a'}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path


def words(root, *more, file="table.csv", fraction=0.25):
    where = ["--dataset", "filelist", "--data_path", root / "images", "--train_list", root / file]
    return [*where, "--image_column", "picture", *(["--val_fraction", fraction] if fraction else []), *more]


GROUPED = ("--group_column", "patient")


def values(images) -> set[int]:
    return {value for value, _ in contents(images)}


@pytest.mark.parametrize("more", [(), GROUPED])
def test_both_sides_of_a_table(table, more, capsys):
    train, held = (read_images(flags(*words(table, *more)), side) for side in (True, False))
    assert train.classes == held.classes == ["benign", "malignant"]
    assert sorted(values(train) | values(held)) == list(range(60)) and len(train) == 45
    assert sum(target == 1 for target in held.targets) == 3 and {v % 20 < 4 for v, t in contents(held) if t} == {True}
    patients = [{value % 20 for value in values(side)} for side in (train, held)]
    assert bool(patients[0] & patients[1]) == (not more)
    output = capsys.readouterr().out
    assert "--val_fraction 0.25: 15 of 60 images are for evaluation" in output
    assert ("those of 5 of 20 groups (patient)" in output) == bool(more)


def test_a_reordered_table_is_divided_alike(table):
    header, *rows = (table / "table.csv").read_text().split("\n")
    (table / "reordered.csv").write_text("\n".join([header, *sorted(rows, key=lambda row: row[::-1])]))
    for more in ((), GROUPED):
        args = [flags(*words(table, *more, file=name)) for name in ("table.csv", "reordered.csv")]
        assert values(read_images(args[0], False)) == values(read_images(args[1], False))


def test_every_command_has_the_same_division(table):
    """Pretraining, fine-tuning for classes, sets of labels and numbers, probing, prediction and the tools; whatever
    the seed."""
    expected = [values(read_images(flags(*words(table, *GROUPED)), side)) for side in (True, False)]
    sets = ("--targets", "multilabel", "--label_sep", "|")
    for targets in ((), sets, ("--targets", "multilabel"), ("--targets", "regression")):
        column = ("--label_column", "size") if "regression" in targets else ()
        args = finetune_flags(*words(table, *GROUPED, "--seed", 7, *targets, *column))
        if not column:
            assert [values(read_labelled(args, side)) for side in (True, False)] == expected
    args = judged(knn, table)
    assert [values(images) for images in judging.labelled_splits(args)] == expected
    args = judged(predict, table, "--out", "x.csv")
    assert values(predict.open_images(args, ["benign", "malignant"])[0]) == expected[1]
    args.split = "train"
    assert values(predict.open_images(args, None)[0]) == expected[0]


def judged(tool, table, *more):
    return tool.get_args_parser().parse_args(list(map(str, ["random", *words(table, *GROUPED, *more)])))


def test_sets_and_numbers_are_divided_by_groups(table):
    """Their vocabulary is that of the whole list, their mean that of the training images."""
    column = ("--label_column", "findings")
    args = finetune_flags(*words(table, *GROUPED, *column, "--targets", "multilabel", "--label_sep", "|"))
    train, held = (read_labelled(args, side) for side in (True, False))
    assert train.classes == held.classes == ["a", "b"] and len(train) == 45 and len(held) == 15
    assert all(len(target) == 1 + value % 2 for value, target in contents(held))
    args = finetune_flags(*words(table, *GROUPED, "--label_column", "size", "--targets", "regression"))
    train, held = (read_labelled(args, side) for side in (True, False))
    assert sorted(values(train) | values(held)) == list(range(60)) and 10 <= len(held) <= 20
    assert not {v % 20 for v in values(train)} & {v % 20 for v in values(held)}
    assert args.target_mean == [pytest.approx(np.mean([round(value / 7, 3) for value in values(train)]))]


def test_pretraining_must_know_the_labels(table):
    """They decide the division. A table without any is divided by its groups alone."""
    text = (table / "table.csv").read_text()
    (table / "table.csv").write_text(text.replace("label", "kind", 1))
    with pytest.raises(UserError, match="choose the labels with --label_column"):
        read_images(flags(*words(table)), True)
    assert len(read_images(flags(*words(table, "--label_column", "kind")), True)) == 45
    (table / "table.csv").write_text("\n".join(",".join(line.split(",")[:2]) for line in text.split("\n")))
    train = read_images(flags(*words(table, *GROUPED)), True)
    assert train.classes is None and len(train) == 45 and len({value % 20 for value in values(train)}) == 15


def test_a_note_on_weights_of_another_division(table, capsys):
    args = flags(*words(table, *GROUPED))
    named = flags(*words(table, *GROUPED, "--label_column", "label"))  # the column that is taken anyway
    for stored in (vars(args), vars(named), {}, {"train_list": "x.csv"}):
        note_other_split(args, "a.pth", stored)
    assert not capsys.readouterr().out
    note_other_split(args, "b.pth", vars(flags(*words(table))))
    expected = "b.pth was trained on another division of table.csv (--group_column was not given and is patient)"
    assert expected in capsys.readouterr().out
    note_other_split(args, "c.pth", vars(flags(*words(table, fraction=None))))
    assert "--val_fraction was not given and is 0.25" in capsys.readouterr().out


# Two lists, and refusals ----------------------------------------------------------------------------------------------


def test_lists_that_share_a_group(table):
    header, *rows = (table / "table.csv").read_text().split("\n")
    apart = [row for row in rows if int(row[1:].split(",")[0]) < 12]
    others = [row for row in rows if row not in apart]
    (table / "a.csv").write_text("\n".join([header, *apart]))
    (table / "b.csv").write_text("\n".join([header, *others]))
    given = words(table, "--val_list", table / "b.csv", *GROUPED, file="a.csv", fraction=None)
    assert [len(read_images(flags(*given), side)) for side in (True, False)] == [36, 24]
    (table / "b.csv").write_text("\n".join([header, *others, apart[3], apart[7]]))
    message = r"2 groups are in both lists, among them P3 with {} images in .*/{}\.csv and {} in .*: move all images"
    for side, found in ((True, (3, "a", 1)), (False, (1, "b", 3))):
        with pytest.raises(UserError, match=message.format(*found)):
            read_images(flags(*given), side)
    assert len(read_images(flags(*[word for word in given if word not in GROUPED]), False)) == 26
    alone = words(table, *GROUPED, file="a.csv", fraction=None)  # pretraining needs no second list
    assert len(set(read_images(flags(*alone), True).groups)) == 12


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ((), ("--group_column", "person"), "--group_column person is no column of .*table.csv, whose first line"),
        ((), ("--group_column", "picture"), "--group_column picture is the image column"),
        (("P3,", ","), GROUPED, r"has no group for 3 of 60 images, among them .*/3\.png: fill in this column"),
        (("P3,23.png", "P3,4.png"), GROUPED, r"has .*/4\.png in the groups P[34] and P[34]: an image can be in one"),
        (
            (),
            ("--group_column", "label", "--label_column", "label"),
            "--val_fraction 0.25 leaves no image for evaluation: a class needs images of two",
        ),
    ],
)
def test_refused_groups(table, change, more, message):
    text = (table / "table.csv").read_text()
    (table / "table.csv").write_text(text.replace(*change) if change else text)
    with pytest.raises(UserError, match=message):
        read_images(flags(*words(table, *more)), False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--dataset", "digits", "--val_fraction", 0.1), "--val_fraction is for --dataset imagefolder and filelist"),
        (("--dataset", "filelist", "--val_fraction", 0.1, "--val_list", "x"), "both choose the evaluation images"),
        (("--dataset", "digits", "--group_column", "p"), "--group_column p is for --dataset filelist and imagefolder"),
        (("--group_column", "p"), "--group_column p needs --val_fraction and --train_list with --dataset imagefolder"),
        (("--group_column", "p", "--val_fraction", 0.1), "--group_column p needs --train_list with"),
        (("--train_list", "x", "--val_fraction", 0.1), "--train_list is for --dataset filelist, not imagefolder"),
    ],
)
def test_flags_without_effect(argv, message):
    with pytest.raises(UserError, match=message):
        check_numbers(flags(*argv, size=None))


def test_a_list_to_divide_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"needs two text files: .*; or --train_list and --val_fraction"):
        read_images(flags("--dataset", "filelist", "--data_path", tmp_path, "--val_fraction", 0.1), False)


# Class folders --------------------------------------------------------------------------------------------------------


def test_class_folders_with_a_table_of_groups(tmp_path):
    """The labels are those of the folders; the table gives the groups, under names with or without the folder."""
    class_folders(tmp_path / "in", a=range(40), b=range(100, 120))
    names = [*(f"a/{i:03d}.png" for i in range(40)), *(f"b/{i:03d}.png" for i in range(100, 120))]
    given = ["--data_path", tmp_path / "in", "--val_fraction", 0.2, "--train_list", tmp_path / "groups.csv"]
    given += ["--group_column", "patient"]
    for cut in (0, 2):
        rows = [f"{name[cut:]},{int(name[2:5]) % 10},x" for name in names]
        (tmp_path / "groups.csv").write_text("\n".join(["image,patient,other", *rows, "gone.png,3,x"]))
        sides = [read_images(flags(*given), side) for side in (True, False)]
        assert not {v % 10 for v in values(sides[0])} & {v % 10 for v in values(sides[1])}
        assert [Counter(side.targets) for side in sides] == [{0: 32, 1: 16}, {0: 8, 1: 4}]
        assert set(sides[1].groups) == {str(v % 10) for v in values(sides[1])}
    (tmp_path / "groups.csv").write_text("\n".join(["image,patient,other", *rows[:-2]]))
    with pytest.raises(
        UserError, match=r"has no group for 2 of 60 images, among them .*b/118\.png: add them to the table"
    ):
        read_images(flags(*given), True)


# Held out of the training images --------------------------------------------------------------------------------------


def test_stage_three_has_whole_groups_of_its_own():
    groups, labels = patients(3)
    images = Arrays(
        np.zeros((len(groups), 2, 2), np.uint8), ["abcdef".index(label) for label in labels], list("abcdef")
    )
    images.groups = groups
    train, held = stratified_split(images, 0.2, 0)
    assert sorted(train + held) == list(range(600)) and not {groups[i] for i in train} & {groups[i] for i in held}
    assert stratified_split(images, 0.2, 0) == (train, held) != stratified_split(images, 0.2, 1)
    images.groups = ["rare" if label == "f" else group for group, label in zip(groups, labels)]
    with pytest.raises(UserError, match="leaves no image of class 'f' for stage III: its images are in too few groups"):
        stratified_split(images, 0.2, 0)


def test_patients_are_recognised():
    """In the made-up set, as in real ones: nearest neighbours by pixels score higher if a patient is on both sides."""
    rows, pictures = zip(*make_lesions.draw(patients=200, size=12, seed=0))
    pixels, labels = np.stack(pictures).reshape(len(rows), -1) / 255, np.array([row["diagnostic"] for row in rows])
    scores = {"img_id": [], "patient_id": []}
    for column, found in scores.items():
        for salt in range(6):
            held = hold_out([row[column] for row in rows], [(label,) for label in labels], 0.2, salt=str(salt))
            nearest = ((pixels[held][:, None] - pixels[~held]) ** 2).sum(-1).argmin(1)
            found.append((labels[~held][nearest] == labels[held]).mean())
    assert np.mean(scores["img_id"]) > np.mean(scores["patient_id"]) + 0.03


# The layout of PAD-UFES-20 --------------------------------------------------------------------------------------------


def test_the_layout_of_pad_ufes(tmp_path, capsys):
    """Its table has 26 columns; its images are in three folders, which a second extraction may nest."""
    root = tmp_path / "PAD"
    assert make_lesions.write(root, patients=40, size=8, seed=0) == 77
    (root / "imgs_part_2").rename(root / "x")
    (root / "imgs_part_2").mkdir()
    (root / "x").rename(root / "imgs_part_2" / "imgs_part_2")
    given = ["--dataset", "filelist", "--data_path", root, "--train_list", root / "metadata.csv"]
    given += ["--group_column", "patient_id", "--val_fraction", 0.2]
    sides = [read_images(flags(*given), side) for side in (True, False)]
    assert sides[0].classes == ["ACK", "BCC", "MEL", "NEV", "SCC", "SEK"] and sum(map(len, sides)) == 77
    owners = [{side.name(i).rsplit("/", 1)[1].split("_")[1] for i in range(len(side))} for side in sides]
    assert not owners[0] & owners[1] and {f"PAT_{owner}" for owner in owners[1]} == set(sides[1].groups)
    assert all(side.load(i).size == (8, 8) for side in sides for i in range(len(side)))
    out = capsys.readouterr().out
    assert "images from img_id, labels from diagnostic, groups from patient_id; names are those in subfolders" in out
