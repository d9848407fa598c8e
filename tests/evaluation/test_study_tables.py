"""The tables of a study: cells with n, differences, verdicts on claims, MAE at equal time, figures."""

import json
from pathlib import Path

import pytest
import yaml

from evaluation.study import Kept, Study
from evaluation.study_claims import claims_table, judged, read_claims, verdict
from evaluation.study_figures import curves
from evaluation.study_scores import Difference, at_equal_time, difference, hours, noise_of, scores_of
from evaluation.study_tables import BEGIN, END, cell, first_table, rates_table, scores_table, write_results
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = {
    "model": "mae_vit_micro_patch4",
    "rates": ["1e-3", "2e-3"],
    "seeds": [0, 1, 2],
    "within": 2.0,
    "pretrain": "",
    "full": "--epochs 4",
    "short": "--epochs 1",
    "evaluate": {
        "probe": "main_linprobe.py {start}",
        "robustness": "tools/robustness.py {classifier}",
        "finetune": "main_finetune.py --epochs 1",
    },
    "recipe": "",
    "scores": [["probe", "eval/acc1", "probe"], ["robustness", "eval/corrupted_error", "error", "lower"]],
    "equal_time": ["mae", "mae_8"],
    "claims": "claims.yaml",
    "methods": {"mae": {"title": "MAE"}, "other": {}, "mae_8": {}},
}
CLAIMS = [
    {"claim": "other is better", "source": "Paper, Table 1", "better": [["other", "mae", "probe"]]},
    {"claim": "as good", "source": "Paper", "not_worse": [["other", "mae", "probe"]]},
    {"claim": "robust", "source": "Paper", "better": [["other", "mae", "error"]]},
    {"claim": "orthogonal", "source": "Fig. 3b", "smaller": ["other", "mae", "train/grad_cosine"]},
    {"claim": "memory", "source": "Paper", "untestable": "no GPU"},
]


@pytest.fixture
def study(tmp_path):
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(CLAIMS))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return Study(tmp_path / "study.yaml", Kept(tmp_path / "kept"))


def put(study: Study, name: str, kind: str = "probe", **entries) -> None:
    study.kept.results[name] = {"kind": kind, "seconds": 36.0, "images_seen": 100, **entries}


def probes(study: Study, method: str, *values: float, metric: str = "eval/acc1", kind: str = "probe") -> None:
    for seed, value in enumerate(values):
        put(study, f"{method}-seed{seed}-{kind}", kind, metrics={metric: value})


def test_cells():
    assert cell([]) == "" and cell([1.0]) == "1.00 (n = 1)" and cell([1.0, 3.0]) == "2.00 ± 1.41 (n = 2)"


def test_differences_are_paired_and_signed(study):
    score, error = scores_of(study).values()

    def values(column):
        found = difference(study, "other", "mae", column)
        return found and found.values

    assert values(score) is None
    probes(study, "mae", 50.0, 60.0)
    probes(study, "other", 51.0, 61.5, 70.0)
    assert values(score) == (1.0, 1.5)
    assert str(difference(study, "other", "mae", score)) == "+1.25 ± 0.35 (n = 2)"
    probes(study, "mae", 30.0, metric="eval/corrupted_error", kind="robustness")
    probes(study, "other", 28.0, metric="eval/corrupted_error", kind="robustness")
    assert values(error) == (2.0,) and noise_of(study, error) is None


def test_noise_is_pooled_over_rows(study):
    """Variances 2 (two seeds) and 1 (three seeds) pool to (2 + 2 * 1) / 3; a difference has twice as much."""
    score = scores_of(study)["probe"]
    probes(study, "mae", 1.0, 3.0)
    probes(study, "other", 1.0, 2.0, 3.0)
    assert noise_of(study, score) == pytest.approx((2 * 4 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("values", "noise", "expected"),
    [
        ((1.0,), None, 1),
        ((-1.0,), None, -1),
        ((1.0,), 0.6, 0),
        ((1.3,), 0.6, 1),
        ((1.0, 1.1, 0.9), 5.0, 1),  # its own deviation counts where it has one
        ((1.0, -1.0, 0.5), 0.0, 0),
        ((-1.0, -1.1, -0.9), None, -1),
    ],
)
def test_direction(values, noise, expected):
    assert Difference(values, noise).direction == expected


def test_verdicts():
    assert verdict([1, 1], 3, strict=True) == "seen" and verdict([1], 1, strict=True) == "seen with one seed"
    assert verdict([1, 0], 3, strict=True) == "partly seen: 1 of 2" and verdict([0, 0], 3, strict=True) == "not seen"
    assert verdict([-1], 3, strict=True) == "not seen: the opposite"
    assert verdict([0], 3, strict=False) == "seen" and verdict([-1], 3, strict=False) == "not seen: the opposite"


def test_claims(study):
    better, as_good, robust, orthogonal, memory = read_claims(study)
    assert judged(study, better) == ("", "open: not run yet: other; MAE")
    assert judged(study, memory) == ("", "not testable here: no GPU")
    probes(study, "mae", 50.0, 50.2, 49.8)
    probes(study, "other", 53.0, 53.1, 52.9)
    ours, decided = judged(study, better)
    assert decided == "seen" and ours == "other against MAE, probe: +3.00 ± 0.10 (n = 3)"
    assert judged(study, as_good)[1] == "seen" and judged(study, robust)[1].startswith("open")
    for name, values in {"other": (0.1, -0.1), "mae": (0.3, float("nan"))}.items():
        study.kept.folder.mkdir(exist_ok=True)
        lines = [json.dumps({"epoch": epoch, "train/grad_cosine": value}) for epoch, value in enumerate(values)]
        (study.kept.folder / f"{name}-seed0.txt").write_text("\n".join(lines) + "\n")
    assert judged(study, orthogonal) == ("mean size of grad cosine: other 0.100, MAE 0.300", "seen")
    assert len(claims_table(study)) == 2 + len(CLAIMS)


def test_a_claim_about_an_unknown_row_is_refused(study, tmp_path):
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([{"claim": "x", "better": [["other", "mea", "probe"]]}]))
    with pytest.raises(UserError, match="mea is no row or score"):
        read_claims(study)
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([{"claim": "x"}]))
    with pytest.raises(UserError, match="needs one of"):
        read_claims(study)


