"""A disk that is full, read-only or unmounted, and bytes that change on it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.inject import CLASSIFIER, FLAGS, FULL, FullDisk, after_step, dense, finetune, pretrain
from helpers.launch import ROOT, checkpoint, log_rows, ranks, same_tensors, scalars

from util.checkpoint import retry
from util.checkpoint.atomic import write_atomically
from util.checkpoint.resume import find_resume
from util.checkpoint.save import save_checkpoint
from util.errors import RunFailed, UserError
from util.weights.checksum import damage
from util.weights.file import read_file


def flip(path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    pretrain(f"{FLAGS} --data_path {image_folder} --output_dir {folder}")
    return folder


def assert_same_run(folder, undisturbed) -> None:
    ours, theirs = checkpoint(folder, "checkpoint-1.pth"), checkpoint(undisturbed, "checkpoint-1.pth")
    for key in ("model", "optimizer", "rng"):
        assert same_tensors(ours[key], theirs[key]), key
    assert log_rows(folder) == log_rows(undisturbed)
    for name in ("train/loss", "train/grad_norm"):
        assert scalars(folder, name) == scalars(undisturbed, name)
    assert not list(folder.glob(".*.tmp"))


# Checksums ------------------------------------------------------------------------------------------------------------


def test_any_flipped_byte_is_detected_or_harmless(tmp_path):
    """One bit of every byte of a checkpoint: the file is refused, or its content is unchanged (padding, dates). The bit
    is the one that can turn a record into a folder, which torch.load reads as garbage."""
    state = {"model": {"w": torch.randn(3, 5), "b": torch.randn(7)}, "epoch": 3}
    path = save_checkpoint(tmp_path, 3, 0, state)
    assert damage(path) == ""
    whole, detected = path.read_bytes(), 0
    for offset in range(len(whole)):
        changed = bytearray(whole)
        changed[offset] ^= 0x10
        path = tmp_path / f"flipped-{offset}.pth"
        path.write_bytes(changed)
        try:
            assert same_tensors(read_file(path), state), offset
        except UserError as error:
            detected += 1
            assert str(path) in str(error)
        path.unlink()
    assert detected > len(whole) / 10  # the records themselves


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "none.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("none.pth", "legacy.pth"):
        assert torch.equal(read_file(tmp_path / name)["model"]["w"], torch.ones(3))


def test_a_run_goes_on_from_the_file_before_the_damaged_one(undisturbed, image_folder, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "checkpoint-1.pth", (tmp_path / "checkpoint-1.pth").stat().st_size // 2)
    flags = f"{FLAGS} --data_path {image_folder} --output_dir {tmp_path}"
    with pytest.raises(
        UserError, match=r"checkpoint-1.pth is truncated or damaged \(the checksum of .* does not match"
    ):
        pretrain(f"{flags} --resume {tmp_path}/checkpoint-1.pth")
    pretrain(f"{flags} --resume auto")
    output = capsys.readouterr().out
    assert f"skipping {tmp_path}/checkpoint-1.pth: the file is damaged" in output
    assert f"resumed {tmp_path}/checkpoint-0.pth" in output
    assert_same_run(tmp_path, undisturbed)


# Writing ------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 0, 0, {"model": {"w": torch.ones(1000)}})
    before = path.read_bytes()
    FullDisk(monkeypatch, full=True)
    with pytest.raises(retry.SaveFailed, match="No space left on device"):  # torch does not raise an OSError
        save_checkpoint(tmp_path, 0, 0, {"model": {"w": torch.zeros(1000)}})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_growing_file_takes_back_what_was_cut_off(tmp_path, monkeypatch, capsys):
    file, full = retry.GrowingFile(tmp_path / "log.txt"), FullDisk(monkeypatch)
    file.append(b"one\n")
    full.full = True
    file.append(b"two\n")
    file.append(b"three\n")
    assert (tmp_path / "log.txt").read_bytes() == b"one\n"
    full.full = False
    file.append()
    assert (tmp_path / "log.txt").read_bytes() == b"one\ntwo\nthree\n"
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_full_for_a_while(undisturbed, image_folder, tmp_path, monkeypatch, capsys):
    """The disk is full from step 3 to step 8, across the end of the epoch: the run resumes bit-identically."""
    full = FullDisk(monkeypatch)
    kept = []

    def fill(run):
        full.full = True
        kept.append(next(tmp_path.glob("checkpoint-0-*.pth")).name)

    def empty(_run):
        kept.append(next(tmp_path.glob("checkpoint-*.pth")).name)
        full.full = False

    with monkeypatch.context() as patch:
        after_step(patch, 3, fill)
        after_step(patch, 8, empty)
        pretrain(f"{FLAGS} --data_path {image_folder} --output_dir {tmp_path}")
    assert kept == ["checkpoint-0-3.pth"] * 2
    output = capsys.readouterr().out
    assert f"no checkpoint could be written to {tmp_path} (No space left on device)" in output
    assert "the last checkpoint is checkpoint-0-3.pth" in output and "can be written" in output
    assert full.refused > 5  # log lines, events, checkpoints
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["segment", "detect"])
def test_full_in_a_dense_evaluation(name, tmp_path, monkeypatch, capsys):
    """The disk is full from step 5 to step 8, so also while the best weights and the log of the first epoch are due,
    and again in the last step, until the end: all files are those of an undisturbed run."""
    dense(name, f"--output_dir {tmp_path / 'undisturbed'}")
    full = FullDisk(monkeypatch)
    with monkeypatch.context() as patch:
        for step in (5, 8, 11):
            after_step(patch, step, lambda run: setattr(full, "full", run.step != 8))
        patch.setattr("util.checkpoint.retry.time.sleep", lambda _: setattr(full, "full", False))
        dense(name, f"--output_dir {tmp_path / 'run'}")
    assert full.refused > 5 and "checkpoint-best.pth cannot be written" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    best, expected = (checkpoint(tmp_path / each, "checkpoint-best.pth")["model"] for each in ("run", "undisturbed"))
    assert same_tensors(best, expected)
    scores = [json.loads((tmp_path / each / "scores.json").read_text()) for each in ("run", "undisturbed")]
    assert scores[0]["result"] == scores[1]["result"] and scores[0]["details"] == scores[1]["details"]
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["segment", "detect"])
def test_dense_runs_refuse_a_folder_that_cannot_be_written(name, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("util.checkpoint.output_dir.write_atomically", refuse)
    with pytest.raises(UserError, match=r"--output_dir .* cannot be written: Read-only file system"):
        dense(name, f"--output_dir {tmp_path}")


def test_a_failed_save_is_retried_before_the_next_is_due(image_folder, tmp_path, monkeypatch):
    full = FullDisk(monkeypatch)
    flags = FLAGS.replace("--save_steps 1", "--save_steps 2").replace("--epochs 2", "--epochs 1")
    seen = []
    monkeypatch.setattr("util.checkpoint.retry.FIRST", 0.0)
    after_step(monkeypatch, 1, lambda _: setattr(full, "full", True))
    after_step(monkeypatch, 2, lambda _: setattr(full, "full", False))
    after_step(monkeypatch, 3, lambda _: seen.append([path.name for path in tmp_path.glob("checkpoint*")]))
    pretrain(f"{flags} --data_path {image_folder} --output_dir {tmp_path}")
    assert seen == [["checkpoint-0-3.pth"]]


def test_full_until_the_end_fails(image_folder, tmp_path, monkeypatch, capsys):
    full = FullDisk(monkeypatch)
    after_step(monkeypatch, 9, lambda _: setattr(full, "full", True))
    flags = f"{FLAGS} --data_path {image_folder} --output_dir {tmp_path} --save_patience 0.001"  # 60 ms
    with pytest.raises(
        RunFailed, match=r"the last state cannot be written .*No space left.*last checkpoint is checkpoint-1-3.pth"
    ):
        pretrain(flags)
    assert "the next attempt is in 0.02 s" in capsys.readouterr().out  # after the one in 0.01 s
    assert checkpoint(tmp_path, "checkpoint-1-3.pth")["step"] == 9
    assert not (tmp_path / "results.jsonl").exists()  # of runs that ended


def test_vanished_folder(undisturbed, image_folder, tmp_path, monkeypatch, capsys):
    """The output folder is deleted during the run: it is made again and holds the end of the run."""
    folder = tmp_path / "run"
    after_step(monkeypatch, 8, lambda _: shutil.rmtree(folder))
    pretrain(f"{FLAGS} --data_path {image_folder} --output_dir {folder}")
    assert f"{folder} had been deleted and was created again" in capsys.readouterr().out
    assert same_tensors(checkpoint(folder, "checkpoint-1.pth"), checkpoint(undisturbed, "checkpoint-1.pth")) is False
    for key in ("model", "optimizer"):  # args and times differ
        assert same_tensors(
            checkpoint(folder, "checkpoint-1.pth")[key], checkpoint(undisturbed, "checkpoint-1.pth")[key]
        )
    assert (folder / "encoder.safetensors").exists()


def test_vanished_disk_is_not_replaced_by_a_folder(tmp_path):
    """When the parent is gone too, the folder was on a mounted disk: no folder is made instead."""
    file = retry.GrowingFile(tmp_path / "mounted" / "run" / "log.txt")
    file.append(b"line\n")
    assert not (tmp_path / "mounted").exists() and file.waiting == b"line\n"
    (tmp_path / "mounted" / "run").mkdir(parents=True)
    file.append()
    assert file.path.read_bytes() == b"line\n"


def test_read_only_folder_is_refused_at_the_start(image_folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("util.checkpoint.output_dir.write_atomically", refuse)
    with pytest.raises(UserError, match=r"--output_dir .* cannot be written: Read-only file system"):
        pretrain(f"{FLAGS} --data_path {image_folder} --output_dir {tmp_path}")


def test_best_weights_wait_too(image_folder, tmp_path, monkeypatch):
    """The best checkpoint of the first epoch cannot be written at first; it is written with the next checkpoint,
    unchanged by the training in between."""
    full, wanted = FullDisk(monkeypatch), []
    original = retry.LateFile.put

    def put(self, content):
        if not wanted:
            wanted.append({name: value.clone() for name, value in content["model"].items()})
            full.full = True
            original(self, content)
            full.full = False
            assert not self.path.exists()

    monkeypatch.setattr(retry.LateFile, "put", put)
    finetune(f"{CLASSIFIER} --data_path {image_folder} --output_dir {tmp_path}")
    assert same_tensors(checkpoint(tmp_path, "checkpoint-best.pth")["model"], wanted[0])


def test_last_files_of_a_run_are_retried(tmp_path, monkeypatch):
    """Writes of encoder.safetensors and of the ledger are retried; a UserError is not treated as a full disk."""
    monkeypatch.setattr("util.checkpoint.retry.FIRST", 0.001)
    calls = []

    def write():
        calls.append(1)
        if len(calls) < 3:
            raise UserError("cannot be written") from FULL

    retry.Saver(tmp_path, 1).insist("the ledger", write)
    assert len(calls) == 3
    with pytest.raises(RunFailed, match="the ledger cannot be written"):
        retry.Saver(tmp_path, 0).insist("the ledger", lambda: calls.clear() or write())
    with pytest.raises(UserError, match="another"):
        retry.Saver(tmp_path, 0).insist("the ledger", lambda: (_ for _ in ()).throw(UserError("another")))


def test_two_ranks_while_the_disk_of_one_is_full(image_folder, tmp_path):
    """Rank 0 cannot write from step 3 to step 8; both ranks continue and finish."""
    flags = FLAGS.replace("--batch_size 16", "--batch_size 8")
    output = ranks("helpers.fault_script", f"full {flags} --data_path {image_folder} --output_dir {tmp_path}", 2)
    assert "no checkpoint could be written" in output and "can be written" in output
    assert output.count("ended at step 12") == 2
    assert checkpoint(tmp_path, "checkpoint-1.pth")["step"] == 12
    assert [row["epoch"] for row in log_rows(tmp_path)] == [0, 1]


def test_two_ranks_while_a_part_of_a_folder_cannot_be_written(image_folder, tmp_path):
    """--fsdp: only rank 1 has a full disk, and both ranks retry together."""
    flags = FLAGS.replace("--batch_size 16", "--batch_size 8") + " --fsdp --keep 1"
    output = ranks("helpers.fault_script", f"share {flags} --data_path {image_folder} --output_dir {tmp_path}", 2)
    assert (
        "(No space left on device): the run continues" in output
        and "the last checkpoint is checkpoint-0-3.dcp" in output
    )
    assert output.count("ended at step 12") == 2
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1.dcp"]
    assert find_resume("auto", str(tmp_path)) == tmp_path / "checkpoint-1.dcp"
    share = next((tmp_path / "checkpoint-1.dcp").glob("__1_*.distcp"))
    flip(share, share.stat().st_size // 2)
    assert find_resume("auto", str(tmp_path)) is None


# Room for one and a half checkpoints, so that the second one fails however slow the machine is; all of it is taken once
# the first one is there, and given back once the run has reported the failure.
TMPFS = """
mount -t tmpfs -o size=48m none {disk} || exit 77
head -c 33m /dev/zero > {disk}/filler
(while [ ! -e {disk}/checkpoint-0-1.pth ]; do sleep 0.02; done
 head -c 48m /dev/zero > {disk}/rest 2> /dev/null
 until grep -q "No space left on device" {log}; do sleep 0.02; done
 rm {disk}/filler {disk}/rest) &
{command} > {log}
code=$?
kill $! 2> /dev/null
cp -r {disk}/. {out}
exit $code
"""


def test_a_real_full_disk(undisturbed, image_folder, tmp_path):
    """A tmpfs that is full from the second checkpoint (9.6 MB each) until the run reports it; skipped where mounting is
    not permitted."""
    out, disk, log = tmp_path / "out", tmp_path / "disk", tmp_path / "log"
    out.mkdir(), disk.mkdir()
    command = f"{sys.executable} {ROOT}/main_pretrain.py {FLAGS} --data_path {image_folder} --output_dir {disk}"
    script = TMPFS.format(disk=disk, out=out, log=log, command=f"{command} --save_patience 1")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=170)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no tmpfs can be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No space left on device" in log.read_text()
    assert_same_run(out, undisturbed)


def test_whole_or_not_at_all(tmp_path):
    """Any other error is raised unchanged, and leaves no file behind."""

    def write(file):
        file.write(b"half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())
