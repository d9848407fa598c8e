"""`--help` of every main and tool: short, one line of usage, and every default once and equal to the parser's."""

import re
import shlex
import sys

import pytest
from helpers.launch import ROOT, command_module

from util.parallel.slurm import add_job_arguments
from util.parser import HelpAll, Parser, default_of, rare

MAINS = ["main_pretrain", "main_finetune", "main_linprobe", "main_segment", "main_detect", "main_lit"]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))
JOBS = [main.replace("main", "submitit") for main in MAINS]
WIDTH = 80  # of a terminal of unknown size


@pytest.fixture(params=MAINS + TOOLS + JOBS)
def command(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setattr(sys, "argv", [f"{request.param}.py"])
    parser = command_module(request.param.replace("submitit", "main")).get_args_parser()
    if request.param in JOBS:
        add_job_arguments(parser.add_argument_group("job"))
    return parser


def entries(text: str) -> dict[str, str]:
    """Return {flag or argument: its entry in one line}. The explanation of an entry begins in column 10 or later, on
    the line of the flag or on the next."""
    by_flag = {}
    for entry in re.findall(r"^  \S[^\n]*(?:   *|\n {10,})\S[^\n]*(?:\n {10,}[^\n]*)*", text, re.MULTILINE):
        name = entry.split()[0].rstrip(",")
        assert name not in by_flag, f"{name} has two entries"
        by_flag[name] = " ".join(entry.split())
    return by_flag


def read_default(action, text: str):
    """Return the value of a "(default: TEXT)"."""
    if text == "all":
        return list(action.choices)
    values = [(action.type or str)(word) for word in shlex.split(text)]
    return values if action.nargs in ("+", "*") or isinstance(action.nargs, int) else values[0]


def test_help(command):
    short, full = command.format_help(), command.format_help(everything=True)
    program = command.prog
    for text in (short, full):
        assert all(len(line) <= WIDTH for line in text.splitlines())
        usage, blank, description, *_ = text.splitlines()
        assert usage.startswith(f"usage: {program} ") and not blank and description
        assert text.count("usage:") == 1 and "(default: None)" not in text and "==SUPPRESS==" not in text
    left_out = [action for action in command._actions if hasattr(action, "rare")]
    assert ("--help_all" in short) == bool(left_out)
    shown = entries(full)
    assert not any(action.option_strings[0] in entries(short) for action in left_out)
    for action in command._actions:
        name = (action.option_strings or [action.metavar or action.dest.upper()])[0]
        if isinstance(action, HelpAll) and not left_out:
            continue
        entry, default = shown[name], default_of(action)
        assert action.help, f"{name} is not explained"
        assert entry.lower().count("(default") == len(re.findall(r"\(default(: [^()]*)?\)$", entry)) <= 1, entry
        written = re.search(r"\(default: (.*)\)$", entry)
        assert not re.search(r"by default|\bdefault: ", entry.removesuffix(written[0] if written else "")), entry
        if written:
            value = read_default(action, written[1])
            assert value == (list(default) if isinstance(value, list) else default), entry
        elif action.nargs != 0:
            assert default in (None, "", []) or action.required or default == "==SUPPRESS==", entry


def test_length(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    text = command_module("main_pretrain").get_args_parser().format_help()
    assert len(text.splitlines()) < 320 and "see --help_all" in text


def test_old_spellings(monkeypatch):
    """They are aliases of the new flags with the names of the ledger, and are not shown."""
    parser = command_module("robustness").get_args_parser()
    old = parser.parse_args(["x.pth", "--foreign", "o", "--known", "val"])
    assert old == parser.parse_args(["x.pth", "--ood", "o", "--in_distribution", "val"])
    assert (old.foreign, old.known) == ("o", "val")
    text = parser.format_help(everything=True)
    assert "--ood" in text and "--foreign" not in text and "--known" not in text


def test_help_all_prints_and_ends(capsys):
    parser = Parser("What it does.", usual="--data PATH")
    parser.prog = "made_up.py"
    parser.add_argument("image", nargs="*")
    parser.add_argument("--out", required=True)
    parser.add_argument("--share", type=float, default=0.25, help="25%% of all")
    rare(parser.add_argument("--seldom", action="store_true", help="for few"))
    for flag, shows in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([flag])
        text = capsys.readouterr().out
        assert text.startswith("usage: made_up.py [IMAGE ...] --out OUT --data PATH [flags]\n")
        assert ("--seldom" in text) == shows and "25% of all (default: 0.25)" in text
    assert vars(parser.parse_args(["--out", "x"])) == {"image": [], "out": "x", "share": 0.25, "seldom": False}
