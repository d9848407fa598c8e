"""Tables that are made from the ledgers of finished runs."""

import csv
import statistics

import pytest
from helpers.ledgers import pretraining, write
from PIL import Image

from evaluation import runs
from tools import collect
from util.errors import UserError


def cells(*flags) -> dict:
    """Return {values of --by: (mean, standard deviation, n) of the only column}."""
    table = collect.main(collect.get_args_parser().parse_args([str(flag) for flag in flags]))
    assert len(table.columns) == 1
    result = {values: row[table.columns[0]] for values, row in table.rows}
    return {values: (cell.mean, cell.deviation, cell.n) for values, cell in result.items()}


def test_mean_and_deviation(tmp_path, capsys):
    """Against a direct computation, grouped by flags of the pretraining, with numbers in numeric order."""
    values = {0.9: [50.0, 54.0, 58.0], 0.5: [61.0]}
    for ratio, accuracies in values.items():
        for seed, value in enumerate(accuracies):
            folder = tmp_path / f"probe-m{ratio}-seed{seed}"
            source = pretraining(ratio, seed, init=f"/somewhere/seed{seed}/a.pth")
            write(folder, seed=seed, metrics={"eval/acc1": value}, source=source, finetune=source["path"])
    assert cells(tmp_path, "--by", "mask_ratio") == {(0.5,): (61.0, None, 1), (0.9,): (54.0, 4.0, 3)}
    table = capsys.readouterr().out
    assert "| 0.9 | 3 | 54.00 ± 4.00 |" in table and table.endswith(
        "\n\n±: sample standard deviation over seeds; n: number of seeds\n"
    )
    cells(tmp_path, "--by", "mask_ratio", "--where", "mask_ratio=0.5")
    assert "±" not in capsys.readouterr().out  # one seed
    assert list(cells(tmp_path, "--by", "pretrain.mask_ratio,method")) == [(0.5, "mae"), (0.9, "mae")]
    assert cells(tmp_path, "--by", "run", "--where", "mask_ratio=0.90") == {("probe-m0.9",): (54.0, 4.0, 3)}


def test_a_run_counts_once(tmp_path, capsys):
    """A run that was resumed, given twice, or copied counts with its latest line."""
    for seed in (0, 1):
        write(tmp_path / f"a-seed{seed}", seed=seed, metrics={"eval/acc1": 10.0})
        write(tmp_path / f"a-seed{seed}", seed=seed, metrics={"eval/acc1": 50.0 + seed}, blr=0.2)
    assert cells(tmp_path, tmp_path / "a-seed0") == {("a",): (50.5, statistics.stdev([50, 51]), 2)}
    assert capsys.readouterr().err == ""
    write(tmp_path / "b" / "a-seed1", seed=1, metrics={"eval/acc1": 51.0}, blr=0.2)
    assert cells(tmp_path)["a",][2] == 2
    assert "have the same flags and seeds" in capsys.readouterr().err


def test_judging_the_same_checkpoint_again(tmp_path):
    """Another file or another evaluation is another line; a repetition of the same evaluation is not."""
    for value, seed, k in ((1.0, 0, [5]), (2.0, 0, [5]), (4.0, 1, [5]), (8.0, 0, [20])):
        write(tmp_path, "knn", metrics={"acc1": value}, source=pretraining(seed=seed), k=k)
    result = runs.read_runs([str(tmp_path)])
    assert sorted(one.row["metrics"]["eval/acc1"] for one in result) == [2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("one", "other", "message", "allow"),
    [
        ({"blr": 0.1}, {"blr": 0.3}, "differ in blr: 0.1 in .*, 0.3 in", "--allow_differing blr"),
        ({"revision": "abc"}, {"revision": "abc+"}, "differ in revision: abc in", "--allow_revisions"),
        ({"data": "x"}, {"data": "y"}, "differ in data.test", "--allow_differing data.test"),
        ({"world_size": 1}, {"world_size": 2}, "differ in world_size", "--allow_differing world_size"),
        ({}, {"new_flag": 1}, "differ in new_flag: absent in", "--allow_differing new_flag"),
        ({"source": pretraining(0.5)}, {"source": pretraining(0.9)}, "pretrain.mask_ratio", "--by mask_ratio"),
        ({"source": pretraining(0.5)}, {"source": None}, "differ in pretrained: True", "--by pretrained"),
        ({"source": pretraining()}, {"source": pretraining(rc_mae=True)}, "pretrain.method: mae", "--by rc_mae"),
        (
            {"source": pretraining(source=pretraining(0.5))},
            {"source": pretraining(source=pretraining(0.9))},
            "differ in pretrain2.mask_ratio",
            "--by pretrain2.mask_ratio",
        ),
        (
            {"source": {"path": "a", "sha256": "1", "flags": {}}},
            {"source": {"path": "b", "sha256": "2", "flags": {}}},
            "differ in pretrain.file",
            "--allow_differing file",
        ),
    ],
)
def test_what_must_not_be_averaged(tmp_path, one, other, message, allow):
    write(tmp_path / "a-seed0", seed=0, **one)
    write(tmp_path / "a-seed1", seed=1, **other)
    with pytest.raises(UserError, match=message):
        cells(tmp_path)
    if message.startswith("pretrain.method"):  # the flag and the name that follows from it
        allow += ",method"
    assert sum(n for _, _, n in cells(tmp_path, *allow.split()).values()) == 2


