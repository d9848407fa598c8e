"""The papers' sweeps, with a stand-in for python that only writes the files of the mains."""

import argparse
import os
import shutil

import pytest
from helpers.sweeps import parsed

import main_finetune
import main_linprobe
import main_pretrain
from methods import METHODS, enabled_methods
from tools import reproduce
from util.architectures import own_config
from util.report import ledger


def test_stopped_and_started_again(sweep, tmp_path):
    """A stopped main also exits with 0, but its run does not count as finished. Finished runs are not repeated."""
    out = str(tmp_path / "out")
    flags = (out, "--cpu_small", "--only", "mae k10")
    (tmp_path / "stop").touch()
    code, output, calls = sweep("bootstrap_mae", *flags)
    assert code == 1 and "stopped before" in output and "start the sweep again" in output
    assert [call[0] for call in calls] == ["main_pretrain.py", "main_linprobe.py", "knn.py", "main_finetune.py"]
    (tmp_path / "stop").unlink()
    code, output, calls = sweep("bootstrap_mae", *flags)
    assert code == 0, output
    names = [call[0] for call in calls]
    assert names == ["main_finetune.py"] + [
        "main_pretrain.py",
        "main_linprobe.py",
        "knn.py",
        "main_finetune.py",
        "collect.py",
    ]
    assert all("--resume" in call for call in calls if call[0] in ("main_pretrain.py", "main_finetune.py"))
    assert [call[0] for call in sweep("bootstrap_mae", *flags)[2]] == ["collect.py"]


def test_started_again_with_other_flags(sweep, tmp_path):
    """Finished runs would be skipped and stand in the table as if they had these flags. --only may differ."""
    flags = ("bootstrap_mae", str(tmp_path / "out"), "--cpu_small")
    assert sweep(*flags, "--only", "mae", "--mask_ratio", "0.5")[0] == 0
    for other in ((), ("--mask_ratio", "0.6")):
        code, output, calls = sweep(*flags, "--only", "mae", *other)
        assert code == 2 and "holds runs of this sweep with other flags" in output and not calls
    code, output, _ = sweep(*flags, "--only", "mae k10", "--mask_ratio", "0.5")
    assert code == 0, output


