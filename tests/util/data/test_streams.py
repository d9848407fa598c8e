"""WebDataset shards: every sample once, equal batches on all ranks, damage, HTTP and pipes, resumption."""

import functools
import http.server
import io
import json
import signal
import tarfile
import threading

import numpy as np
import pytest
import torch
from helpers.forked import Forked
from helpers.launch import SMALL, checkpoint, kill_when, log_rows, same_tensors
from PIL import Image
from torchvision import transforms as tvt

import main_pretrain
import util.data.shard_loader
import util.training.run
from util.data.build import build_loader
from util.data.readers import read_images
from util.data.samples import UnreadableData
from util.errors import UserError

SIZES = [5, 9, 1, 12, 7, 6]  # of the shards


def write_shard(path, values, unreadable=()):
    """Write images of one colour whose value is their label, and a member that is neither image nor label."""
    with tarfile.open(path, "w") as tar:
        for value in values:
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
            image = b"no image" if value in unreadable else file.getvalue()
            for ending, content in (("png", image), ("json", b"{}"), ("cls", str(value).encode())):
                member = tarfile.TarInfo(f"{value:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_set(root, sizes=SIZES, index=True, unreadable=()):
    root.mkdir(exist_ok=True)
    edges = np.cumsum([0, *sizes])
    names = [f"x-train-{i:03d}.tar" for i in range(len(sizes))]
    for name, first, last in zip(names, edges, edges[1:]):
        write_shard(root / name, range(first, last), unreadable)
    write_shard(root / "x-validation-000.tar", range(200, 211))
    splits = {"train": (names, list(sizes)), "validation": (["x-validation-000.tar"], [11])}
    if index:
        entries = {split: dict(filenames=names, shard_lengths=lengths) for split, (names, lengths) in splits.items()}
        (root / "_info.json").write_text(json.dumps({"splits": entries}))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("shards"))


def loader_of(path, *argv, workers=0, batch=3, train=True, seed=0):
    """Return a loader of batches of (value, random number) from shards."""
    words = ["--dataset", "wds", "--data_path", path, "--num_workers", workers, "--seed", seed, *argv]
    args = main_pretrain.get_args_parser().parse_args([str(word) for word in words])
    noisy = tvt.Compose([tvt.Resize((8, 8)), tvt.ToTensor(), lambda x: torch.cat([x[:1], torch.rand_like(x[:1])])])
    return build_loader(read_images(args, train), noisy, args, batch, train)


def labels(batches) -> list[int]:
    return torch.cat([batch.target for batch in batches]).tolist()


def bad(batches) -> int:
    return sum(int(batch.bad.sum()) for batch in batches)


def same_batches(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for x, y in zip(ours, theirs) for a, b in zip(x, y))


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(util.data.shard_loader, "get_rank", lambda: rank)
    monkeypatch.setattr(util.data.shard_loader, "get_world_size", lambda: world)


@pytest.mark.parametrize("world,workers", [(1, 0), (1, 3), (2, 2), (3, 1)])
def test_every_sample_once(folder, monkeypatch, world, workers):
    """Shards of very different sizes over ranks and workers: all have the same number of full batches, no image is read
    twice, and incomplete batches are left out."""
    for epoch in (0, 1):
        seen = []
        for rank in range(world):
            as_rank(monkeypatch, rank, world)
            loader = loader_of(folder, workers=workers)
            batches = list(loader.begin(epoch))
            assert len(batches) == len(loader) == 40 // (3 * world)
            assert all(len(batch.target) == 3 for batch in batches) and not bad(batches)
            values = torch.cat([batch.image[:, 0, 0, 0] for batch in batches]) * 255
            assert values.round().int().tolist() == labels(batches)
            # The index in the whole set is the key of an image's random numbers; here it is also the label.
            assert torch.equal(*(torch.cat([getattr(batch, key) for batch in batches]) for key in ("index", "target")))
            seen += labels(batches)
        assert len(seen) == len(set(seen)) == 40 // (3 * world) * 3 * world


@pytest.mark.parametrize("world,workers", [(1, 0), (1, 2), (2, 2), (3, 0)])
def test_evaluation_is_complete_and_in_order(folder, monkeypatch, world, workers):
    seen = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        loader = loader_of(folder, workers=workers, train=False)
        batches = list(loader.begin(0))
        assert len(batches) == len(loader)
        seen += sorted(labels(batches))
    assert seen == list(range(200, 211))


