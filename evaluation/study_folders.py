"""The folders of a study: parts of the data set as links, a tiny data set for rehearsals, logs and times of pieces."""

import json
import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

from PIL import Image

from util.errors import UserError

TIMES = ("seconds", "speed/", "gpu_memory", "data_wait")  # beginnings of names in a log that are not kept
PARTS = "times.jsonl"


class Sets:
    """The parts of the data set: whole (`data`), with a tenth of the training images held out in place of those for
    evaluation, and with few labels. The parts are folders of links in `out`."""

    def __init__(self, data: str, out: Path, config: dict):
        self.data, self.out, self.config = Path(data), out, config

    def flags(self) -> dict[str, str]:
        stats = self.config.get("stats", "")
        folders = {"images": self.data, "held_out": self.out / "data/held_out", "tenth": self.out / "data/few"}
        return {name: f"--data_path {shlex.quote(str(path))} {stats}" for name, path in folders.items()}

    def make(self) -> None:
        """Make the folders of links. Raises UserError where the data set has no train/<class>/ and val/<class>/, and
        where the links lead to another data set."""
        classes = sorted(path.name for path in (self.data / "train").glob("*/"))
        if not classes or not (self.data / "val").is_dir():
            raise UserError(f"--data {self.data} has no train/<class>/ and val/<class>/")
        self.check_links()
        for part in ("held_out", "few"):
            target = self.out / "data" / part
            if target.exists():
                continue
            unfinished = self.out / "data" / f"{part}.{os.getpid()}"
            for name in classes:
                for split, files in self.divided(part, name).items():
                    folder = unfinished / split / name
                    folder.mkdir(parents=True)
                    for file in files:
                        (folder / file.name).symlink_to(file)
            if part == "few":
                (unfinished / "val").symlink_to((self.data / "val").resolve())
            with suppress(OSError):  # another queue was first
                unfinished.rename(target)
            shutil.rmtree(unfinished, ignore_errors=True)

    def divided(self, part: str, name: str) -> dict[str, list[Path]]:
        """Return the files of a class in each split of a part."""
        files = sorted((self.data / "train" / name).resolve().iterdir())
        if part == "few":
            return {"train": files[: self.config["few"]]}
        cut = max(1, len(files) // 10)
        return {"train": files[cut:], "val": files[:cut]}

    def check_links(self) -> None:
        link = self.out / "data/few/val"
        if not link.is_symlink() or link.resolve() == (self.data / "val").resolve():
            return
        if link.exists():
            raise UserError(f"--data {self.data} is not {link.resolve().parent}, of which {self.out} is a study")
        shutil.rmtree(self.out / "data")  # the data set has moved: its links are made again


def write_digits(folder: Path, per_class: int = 40) -> None:
    """Write some of scikit-learn's digits as a data set of pictures, train/<class>/ and val/<class>/."""
    from sklearn.datasets import load_digits

    if folder.exists():
        return
    unfinished, (rows, labels) = folder.with_name(f"{folder.name}.{os.getpid()}"), load_digits(return_X_y=True)
    count = dict.fromkeys(range(10), 0)
    for pixels, label in zip(rows.reshape(-1, 8, 8), labels):
        number = count[label] = count[label] + 1
        if number > per_class * 5 // 4:
            continue
        path = unfinished / ("train" if number <= per_class else "val") / str(label)
        path.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * 15.9).astype("uint8"))
        grey.convert("RGB").resize((16, 16)).save(path / f"{number:03}.png")
    with suppress(OSError):  # another queue was first
        unfinished.rename(folder)


# Logs and times -------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict]:
    """Return the lines of a file of JSON, without one that a crash cut off; [] if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def rows_of(log: Path) -> str:
    """Return the lines of a log without times; "" without a log."""
    kept = [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in read_lines(log)]
    return "".join(json.dumps(row) + "\n" for row in kept)


def epochs_in(folder: Path) -> int:
    """Return the number of finished epochs in the log of a piece."""
    return len(read_lines(folder / "log.txt"))


def add_time(folder: Path, core_seconds: float, epochs: int) -> None:
    """Note that a part of a piece, of so many epochs, took so long. It is one line for each start."""
    with (folder / PARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"core_seconds": round(core_seconds, 2), "epochs": epochs}) + "\n")


def whole_time(folder: Path) -> float | None:
    """Return the core seconds of a whole piece, None if they are not known. Parts that ended with their queue are not
    measured: they count as long as the others."""
    parts, epochs = read_lines(folder / PARTS), epochs_in(folder)
    if not epochs:  # a command without epochs starts anew
        return parts[-1]["core_seconds"] if parts else None
    measured = sum(part["epochs"] for part in parts)
    return sum(part["core_seconds"] for part in parts) * epochs / measured if measured > 0 else None