RUNS = {
    "bootstrap_mae": "mae scratch k1 k2 k4 k5 k10 k20 wse0 wse5 wse20 wse50 wse20-tau0.1 wse20-tau0.3",
    "rc_mae": "mae same different constant",
    "dmae": "scratch mask75 mask50 mask90 depth1 width128 three-augment dmae75 dmae90",
    "mlo_mae": "mae mlo unroll1 unroll5 mae-patch4 patch4 mae-patch8 patch8 ratio60 ratio80 ratio90 every5 blo "
    "finetuned curriculum",
}
# Runs that a smaller budget leaves out, and those that replace them.
LEFT_OUT = {
    ("bootstrap_mae", "cpu_small"): {"wse50"},
    ("bootstrap_mae", "gpu_hour"): {"k1"},
    ("mlo_mae", "cpu_small"): {"mae-patch4", "patch4"},
}
INSTEAD = {("mlo_mae", "cpu_small"): {"mae-patch2", "patch2"}}
WHERE = {"paper": ["--data", "{}"], "gpu_hour": ["--gpu_hour", "--data", "{}"], "cpu_small": ["--cpu_small"]}
# Effective batch and epochs of every pretraining.
LENGTHS = {
    ("bootstrap_mae", "paper"): (512, 200), ("rc_mae", "paper"): (4096, 1600),
    ("dmae", "paper"): (128, 500), ("mlo_mae", "paper"): (128, 200),
    ("bootstrap_mae", "gpu_hour"): (512, 100), ("rc_mae", "gpu_hour"): (512, 40),
    ("dmae", "gpu_hour"): (128, 20), ("mlo_mae", "gpu_hour"): (128, 40),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("budget", WHERE)
def test_every_command_is_legal(sweep, tmp_path, name, budget):
    """The sweep has all runs of the paper, and the mains accept its flags."""
    where = [word.format(tmp_path) for word in WHERE[budget]]
    code, output, calls = sweep(name, str(tmp_path / "out"), *where, TEACHER="teacher.pth", GPUS="1")
    assert code == 0, output
    parsers = {"main_pretrain.py": main_pretrain, "main_finetune.py": main_finetune, "main_linprobe.py": main_linprobe}
    pretrained, seen = set(), set()
    for main, *flags in calls:
        if main not in parsers:
            continue
        args = parsers[main].get_args_parser().parse_args(flags)
        parsers[main].check(args)
        run = args.output_dir.split("/")[-1].removesuffix("-seed0")
        seen.add(run)
        assert not (getattr(args, "cache_features", False) and args.resume)  # the probe refuses it
        if main == "main_pretrain.py" and run != "teacher":
            pretrained.add(run)
            enabled_methods(args, METHODS)
            length = (args.batch_size * args.accum_iter, args.epochs)
            assert length == LENGTHS.get((name, budget), length)
    expected = set(RUNS[name].split()) - LEFT_OUT.get((name, budget), set()) | INSTEAD.get((name, budget), set())
    assert pretrained == expected - {"scratch"}
    tuned = {run.removeprefix("finetune-") for run in seen if run.startswith("finetune-")}
    assert tuned == expected | ({"same-ema", "different-ema", "constant-ema"} if name == "rc_mae" else set())


@pytest.mark.parametrize("name", RUNS)
def test_small_runs_are_compared_fairly(sweep, tmp_path, name):
    """Every encoder, the untrained one too, is fine-tuned and probed with the same flags, for at least 500 steps: after
    110 fine-tuning was behind the probe of every run. The table begins with fine-tuning."""
    calls = sweep(name, str(tmp_path / "out"), "--cpu_small", GPUS="1")[2]
    own = {"--finetune", "--output_dir", "--checkpoint_key"}
    settings = {"main_finetune.py": set(), "main_linprobe.py": set()}
    for main, *flags in calls:
        if main in settings:
            kept = [word for word, before in zip(flags, ["", *flags]) if own.isdisjoint((word, before))]
            settings[main].add(tuple(kept))
    assert all(len(each) == 1 for each in settings.values()), settings
    args = main_finetune.get_args_parser().parse_args(list(settings["main_finetune.py"].pop()))
    assert args.epochs * (1437 // args.batch_size) >= 500
    table = calls[-1]
    assert table[0] == "collect.py" and table[table.index("--metric") + 1] == "finetune:eval/acc1"


def test_an_hour_keeps_the_shares_of_the_paper(sweep, tmp_path):
    """Half as many epochs: half of K, of the epochs before the bootstrap and of the warm-up."""
    calls = sweep("bootstrap_mae", str(tmp_path / "out"), "--gpu_hour", "--data", str(tmp_path), GPUS="1")[2]
    runs = {args.output_dir.split("/")[-1]: args for name, args in parsed(calls) if name == "main_pretrain.py"}
    assert {args.epochs for args in runs.values()} == {100} and {args.warmup_epochs for args in runs.values()} == {20}
    assert {name: args.mae_k for name, args in runs.items() if args.mae_k} == {
        "k2-seed0": 1, "k4-seed0": 2, "k5-seed0": 3, "k10-seed0": 5, "k20-seed0": 10,
    }  # fmt: skip
    assert {name: (args.wse, args.tau) for name, args in runs.items() if args.ema_mae} == {
        "wse0-seed0": (0, 0.005), "wse5-seed0": (3, 0.005), "wse20-seed0": (10, 0.005), "wse50-seed0": (25, 0.005),
        "wse20-tau0.1-seed0": (10, 0.1), "wse20-tau0.3-seed0": (10, 0.3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "script", "flags"), [("rc_mae", "sweep", ["--gpu_hour", "--only", "mae"]), ("maws", "scaling", [])]
)
def test_the_pretrained_model_is_evaluated(sweep, tmp_path, cifar10, name, script, flags):
    """Not that of the recipe of fine-tuning, which is ViT-B."""
    data, given = str(cifar10), {"SIZES": "vit_large_patch16", "SHARES": "1", "GPUS": "1"}
    code, output, calls = sweep(name, str(tmp_path / "out"), "--data", data, *flags, script=script, **given)
    assert code == 0, output
    models = [args.model.removeprefix("mae_") for _, args in parsed(calls)]
    assert len(models) == 3 and len(set(models)) == 1 and models[0] != "vit_base_patch16"


def test_an_hour_is_too_short(sweep, tmp_path):
    """Some tables do not fit into an hour with any model."""
    where = (str(tmp_path / "out"), "--gpu_hour", "--data", str(tmp_path))
    for name, script, environment in (("mlo_mae", "sweep", {"SET": "imagenet"}), ("maws", "scaling", {})):
        code, output, calls = sweep(name, *where, script=script, **environment)
        assert code == 2 and "--gpu_hour" in output and not calls


def test_more_processes_keep_the_papers_batch(sweep, tmp_path):
    for name, effective in (("bootstrap_mae", 512), ("rc_mae", 4096), ("dmae", 128), ("mlo_mae", 128)):
        run = "mask75" if name == "dmae" else "mae"
        calls = sweep(name, str(tmp_path / name), "--data", str(tmp_path), "--only", run, GPUS="4")[2]
        flags = next(call for call in calls if any("main_pretrain.py" in word for word in call))
        start = next(i for i, word in enumerate(flags) if "main_pretrain.py" in word)
        args = main_pretrain.get_args_parser().parse_args(flags[start + 1 :])
        assert 4 * args.batch_size * args.accum_iter == effective


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage:"),
        (("OUT",), "--data DIR is needed"),
        (("OUT", "--cpu_small", "--only", "k3"), "--only k3 is no run"),
        (("OUT", "--gpu_hour"), "--data DIR is needed"),
        (("OUT", "--gpu_hour", "--data", ".", "--only", "k1"), "--only k1 is no run"),
        (("OUT", "--gpu_hour", "--cpu_small"), "choose one"),
    ],
)
def test_mistakes(sweep, arguments, message):
    code, output, calls = sweep("bootstrap_mae", *arguments)
    assert code == 2 and message in output and not calls


