"""List files as other tools write them: separators, headers, columns, identifiers, one-hot labels; and what is refused
or noted instead of becoming classes."""

import re

import pytest
from helpers.plain_images import contents, finetune_flags, flags, save

from util.data.labels import read_labelled
from util.data.readers import read_images
from util.errors import UserError

NAMES = [f"{number}.png" for number in range(4)]


@pytest.fixture
def root(tmp_path):
    for value, name in enumerate(NAMES):
        save(tmp_path / "in" / name, value)
    return tmp_path


def listed(root, text: str, *argv, parse=finetune_flags):
    (root / "list.csv").write_text(text, encoding="utf-8")
    where = ["--dataset", "filelist", "--data_path", root / "in", "--train_list", root / "list.csv"]
    return read_images(parse(*where, *argv), True)


def rows(separator=",", header=""):
    """Four images of the classes b, a, b, a."""
    lines = [f"{name}{separator}{label}" for name, label in zip(NAMES, "baba")]
    return "\n".join([*([header] if header else []), *lines])


@pytest.mark.parametrize("separator", ["\t", ",", ";", " ", ", "])
@pytest.mark.parametrize("header", ["", "id{}label", "Image Name{}Finding"])
def test_separators_and_headers(root, separator, header, capsys):
    if separator == " " and "Name" in header:
        header = "image{}finding"  # with spaces, a header has as many words as there are columns
    images = listed(root, rows(separator, header.format(separator)))
    assert contents(images) == [(0, 1), (1, 0), (2, 1), (3, 0)] and images.classes == ["a", "b"]
    output = capsys.readouterr().out
    assert bool(output) == bool(header or separator != "\t")  # our own lists are read without a word
    assert not header or f"the header {', '.join(part.strip() for part in header.format('|').split('|'))}" in output


@pytest.mark.parametrize("name", ["a,b.png", "a b.png", "a;b.png", "a, b;c d.png"])
@pytest.mark.parametrize("label", ["", "\tx", ',"x, y"', " x"])
def test_separators_in_paths(root, name, label):
    """A line that is a path as a whole is one; a path with a separator can be quoted."""
    save(root / "in" / name, 9)
    quoted = f'"{name}"' if label.startswith(",") else name
    images = listed(root, "\n".join([quoted + label, f"0.png{label}"] * 3))
    assert [value for value, _ in contents(images)] == [9, 0] * 3
    assert images.classes == {"": None, ',"x, y"': ["x, y"]}.get(label, ["x"])


def test_a_missing_first_image_is_no_header(root):
    images = listed(root, "gone_7.png\tx\n0.png\ty\n1.png\tx")
    assert len(images) == 3 and images.classes == ["x", "y"]
    images = listed(root, "scan_7\tx\n0\ty\n1\tx")  # identifiers without an ending
    assert len(images) == 3 and images.name(1).endswith("/0.png")


HAM = "lesion_id,image_id,dx,dx_type,age\n" + "\n".join(f"L{i},{i},{dx},histo,{i}.5" for i, dx in enumerate("nmnm"))


def test_columns_by_their_usual_names(root):
    """Identifiers in the second column, as in HAM10000; the number of the image is also the start of other cells."""
    images = listed(root, HAM)
    assert contents(images) == [(0, 1), (1, 0), (2, 1), (3, 0)] and images.classes == ["m", "n"]
    chosen = listed(root, HAM, "--image_column", "image_id", "--label_column", "Lesion ID")
    assert chosen.classes == ["L0", "L1", "L2", "L3"]
    chosen = listed(root, "\n".join(HAM.splitlines()[1:]), "--image_column", 2, "--label_column", 3)
    assert contents(chosen) == contents(images) and chosen.classes == ["m", "n"]


def test_the_line_of_excel(root):
    images = listed(root, "sep=;\nimage;label\n0.png;b\n1.png;a")
    assert contents(images) == [(0, 1), (1, 0)] and images.classes == ["a", "b"]


def test_nan_is_no_class(root):
    with pytest.raises(UserError, match="has no label for 1 of 3 images"):
        listed(root, "image,label\n0.png,b\n1.png,nan\n2.png,a")


