"""The package: its metadata agrees with the other files, and a wheel works in an empty folder, without the sources."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from helpers.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = PROJECT["project"]["scripts"]


def pins(name: str) -> dict[str, str]:
    """The packages of a requirements file, with their versions."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)(?:\[\w+\])?(?:[>=]=([\d.]+))?", each).groups() for each in requirements)
    return {package: version for package, version in found if version}


def numbers(version: str) -> list[int]:
    """1.0.0 as [1], which equals 1.0."""
    parts = [int(part) for part in version.split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return parts


def test_requirements_agree():
    """The oldest versions are those that are tested, the packages those of requirements.txt."""
    oldest, bounds = pins("requirements-oldest.txt"), lower_bounds(PROJECT["project"]["dependencies"])
    assert oldest.keys() == bounds.keys() == pins("requirements.txt").keys()
    assert {each: numbers(version) for each, version in oldest.items()} == {
        each: numbers(version) for each, version in bounds.items()
    }
    extras = PROJECT["project"]["optional-dependencies"]
    dev = lower_bounds(extras["dev"] + extras["export"] + extras["bands"] + extras["log"])
    assert dev.keys() == pins("requirements-dev.txt").keys()
    for package, version in pins("requirements-dev-oldest.txt").items():
        assert numbers(dev[package]) <= numbers(version)


def test_every_module_is_in_the_package():
    assert PROJECT["tool"]["setuptools"]["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    packages = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert {f"{package}*" for package in packages} == {*PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    inside = [path.parent for package in packages for path in (ROOT / package).rglob("*.py")]
    assert [folder for folder in inside if not (folder / "__init__.py").exists()] == []


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed wheel, without its dependencies."""
    folder = tmp_path_factory.mktemp("package")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:  # copied, because a build writes into its folder
        if not name.startswith(("tests/", "docs/", "scripts/")) and (ROOT / name).exists():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", folder / "source"], check=True)
    return folder / "site"


def start(installed, command: str, folder, *flags: str) -> str:
    """Run an installed command in `folder`, without the sources on the path, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(installed / "bin" / command), *flags]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_of_a_wheel(installed, image_folder, tmp_path):
    """In an empty folder: it starts mains and tools of the package, and none of the sources. Images without labels: the
    commands that evaluate an encoder would take a minute."""
    flags = f"--data_path {image_folder}/train --epochs 1 --device cpu --num_workers 0"
    text = start(installed, "mae-quickstart", tmp_path, *flags.split())
    assert "These images have no labels" in text
    assert f"{installed}/tools/visualize.py" in text and f"{ROOT}/tools/" not in text and f"{ROOT}/main_" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"output"}
    assert [*tmp_path.rglob("checkpoint-*.pth")] and [*tmp_path.rglob("*.png")]


def test_installed_commands(installed, tmp_path):
    """Each has the help of its file, and its name is that of its file."""
    files = {path.name for path in (installed / "bin").iterdir()}
    assert files == COMMANDS.keys()
    mains = {"pretrain", "finetune", "linprobe", "segment", "detect", "lit"}
    for command, target in COMMANDS.items():
        function = command.removeprefix("mae-").replace("-", "_")
        file = f"main_{function}.py" if function in mains else f"tools/{function}.py"
        assert target == f"util.console:{function}" and (ROOT / file).exists()
    assert start(installed, "mae-knn", tmp_path, "--help").startswith("usage: ")