def test_dmae_without_a_teacher(sweep, tmp_path):
    code, output, calls = sweep(
        "dmae", str(tmp_path / "out"), "--data", str(tmp_path), "--only", "mask75 dmae75", TEACHER=""
    )
    assert code == 0 and "name its teacher" in output
    assert not any("--dmae_teacher" in call for call in calls)


@pytest.mark.parametrize("setting,batch,epochs", [("cifar100", 128, 200), ("imagenet", 256, 50)])
def test_other_settings_of_learned_masks(sweep, tmp_path, setting, batch, epochs):
    where = ("--data", str(tmp_path), "--only", "mlo")
    code, output, calls = sweep("mlo_mae", str(tmp_path / "out"), *where, SET=setting, GPUS="1")
    assert code == 0, output
    args = main_pretrain.get_args_parser().parse_args(calls[0][1:])
    main_pretrain.check(args)
    assert (args.batch_size, args.epochs, args.mlo_unroll) == (batch, epochs, 1 if setting == "imagenet" else 2)


@pytest.fixture
def cifar10(tmp_path):
    """The class folders of CIFAR-10 with one image each."""
    for split in ("train", "val"):
        for name in "airplane automobile bird cat deer dog frog horse ship truck".split():
            (tmp_path / "cifar10" / split / name).mkdir(parents=True)
            (tmp_path / "cifar10" / split / name / "1.png").touch()
    return tmp_path / "cifar10"


