"""The pieces of a study: which runs it consists of, in which order, and what each needs.

A study is a YAML file (configs/study/). A method is pretrained with several base learning rates on a tenth of the
length (tuning), then whole with the best one, for one seed after the other, and each encoder is evaluated in several
ways. A piece is one command. What it measured is kept as a JSON file beside its log, apart from the checkpoints.
"""

import itertools
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from util.checkpoint.atomic import write_atomically
from util.errors import UserError

TUNING, PRETRAINING = "tune", "pretrain"


@dataclass(frozen=True)
class Piece:
    """One command of a study. `words` are its flags without paths, by which two studies are compared; `needs` are the
    names of the pieces before it; `checkpoint` is the file, relative to the study, that later pieces read."""

    name: str
    kind: str
    words: str
    needs: tuple[str, ...] = ()
    checkpoint: str = ""


@dataclass
class Kept:
    """The results of finished pieces, one JSON file each in `folder`."""

    folder: Path
    results: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        self.read()

    def read(self) -> None:
        """Read what other queues have written meanwhile. Raises UserError for a damaged file."""
        for path in sorted(self.folder.glob("*.json")):
            if path.stem not in self.results:
                try:
                    self.results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
                except ValueError as error:
                    raise UserError(f"{path} is damaged: remove it, and its piece runs again") from error

    def metric(self, name: str, metric: str) -> float | None:
        return self.results.get(name, {}).get("metrics", {}).get(metric)

    def add(self, piece: Piece, row: dict, seconds: float, log: str) -> None:
        """Keep the ledger line `row` of a piece that took `seconds`, and the rows of its log without times."""
        chosen = {name: row.get(name) for name in ("metrics", "images_seen", "revision", "finished", "hardware")}
        self.results[piece.name] = {"words": piece.words, "kind": piece.kind, "seconds": round(seconds, 1), **chosen}
        self.folder.mkdir(parents=True, exist_ok=True)
        if log:
            write_atomically(self.folder / f"{piece.name}.txt", lambda file: file.write(log.encode()))
        text = json.dumps(self.results[piece.name], indent=1, sort_keys=True)
        write_atomically(self.folder / f"{piece.name}.json", lambda file: file.write(f"{text}\n".encode()))


