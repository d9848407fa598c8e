"""Every command on the pages exists, and its flags are accepted.

Nothing is trained. The parser of a Python command parses its flags. A shell script runs with a stand-in for python
that records the commands, which are then parsed; sweeps only list their runs.
"""

import functools
import itertools
import os
import re
import shlex
import subprocess
from typing import NamedTuple

import pytest
from helpers.pages import PAGES, ROOT, blocks, inline_code, name
from helpers.parsers import options, parse_error, tracked

FLAG = re.compile(r"--[a-z][a-z0-9_]*")
ASSIGNMENT = re.compile(r"[A-Z_]+=.*", re.DOTALL)
OTHER_PROGRAMS = {"pip", "tensorboard"}
OTHER_FLAGS = {"--max_restarts", "--nproc_per_node", "--standalone", "--logdir"}  # of torchrun and tensorboard
PYTEST_SCRIPTS = {"scripts/test.sh", "scripts/test_matrix.sh"}  # their arguments go to pytest
# Flags that the sweeps read, with their number of values; they pass all others to each pretraining.
SWEEP_FLAGS = {"--data": 1, "--only": 1, "--budget": 1, "--cpu_small": 0, "--gpu_hour": 0, "--list": 0}
EXAMPLES = {"PAPER": "dmae", "BUDGET": "cpu_small"}  # for placeholders that a script checks
STAND_IN = """#!/bin/bash
[ "$1" != -c ] || { echo 1; exit; }
printf '%s\\0' "$@" $'\\n' >> "$CALLS"
"""


class Command(NamedTuple):
    """A command on a page. `program` is the path of a script, or the name of another program."""

    program: str
    arguments: list[str]
    variables: dict[str, str]  # environment variables set on the same line
    whole: bool = True  # False: an excerpt, which may omit required flags


def words_of(line: str) -> list[str]:
    """Return the words of a line without comments; none when the line is not shell code."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a single quote
        return []


def parse(line: str) -> Command | None:
    """Return the command of a line, None when it has none. An ellipsis marks an excerpt."""
    words, variables = [word for word in words_of(line) if word != "…"], {}
    while words and ASSIGNMENT.fullmatch(words[0]):
        variable, _, value = words.pop(0).partition("=")
        variables[variable] = value
    if words and words[0] == "torchrun":
        words = words[next((i for i, word in enumerate(words) if word.endswith(".py")), len(words)) :]
    elif words and words[0] in ("python", "bash"):
        words = words[1:]
    if not words:
        return None
    program = words[0]
    if program.endswith(".py") and "/" not in program and not (ROOT / program).exists():
        program = f"tools/{program}"  # tools are also named without their folder
    return Command(program, words[1:], variables, "…" not in line)


def commands_of(text: str) -> list[Command]:
    """Return the commands in the bash blocks of a page and in spans of code that begin with a script."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [parse(line) for line in lines]
    for span in inline_code(text):
        command = parse(span)
        if command and command.program.endswith((".py", ".sh")) and len(words_of(span)) > 1:
            starts = words_of(span)[0] in ("python", "bash", "torchrun") or command.variables
            commands.append(command._replace(whole=bool(starts) and command.whole))
    return [command for command in commands if command]


def missing(paths: list[str]) -> list[str]:
    return [f"{path} does not exist" for path in paths if not (ROOT / path).exists()]


@pytest.fixture
def started(tmp_path):
    """A function that runs a shell script and returns the commands it would start, as (script, arguments)."""
    calls, binaries = tmp_path / "calls", tmp_path / "venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(STAND_IN)
    (binaries / "python").chmod(0o755)
    fixed = {"PATH": os.environ["PATH"], "CALLS": str(calls), "VENV": str(tmp_path / "venv"), "GPUS": "1"}

    def run(script: str, arguments: list[str], variables: dict[str, str]) -> list[tuple[str, list[str]]]:
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(ROOT / script), *arguments], env={**fixed, "PYTHON": str(binaries / "python"), **variables},
            cwd=tmp_path, timeout=60, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"bash {script} {shlex.join(arguments)}: {done.stdout}"
        recorded = [call.split("\0") for call in calls.read_text().split("\0\n\0") if call]
        return [(words[0].removeprefix(f"{ROOT}/"), words[1:]) for words in recorded if words[0].endswith(".py")]

    return run


