"""Members of shards: names with dots, several images of one key, other files; what is left out is counted and named."""

import io
import random
import tarfile

import pytest
from helpers.plain_images import flags
from helpers.strange import encoded, plain, write_shard
from webdataset.tariterators import base_plus_ext, group_by_keys

import util.data.shard_loader
from util.data.readers import read_images
from util.data.shard_loader import read_shard
from util.data.shard_members import IMAGE_ENDINGS, LOOKAHEAD, LeftOut, members_of, samples_of
from util.data.shards import count_images
from util.errors import UserError

IMAGE = encoded(plain(), "PNG")
CASES = {
    "one name with dots": ({"scan_2024.01.00.png": b""}, [("scan_2024.01.00.png", None)]),
    "a series with labels": (
        {"s.01.png": b"", "s.01.cls": b"3", "s.02.png": b"", "s.02.cls": b"4"},
        [("s.01.png", b"3"), ("s.02.png", b"4")],
    ),
    "names with and without dots": (
        {"cat.png": b"", "scan.01.png": b"", "v1.0/dog.jpg": b"", "v1.0/a.b.jpg": b""},
        [("cat.png", None), ("scan.01.png", None), ("v1.0/dog.jpg", None), ("v1.0/a.b.jpg", None)],
    ),
    "further images before and after": (
        {f"{i}.{end}": str(i).encode() for i in (7, 8) for end in ("depth.png", "jpg", "seg.png", "cls")},
        [("7.jpg", b"7"), ("8.jpg", b"8")],
    ),
    "a further image of a sample without its own": (
        {"7.jpg": b"", "7.cls": b"1", "8.seg.png": b"", "8.cls": b"2"},
        [("7.jpg", b"1")],
    ),
    "two formats": ({"a.jpg": b"", "a.png": b"", "a.cls": b"1"}, [("a.jpg", b"1")]),
    "the only image of a key": ({"1.img.png": b"", "1.cls": b"5"}, [("1.img.png", b"5")]),
    "img2dataset": (
        {"1.jpg": b"", "1.json": b"{}", "1.txt": b"x", "2.jpg": b"", "2.json": b"{}"},
        [("1.jpg", None), ("2.jpg", None)],
    ),
    "img2dataset with dots": (
        {"a.b.jpg": b"", "a.b.json": b"{}", "a.c.jpg": b"", "a.c.json": b"{}"},
        [("a.b.jpg", None), ("a.c.jpg", None)],
    ),
    "hidden": ({"._a.png": b"", "a.png": b"", "x/._b.png": b"", ".DS_Store": b""}, [("a.png", None)]),
    "without a label": ({"a.png": b"", "a.cls": b"1", "b.png": b""}, [("a.png", b"1")]),
}


def read(path) -> tuple[list, LeftOut]:
    left_out = LeftOut()
    with open(path, "rb") as file:
        found = [(sample.name, sample.label) for sample in samples_of(members_of(file, str(path), left_out), left_out)]
    return found, left_out


@pytest.mark.parametrize("case", CASES)
def test_samples(case, tmp_path):
    """Reading and counting agree, and every file is in a sample or counted."""
    members, expected = CASES[case]
    write_shard(tmp_path / "x.tar", members)
    samples, left_out = read(tmp_path / "x.tar")
    assert samples == expected
    assert count_images(str(tmp_path / "x.tar")) == len(expected)
    used = sum(1 if label is None else 2 for _, label in samples)
    assert used + left_out.counts.total() == len(members), str(left_out)


def webdatasets(path) -> list:
    """The samples of webdataset's own grouping: what older revisions read."""
    with tarfile.open(path) as tar:
        names = [member.name for member in tar if base_plus_ext(member.name)[1]]
        wanted = [n for n in names if base_plus_ext(n)[1].lower() in (*IMAGE_ENDINGS, "cls")]
        members = [dict(fname=n, data=tar.extractfile(n).read(), __url__="") for n in wanted]
    samples, labelled = [], None
    for sample in group_by_keys(members, handler=lambda _: True):
        ending = next((key for key in sample if key in IMAGE_ENDINGS), None)
        if ending:
            labelled = "cls" in sample if labelled is None else labelled
            if "cls" in sample or not labelled:
                samples.append((sample["__key__"], ending, sample.get("cls")))
    return samples