def test_what_may_differ(tmp_path):
    """Paths, workers and other flags that do not change the numbers may differ, and paths that contain the seed."""
    write(tmp_path / "a-seed0", num_workers=1, print_freq=3, device="cpu", masks="/x/m-seed0/c.pth", finetune="a")
    write(tmp_path / "a-seed1", seed=1, num_workers=9, print_freq=4, device="auto", masks="/x/m-seed1/c.pth")
    assert cells(tmp_path) == {("a",): (50.0, 0.0, 2)}
    write(tmp_path / "a-seed2", seed=2, masks="/y/m-seed2/c.pth")
    with pytest.raises(UserError, match="differ in masks"):
        cells(tmp_path)


def test_one_row_from_several_folders(tmp_path, capsys):
    """Folders named by evaluation and encoder: one row for each encoder, one column for each evaluation."""
    for seed in (0, 1):
        write(tmp_path / f"probe-mae-seed{seed}", seed=seed, metrics={"eval/acc1": 40.0 + seed, "train/loss": 1.0})
        write(tmp_path / f"probe-mae-seed{seed}", "knn", seed=seed, metrics={"knn20_acc1": 30.0})
        metrics = {"eval/acc1": 60.0, "eval/best_acc1": 65.0}
        write(tmp_path / f"finetune-mae-seed{seed}", "main_finetune", seed=seed, metrics=metrics)
    write(tmp_path / "finetune_small-mae-seed0", "main_finetune", seed=0, metrics={"eval/acc1": 70.0})
    strip = "--strip probe- finetune- finetune_small-".split()
    collect.main(collect.get_args_parser().parse_args([str(tmp_path), *strip]))
    out = capsys.readouterr().out.splitlines()
    row = dict(zip(out[0].split(" | "), out[2].split(" | ")))
    assert row["probe eval/acc1"] == "40.50 ± 0.71" and row["finetune eval/acc1"] == "60.00 ± 0.00"
    assert row["finetune_small eval/acc1"] == "70.00 (n = 1)" and not any("best" in title for title in row)
    alone = ["--metric", "main_finetune:test_acc1", "--where", "run=finetune-mae"]
    assert cells(tmp_path, *alone) == {("finetune-mae",): (60.0, 0.0, 2)}


def test_last_epoch_beside_the_evaluated_one(tmp_path, capsys):
    """The numbers of a training and of --eval are of different epochs: the table says of which."""
    for seed, best in ((0, 3), (1, 6)):
        folder = tmp_path / f"a-seed{seed}"
        write(folder, "main_finetune", seed=seed, metrics={"eval/acc1": 50.0, "eval/best_acc1": 55.0})
        source = {"path": f"{folder}/checkpoint-best.pth", "sha256": "x", "epoch": best, "flags": {"seed": seed}}
        write(folder, "main_finetune --eval", seed=seed, metrics={"eval/acc1": 55.0}, source=source)

    def text(*flags):
        given = [str(tmp_path), *flags]  # the epochs of the best checkpoints may differ
        collect.main(collect.get_args_parser().parse_args(given))
        return capsys.readouterr()

    seeds = "±: sample standard deviation over seeds; n: number of seeds"
    note = (
        "main_finetune: after the last epoch. main_finetune --eval: of the evaluated checkpoint (checkpoint-best.pth "
        "after 4 to 7 epochs). checkpoint-best.pth is of the best epoch on the evaluation images."
    )
    assert text().out.endswith(f"| a | 2 | 50.00 ± 0.00 | 55.00 ± 0.00 |\n\n{seeds}\n\n{note}\n")
    assert text("--format", "latex").out.startswith(f"% {note}\n")
    csv_text = text("--format", "csv")
    assert csv_text.err == f"note: {note}\n" and "checkpoint" not in csv_text.out
    assert "epoch" not in text("--metric", "main_finetune:acc1").out


