"""The recipes in configs/: each says what was published and what we have, and is what its script starts."""

import itertools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.launch import ROOT
from helpers.parsers import tracked
from helpers.sweeps import STAND_IN, parsed

RECIPES = [recipe for recipe in tracked("configs/*/*.yaml") if "/study/" not in recipe]  # a study is a list of runs
# What a script adds to a recipe: where images, weights and results are, and how they are read.
PLACES = set("data_path dataset output_dir resume keep seed num_workers finetune checkpoint_key init_from".split())
PLACES |= set("dmae_teacher train_list val_list val_fraction batch_size accum_iter".split())


def head(recipe: str) -> str:
    """Return the comment at the top of a recipe, as one line."""
    lines = (ROOT / recipe).read_text(encoding="utf-8").splitlines()
    comment = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.strip("# ") for line in comment)


def command(recipe: str) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the words of the command in the head of a recipe."""
    (line,) = re.findall(r"^#   (.*bash scripts/.*)$", (ROOT / recipe).read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(line)
    start = words.index("bash")
    return dict(word.split("=", 1) for word in words[:start]), words[start + 1 :]


@pytest.fixture
def start(tmp_path):
    """A function that runs the command of a recipe on one process, with a stand-in for python, and returns the
    commands that it starts."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    def run(recipe: str) -> list[list[str]]:
        variables, (script, *arguments) = command(recipe)
        env = {**os.environ, "PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls"), "GPUS": "1"}
        done = subprocess.run(
            ["bash", str(ROOT / script), *arguments],
            env={**env, "STOP": str(tmp_path / "stop"), **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def configs(words: list[str]) -> list[str]:
    return [word for flag, word in itertools.pairwise(words) if flag == "--config"]


def test_recipes_are_in_the_folder_of_a_paper():
    """No recipe is elsewhere, and every folder has some."""
    everything = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    everything = {path for path in everything if "/study/" not in path}
    assert everything == set(RECIPES) and len(RECIPES) > 30


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_what_its_script_starts(start, recipe):
    """The command in its head starts a main with the file. On one process the file alone, read by the parser of that
    main, gives the flags of the command, except for where the images, weights and results are."""
    calls = [call for call in start(recipe) if str(ROOT / recipe) in configs(call)]
    assert calls
    main, *words = calls[0]
    files = [word for file in configs(words) for word in ("--config", file)]
    (_, alone), (_, whole) = parsed([(main, *files), (main, *words)], check=False)
    assert alone.batch_size * alone.accum_iter == whole.batch_size * whole.accum_iter
    own = PLACES if main == "main_pretrain.py" else PLACES | {"mean", "std"}  # without them those of the checkpoint
    own |= {"log_grad_cosine"}  # a diagnostic of RC-MAE that does not change its training
    differ = {name for name in {*vars(alone), *vars(whole)} if vars(alone).get(name) != vars(whole).get(name)}
    assert differ <= own


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_its_result(recipe):
    """Published and ours; a number of ours comes with the page that explains it, and is on that page."""
    named = re.search(r"Published and ours: in .*\.yaml", head(recipe))  # of an evaluation: with the pretraining
    published, _, ours = head(recipe).partition("Published")[2].partition(" Ours: ")
    assert named or (published and ours)
    pages = re.findall(r"docs/\w+\.md", ours)
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    numbers = re.findall(r"\d+\.\d\d(?: ± \d\.\d\d)?", ours)
    assert not numbers or pages
    assert [number for number in numbers if number not in text] == []


def test_files_named_in_heads_exist():
    for recipe in RECIPES:
        for name in re.findall(r"[\w/]+\.yaml", head(recipe)):
            folders = (ROOT, ROOT / "configs", (ROOT / recipe).parent)
            assert any((folder / name).exists() for folder in folders), f"{recipe}: {name}"


def test_flags_are_written_as_in_the_help():
    """Names of flags, not dashes or aliases, and no flag twice."""
    for recipe in RECIPES:
        names = re.findall(r"^([\w-]+):", (ROOT / recipe).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(names) == len(set(names)) and all(re.fullmatch(r"[a-z_]+", name) for name in names), recipe
        assert list(yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))) == names


def test_larger_models_of_mae():
    """Table 9 of He et al. 2022: the rate, length and drop path of ViT-L and ViT-H are not those of ViT-B."""
    for model, drop_path in (("vit_large", 0.2), ("vit_huge", 0.3)):
        flags = yaml.safe_load((ROOT / f"configs/mae/finetune_{model}.yaml").read_text())
        settings = (float(flags["blr"]), flags["epochs"], flags["layer_decay"], flags["drop_path"])
        assert settings == (1e-3, 50, 0.75, drop_path) and flags["model"].startswith(model)


VALUES = {
    "--config A": "3",
    "--config A --config B": "4",
    "--config B --config A": "3",
    "--config B --config C": "4",
    "--epochs 7 --config A": "7",
    "--epochs=8 --seed 1": "8",
    "--epochs 7 --epochs 9 --seed 1": "9",
    "--config ARGS": "5",
    "--seed 1": "",
}


@pytest.mark.parametrize("words", VALUES)
def test_scripts_read_a_flag_as_the_mains_do(tmp_path, words):
    """`value_of` of scripts/_torchrun.sh: the command line wins, then the last file that has the flag."""
    for name, text in (("A", "epochs: 3  # short\n"), ("B", "seed: 1\nepochs: 4\n"), ("C", "warmup_epochs: 1\n")):
        Path(tmp_path / name).write_text(text)
    Path(tmp_path / "ARGS").write_text('{\n "epochs": 5,\n "seed": 0\n}\n')
    line = f'. "{ROOT}/scripts/_torchrun.sh"; value_of epochs {words}; value_of rc_mae --rc_mae --seed 1'
    env = {**os.environ, "PYTHON": "true", "GPUS": "1"}
    done = subprocess.run(["bash", "-euc", line], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{VALUES[words]}\ntrue\n"
