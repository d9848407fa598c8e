"""Lists of large folders that are kept in an index: always those of walking through the folders, and small."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.plain_images import class_folders, flags

from util.data import listing
from util.data.image_folders import class_folder, unlabelled_folder
from util.data.listing import IndexFiles
from util.data.readers import read_images
from util.data.sources import Files
from util.errors import UserError


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    """Keep an index of any set, and trust folders that have not changed for a tenth of a second."""
    monkeypatch.setattr(listing, "FROM", 1)
    monkeypatch.setattr(listing, "SETTLED", 0.1)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data" / "train"
    class_folders(folder, **{f"c{c}": range(4 * c, 4 * c + 4) for c in range(5)})
    (folder / "c1" / "deep" / "er").mkdir(parents=True)
    (folder / "c1" / "deep" / "er" / "é 1.png").write_bytes(b"")
    (folder / "c2" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    (folder / "c2" / "old.dcm").write_bytes(b"")
    (folder / "c3" / ".DS_Store").write_bytes(b"")
    (folder / "empty").mkdir()
    time.sleep(0.2)
    return folder


def index_of(tmp_path, **more) -> IndexFiles:
    return IndexFiles(str(tmp_path / "index"), **more)


def content(images: Files) -> list[tuple[str, int]]:
    return list(zip(images.paths, images.targets))


def read_again(root, index, capsys) -> str:
    """Check that the list with an index is that without one, and return what was printed about the index."""
    plain = class_folder(root)
    expected = capsys.readouterr().out
    images = class_folder(root, index=index)
    printed = capsys.readouterr().out
    assert content(images) == content(plain) and images.classes == plain.classes
    own = [line for line in printed.splitlines() if ".index" in line]
    assert [line for line in printed.splitlines() if line not in own] == expected.splitlines()  # the notes
    return "\n".join(own)


def test_the_second_start_reads_the_index(root, tmp_path, capsys, monkeypatch):
    index = index_of(tmp_path)
    assert "the list of 22 images is kept in" in read_again(root, index, capsys)
    assert read_again(root, index, capsys).startswith(f"22 images below {root}, from the index {tmp_path}")
    monkeypatch.setattr(listing, "images_below", None)  # no folder is walked through
    assert len(class_folder(root, index=index)) == 22
    with pytest.raises(TypeError):
        class_folder(root, index=index_of(tmp_path, relist=True))
    with pytest.raises(TypeError):
        class_folder(root, index=IndexFiles(""))


def test_images_without_labels_have_an_index_too(root, tmp_path, capsys, monkeypatch):
    expected = content(unlabelled_folder(root))
    for _ in range(2):
        assert content(unlabelled_folder(root, index=index_of(tmp_path))) == expected
    monkeypatch.chdir(root)
    relative = content(unlabelled_folder(Path(".")))
    for _ in range(2):
        assert content(unlabelled_folder(Path("."), index=index_of(tmp_path / "other"))) == relative


def replace_file(root):
    """The number of files stays, and the folder's time of content is set back, as archives and rsync do it."""
    times = os.stat(root / "c0")
    (root / "c0" / "000.png").rename(root / "c0" / "renamed.png")
    os.utime(root / "c0", ns=(times.st_atime_ns, times.st_mtime_ns))


def swap_folders(root):
    (root / "c0").rename(root / "x")
    (root / "c1").rename(root / "c0")
    (root / "x").rename(root / "c1")


def link_elsewhere(root):
    shutil.copytree(root / "c4", root.parent / "elsewhere", copy_function=shutil.copy2)
    (root.parent / "elsewhere" / "another.png").write_bytes(b"")
    shutil.rmtree(root / "c4")
    (root / "c4").symlink_to(root.parent / "elsewhere")