def test_shards_that_follow_webdataset_are_read_as_before(tmp_path):
    """Random shards whose samples have an image of their plain name: the same samples in the same order."""
    rng = random.Random(0)
    for number in range(60):
        members = {}
        labelled = rng.random() < 0.5
        for key in range(rng.randrange(1, 12)):
            folder = rng.choice(["", "v1.2/", "./"])
            endings = ["jpg", *rng.sample(["PNG", "json", "seg.png", "depth.png", "txt", "cls.txt"], rng.randrange(4))]
            if labelled and rng.random() < 0.8:
                endings.append("cls")
            rng.shuffle(endings)
            members |= {f"{folder}{key:03d}.{ending}": str(key).encode() for ending in endings}
        path = tmp_path / f"{number}.tar"
        write_shard(path, members)
        samples, _ = read(path)
        ours = [(*name.rsplit(".", 1), label) for name, label in samples]
        assert [(key, ending.lower(), label) for key, ending, label in ours] == webdatasets(path)


def test_a_long_series_is_not_held_in_memory(tmp_path):
    """All names have one webdataset key; a sample is given out once it is clear that it is one."""
    members = {f"img.{number:05d}.png": b"" for number in range(4 * LOOKAHEAD)}
    write_shard(tmp_path / "x.tar", members)
    seen, given = [], []
    with open(tmp_path / "x.tar", "rb") as file:
        counted = (seen.append(member) or member for member in members_of(file, "", LeftOut()))
        for sample in samples_of(counted, LeftOut()):
            given.append(sample.name)
            assert len(seen) - len(given) <= LOOKAHEAD
    assert given == list(members)


def test_members_that_are_left_out_are_named_once(tmp_path, capsys):
    members = {"1.jpg": IMAGE, "1.seg.png": IMAGE, "1.json": b"{}", "2.jpg": IMAGE, "2.json": b"{}", "README": b"x"}
    for name in ("x-train-0.tar", "x-train-1.tar"):
        write_shard(tmp_path / name, members)
    assert read_images(flags("--dataset", "wds", "--data_path", tmp_path), True).counts == [2, 2]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert lines == [
        "note: left out of 2 shards: 4 .json (1.json, 2.json, 1.json, …), 2 further images or labels of "
        "a sample (1.seg.png, 1.seg.png), 2 without a known ending (README, README)"
    ]


def test_no_image_says_what_there_is(tmp_path):
    write_shard(tmp_path / "x.tar", {"1.npy": b"", "2.npy": b"", "1.cls": b"1"})
    with pytest.raises(UserError, match=r"none of the 1 shards contains an image .*; they contain 2 \.npy"):
        read_images(flags("--dataset", "wds", "--data_path", tmp_path / "x.tar"), True)


def test_streams_name_the_samples_that_they_leave_out_once(tmp_path, capfd):
    """Captions are no loss, a second image may be one; a shard that was counted at the start is not named again."""
    path = tmp_path / "x.tar"
    write_shard(path, {"1.jpg": IMAGE, "1.seg.png": IMAGE, "1.txt": b"x", "2.jpg": IMAGE})
    for _ in range(2):
        assert len(list(read_shard(str(path)))) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"note: left out of {path}: 1 further images or labels of a sample (1.seg.png)"]
    util.data.shard_loader._noted.clear()
    other = tmp_path / "captions.tar"
    write_shard(other, {"1.jpg": IMAGE, "1.txt": b"x"})
    assert len(list(read_shard(str(other)))) == 1 and not capfd.readouterr().err


def test_damage_before_the_plain_image(tmp_path, capfd):
    """In a shard of webdataset's convention a depth map whose image was cut off does not become an image."""
    buffer = io.BytesIO()
    write_shard(tmp_path / "x.tar", {"1.depth.png": b"", "1.jpg": b"1", "2.depth.png": b"", "2.jpg": b"2"})
    with tarfile.open(tmp_path / "x.tar") as tar:
        cut = tar.getmember("2.jpg").offset_data
    buffer.write((tmp_path / "x.tar").read_bytes()[:cut])
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    assert count_images(str(tmp_path / "x.tar")) == 1
    assert "only its first 1 images are read" in capfd.readouterr().err