def test_order(folder):
    """The order depends on epoch and seed alone; a buffer of 1 keeps the order inside the shards."""
    orders = [labels(loader_of(folder, seed=seed).begin(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[1] == labels(loader_of(folder).begin(1))
    plain = labels(loader_of(folder, "--shuffle_buffer", 1, batch=40).begin(0))
    starts = np.cumsum([0, *SIZES])
    runs = {first: list(range(first, first + size)) for first, size in zip(starts.tolist(), SIZES)}
    assert plain == [value for head in plain if head in runs for value in runs[head]] and plain != sorted(plain)


def test_generators_of_the_process_are_left_alone(folder):
    """Reading in this process seeds the generators for every sample and restores their states before the batch is
    used."""
    before = torch.get_rng_state()
    for _ in loader_of(folder).begin(0):
        assert torch.equal(torch.get_rng_state(), before)


def test_epochs_of_one_loader(folder):
    """Persistent workers read the requested epoch from the requested batch, whatever they read before."""
    one = loader_of(folder, workers=2)
    for epoch, start in ((0, 0), (0, 0), (5, 4), (1, 0)):
        batches = list(one.begin(epoch, start))
        assert len(batches) == 13 - start
        assert same_batches(batches, list(loader_of(folder, workers=2).begin(epoch, start)))


def test_buffer_bounds_its_content(tmp_path):
    """An image leaves a buffer of N only after it has entered: it is among the first N plus those that have left."""
    shards = write_set(tmp_path / "s", sizes=[200])
    values = np.array(labels(loader_of(shards, "--shuffle_buffer", 10, batch=200).begin(0)))
    # Two enter for one that leaves, so an image is given out at most 10 + 2 positions before its turn.
    assert (values - np.arange(200)).max() <= 12
    assert np.abs(values - np.arange(200)).mean() > 2


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_batch(folder, monkeypatch, workers):
    """Batches equal those of the uninterrupted run bit for bit, random numbers included. Delivered images are not
    decoded again, and fully delivered shards are not opened."""
    as_rank(monkeypatch, 1, 2)
    flags = ("--shuffle_buffer", 4)
    whole = list(loader_of(folder, *flags, workers=workers, batch=2).begin(3))
    assert len(whole) == 10
    decoded, opened = [], []
    original, shard = util.data.shard_loader.ShardDataset._decoded, util.data.shard_loader.read_shard
    monkeypatch.setattr(
        util.data.shard_loader.ShardDataset, "_decoded", lambda self, r: decoded.append(r.name) or original(self, r)
    )
    monkeypatch.setattr(util.data.shard_loader, "read_shard", lambda url: opened.append(url) or shard(url))
    counts = []
    for start in (1, 2, 5, 9):
        decoded.clear(), opened.clear()
        rest = list(loader_of(folder, *flags, workers=workers, batch=2).begin(3, start))
        assert same_batches(rest, whole[start:])
        if not workers:  # a worker has its own lists
            assert len(decoded) == 20 - 2 * start
            counts.append(len(opened))
    assert counts == sorted(counts, reverse=True) and (workers or counts[-1] < counts[0])


def damage(root):
    """Delete shard 0, truncate shard 1 inside an image, make shard 3 no tar file and image 33 of shard 4 no image."""
    (root / "x-train-000.tar").unlink()
    path = root / "x-train-001.tar"
    with tarfile.open(path) as tar:  # image 5 + 4 is the fifth one
        cut = tar.getmember("00009.png").offset_data + 20
    path.write_bytes(path.read_bytes()[:cut])
    (root / "x-train-003.tar").write_bytes(b"<html>not found</html>" * 300)
    return {*range(5), *range(9, 14), *range(15, 27), 33}


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_named_counted_and_replaced(tmp_path, workers, capfd):
    """All other images are delivered once; lost ones are counted, and a resumed run replaces them by the same
    images."""
    root = write_set(tmp_path / "s", unreadable=[33])
    lost = damage(root)
    whole = list(loader_of(root, workers=workers, batch=2).begin(0))
    errors = capfd.readouterr().err
    indices = torch.cat([batch.index for batch in whole])
    assert sorted(indices.tolist()) == list(range(40)) and len(whole) == 20  # the length of an epoch stays
    targets = torch.tensor(labels(whole))
    good = torch.tensor([index not in lost for index in indices.tolist()])
    assert torch.equal(targets[good], indices[good])
    assert not set(targets.tolist()) & lost
    assert torch.equal(torch.cat([batch.bad for batch in whole]) > 0, ~good)
    for name, reason in (("000", "No such file"), ("001", "unexpected end of data"), ("003", "invalid header")):
        assert any(f"x-train-{name}.tar: " in line and reason in line for line in errors.splitlines()), name
    assert "unreadable image" in errors and "00033.png" in errors
    for start in (1, 10, 19):
        assert same_batches(list(loader_of(root, workers=workers, batch=2).begin(0, start)), whole[start:])


def test_damage_in_evaluation_is_left_out(tmp_path, capfd):
    root = write_set(tmp_path / "s")
    path = root / "x-validation-000.tar"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    batches = list(loader_of(root, train=False).begin(0))
    targets, wrong = (torch.cat([getattr(batch, key) for batch in batches]) for key in ("target", "bad"))
    assert len(targets) == 11 and 0 < wrong.sum() < 11
    assert targets[wrong == 0].tolist() == list(range(200, 211))[: int((wrong == 0).sum())]


def test_without_an_index(tmp_path, capfd):
    """Local shards are counted, damaged ones up to the damage, so nothing needs replacing; remote ones need a flag."""
    root = write_set(tmp_path / "s", index=False)
    lost = damage(root)
    loader = loader_of(root, batch=1)
    assert len(loader) == 40 - len(lost - {33})
    batches = list(loader.begin(0))
    assert set(labels(batches)) == set(range(40)) - lost | {33} and not bad(batches)
    assert len(loader_of(root / "x-train-{002,005}.tar", batch=1)) == 7
    assert len(loader_of(root / "x-train-*.tar", batch=1)) == len(loader)
    assert len(loader_of(root, batch=1, train=False)) == 11
    with pytest.raises(UserError, match="give --shard_samples N"):
        loader_of(f"pipe:cat {root}/x-train-{{002,005}}.tar")


def test_all_shards_bad(tmp_path):
    root = write_set(tmp_path / "s")
    for path in root.glob("*.tar"):
        path.write_bytes(b"nothing" * 1000)
    with pytest.raises(UnreadableData, match=r"6 shards in a row could not be read.*invalid header"):
        list(loader_of(root).begin(0))
    (root / "_info.json").unlink()
    with pytest.raises(UserError, match="none of the 6 shards contains an image"):
        loader_of(root)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """A function that serves a folder by HTTP and returns its address."""
    servers = []

    def start(root):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_http_and_pipes_give_what_the_disk_gives(folder, serve, workers):
    local = list(loader_of(folder, workers=workers).begin(0))
    address = serve(folder)
    assert same_batches(list(loader_of(address, workers=workers).begin(0)), local)
    pattern = f"{address}/x-train-{{000..005}}.tar"  # lengths come from the index beside the shards
    assert same_batches(list(loader_of(pattern, workers=workers).begin(0, 5)), local[5:])
    even = write_set(folder / "even", sizes=[10, 10, 10])
    piped = loader_of(f"pipe:cat {even}/x-train-{{000..002}}.tar", "--shard_samples", 10, workers=workers)
    assert same_batches(list(piped.begin(1)), list(loader_of(even, workers=workers).begin(1)))
    few = loader_of(f"pipe:cat {even}/x-train-{{000..002}}.tar", "--shard_samples", 8, batch=24)
    assert {value % 10 for value in labels(few.begin(0))} == set(range(8))  # the first samples of each


def test_missing_files_over_http(folder, serve, tmp_path, capfd):
    """A missing shard is skipped; a missing index is reported."""
    root = write_set(tmp_path / "s")
    (root / "x-train-003.tar").unlink()
    batches = list(loader_of(serve(root), batch=4).begin(0))
    assert bad(batches) == 12 and "x-train-003.tar: curl ended with exit code 22" in capfd.readouterr().err
    (root / "_info.json").unlink()
    with pytest.raises(UserError, match=r"_info\.json cannot be read: give the shards by a pattern"):
        loader_of(serve(root))


def test_failing_command(folder):
    pattern = f"pipe:exit 3; cat {folder}/x-train-{{000..005}}.tar"
    with pytest.raises(UnreadableData, match="ended with exit code 3"):
        list(loader_of(pattern, "--shard_samples", 5).begin(0))


@pytest.mark.parametrize("name", ["pipe:touch x", "/etc/x.tar", "../x.tar", "http://a.b/x.tar", "a/../../x.tar"])
def test_an_index_names_no_commands_and_no_other_folders(tmp_path, name):
    entry = {"filenames": [name], "shard_lengths": [4]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": entry}}))
    for path in (tmp_path, f"{tmp_path}/x-{{0..2}}.tar"):
        with pytest.raises(UserError, match="is not a file beside it"):
            loader_of(path)


@pytest.mark.parametrize("text", ["[]", "{", '{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": []}}}'])
def test_broken_index(tmp_path, text):
    (tmp_path / "_info.json").write_text(text)
    with pytest.raises(UserError, match=r"_info\.json is not an index"):
        loader_of(tmp_path)


@pytest.mark.parametrize(
    "path,words",
    [
        ("{000..012", "not a pattern"),
        ("foo://x/{0..2}.tar", "foo: is not known; known are"),
        ("nowhere", "not a folder"),
        ("${NO}/x.tar", "not a pattern"),
        ("", "needs --data_path"),
    ],
)
def test_invalid_shard_paths(path, words):
    with pytest.raises(UserError, match=words):
        loader_of(path)


RUN = f"{SMALL} --batch_size 8 --epochs 2 --warmup_epochs 1 --vis_freq 0 --device cpu --save_steps 3 --save_freq 1 "
RUN += "--print_freq 1 --shuffle_buffer 20 --dataset wds"


def pretrain(flags):
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))


@pytest.mark.parametrize("number,place", [(signal.SIGKILL, "folder"), (signal.SIGTERM, "pipe")])
def test_killed_and_resumed(tmp_path, number, place):
    """Killed, or stopped by a signal to all its processes, including the commands that read shards, the run resumes
    bit-identically."""
    root = write_set(tmp_path / "s", sizes=[40, 40, 40, 40])
    shards = f"pipe:cat<{root}/x-train-{{000..003}}.tar --shard_samples 40" if place == "pipe" else root
    flags = f"{RUN} --data_path {shards} --num_workers 2 --output_dir"
    process = Forked("main_pretrain", f"{flags} {tmp_path / 'run'}")
    kill_when(process, (tmp_path / "run" / "checkpoint-1-4.pth").exists, number)
    process.communicate()
    pretrain(f"{flags} {tmp_path / 'run'} --resume auto")
    pretrain(f"{flags} {tmp_path / 'whole'}")
    ours, theirs = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("run", "whole"))
    for key in ("model", "optimizer", "step", "rng"):
        assert same_tensors(ours[key], theirs[key]), key
    assert log_rows(tmp_path / "run") == log_rows(tmp_path / "whole")
    assert log_rows(tmp_path / "run")[-1]["data/bad_images"] == 0


def test_changed_workers_are_reported(tmp_path, monkeypatch, capsys):
    root = write_set(tmp_path / "s", sizes=[40, 40])
    flags = f"{RUN} --data_path {root} --epochs 1 --output_dir {tmp_path}"
    original = util.training.run.adjust_learning_rate
    monkeypatch.setattr(util.training.run, "adjust_learning_rate", lambda *a: signal.raise_signal(15) or original(*a))
    pretrain(f"{flags}/run --num_workers 0")  # stops after its first step
    monkeypatch.setattr(util.training.run, "adjust_learning_rate", original)
    outputs = []
    for workers in (0, 2):
        capsys.readouterr()
        pretrain(f"{flags}/{workers} --num_workers {workers} --resume {tmp_path}/run/checkpoint-0-1.pth")
        outputs.append(capsys.readouterr().out)
    same, output = outputs
    assert "note: the rest" not in same
    assert "note: the rest of this epoch has other images than the interrupted run's" in output
    assert "by 1 x 1 processes" in output and "this one reads 2 shards with 80 images by 1 x 2 processes" in output