class Study:
    """The pieces of the study in the YAML file `path`, given what was `kept`."""

    def __init__(self, path: Path, kept: Kept):
        try:
            self.config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--study {path} cannot be read: {error}") from error
        self.kept = kept
        self.methods: dict[str, dict] = {name: entry or {} for name, entry in self.config["methods"].items()}

    @cached_property
    def baseline(self) -> str:
        return next(iter(self.methods))

    def pieces(self) -> Iterator[Piece]:
        """Yield all pieces that are known now, in the order of the queue: the first seed of every method, then the
        other seeds of those that are near the baseline."""
        first, *others = self.config["seeds"]
        for method in self.methods:
            yield from self.tuning(method)
            yield from self.run(method, first)
        for seed in others:
            for method in self.methods:
                if self.near_baseline(method):
                    yield from self.run(method, seed)

    def near_baseline(self, method: str) -> bool:
        """Whether the first seed of a method is finished, and near enough to the baseline or above it. Rows without
        pretraining of their own follow theirs."""
        method = self.methods[method].get("of", method)
        seed, (kind, metric, _) = self.config["seeds"][0], self.config["scores"][0]
        ours, theirs = (self.kept.metric(f"{name}-seed{seed}-{kind}", metric) for name in (method, self.baseline))
        return ours is not None and theirs is not None and ours >= theirs - self.config["within"]

    # Pieces of a method ----------------------------------------------------------------------------------------------

    def tuning(self, method: str) -> Iterator[Piece]:
        """One piece for each base learning rate."""
        entry, config = self.methods[method], self.config
        if "of" in entry or "of_rate" in entry or not entry.get("pretrained", True):
            return
        needs = (entry["needs"],) if "needs" in entry else ()
        for rate in config["rates"]:
            flags = f"{config['pretrain']} {config['short']} {entry.get('tune', entry.get('flags', ''))}"
            words = f"main_pretrain.py {{held_out}} --model {config['model']} {flags} --lr {rate} --seed 0"
            yield Piece(f"{TUNING}-{method}-{rate}", TUNING, words, needs)

    def best_rate(self, method: str) -> str | None:
        """The learning rate with the highest accuracy on held-out training images; None before all are tried."""
        method = self.methods[method].get("of_rate", method)
        names = {rate: f"{TUNING}-{method}-{rate}" for rate in self.config["rates"]}
        scores = {rate: self.kept.metric(name, "eval/knn20_acc1") for rate, name in names.items()}
        if None in scores.values():
            return None
        return max(scores, key=lambda rate: -math.inf if math.isnan(scores[rate]) else scores[rate])

    def run(self, method: str, seed: int) -> Iterator[Piece]:
        """Pretraining with one seed, and its evaluations."""
        entry, config, name = self.methods[method], self.config, f"{method}-seed{seed}"
        needs: tuple[str, ...] = ()
        encoder, key = "", entry.get("key", "model")
        if "of" in entry:
            needs = (f"{entry['of']}-seed{seed}",)
            flags = self.pretraining_flags(entry["of"])
            encoder = f"{needs[0]}/checkpoint-{int(value_of('--epochs', flags)) - 1}.pth"
        elif entry.get("pretrained", True):
            flags = self.pretraining_flags(method)
            encoder = f"{name}/checkpoint-{int(value_of('--epochs', flags)) - 1}.pth"
            rate = self.best_rate(method)
            tuned = tuple(piece.name for piece in self.tuning(entry.get("of_rate", method)))
            before = tuned + ((entry["needs"],) if "needs" in entry else ())
            words = f"main_pretrain.py {{images}} --model {config['model']} {flags} --lr {rate} --seed {seed}"
            yield Piece(name, PRETRAINING, f"{words} --resume auto", before, encoder)
            needs = (name,)
        yield from self.evaluations(name, seed, encoder, key, needs)

    def pretraining_flags(self, method: str) -> str:
        return f"{self.config['pretrain']} {self.config['full']} {self.methods[method].get('flags', '')}"

    def evaluations(self, name: str, seed: int, encoder: str, key: str, needs: tuple[str, ...]) -> Iterator[Piece]:
        start = f"--finetune {{out}}/{encoder} --checkpoint_key {key}" if encoder else ""
        read = f"{{out}}/{encoder} --checkpoint_key {key}" if encoder else "random"
        for kind, words in self.config["evaluate"].items():
            recipe = self.config["recipe"]
            classifier = f"{{out}}/{name}-finetune/checkpoint-{int(value_of('--epochs', words) or 1) - 1}.pth"
            if kind == "robustness":
                epochs = int(value_of("--epochs", self.config["evaluate"]["finetune"]))
                classifier = f"{{out}}/{name}-finetune/checkpoint-{epochs - 1}.pth"
                needs = (*needs, f"{name}-finetune")
            words = words.replace("{recipe}", recipe).replace("{start}", start).replace("{encoder}", read)
            words = f"{words.replace('{classifier}', classifier)} --seed {seed}"
            checkpoint = classifier.removeprefix("{out}/") if kind == "finetune" else ""
            yield Piece(f"{name}-{kind}", kind, words, needs, checkpoint)


def value_of(flag: str, words: str) -> str | None:
    """Return the last value of a flag, or None without it."""
    found, split = None, shlex.split(words)
    for word, value in itertools.pairwise(split):
        found = value if word == flag else found
    return found


# The state of a study -------------------------------------------------------------------------------------------------


def check_unchanged(pieces: list[Piece], kept: Kept) -> None:
    """Raise UserError for a finished piece that now has other flags. A pretraining whose rate is not known yet is not
    compared."""
    for piece in pieces:
        old = kept.results.get(piece.name)
        if old is not None and old["words"] != piece.words and "--lr None" not in piece.words:
            raise UserError(
                f"{kept.folder / piece.name}.json was made with other flags: remove it to run the piece again, or give "
                f"another --keep\n  then: {old['words']}\n  now:  {piece.words}"
            )


def missing(pieces: list[Piece], kept: Kept, out: Path) -> list[Piece]:
    """Return the pieces that have to run, in order: those without a result, and those whose checkpoint is lost and
    needed by a missing piece."""
    wanted = {piece.name for piece in pieces if piece.name not in kept.results}
    by_name = {piece.name: piece for piece in pieces}
    todo = list(wanted)
    while todo:
        for name in by_name[todo.pop()].needs:
            before = by_name.get(name)
            lost = before is not None and before.checkpoint and not (out / before.checkpoint).exists()
            if lost and name not in wanted:
                wanted.add(name)
                todo.append(name)
    return [piece for piece in pieces if piece.name in wanted]


def ready(piece: Piece, waiting: set[str]) -> bool:
    """Whether nothing that a piece needs is among the names of pieces that have not run."""
    return not any(name in waiting for name in piece.needs)


def hours_left(pieces: list[Piece], kept: Kept) -> float | None:
    """Return the hours of one core that `pieces` take by the mean time of finished ones of their kind; None where no
    piece of a kind is finished."""
    times: dict[str, list[float]] = {}
    for result in kept.results.values():
        times.setdefault(result["kind"], []).append(result["seconds"])
    if any(piece.kind not in times for piece in pieces):
        return None
    return sum(sum(times[piece.kind]) / len(times[piece.kind]) for piece in pieces) / 3600
