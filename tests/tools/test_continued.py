"""scripts/mlo_mae/continued.sh: the rows of the paper's table on one division of the set."""

import pytest
from helpers.sweeps import parsed

from util.next_commands import data_words

RUNS = {"none", "mae", "mlo-only", "mlo"}


@pytest.fixture
def start(sweep, tmp_path):
    """A function start(data, *arguments) that runs the script -> exit code, output, commands."""
    given = {"START": "start.pth", "GPUS": "1", "MODEL": ""}

    def run(data, *arguments, **environment):
        where = ["--data", str(data)] if data else []
        return sweep("mlo_mae", str(tmp_path / "out"), *where, *arguments, script="continued", **given | environment)

    return run


def layout(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def runs_of(calls) -> dict[str, dict]:
    """The flags of every run by main and name, without the seed."""
    runs = {"main_pretrain.py": {}, "main_finetune.py": {}}
    for main, args in parsed(calls):
        name = args.output_dir.split("/")[-1].removesuffix("-seed0").removeprefix("finetune-")
        runs[main][name] = args
    return runs


LAYOUTS = {
    "patients": (["metadata.csv"], "--group_column patient_id --val_fraction 0.2".split()),
    "class folders": (["blight/1.png"], ["--val_fraction", "0.2"]),
    "splits": (["train/blight/1.png", "val/blight/1.png"], []),
}


@pytest.mark.parametrize("files", LAYOUTS)
def test_the_rows_of_the_table(start, tmp_path, files):
    """Each row is fine-tuned from what its pretraining wrote, and all commands have the same division of the set."""
    names, division = LAYOUTS[files]
    code, output, calls = start(layout(tmp_path / "set", *names))
    assert code == 0, output
    runs = runs_of(calls)
    pretrained, tuned = runs["main_pretrain.py"], runs["main_finetune.py"]
    assert pretrained.keys() == RUNS - {"none"} and tuned.keys() == RUNS
    assert {name: (args.init_from, args.mlo_mae) for name, args in pretrained.items()} == {
        "mae": ("start.pth", False), "mlo-only": ("", True), "mlo": ("start.pth", True),
    }  # fmt: skip
    own = {name: f"{args.output_dir}/checkpoint-199.pth" for name, args in pretrained.items()}
    assert {name: args.finetune for name, args in tuned.items()} == own | {"none": "start.pth"}
    words = [data_words(args) for each in runs.values() for args in each.values()]
    assert all(each == words[0] for each in words) and all(word in words[0] for word in division)
    assert ("--val_fraction" in words[0]) == bool(division)
    assert {call[0] for call in calls} == {"main_pretrain.py", "main_finetune.py", "collect.py"}
    assert calls[-1][-2:] == ["eval/acc1", "eval/balanced_acc"]
    assert [call[0] for call in start(tmp_path / "set")[2]] == ["collect.py"]  # nothing is missing


def test_the_rows_differ_in_their_pretraining_alone(start, tmp_path):
    """Lengths, learning rates and fine-tuning are the same for all."""
    calls = start(layout(tmp_path / "set", "metadata.csv"), "--epochs", "7")[2]
    for main, runs in runs_of(calls).items():
        flags = [vars(args) for args in runs.values()]
        common = set.intersection(*map(set, flags)) - {"output_dir", "finetune", "init_from", "mlo_mae"}
        assert len(common) > 80
        assert all(each[name] == flags[0][name] for name in common for each in flags), main
    assert runs_of(calls)["main_pretrain.py"]["mlo"].epochs == 7


def test_a_small_version_makes_its_own_set_and_start(start, tmp_path):
    code, output, calls = start("", "--cpu_small", START="")
    assert code == 0, output
    assert [call[0] for call in calls[:2]] == ["make_lesions.py", "main_pretrain.py"]
    runs = runs_of(calls)
    first = runs["main_pretrain.py"].pop("start")
    assert first.dataset == "scenes" and not first.init_from
    made = f"{first.output_dir}/checkpoint-{first.epochs - 1}.pth"
    assert {args.init_from for args in runs["main_pretrain.py"].values()} == {made, ""}
    assert runs["main_finetune.py"]["none"].finetune == made
    assert {args.group_column for each in runs.values() for args in each.values()} == {"patient_id"}
    assert len({args.epochs for args in runs["main_pretrain.py"].values()}) == 1


def test_another_model_and_more_processes(start, tmp_path):
    given = {"MODEL": "vit_large_patch16", "GPUS": "4"}
    calls = start(layout(tmp_path / "set", "metadata.csv"), "--only", "mlo", **given)[2]
    words = [word for call in calls for word in call]
    assert "mae_vit_large_patch16" in words and "--nproc_per_node=4" in " ".join(words)
    assert words[words.index("--batch_size") + 1] == "16"


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ((), {"START": ""}, "START is needed: a released MAE"),
        (("--gpu_hour",), {}, "has no --gpu_hour: shorten the pretraining with --epochs"),
        (("--only", "scratch"), {}, "--only scratch is no run"),
    ],
)
def test_mistakes_of_continued_pretraining(start, tmp_path, arguments, given, message):
    code, output, calls = start(tmp_path, *arguments, **given)
    assert code == 2 and message in output and not calls


def test_runs_of_another_start_are_not_mixed(start, tmp_path):
    data = layout(tmp_path / "set", "metadata.csv")
    assert start(data, "--only", "none")[0] == 0
    code, output, calls = start(data, START="other.pth")
    assert code == 2 and "holds runs of this sweep with other flags" in output and not calls