@pytest.mark.parametrize("budget", WHERE)
def test_three_stages(sweep, tmp_path, cifar10, budget):
    """Each initialisation and length of WSP: one MAE serves all lengths, and every stage starts from the previous
    one."""
    out, where = tmp_path / "out", ["--data", str(cifar10), *([] if budget == "paper" else [f"--{budget}"])]
    lists = {"WEAK": "w", "WEAK_LIST": "a", "WEAK_VAL": "b", "MAE_EPOCHS": "10", "WSP_EPOCHS": "0.5 1", "GPUS": "1"}
    code, output, calls = sweep("maws", str(out), *where, **lists)
    assert code == 0, output
    runs = parsed(calls)
    mae = {args.output_dir.split("/")[-1]: args.epochs for name, args in runs if name == "main_pretrain.py"}
    assert mae == {"mae0.1-seed0": 1, "mae0.5-seed0": 5, "mae1-seed0": 10}
    weak = [args for _, args in runs if getattr(args, "targets", "") == "multilabel"]
    assert {(args.finetune.removeprefix(f"{out}/").split("-")[0], args.epochs) for args in weak} == {
        (start, epochs) for start in ("", "mae0.1", "mae0.5", "mae1") for epochs in (0.5, 1)
    }
    assert all(args.warmup_epochs == args.epochs / 10 for args in weak)
    tuned = [args for name, args in runs if name != "main_pretrain.py" and args not in weak]
    assert len(tuned) == 16 and {args.finetune.rsplit("/", 1)[0] for args in tuned} == {a.output_dir for a in weak}
    assert sum(call[0] == "fewshot.py" for call in calls) == 8 and sum("--plot" in call for call in calls) == 3
    assert not [
        call for call in sweep("maws", str(out), *where, **lists)[2] if call[0] != "collect.py"
    ]  # nothing is missing


def test_scaling_grid(sweep, tmp_path, cifar10):
    """Smaller shares are subsets of larger ones, in a fixed order; the numbers of steps are equal."""
    where = [str(tmp_path / "out"), "--data", str(cifar10), "--cpu_small"]
    code, output, calls = sweep("maws", *where, script="scaling", SHARES="0.5 1", STEPS="7")
    # The small set takes the first 500 images of a class; here a class has one.
    assert code == 0, output
    runs = [args for name, args in parsed(calls) if name == "main_pretrain.py"]
    assert {(args.model, args.max_steps) for args in runs} == {("mae_vit_micro_patch4", 7), ("mae_deit_tiny_patch4", 7)}
    half, whole = ((tmp_path / "out" / "lists" / f"{share}.txt").read_text().split() for share in ("0.5", "1"))
    assert len(half) == 5 and len(whole) == 10 and whole[:5] == half
    assert whole != sorted(whole)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("OUT", "--cpu_small"), "--cpu_small needs --data CIFAR10"),
        (("OUT", "--gpu_hour", "--data", "/"), "--gpu_hour needs CIFAR-10 as class folders"),
        (("OUT", "--cpu_small", "--data", "/"), "has no train/airplane/"),
        (("OUT", "--data", "x"), "the folder of the images with hashtags"),
    ],
)
def test_mistakes_of_three_stages(sweep, arguments, message):
    code, output, calls = sweep("maws", *arguments)
    assert code != 0 and message in output and not calls


# A paper's table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", WHERE)
def test_a_table_is_its_sweep_and_then_the_comparison(sweep, tmp_path, budget):
    """The commands of the sweep, then the table of all runs, even with --only."""
    out, where = tmp_path / "out", [word.format(tmp_path) for word in WHERE[budget] if word != f"--{budget}"]
    flags = [*where, "--only", "k10"]
    expected = sweep("bootstrap_mae", str(out), *flags, *([] if budget == "paper" else [f"--{budget}"]))[2]
    shutil.rmtree(out)
    code, output, calls = sweep(".", "bootstrap_mae", str(out), "--budget", budget, *flags, script="reproduce")
    assert code == 0, output
    assert calls[:-1] == expected and len(expected) == 5
    left_out = LEFT_OUT.get(("bootstrap_mae", budget), set())
    runs = [name for name in RUNS["bootstrap_mae"].split() if name not in left_out]
    assert calls[-1] == ["reproduce.py", str(out), "--paper", "bootstrap_mae", "--runs", *runs]


def enter(calls, images: int) -> None:
    """Write the ledger lines of these commands into their folders."""
    pretrained = {}
    for main, args in parsed(calls):
        flags = vars(args)
        if main == "main_pretrain.py":
            pretrained[args.output_dir] = flags
            continue
        source = pretrained.get(os.path.dirname(args.finetune))
        model = own_config((source or flags)["model"])
        flags |= {"patch_size": (source or flags)["patch_size"] or model["patch_size"]}
        flags |= {"input_size": flags["input_size"] or model["img_size"]}
        row = {
            "command": main.removesuffix(".py"),
            "flags": flags,
            "data": {"train": {"images": images}},
            "seed": 0,
            "source": source and {"path": args.finetune, "flags": source},
            "metrics": {"eval/acc1": 50.0},
        }
        ledger.append(args.output_dir, row)


