"""Scores of a study: of a row over the seeds, differences of two rows, costs, and MAE at equal time."""

import itertools
import math
import statistics
from dataclasses import dataclass

from evaluation.study import Study


@dataclass(frozen=True)
class Score:
    """A column: the `metric` of the pieces of a `kind`. `lower` is better, or higher."""

    kind: str
    metric: str
    title: str
    lower: bool = False


def scores_of(study: Study) -> dict[str, Score]:
    """Return the columns of a study by title, in order."""
    rows = [(*row[:3], "lower" in row[3:]) for row in study.config["scores"]]
    return {title: Score(kind, metric, title, lower) for kind, metric, title, lower in rows}


def title_of(study: Study, method: str) -> str:
    """Return the name of a row in tables and figures."""
    entry = study.methods.get(method) or study.config["methods"].get(method) or {}
    return entry.get("title", method)


def by_seed(study: Study, method: str, score: Score) -> dict[int, float]:
    """Return the values of a row by seed; not finite ones are left out."""
    values = {}
    for seed in study.config["seeds"]:
        value = study.kept.metric(f"{method}-seed{seed}-{score.kind}", score.metric)
        if value is not None and math.isfinite(value):
            values[seed] = value
    return values


# Differences ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How much better one row is than another, for each seed that both have. `noise` is the standard deviation of a
    difference with one seed, None where it is not known."""

    values: tuple[float, ...]
    noise: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def direction(self) -> int:
        """1: better, -1: worse, 0: within twice the standard error of the mean, or of one seed's difference."""
        deviation = statistics.stdev(self.values) if len(self.values) > 1 else self.noise
        error = (deviation or 0.0) / math.sqrt(len(self.values))
        return 0 if abs(self.mean) <= 2 * error else int(math.copysign(1, self.mean))

    def __str__(self) -> str:
        deviation = f" ± {statistics.stdev(self.values):.2f}" if len(self.values) > 1 else ""
        return f"{self.mean:+.2f}{deviation} (n = {len(self.values)})"


def noise_of(study: Study, score: Score) -> float | None:
    """Return the standard deviation over seeds of the difference of two rows, pooled over all rows with several seeds;
    None without any."""
    rows = [list(by_seed(study, method, score).values()) for method in study.methods]
    variances = [(statistics.variance(row), len(row) - 1) for row in rows if len(row) > 1]
    if not variances:
        return None
    pooled = sum(variance * freedom for variance, freedom in variances) / sum(freedom for _, freedom in variances)
    return math.sqrt(2 * pooled)


def difference(study: Study, one: str, other: str, score: Score) -> Difference | None:
    """Return by how much `one` is better than `other`; None while they have no common seed."""
    ours, theirs = by_seed(study, one, score), by_seed(study, other, score)
    sign = -1 if score.lower else 1
    values = tuple(sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs)
    return Difference(values, noise_of(study, score)) if values else None


# Costs ----------------------------------------------------------------------------------------------------------------


def pretrainings(study: Study, method: str) -> list[dict]:
    """Return the finished pretrainings of a row."""
    source = study.methods[method].get("of", method)
    runs = [study.kept.results.get(f"{source}-seed{seed}") for seed in study.config["seeds"]]
    return [run for run in runs if run]


def hours(study: Study, *methods: str) -> list[float] | None:
    """Return the hours that the pretraining of each row took, mean over seeds: of a core where that was measured for
    every one of these rows, else of the clock. None while one is not finished."""
    runs = [pretrainings(study, method) for method in methods]
    if not all(runs):
        return None
    of_core = [[run for run in row if "core_seconds" in run] for row in runs]
    chosen, key = (of_core, "core_seconds") if all(of_core) else (runs, "seconds")
    return [statistics.fmean(run[key] for run in row) / 3600 for row in chosen]


def clock_only(study: Study) -> bool:
    """Whether the time of some pretraining is that of the clock, which other work on the machine lengthens."""
    runs = [run for method in study.methods for run in pretrainings(study, method)]
    return any("core_seconds" not in run for run in runs)


def at_equal_time(study: Study, method: str, score: Score) -> float | None:
    """Return the score of plain MAE trained for as long as this row: between the runs of MAE of the study
    (`equal_time`), in proportion to the logarithm of their time. None outside of their range."""
    rows = study.config.get("equal_time", [])
    values = [list(by_seed(study, row, score).values()) for row in rows]
    costs = hours(study, method, *rows)
    if not costs or len(rows) < 2 or not all(values):
        return None
    at, *lengths = map(math.log, costs)
    points = sorted(zip(lengths, map(statistics.fmean, values)))
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= at <= right and left < right:
            return low + (high - low) * (at - left) / (right - left)
    return None
