"""A paper's table beside ours: synthetic ledgers with known answers, and published numbers that match the sweeps."""

import csv
import json
import os
import subprocess
from fnmatch import fnmatchcase

import pytest
from helpers.launch import ROOT

import main_finetune
import main_pretrain
from tools import reproduce
from util.architectures import own_config
from util.errors import UserError
from util.report import ledger

PAPERS = json.loads(reproduce.PUBLISHED.read_text(encoding="utf-8"))
AS_PUBLISHED = {
    "model": "vit_base_patch8",
    "patch_size": 8,
    "input_size": 64,
    "dataset": "tiny_imagenet",
    "epochs": 300,
    "warmup_epochs": 10,
    "batch_size": 64,
    "accum_iter": 2,
    "world_size": 1,
    "aug_preset": "full",
}
PRETRAINED = {
    "model": "mae_vit_base_patch8",
    "mask_ratio": 0.75,
    "batch_size": 16,
    "accum_iter": 1,
    "world_size": 8,
    "epochs": 500,
    "warmup_epochs": 50,
    "patch_size": None,
    "decoder_depth": None,
}


def write(folder, accuracy=50.0, seed=0, pretrained=(), images=100000, revision="abc", **flags):
    """Write a line as main_finetune.py does for the Tiny ImageNet report, in its setting except for `flags` and those
    of its pretraining (None: no pretraining)."""
    source = None
    if pretrained is not None:
        source = {"path": "x", "flags": PRETRAINED | dict(pretrained) | {"seed": seed}, "source": None}
    row = {
        "command": "main_finetune",
        "finished": "2030-01-01",
        "revision": revision,
        "images_seen": 5,
        "seconds": 1.0,
        "flags": AS_PUBLISHED | flags | {"seed": seed},
        "data": {"train": {"images": images, "sha256": "d"}},
        "hardware": {"amp_dtype": "bfloat16"},
        "metrics": {"eval/acc1": accuracy},
        "source": source,
    }
    ledger.append(folder, row)


def table(out, paper="dmae", runs=("mask75",)) -> dict:
    """Return {(run, metric): row}."""
    rows = reproduce.main(reproduce.get_args_parser().parse_args([str(out), "--paper", paper, "--runs", *runs]))
    return {(row.run, row.metric): row for row in rows}


# Known answers --------------------------------------------------------------------------------------------------------


def test_mean_deviation_and_published(tmp_path, capsys):
    """Against a direct computation. Eight processes of 16 images, or two accumulated batches of 64, are the paper's
    batch."""
    for seed, accuracy in enumerate([70.0, 72.0, 74.0]):
        write(tmp_path / f"finetune-mask75-seed{seed}", accuracy, seed)
        write(tmp_path / f"finetune_small-mask75-seed{seed}", accuracy - 10, seed, aug_preset="small")
    rows = table(tmp_path)
    full, small = rows["mask75", "finetune:eval/acc1"], rows["mask75", "finetune_small:eval/acc1"]
    assert (full.cell.mean, full.cell.deviation, full.cell.n) == (72.0, 2.0, 3) and full.published["value"] == 72.58
    assert (small.cell.mean, small.published["value"]) == (62.0, 66.76) and full.differs == small.differs == []
    line = "| mask75 | fine-tuned | 72.00 ± 2.00 (n = 3) | 72.58 | Table 1 |  |"
    assert line in capsys.readouterr().out and line in (tmp_path / "reproduced.md").read_text()
    assert "±: sample standard deviation over seeds" in (tmp_path / "reproduced.md").read_text()
    with open(tmp_path / "reproduced.csv") as file:
        first = next(csv.DictReader(file))
    assert first == {
        "run": "mask75",
        "metric": "finetune:eval/acc1",
        "mean": "72.0",
        "deviation": "2.0",
        "n": "3",
        "published": "72.58",
        "from": "Table 1",
        "differs": "",
    }


def test_what_differs_is_named(tmp_path):
    """Differences of the run, of its pretraining, and those implied by a flag: batch, decoder and patches of another
    model."""
    write(
        tmp_path / "finetune-mask75-seed0",
        pretrained={"epochs": 20, "world_size": 4, "model": "mae_vit_micro_patch4"},
        model="vit_micro_patch4",
        patch_size=4,
        input_size=[32, 32],
        dataset="imagefolder",
        images=50000,
        epochs=5,
    )
    assert table(tmp_path)["mask75", "finetune:eval/acc1"].differs == [
        "model vit_micro, not vit_base",
        "patch_size 4, not 8",
        "images.train 50000, not 100000",
        "input_size 32, not 64",
        "pretrain.batch 64, not 128",
        "pretrain.epochs 20, not 500",
        "pretrain.decoder_depth 2, not 8",
        "pretrain.decoder_embed_dim 96, not 512",
        "epochs 5, not 300",
        "one seed",
    ]


def test_a_reader_of_folders_does_not_name_its_set(tmp_path):
    write(tmp_path / "finetune-mask75-seed0", dataset="imagefolder")
    write(tmp_path / "finetune-depth1-seed0", dataset="cifar100", pretrained={"decoder_depth": 1})
    rows = table(tmp_path, runs=["mask75", "depth1"])
    assert rows["mask75", "finetune:eval/acc1"].differs == ["one seed"]
    assert rows["depth1", "finetune:eval/acc1"].differs == ["dataset cifar100, not tiny_imagenet", "one seed"]