def test_claims_of_the_real_study(tmp_path):
    real = Study(ROOT / "configs/study/cifar10.yaml", Kept(tmp_path))
    assert len(read_claims(real)) > 20
    assert all({"claim", "source"} <= entry.keys() for entry in read_claims(real))
    assert set(real.config["headline"]) <= set(scores_of(real))
    assert {*real.config["equal_time"], *real.config["reconstructed"]} <= set(real.config["methods"])


def test_mae_at_equal_time(study):
    """Halfway between one and four hours, by the logarithm, is two hours."""
    score = scores_of(study)["probe"]
    probes(study, "mae", 50.0)
    probes(study, "mae_8", 60.0)
    for name, length in {"mae": 1, "mae_8": 4, "other": 2}.items():
        put(study, f"{name}-seed0", "pretrain", seconds=3600.0 * length)
    assert at_equal_time(study, "other", score) == pytest.approx(55.0)
    put(study, "other-seed0", "pretrain", seconds=3600.0 * 5)
    assert at_equal_time(study, "other", score) is None
    put(study, "other-seed0", "pretrain", seconds=3600.0, core_seconds=1800.0)
    assert hours(study, "other") == [0.5] and hours(study, "other", "mae") == [1.0, 1.0]  # both of the clock


def test_tables(study):
    for rate, accuracy in zip(CONFIG["rates"], (40.0, 45.0)):
        put(study, f"tune-mae-{rate}", "tune", metrics={"eval/knn20_acc1": accuracy})
    put(study, "mae-seed0", "pretrain", metrics={})
    probes(study, "mae", 50.0, 52.0)
    assert scores_table(study)[2:] == ["| MAE | 100 | 0.01 | 51.00 ± 1.41 (n = 2) |  |"]
    assert rates_table(study)[2:] == ["| MAE | 40.00 | 45.00 | 2e-3 |"]
    assert first_table(study)[2:] == ["| MAE | 51.00 ± 1.41 (n = 2) | 1.00 |  |"]


def test_page(study, tmp_path):
    """Between its markers, the page begins with the figure and the short table."""
    put(study, "mae-seed0", "pretrain", metrics={}, images_seen=2_000_000)
    probes(study, "mae", 50.0)
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    with pytest.raises(UserError, match="has no lines"):
        write_results(study, page)
    page.write_text(f"# Results\n\n{BEGIN}\nold\n{END}\n\nend\n")
    write_results(study, page)
    assert "old" not in page.read_text() and "study.png" not in page.read_text()  # nothing to draw
    study.kept.folder.mkdir(exist_ok=True)
    rows = [
        {"epoch": 0, "train/target_rank": float("nan")},
        {"epoch": 1, "eval/knn20_acc1": 30, "train/target_rank": 9},
    ]
    (study.kept.folder / "mae-seed0.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_results(study, page)
    text = page.read_text()
    begins = text.partition(f"{BEGIN}\n")[2].splitlines()
    assert text.endswith(f"{END}\n\nend\n") and "![" in begins[0] and begins[2].startswith("| method | probe")
    assert curves(study, "eval/knn20_acc1") == {"mae": [(2.0, 30)]}
    assert curves(study, "train/target_rank") == {"mae": [(2.0, 9)]}
    for name in ("study.png", "study_targets.png"):
        assert name in text and (tmp_path / name).stat().st_size > 5000
    assert "study_cosine.png" not in text and not (tmp_path / "study_cosine.png").exists()


def test_earlier_and_fixed_evidence(study):
    """What a smaller study found is shown until this one can tell; bounds are checked over the whole run."""
    earlier = CLAIMS[0] | {"earlier": ["-3.15", "not seen"]}
    assert judged(study, earlier) == ("-3.15", "open: not run yet: other; MAE; in a smaller study: not seen")
    probes(study, "mae", 50.0)
    probes(study, "other", 53.0)
    assert judged(study, earlier)[1] == "seen with one seed"
    assert judged(study, {"claim": "x", "measured": ["equal", "seen"]}) == ("equal", "seen")
    bound = {"claim": "x", "stays_above": ["other", "train/target_rank", 10]}
    assert judged(study, bound)[1] == "open: not run yet: other"
    study.kept.folder.mkdir(exist_ok=True)
    for last, decided in ((12.0, "seen"), (3.0, "not seen")):
        lines = [json.dumps({"epoch": epoch, "train/target_rank": value}) for epoch, value in enumerate((40.0, last))]
        (study.kept.folder / "other-seed0.txt").write_text("\n".join(lines) + "\n")
        assert judged(study, bound) == (f"other, target rank at least {last:.1f}", decided)