CHANGES = {
    "an image more": lambda root: (root / "c2" / "more.png").write_bytes(b""),
    "an image less": lambda root: (root / "c2" / "008.png").unlink(),
    "an image deep below": lambda root: (root / "c1" / "deep" / "er" / "a.png").write_bytes(b""),
    "an image with another name": replace_file,
    "a class more": lambda root: class_folders(root, c00=[1]),
    "a class less": lambda root: shutil.rmtree(root / "c0"),
    "a class with another name": lambda root: (root / "c0").rename(root / "c9"),
    "two classes that change places": swap_folders,
    "a class that is a link": link_elsewhere,
    "a folder more in a class": lambda root: class_folders(root / "c3", new=[77]),
    "an image in an empty class": lambda root: (root / "empty" / "a.png").write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_index_is_never_used(root, tmp_path, capsys, change):
    """Whatever changes, the list is that of the folders as they are, also at the start after the next."""
    index = index_of(tmp_path)
    class_folder(root, index=index)
    CHANGES[change](root)
    capsys.readouterr()
    read_again(root, index, capsys)
    read_again(root, index, capsys)
    time.sleep(0.2)
    read_again(root, index, capsys)
    assert "have changed" not in read_again(root, index, capsys)


def test_only_changed_classes_are_listed_again(root, tmp_path, capsys, monkeypatch):
    index = index_of(tmp_path)
    class_folder(root, index=index)
    (root / "c2" / "more.png").write_bytes(b"")
    walked, original = [], listing.images_below
    monkeypatch.setattr(listing, "images_below", lambda folder, *rest: walked.append(folder) or original(folder, *rest))
    capsys.readouterr()
    class_folder(root, index=index)
    assert walked == [root / "c2"] and "1 of 6 classes have changed" in capsys.readouterr().out


def test_a_folder_that_has_just_changed_is_not_trusted(root, tmp_path, capsys, monkeypatch):
    """A second change may get the same time: clocks of file systems tick every few milliseconds, some every second."""
    monkeypatch.setattr(listing, "SETTLED", 60)
    index = index_of(tmp_path)
    class_folder(root, index=index)
    capsys.readouterr()
    frozen = listing.times_of
    monkeypatch.setattr("util.data.file_lists.times_of", lambda folder: [0, time.time_ns()])
    monkeypatch.setattr(listing, "times_of", lambda folder: frozen(folder))
    (root / "c2" / "more.png").write_bytes(b"")
    assert "6 of 6 classes have changed" in read_again(root, index, capsys)


def test_no_index_of_file_systems_whose_times_may_not_change(root, tmp_path, capsys, monkeypatch):
    device = os.stat(root).st_dev
    line = f"1 2 {os.major(device)}:{os.minor(device)} / /mnt rw - fuse.gcsfuse bucket rw"
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **more: line if self.name == "mountinfo" else read_text(self, **more)
    )
    assert not read_again(root, index_of(tmp_path), capsys) and not (tmp_path / "index").exists()


@pytest.mark.parametrize("damage", ["cut off", "changed", "empty", "of another folder", "of other rules"])
def test_a_damaged_index_is_replaced(root, tmp_path, capsys, damage, monkeypatch):
    index = index_of(tmp_path)
    class_folder(root, index=index)
    (path,) = (tmp_path / "index").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "of other rules":
        monkeypatch.setattr(listing, "RULES", "others")
    elif damage == "of another folder":
        other = root.parent / "other"
        shutil.copytree(root, other)
        os.replace(path, path.parent / index.path_for(other).name)
        root = other
    elif damage == "changed":
        data[data.index(b"000.png")] ^= 1
    if damage in ("cut off", "changed", "empty"):
        path.write_bytes({"cut off": data[:-200], "changed": data, "empty": b""}[damage])
    capsys.readouterr()
    printed = read_again(root, index, capsys)
    assert "is kept in" in printed and ("cannot be read" in printed) == (not damage.startswith("of"))


def test_a_folder_that_cannot_be_written(root, tmp_path, capsys, monkeypatch):
    """A note, and the run goes on."""
    (tmp_path / "index").write_text("a file")
    assert "cannot be kept in" in read_again(root, index_of(tmp_path), capsys)

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(listing.np, "savez", full)
    assert "(No space left on device): the next start" in read_again(root, IndexFiles(str(tmp_path / "a")), capsys)
    assert not list((tmp_path / "a").iterdir())


def test_flags(root, tmp_path, capsys):
    """Beside the output, or where --index_dir says; --relist replaces it; small sets have none."""
    words = ["--data_path", root.parent, "--output_dir", tmp_path / "run"]
    read_images(flags(*words), True)
    assert list((tmp_path / "run").glob("images-*.index")) and "is kept in" in capsys.readouterr().out
    read_images(flags(*words), True)
    assert "from the index" in capsys.readouterr().out
    read_images(flags(*words, "--relist"), True)
    assert "is kept in" in capsys.readouterr().out
    read_images(flags(*words, "--index_dir", tmp_path / "shared"), True)
    assert list((tmp_path / "shared").glob("images-*.index"))
    capsys.readouterr()
    read_images(flags(*words, "--index_dir", ""), True)
    assert "index" not in capsys.readouterr().out
    listing.FROM = 23  # restored by the fixture
    read_images(flags("--data_path", root.parent, "--output_dir", tmp_path / "other"), True)
    assert not (tmp_path / "other").exists()


