"""Kill runs, damage files and feed bad input for a given time, then report the number of attempts and of losses.

python tests/faults/soak.py --minutes 30 --out soak.json        (scripts/soak.sh)

Rounds are random, seeded by `--seed`. A run of one of several methods, on one process or two, is killed one to five
times at random moments and compared with the undisturbed run. Bytes of images, list files, shards and checkpoints are
changed, cut off or inserted. Nothing may crash, hang, be lost, or be read wrongly without a message.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

import torch  # noqa: E402
from helpers.found import KINDS  # noqa: E402
from helpers.kills import RUNS, Broken, Killed, events_of  # noqa: E402
from helpers.strange import GOOD  # noqa: E402
from PIL import Image  # noqa: E402

import main_pretrain  # noqa: E402
from util.data.build import build_loader  # noqa: E402
from util.data.readers import read_images  # noqa: E402
from util.data.samples import KeyedDataset, UnreadableData  # noqa: E402
from util.data.transforms import eval_transform  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.weights.file import read_file  # noqa: E402

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")


class Soak:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.chance = folder, random.Random(seed)
        self.count, self.losses = Counter(), []
        self.references: dict[tuple, Killed] = {}

    def round(self) -> None:
        tasks = {"kills": 6, "images": 1, "lists": 1, "shards": 1, "checkpoints": 1, "found": 1}
        task = self.chance.choices(list(tasks), list(tasks.values()))[0]
        try:
            getattr(self, task)()
        except Exception as error:  # every exception is a loss
            self.losses.append(f"{task}: {type(error).__name__}: {error}")
            print(f"LOST {self.losses[-1]}", flush=True)
        self.count[f"rounds of {task}"] += 1

    # Kills ------------------------------------------------------------------------------------------------------------

    def kills(self) -> None:
        name = self.chance.choice(list(RUNS))
        processes = self.chance.choice((1, 1, 2))
        run, events = Killed(self.folder / "run", name, processes), events_of(name)
        for _ in range(self.chance.randint(1, 5)):
            where = self.chance.choice(list(events))
            number = self.chance.randint(1, max(1, events[where] // 2))
            rank = self.chance.randrange(processes) if where in ("step", "accumulation", "worker") else 0
            code, output = run.start(where, number, rank)
            if code == 0:  # the run ended before the kill
                break
            if "Traceback" in output and where != "worker" and processes == 1:
                raise Broken(f"{name}: {output.splitlines()[-1]}")
            self.count[f"kills: {where}"] += 1
            self.count["kills"] += 1
            self.count["kills of a rank of two"] += processes > 1
        code, output = run.start()
        if code != 0:
            raise Broken(f"{name} on {processes}: exit code {code}: {output.splitlines()[-1]}")
        run.check_end(self.reference(name, processes))
        self.count[f"runs of {name} on {processes}"] += 1
        run.remove()

    def reference(self, name: str, processes: int) -> Killed:
        if (name, processes) not in self.references:
            run = Killed(self.folder / f"{name}-{processes}", name, processes)
            code, output = run.start()
            if code != 0:
                raise Broken(f"the undisturbed {name} on {processes}: {output.splitlines()[-1]}")
            self.references[name, processes] = run
        return self.references[name, processes]

    # Files ------------------------------------------------------------------------------------------------------------

    def damaged(self, content: bytes) -> bytes:
        """Return the content with some bytes changed, cut off at the end, or inserted."""
        content, chance = bytearray(content), self.chance
        change = chance.randrange(4)
        if change == 0:
            return bytes(content[: chance.randrange(len(content) + 1)])
        for _ in range(chance.choice((1, 3, 30))):
            offset = chance.randrange(max(1, len(content)))
            if change == 1:
                content[offset : offset + 1] = bytes([chance.randrange(256)])
            elif change == 2:
                content[offset:offset] = chance.randbytes(chance.randint(1, 8))
            else:
                del content[offset : offset + chance.randint(1, 64)]
        return bytes(content)

    def picture(self, format: str) -> bytes:
        size = self.chance.randint(1, 40), self.chance.randint(1, 40)
        file = io.BytesIO()
        Image.frombytes("RGB", size, self.chance.randbytes(3 * size[0] * size[1])).save(file, format)
        return file.getvalue()

    def args(self, flags: str):
        return main_pretrain.get_args_parser().parse_args(f"{flags} --num_workers 0 --input_size 16".split())

    def images(self) -> None:
        """Each image is read, or counted as unreadable."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for number in range(60):
                ending = self.chance.choice((".png", ".jpg", ".webp", ".bmp", ".ppm"))
                kinds = [self.picture(self.chance.choice(FORMATS)), self.chance.choice(list(GOOD.values()))]
                content = self.damaged(self.chance.choice(kinds))
                (Path(folder) / f"{number:02d}{ending}").write_bytes(content)
            args = self.args(f"--dataset folder --data_path {folder}")
            dataset = KeyedDataset(read_images(args, True), self.transform(), seed=0, in_chans=3, replace=False)
            bad = sum(int(dataset[index].bad) for index in range(len(dataset)))
        self.count["bad images"] += 60
        self.count["bad images that were still readable"] += 60 - bad

    def lists(self) -> None:
        """Each list is read, or refused in a sentence."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for number in range(10):
                (Path(folder) / f"{number}.png").write_bytes(self.picture("PNG"))
            lines = "".join(f"{number}.png\tclass{number % 3}\n" for number in range(10)).encode()
            for _ in range(40):
                (Path(folder) / "list.txt").write_bytes(self.damaged(lines))
                args = self.args(f"--dataset filelist --data_path {folder} --train_list {folder}/list.txt")
                try:
                    dataset = KeyedDataset(read_images(args, True), self.transform(), seed=0, in_chans=3, replace=False)
                    for index in range(len(dataset)):
                        dataset[index]  # missing files count as unreadable
                except UserError:
                    self.count["bad lists refused"] += 1
                self.count["bad lists"] += 1

    def shards(self) -> None:
        """The number of images stays, and damaged ones are replaced and counted; or the run is refused in a
        sentence."""
        import tarfile

        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            shard = Path(folder) / "train-000000.tar"
            with tarfile.open(shard, "w") as archive:
                for number in range(12):
                    for ending, content in (("png", self.picture("PNG")), ("cls", str(number % 3).encode())):
                        member = tarfile.TarInfo(f"{number:03d}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            whole = shard.read_bytes()
            for _ in range(8):
                shard.write_bytes(self.damaged(whole))
                args = self.args(f"--dataset wds --data_path {shard} --shard_samples 12 --batch_size 4")
                try:
                    loader = build_loader(read_images(args, True), self.transform(), args, 4, train=True)
                    seen = sum(len(batch.target) for batch in loader.begin(0))
                    if seen != 12:
                        raise Broken(f"{seen} images of a shard of 12")
                except (UserError, UnreadableData):
                    self.count["bad shards refused"] += 1
                self.count["bad shards"] += 1

    def checkpoints(self) -> None:
        """Each checkpoint is refused in a sentence, or has its original content."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path, state = Path(folder) / "checkpoint.pth", {"model": {"w": torch.randn(50, 7)}, "epoch": 3}
            torch.save(state, path)
            whole = path.read_bytes()
            for _ in range(100):
                path.write_bytes(self.damaged(whole))
                try:
                    result = read_file(path)
                except UserError:
                    self.count["damaged checkpoints refused"] += 1
                else:
                    if not (torch.equal(result["model"]["w"], state["model"]["w"]) and result["epoch"] == 3):
                        raise Broken("a damaged checkpoint was read as another one")
                self.count["damaged checkpoints"] += 1

    def found(self) -> None:
        """Each data set and file as people have them is read as it was meant."""
        for name, check in KINDS.items():
            for _ in range(5):
                with tempfile.TemporaryDirectory(dir=self.folder) as folder, contextlib.redirect_stdout(io.StringIO()):
                    check(self.chance, Path(folder))
                self.count[f"found: {name}"] += 1

    def transform(self):
        return eval_transform((16, 16), (0.5,) * 3, (0.5,) * 3, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    began, reported = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.seed)
        while (minutes := (time.monotonic() - began) / 60) < options.minutes:
            with contextlib.redirect_stderr(io.StringIO()):  # names of unreadable images
                soak.round()
            if minutes - reported >= 1:
                reported = minutes
                print(f"{minutes:.0f} min: {soak.count['kills']} kills, {len(soak.losses)} losses", flush=True)
    result = {
        "seed": options.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        **dict(sorted(soak.count.items())),
    }
    print(json.dumps(result | {"losses": soak.losses}, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result | {"losses": soak.losses}, indent=2) + "\n")
    sys.exit(bool(soak.losses))


if __name__ == "__main__":
    main()
