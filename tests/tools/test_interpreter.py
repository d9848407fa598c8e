"""The scripts use the interpreter that PYTHON names, or refuse it in a sentence; they never use another one."""

import os
import subprocess

import pytest
from helpers.launch import ROOT

# Prints its version, which is in its own name; makes an environment whose interpreter has the same version.
STAND_IN = r"""#!/bin/bash
version={version}
case "$2" in
    *version_info*) [[ "$2" != *exit* ]] || exit 1; echo $version; exit ;;
    venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """A function that sources scripts/_venv.sh with PYTHON set; `have` is the version of an existing environment."""

    def interpreter(path, version):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN.replace("{version}", version))
        path.chmod(0o755)
        return path

    def start(python: str, have: str = ""):
        for version in ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15"):
            interpreter(tmp_path / "bin" / f"python{version}", version)
        if have:
            interpreter(tmp_path / "venv" / "bin" / "python", have)
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"), "PYTHON": python}
        line = f'set -eu; . {ROOT}/scripts/_venv.sh; echo "uses $(version_of "$python")"'
        return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)

    return start


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14", "3.15"])
def test_a_new_environment_has_the_wanted_version(run, version):
    done = run(f"python{version}")
    assert done.returncode == 0 and f"uses {version}" in done.stdout, done.stderr
    assert ("meant for 3.11 to 3.14" in done.stderr) == (version == "3.15")


@pytest.mark.parametrize(
    "python, words", [("python3.10", "3.10 | 3.11 to 3.14 is required"), ("python9", "cannot be run")]
)
def test_an_interpreter_that_cannot_be_used(run, python, words):
    done = run(python)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and f"PYTHON={python}" in done.stderr
    assert all(word in done.stderr for word in words.split(" | "))


def test_an_environment_of_another_version(run):
    done = run("python3.13", have="3.11")
    assert done.returncode == 2 and "has Python 3.11, but PYTHON=python3.13 is Python 3.13" in done.stderr
    assert "delete this folder, or set VENV" in done.stderr


def test_an_environment_of_the_same_version(run):
    assert "uses 3.12" in run("python3.12", have="3.12").stdout
    assert "uses 3.11" in run("", have="3.11").stdout


def test_the_launchers_refuse_an_unknown_interpreter(tmp_path):
    env = {"PATH": os.environ["PATH"], "PYTHON": "python9"}
    line = ["bash", str(ROOT / "scripts/mae/pretrain.sh"), "--data_path", str(tmp_path)]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "PYTHON=python9 is not a program" in done.stderr
