"""What papers claim, beside what a study measured: a verdict for each claim of the file `claims` of a study.

A claim has a `claim`, its `source`, our `setting`, and one of
- `better`: triples (row, other row, score): the first is better;
- `not_worse`: triples as well: the first is not worse;
- `smaller`: two rows and a number of their logs: its mean size over the run is smaller in the first;
- `stays_above`: a row, a number of its log, and a bound that it stays above;
- `measured`: what was measured elsewhere, and the verdict;
- `untestable`: the reason why this study cannot tell.
`earlier` is what a smaller study measured, and its verdict: it is shown until this one can tell.
"""

import math
import statistics
from pathlib import Path

import yaml

from evaluation.study import Study
from evaluation.study_folders import read_lines
from evaluation.study_scores import difference, scores_of, title_of
from util.errors import UserError

KINDS = ("better", "not_worse", "smaller", "stays_above", "measured", "untestable")


def read_claims(study: Study) -> list[dict]:
    """Return the claims of a study, [] without any. Raises UserError for a claim that names an unknown row or score."""
    if "claims" not in study.config:
        return []
    path = Path(study.path).with_name(study.config["claims"])
    claims = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows, titles = study.config["methods"], scores_of(study)
    for entry in claims:
        if sum(kind in entry for kind in KINDS) != 1:
            raise UserError(f"{path}: the claim '{entry.get('claim')}' needs one of {', '.join(KINDS)}")
        for one, other, title in triples(entry):
            unknown = [name for name in (one, other) if name not in rows]
            if unknown or title not in titles:
                raise UserError(f"{path}: {(unknown or [title])[0]} is no row or score of {study.path}")
    return claims


def triples(entry: dict) -> list:
    return entry.get("better") or entry.get("not_worse") or []


def judged(study: Study, entry: dict) -> tuple[str, str]:
    """Return what was measured about a claim, and the verdict."""
    ours, decided = judged_here(study, entry)
    if "earlier" in entry and decided.startswith(("open", "not testable")):
        measured, before = entry["earlier"]
        return "; ".join(filter(None, [ours, measured])), f"{decided}; in a smaller study: {before}"
    return ours, decided


def judged_here(study: Study, entry: dict) -> tuple[str, str]:
    """Return the same, without earlier studies."""
    if "untestable" in entry:
        return "", f"not testable here: {entry['untestable']}"
    if "measured" in entry:
        return tuple(entry["measured"])
    if "smaller" in entry:
        return judged_by_size(study, *entry["smaller"])
    if "stays_above" in entry:
        return judged_by_bound(study, *entry["stays_above"])
    texts, directions, seeds, missing = [], [], [], []
    for one, other, title in triples(entry):
        found = difference(study, one, other, scores_of(study)[title])
        if found is None:
            missing += [name for name in (one, other) if name not in missing and not has(study, name, title)]
            continue
        texts.append(f"{title_of(study, one)} against {title_of(study, other)}, {title}: {found}")
        directions.append(found.direction)
        seeds.append(len(found.values))
    if missing:
        return "; ".join(texts), f"open: not run yet: {'; '.join(title_of(study, name) for name in missing)}"
    return "; ".join(texts), verdict(directions, min(seeds), strict="better" in entry)


def has(study: Study, name: str, title: str) -> bool:
    score = scores_of(study)[title]
    return any(study.kept.metric(f"{name}-seed{seed}-{score.kind}", score.metric) for seed in study.config["seeds"])


def verdict(directions: list[int], seeds: int, strict: bool) -> str:
    """Return the verdict on differences that a claim expects to be positive or, if not `strict`, not negative."""
    agree = [direction > 0 if strict else direction >= 0 for direction in directions]
    few = " with one seed" if seeds == 1 else ""
    if all(agree):
        return f"seen{few}"
    if any(agree):
        return f"partly seen{few}: {sum(agree)} of {len(agree)}"
    return f"not seen{few}" + (": the opposite" if all(direction < 0 for direction in directions) else "")


def logged(study: Study, name: str, key: str) -> list[float]:
    """Return the finite values of a number in the logs of a row's finished runs."""
    seeds = [f"{name}-seed{seed}" for seed in study.config["seeds"]]
    rows = [row for seed in seeds for row in read_lines(study.kept.folder / f"{seed}.txt")]
    return [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def judged_by_size(study: Study, one: str, other: str, key: str) -> tuple[str, str]:
    values = {name: logged(study, name, key) for name in (one, other)}
    missing = [title_of(study, name) for name in values if not values[name]]
    if missing:
        return "", f"open: not run yet: {'; '.join(missing)}"
    sizes = {name: statistics.fmean(map(abs, each)) for name, each in values.items()}
    texts = [f"{title_of(study, name)} {size:.3f}" for name, size in sizes.items()]
    return f"mean size of {short(key)}: {', '.join(texts)}", "seen" if sizes[one] < sizes[other] else "not seen"


def judged_by_bound(study: Study, name: str, key: str, bound: float) -> tuple[str, str]:
    values = logged(study, name, key)
    if not values:
        return "", f"open: not run yet: {title_of(study, name)}"
    text = f"{title_of(study, name)}, {short(key)} at least {min(values):.1f}"
    return text, "seen" if min(values) > bound else "not seen"


def short(key: str) -> str:
    return key.split("/")[-1].replace("_", " ")


def claims_table(study: Study) -> list[str]:
    """Return the lines of the table of claims, [] for a study without any."""
    claims = read_claims(study)
    if not claims:
        return []
    lines = ["| claim | source | our setting | ours | verdict |", "|---|---|---|---|---|"]
    for entry in claims:
        ours, decided = judged(study, entry)
        lines.append(f"| {entry['claim']} | {entry['source']} | {entry.get('setting', '')} | {ours} | {decided} |")
    return lines