def test_boxes_of_imagenet(root, capsys):
    text = "ImageId,PredictionString\n0,n01 1 2 3 4 n01 5 6 7 8 \n1,n02 1 2 3 4 \n2,n01 0 0 9 9 "
    images = listed(root, text)
    assert contents(images) == [(0, 0), (1, 1), (2, 0)] and images.classes == ["n01", "n02"]
    assert "has boxes behind its labels" in capsys.readouterr().out


def test_names_of_windows_and_identifiers(root, capsys):
    save(root / "in" / "train" / "x" / "5.JPG", 5)
    images = listed(root, "image,label\n" + "train\\x\\5.JPG,x\n" * 2)
    assert images.name(0).endswith("train/x/5.JPG") and "backslashes" in capsys.readouterr().out
    images = listed(root, "image,label\ntrain/x/5,x\n0,y\n1.png,y\n")
    assert [images.name(i).rsplit("/", 1)[1] for i in range(3)] == ["5.JPG", "0.png", "1.png"]
    assert capsys.readouterr().out.count("are appended to the names") == 1


def test_names_in_subfolders(root, capsys):
    """HAM10000 and PAD-UFES-20 have their images in parts, and the file names alone in their tables."""
    for number in range(4):
        (root / "in" / f"part_{number % 2}" / "x").mkdir(parents=True, exist_ok=True)
        (root / "in" / NAMES[number]).rename(root / "in" / f"part_{number % 2}" / "x" / NAMES[number])
    for text in (HAM, re.sub(r",(\d),", r",\1.png,", HAM)):
        assert contents(listed(root, text)) == [(0, 1), (1, 0), (2, 1), (3, 0)]
    assert "names are those in subfolders" in capsys.readouterr().out
    save(root / "in" / "part_1" / "2.png")
    with pytest.raises(
        UserError, match=r"a list names 2, which is both part_0/x/2\.png and part_1/2\.png in .*: remove"
    ):
        listed(root, HAM)
    (root / "in" / "a" / "b" / "c").mkdir(parents=True)  # three levels are searched
    (root / "in" / "part_1" / "2.png").rename(root / "in" / "a" / "b" / "c" / "7.png")
    (root / "in" / "part_1" / "again").symlink_to(root / "in")  # every image is there twice
    images = listed(root, "image,label\n7.png,x\n8.png,y\n3,y")
    assert [images.name(i).removeprefix(f"{root}/in/") for i in range(3)] == ["a/b/c/7.png", "8.png", "part_1/x/3.png"]
    with pytest.raises(UserError, match=r"names 9\.png, which is not a file below"):
        listed(root, "9.png\tx\n8.png\ty")


def test_subfolders_are_not_searched_without_need(root, monkeypatch):
    """A list with a missing image must not start a search of a large folder."""
    monkeypatch.setattr("util.data.list_names._images_in_subfolders", lambda *_: pytest.fail("searched"))
    assert len(listed(root, "image,label\n0.png,x\ngone.png,y\n1.png,x")) == 3


ONE_HOT = "image,MEL,NV,BCC\n0,0.0,1.0,0.0\n1,1.0,0.0,0.0\n2,0.0,1.0,0.0\n3,0.0,0.0,1.0"


def test_one_hot_columns(root):
    """As in ISIC 2019. The classes have the order of the flag, and a class may be absent."""
    images = listed(root, ONE_HOT, "--label_column", "NV", "MEL", "BCC")
    assert images.targets == [0, 1, 0, 2] and images.classes == ["NV", "MEL", "BCC"]
    with pytest.raises(UserError, match=r"MEL, NV, BCC contain 0 and 1, and may be given together"):
        listed(root, ONE_HOT)
    with pytest.raises(UserError, match=r"has a 1 in 0 of its label columns for .*3\.png \(1 such rows\)"):
        listed(root, ONE_HOT, "--label_column", "MEL", "NV")
    with pytest.raises(UserError, match=r"has '0\.5' in the column NV"):
        listed(root, ONE_HOT.replace("0,0.0,1.0", "0,0.0,0.5"), "--label_column", "MEL", "NV")


def multilabel(root, text, *argv):
    (root / "list.csv").write_text(text, encoding="utf-8")
    words = ["--dataset", "filelist", "--data_path", root / "in", "--train_list", root / "list.csv"]
    images = read_labelled(finetune_flags(*words, "--targets", "multilabel", *argv), True)
    return images.targets, images.classes