# Several processes ----------------------------------------------------------------------------------------------------


def start(root, index, barrier, result):
    barrier.wait()
    result.put(content(class_folder(root, index=index)))


def test_several_runs_at_once(root, tmp_path, capsys):
    """All write and read the same index at the same time; each has the right list, and no temporary file is left."""
    index, context = index_of(tmp_path), multiprocessing.get_context("fork")
    barrier, result = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=start, args=(root, index, barrier, result)) for _ in range(4)]
    for process in processes:
        process.start()
    lists = [result.get() for _ in processes]
    for process in processes:
        process.join()
    expected = content(class_folder(root))
    assert all(found == expected for found in lists)
    assert [path.suffix for path in (tmp_path / "index").iterdir()] == [".index"]
    capsys.readouterr()
    assert "from the index" in read_again(root, index, capsys)


def write_half(root, index):
    def savez(file, **_content):
        file.write(b"PK half an index")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    listing.np.savez = savez
    class_folder(root, index=index)


def test_a_kill_while_the_index_is_written(root, tmp_path, capsys):
    """The next start lists again; what the killed process left is removed once it is surely abandoned."""
    index = index_of(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=write_half, args=(root, index))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "index").iterdir()
    assert left.suffix == ".tmp"
    assert "is kept in" in read_again(root, index, capsys) and left.exists()
    os.utime(left, (0, 0))
    class_folder(root, index=index_of(tmp_path, relist=True))
    assert [path.suffix for path in (tmp_path / "index").iterdir()] == [".index"]


# Memory ---------------------------------------------------------------------------------------------------------------


def many(count: int) -> Files:
    """Images that do not exist, in 100 classes."""
    names = [f"c{i % 100:02d}/picture_{i:012d}.JPEG".encode() for i in range(count)]
    lengths = np.fromiter(map(len, names), np.int64, count)
    paths = listing.PathList.of_bytes(np.frombuffer(b"".join(names), np.uint8), lengths, "/data/train/")
    return Files(paths, np.arange(count) % 100, [f"c{i:02d}" for i in range(100)])


def private(pid: int) -> int:
    """The bytes of a process that it shares with no other one."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"Private_\w+:\s+(\d+)", lines))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_workers_share_the_list():
    """A worker that reads names and labels of all images keeps no copy of them; one that has a list of strings does."""
    count = 100_000
    images = many(count)
    strings, growth = list(images.paths), {}
    for name, read in (
        ("ours", lambda: sum(len(images.name(i)) + images.target(i) for i in range(count))),
        ("list", lambda: sum(len(path) for path in strings)),
    ):
        there, back = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            with suppress(BaseException):
                before = private(os.getpid())
                assert read() > count
                os.write(back[1], str(private(os.getpid()) - before).encode())
            os._exit(0)
        growth[name] = int(os.read(back[0], 100))
        os.waitpid(child, 0)
        for descriptor in (*there, *back):
            os.close(descriptor)
    assert growth["ours"] < 10 * count < 50 * count < growth["list"]


def test_bytes_of_an_image():
    """Below 100 for names of 30 characters, with label and order; Python's objects take several times as many."""
    images = many(10_000)
    size = images.paths._data.nbytes + images.paths._offsets.nbytes + images.targets.itemsize * len(images)
    assert size / len(images) < 60 and sys.getsizeof(images.paths[0]) > 80


def test_a_folder_that_cannot_be_read_is_refused(root, tmp_path, monkeypatch):
    """As without an index: its images would be missing."""
    index = index_of(tmp_path)
    class_folder(root, index=index)
    (root / "c0" / "new.png").write_bytes(b"")

    def walk(folder, onerror, **_more):
        onerror(PermissionError(13, "Permission denied", str(folder)))

    monkeypatch.setattr("util.data.file_lists.os.walk", walk)
    with pytest.raises(UserError, match=r"c0 cannot be read \(Permission denied\)"):
        class_folder(root, index=index)