def passed_on(arguments: list[str]) -> list[str]:
    """Return the flags that a sweep passes to every pretraining."""
    rest, extra = iter(arguments), []
    for word in rest:
        for _ in range(SWEEP_FLAGS.get(word, 0)):
            next(rest)
        if word not in SWEEP_FLAGS and (word.startswith("--") or extra):
            extra.append(word)
    return extra


@functools.cache
def is_sweep(script: str) -> bool:
    return bool(re.search(r"^\. .*(_sweep|_cifar10_small)\.sh|--list\)", (ROOT / script).read_text(), re.MULTILINE))


def check_shell(command: Command, started) -> list[str]:
    script, arguments = command.program, [EXAMPLES.get(word, word) for word in command.arguments]
    if script in PYTEST_SCRIPTS:
        return missing([word for word in arguments if word.endswith(".py")])
    if is_sweep(script):
        started(script, [*arguments, "--list"], command.variables)  # refuses unknown runs, papers and budgets
        return [parse_error("main_pretrain.py", passed_on(arguments))]
    commands = started(script, arguments, command.variables)
    return [parse_error(*each) for each in commands] or [f"{script} starts nothing"]


def check(command: Command, started) -> list[str]:
    """Return what is wrong with a command; empty strings mean nothing."""
    program, arguments, _, whole = command
    if program == "-m":  # python -m pytest, python -m zipfile
        return missing([word for word in arguments if "/" in word])
    if program in OTHER_PROGRAMS:
        return missing([file for flag, file in itertools.pairwise(arguments) if flag == "-r"])
    if not (ROOT / program).is_file() or not program.endswith((".py", ".sh")):
        return [f"{program} is no command of this project"]
    if program.endswith(".sh"):
        return check_shell(command, started)
    with_config = [
        i for i, word in enumerate(arguments) if word == "--config" and not (ROOT / arguments[i + 1]).exists()
    ]
    own = [word for i, word in enumerate(arguments) if i not in with_config and i - 1 not in with_config]  # a reader's
    return [parse_error(program, own, whole)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands(page, started):
    commands = commands_of(page.read_text(encoding="utf-8"))
    assert [wrong for command in commands for wrong in check(command, started) if wrong] == []


def test_scripts_are_shell():
    scripts = [str(ROOT / script) for script in tracked("scripts/*.sh", "scripts/*/*.sh")]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_flags_in_prose():
    """Each flag named on a page exists in some command (hidden aliases count), or its declaration is on the page."""
    scripts = tracked(
        "*.py", "tools/*.py", "benchmarks/*.py", "scripts/*/*.py", "tests/helpers/freeze.py", "tests/faults/soak.py"
    )
    commands = [script for script in scripts if '__name__ == "__main__"' in (ROOT / script).read_text()]
    known = set(SWEEP_FLAGS) | OTHER_FLAGS | set().union(*map(options, commands))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = {flag for span in inline_code(text) for flag in FLAG.findall(span)}
        code = "\n".join(blocks(text, "python"))
        made_here = {*FLAG.findall(code), *(f"--{option}" for option in re.findall(r'Option\(\s*"(\w+)"', code))}
        assert sorted(named - made_here - known) == [], name(page)


def test_commands_are_recognised():
    text = "`A=1 bash a.sh X`, `b.py --c`, `main_pretrain.py`\n```bash\npython d.py \\\n  --e 'f # g' …  # h\n```\n"
    assert commands_of(text) == [
        Command("tools/d.py", ["--e", "f # g"], {}, False),
        Command("a.sh", ["X"], {"A": "1"}, True),
        Command("tools/b.py", ["--c"], {}, False),
    ]