def test_sets_of_labels(root, capsys):
    expected = [(0, 1), (1,), (0,), (2,)], ["a", "b", "c"]
    for separator, argv in ((",", ()), ("|", ("--label_sep", "|")), ("; ", ("--label_sep", ";"))):
        cells = [separator.join(cell) for cell in ("ab", "b", "a", "c")]
        text = "Image Index,Finding Labels,Age\n"
        text += "\n".join(f'{name},"{cell}",7' for name, cell in zip(NAMES, cells))
        assert multilabel(root, text, *argv) == expected
    columns = "Path,Sex,a,b,c\n0.png,F,1.0,1.0,\n1.png,M,-1.0,1.0,0.0\n2.png,F,1.0,0.0,\n3.png,M,0.0,,1.0"
    assert multilabel(root, columns, "--label_column", "a", "b", "c") == expected  # as in CheXpert
    assert "note: 4 cells of the label columns" in capsys.readouterr().out


SETS = "\n".join(f"{name}\t{label}" for name, label in zip(NAMES, ["a|b", "b|c", "a|c", "b"]))


def test_what_is_no_class(root, capsys):
    """Combinations of labels, measurements and empty cells do not become classes in silence."""
    with pytest.raises(UserError, match=r"such as 'a\|b' .*--targets multilabel --label_sep '\|'"):
        listed(root, SETS)
    assert len(listed(root, SETS, "--label_sep", "").classes) == 4
    few = "0.png\ta|b\n1.png\ta\n2.png\tb\n3.png\tb"
    capsys.readouterr()
    assert len(listed(root, few).classes) == 3 and "--label_sep '|' reads sets" in capsys.readouterr().out
    names = "0.png\ttench, Tinca tinca\n1.png\tcrane\n2.png\tcrane, bird\n3.png\tcrane"  # of ImageNet: no sets
    assert len(listed(root, names).classes) == 3 and not capsys.readouterr().out
    with pytest.raises(UserError, match=r"has no label for 1 of 4 images, among them .*2\.png"):
        listed(root, "0.png\ta\n1.png\tb\n2.png\t\n3.png\tb")
    assert listed(root, "".join(f"{name}\t\n" for name in NAMES)).classes is None


def test_measurements_are_no_classes(root):
    for value in range(60):
        save(root / "in" / f"m{value}.png", value)
    text = "id,age\n" + "\n".join(f"m{value}.png,{30 + value / 7:.3f}" for value in range(60))
    with pytest.raises(UserError, match=r"60 different numbers as labels, such as 30\.000: .*--targets regression"):
        listed(root, text)
    versions = "\n".join(f"m{value}.png\t{1 + value % 9 / 10}" for value in range(60))
    assert len(listed(root, versions).classes) == 9


@pytest.mark.parametrize(
    "text", [HAM.replace("dx,", "kind,"), SETS, "0.png\t1.25\n1.png\t2.5\n2.png\t3.75\n3.png\t4.25\n" * 5]
)
def test_pretraining_does_not_need_labels(root, text, capsys):
    images = listed(root, text.replace("4.25\n" * 5, "4.25"), parse=flags)
    assert images.classes is None or len(images.classes) == 4
    assert images.classes or "the images are read without labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        ("id,label\n5.png,a\n6.png,b", [], r"names id,label, which is not a file below"),
        (HAM.replace("dx,", "kind,"), [], r"columns lesion_id, image_id, kind, dx_type, age: choose .*--label_column"),
        ("mask,picture,label\n0.png,1.png,a\n2.png,3.png,b", [], r"several columns .*mask, picture.*--image_column"),
        ("0.png,a,7\n1.png,b,8", [], "3 columns and no header: choose columns by number"),
        ("0.png,a\n1.png,b,c", [], r"2 cells in its first line and 3 in line 2, separated by commas: put .* in quotes"),
        ('0.png,a\n1.png,"b\n2.png,b', [], "cannot be read as cells separated by commas"),
        (HAM, ["--label_column", "kind"], "--label_column kind is no column"),
        (HAM, ["--image_column", "picture"], "--image_column picture is no column"),
        (HAM, ["--label_column", "image_id"], "names the image column or a column twice"),
    ],
)
def test_refusals(root, text, argv, words):
    with pytest.raises(UserError, match=words):
        listed(root, text, *argv)