def test_a_run_of_its_own_setting(tmp_path):
    """A setting that the paper uses in one run is a difference in the other runs only; missing pretraining is not
    compared."""
    write(tmp_path / "finetune-mask50-seed0", pretrained={"mask_ratio": 0.5})
    write(tmp_path / "finetune-mask75-seed0", pretrained={"mask_ratio": 0.5})
    write(tmp_path / "finetune-scratch-seed0", pretrained=None)
    rows = table(tmp_path, runs=["mask50", "mask75", "scratch"])
    assert rows["mask50", "finetune:eval/acc1"].differs == ["one seed"]
    assert rows["mask75", "finetune:eval/acc1"].differs == ["pretrain.mask_ratio 0.5, not 0.75", "one seed"]
    assert rows["scratch", "finetune:eval/acc1"].differs == ["patch_size 8, not 16", "one seed"]


def test_what_is_missing_and_what_has_no_number(tmp_path, capsys):
    """A run without a published number is marked; a run without any number is left out."""
    write(tmp_path / "finetune-dmae90-seed0", pretrained={"mask_ratio": 0.9})
    rows = table(tmp_path, runs=["mask75", "mask90", "dmae75", "dmae90"])
    assert list(rows) == [
        ("mask75", "finetune:eval/acc1"),
        ("mask75", "finetune_small:eval/acc1"),
        ("mask90", "finetune:eval/acc1"),
        ("dmae75", "finetune:eval/acc1"),
        ("dmae90", "finetune:eval/acc1"),
    ]
    output = capsys.readouterr().out
    assert "| mask75 | fine-tuned | missing | 72.58 | Table 1 |  |" in output
    assert "| mask90 | fine-tuned | missing | below mask75 | Section 8 |  |" in output
    assert "| dmae90 | fine-tuned | 50.00 (n = 1) | no number |  |" in output


def test_nothing_there_yet(tmp_path):
    rows = table(tmp_path, "rc_mae", ["mae", "same", "constant"])
    assert {run for run, _ in rows} == {"mae", "same-ema"} and all(row.cell is None for row in rows.values())


def test_code_that_changed_between_seeds(tmp_path):
    """Such seeds are averaged with a note; seeds that differ in a flag are not averaged."""
    for seed in (0, 1):
        write(tmp_path / f"finetune-mask75-seed{seed}", 70.0, seed, revision=f"r{seed}")
    assert table(tmp_path)["mask75", "finetune:eval/acc1"].differs == ["2 revisions of the code"]
    write(tmp_path / "finetune-mask75-seed2", 70.0, 2, epochs=7)
    with pytest.raises(UserError, match="differ in epochs"):
        table(tmp_path)


def test_a_star_is_the_same_on_both_sides(tmp_path):
    rows = table(tmp_path, "maws", ["random-wsp4", "mae0.5-wsp4"])
    assert rows["mae0.5-wsp4", "linear:eval/acc1"].published["above"] == ["random-wsp4", "mae0.1-wsp4"]


@pytest.mark.parametrize(
    "flags,message",
    [
        ("{out} --paper simmim --runs a", "--paper simmim is not known; use one of bootstrap_mae, dmae"),
        ("{out}/none --paper dmae --runs a", "none must be the folder of a sweep"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        reproduce.main(reproduce.get_args_parser().parse_args(flags.format(out=tmp_path).split()))


# The published numbers match the sweeps -------------------------------------------------------------------------------


def listed(paper: str, *flags) -> set[str]:
    """Return the runs of a sweep; for RC-MAE with the teachers."""
    name, _, setting = paper.partition("/")
    env = {**os.environ, "PYTHON": "true", "GPUS": "1", "SET": setting or "cifar10", "TEACHER": "t"}
    command = ["bash", str(ROOT / "scripts" / name / "sweep.sh"), "--list", *flags]
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    runs = {line.partition(":")[0] for line in lines}
    return runs | {f"{line.partition(':')[0]}-ema" for line in lines if "rc_mae.yaml" in line}


@pytest.mark.parametrize("paper", PAPERS)
def test_every_published_run_is_one_of_the_sweep(paper):
    runs, named = listed(paper), set(PAPERS[paper]["runs"])
    for run in PAPERS[paper]["runs"].values():
        for metric, number in run.items():
            if metric == "setting":
                continue
            assert metric in PAPERS[paper]["metrics"] and metric in reproduce.NAMES
            assert number["from"] and {"value", "above", "below"} & set(number)
            named |= {*number.get("above", []), *number.get("below", [])}
    assert named and not [name for name in named if not any(fnmatchcase(run, name) for run in runs)]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_setting_is_a_flag(paper):
    """Every setting is a flag of pretraining or of fine-tuning, or a name for several flags."""
    mains = (main_pretrain, main_finetune)
    flags = {main: {action.dest for action in main.get_args_parser()._actions} for main in mains}
    settings = [PAPERS[paper]["setting"], *PAPERS[paper]["metrics"].values()]
    for run in PAPERS[paper]["runs"].values():
        settings += [run.get("setting", {}), *(n.get("setting", {}) for m, n in run.items() if m != "setting")]
    for name in {name for setting in settings for name in setting}:
        main = main_pretrain if name.startswith("pretrain.") else main_finetune
        bare = name.removeprefix("pretrain.").removeprefix("finetune.")
        assert bare in flags[main] | {"batch", "images.train"}, name


@pytest.mark.parametrize("paper", PAPERS)
def test_model_and_decoder_of_a_paper_exist(paper):
    setting = PAPERS[paper]["setting"]
    if "model" in setting:
        names = [f"{setting['model']}_patch{size}" for size in (2, 4, 8, 16)]
        assert any(own_config(name) for name in names)