@pytest.mark.parametrize(
    "name,images,expected",
    [
        # MAE's number is of another run
        ("bootstrap_mae", 50000, {"pretrain.mask_ratio 0.75, not 0.6"}),
        ("rc_mae", 1281167, set()),
        ("dmae", 100000, {"patch_size 8, not 16"}),  # without pretraining
        ("mlo_mae", 50000, {"batch 128, not 64"}),
    ],
)
def test_the_papers_budget_is_the_papers_setting(sweep, tmp_path, name, images, expected):
    """The column of differences names the known deviations of the sweep, and no others."""
    out = str(tmp_path / "out")
    enter(sweep(name, out, "--data", str(tmp_path), TEACHER="teacher.pth", GPUS="1")[2], images)
    paper = "mlo_mae/cifar10" if name == "mlo_mae" else name
    rows = reproduce.main(argparse.Namespace(out=out, paper=paper, runs=RUNS[name].split()))
    assert all(row.cell for row in rows) and {text for row in rows for text in row.differs} == expected | {"one seed"}


def test_what_an_hour_changes(sweep, tmp_path):
    out = str(tmp_path / "out")
    enter(sweep("bootstrap_mae", out, "--gpu_hour", "--data", str(tmp_path), "--only", "k10", GPUS="1")[2], 50000)
    rows = reproduce.main(argparse.Namespace(out=out, paper="bootstrap_mae", runs=["k10"]))
    shorter = ["pretrain.epochs 100, not 200", "epochs 20, not 100", "pretrain.mae_k 5, not 10", "one seed"]
    assert [row.differs for row in rows] == [shorter, [text for text in shorter if not text.startswith("epochs")]]


def test_a_table_that_was_interrupted(sweep, tmp_path):
    """The table has the existing results, the exit code shows that it is incomplete, and the next call completes it."""
    flags = ("mlo_mae", str(tmp_path / "out"), "--budget", "cpu_small", "--only", "mae")
    (tmp_path / "stop").touch()
    code, output, calls = sweep(".", *flags, script="reproduce")
    assert code == 1 and "start the sweep again" in output
    assert calls[-1][:4] == ["reproduce.py", str(tmp_path / "out"), "--paper", "mlo_mae/cifar10"]
    (tmp_path / "stop").unlink()
    code, output, calls = sweep(".", *flags, script="reproduce")
    assert code == 0 and [call[0] for call in calls] == ["main_finetune.py", "collect.py", "reproduce.py"]
    code, output, calls = sweep(".", *flags, script="reproduce", SET="cifar100")
    assert code == 2 and "holds runs of mlo_mae/cifar10 cpu_small" in output and not calls


def test_a_table_names_its_runs(sweep):
    arguments = ("bootstrap_mae", "--budget", "gpu_hour", "--list")
    code, output, calls = sweep(".", *arguments, script="reproduce")
    assert code == 0 and "k10: --config configs/bootstrap_mae/mae_k.yaml --mae_k 5\n" in output and not calls


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((), "PAPER is ''"),
        (("simmim", "OUT"), "PAPER is 'simmim', and must be bootstrap_mae, dmae, rc_mae, mlo_mae or maws"),
        (("dmae", "OUT"), "--budget is ''"),
        (("dmae", "OUT", "--budget", "tpu"), "--budget is 'tpu', and must be cpu_small, gpu_hour or paper"),
        (("dmae", "OUT", "--budget"), "--budget needs a value"),
        (("dmae", "OUT", "--cpu_small"), "--budget cpu_small"),
        (("dmae", "--budget", "cpu_small"), "OUT is missing"),
        (("dmae", "OUT", "--budget", "gpu_hour"), "--data DIR is needed"),
        (("dmae", "OUT", "--budget", "cpu_small", "--only", "k3"), "--only k3 is no run"),
    ],
)
def test_mistakes_of_a_table(sweep, arguments, message):
    code, output, calls = sweep(".", *arguments, script="reproduce")
    assert code == 2 and message in output and output.count("error:") == 1 and not calls
