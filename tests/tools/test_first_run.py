"""The page of the first run shows commands that work, and output that looks as it does now."""

import re
import shlex

import pytest
from helpers.pages import ROOT

from tools import first_run
from util.errors import UserError

PAGE = ROOT / "docs" / "first_run.md"


def parsed(*flags):
    return first_run.get_args_parser().parse_args([str(flag) for flag in flags])


def titles(text: str) -> list[str]:
    """Return the titles of the rows of the first block of a main in `text`."""
    block = re.search(r"^data  .*?^duration ", text, re.M | re.S)[0]
    return re.findall(r"^(\w+(?: \w+)?)  ", block + " ", re.M)


def test_the_page_has_all_commands():
    text, defaults = PAGE.read_text(encoding="utf-8"), parsed()
    commands = [first_run.words(command, defaults) for step in first_run.STEPS for command in step.commands]
    places = [text.find(first_run.broken(command)) for command in commands]
    assert len(commands) > 10 and -1 not in places and places == sorted(places)
    assert all(f"## {step.title}\n" in text for step in first_run.STEPS)
    assert not re.search(r"/(tmp|home|root)/", text)  # of the machine that wrote it


def test_its_first_command_prints_what_the_page_shows(tmp_path):
    """Pretraining, for one epoch: the blocks at start and end have the rows of the page."""
    out, page = tmp_path / "out", tmp_path / "page.md"
    first_run.main(parsed("--epochs", 2, "--stop_after", 1, "--output_dir", out, "--write", page))
    ours, theirs = page.read_text(encoding="utf-8"), PAGE.read_text(encoding="utf-8")
    assert titles(ours) == titles(theirs) and "learning rate" in titles(ours)
    for row in ("data ", "pixels ", "model "):  # what does not depend on the epochs
        (line,) = re.findall(rf"^{row}.*$", ours, re.M)
        assert line in theirs
    ends = [re.findall(r"^(finished|last epoch|best|files|next) ", text, re.M) for text in (ours, theirs)]
    assert ends[0] == ["finished", "last epoch", "best", "files", "next"] == ends[1][:5]
    assert (out / "mae" / "checkpoint-1.pth").is_file() and ours.count("…") == 1


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"--output_dir .* exists: delete it"):
        first_run.main(parsed("--output_dir", tmp_path))
    with pytest.raises(UserError, match=r"--write .* must be a .md file"):
        first_run.main(parsed("--output_dir", tmp_path / "new", "--write", tmp_path / "page.html"))


def test_long_commands_can_be_pasted():
    command = "python main_pretrain.py " + " ".join(f"--flag_{i} value" for i in range(20))
    lines = first_run.broken(command).splitlines()
    assert max(map(len, lines)) <= 108 and len(lines) > 2
    pasted = "\n".join(lines).removeprefix("$ ").replace("\\\n", " ")
    assert shlex.split(pasted) == shlex.split(command)