def test_names_of_earlier_revisions(tmp_path, capsys):
    """Ledgers with old and new names make one table, and a metric is found under its old name, its new one, and without
    the group. Names of tools began with that of a folder, which may be `test`."""
    write(tmp_path / "a-seed0", metrics={"test_acc1": 40.0, "train_reconstruction": 1.0, "knn_top1": 20.0})
    write(tmp_path / "a-seed1", seed=1, metrics={"eval/acc1": 42.0, "train/pixels": 3.0, "eval/knn20_acc1": 30.0})
    write(tmp_path / "tools", "robustness", metrics={"test_acc1": 5.0})
    for names, mean in (
        (("test_acc1", "eval/acc1", "acc1", "main_linprobe:test_acc1", "final/acc1"), 41.0),
        (("train_reconstruction", "train/pixels"), 2.0),
        (("knn_top1", "knn20_acc1", "eval/knn20_acc1"), 25.0),
    ):
        for name in names:
            ((value, _, n),) = cells(tmp_path, "--metric", name).values()
            assert (value, n) == (mean, 2), name
    assert cells(tmp_path, "--metric", "eval/test_acc1") == {("tools",): (5.0, None, 1)}


def test_other_forms(tmp_path):
    for ratio, value in ((0.5, 50.0), (0.75, 60.25), (0.9, 55.0)):
        write(tmp_path / f"r{ratio}", metrics={"eval/acc1": value}, mask_ratio=ratio, model="a_b")
    write(tmp_path / "r0.9-seed1", seed=1, metrics={"eval/acc1": 56.0}, mask_ratio=0.9, model="a_b")
    flags = [tmp_path, "--by", "model,mask_ratio", "--out"]
    cells(*flags, tmp_path / "t.csv", "--format", "csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [float(row["eval/acc1 mean"]) for row in rows] == [50.0, 60.25, 55.5]
    assert float(rows[2]["eval/acc1 deviation"]) == pytest.approx(0.5**0.5) and rows[0]["eval/acc1 deviation"] == ""
    cells(*flags, tmp_path / "t.tex", "--format", "latex", "--digits", 1)
    assert r"a\_b & 0.9 & 2 & 55.5 $\pm$ 0.7 \\" in (tmp_path / "t.tex").read_text()
    assert r"$\pm$: sample standard deviation over seeds" in (tmp_path / "t.tex").read_text().splitlines()[-2]
    for ending, first in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        cells(*flags, tmp_path / "t.md", "--plot", tmp_path / f"c.{ending}", "--x", "mask_ratio")
        assert (tmp_path / f"c.{ending}").read_bytes().startswith(first)
    assert b"<!-- bars: sample standard deviation over seeds -->" in (tmp_path / "c.svg").read_bytes()
    assert Image.open(tmp_path / "c.png").size == (900, 600)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--by mask_ration", "mask_ration is no flag of any of these 1 runs; similar flags: mask_ratio"),
        ("--metric acc", "--metric acc is in none of these 1 runs; they have main_linprobe:eval/acc1"),
        ("--where mask_ratio", "must be flag=value"),
        ("--where mask_ratio=0.5", "holds for no run; mask_ratio is 0.75"),
        ("--plot {tmp}/a.png --x blr", "--x blr must be one of --by run"),
        ("--plot {tmp}/a.png", "--x run is a number in none of these rows"),
        ("--plot {tmp}/a.jpg --by blr", "a.jpg must be a .png, .pdf or .svg file"),
        ("--plot /nowhere/a.png --by blr", "--plot /nowhere/a.png must be in a folder that exists"),
        ("--allow_differing blrr", "blrr is no flag"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    write(tmp_path / "a", source=pretraining())
    with pytest.raises(UserError, match=message):
        cells(tmp_path, *flags.format(tmp=tmp_path).split())
    with pytest.raises(UserError, match="no finished run"):
        cells(tmp_path / "empty")


def test_a_number_that_is_none(tmp_path):
    write(tmp_path / "a", metrics={"eval/acc1": float("nan")})
    with pytest.raises(UserError, match=r"eval/acc1 of .* is None, not a finite number"):
        cells(tmp_path)


def test_losses_of_different_methods_are_explained(tmp_path, capsys):
    """A column of train/loss would rank methods by numbers that cannot be compared."""
    write(tmp_path / "a", "main_pretrain", metrics={"train/loss": 0.6}, mask_ratio=0.75, rc_mae=False)
    write(tmp_path / "b", "main_pretrain", metrics={"train/loss": 0.9}, mask_ratio=0.75, rc_mae=True)

    def text(*flags):
        collect.main(collect.get_args_parser().parse_args([str(tmp_path), "--metric", "train/loss", *flags]))
        return capsys.readouterr().out

    assert "train/loss of different methods are different losses" in text()
    assert "different losses" not in text("--where", "method=mae") and "n: number of runs" in text()
