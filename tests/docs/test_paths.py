"""Paths and module names in prose exist: on the pages, and in docstrings and comments of Python files and scripts."""

import ast
import importlib
import io
import re
import tokenize

import pytest
from helpers.pages import PAGES, ROOT, inline_code, name
from helpers.parsers import tracked

FOLDERS = "util|models|methods|evaluation|planning|tools|tests|benchmarks|scripts|docs|notebooks|configs"
PATH = re.compile(rf"(?<![\w/.<>-])(?:{FOLDERS})(?:/[\w<>{{}}*.-]+)+")
MODULE = re.compile(r"(?:util|methods|evaluation|planning|tools)(?:\.\w+)+")  # alone in a span of code
PLACEHOLDER = re.compile(r"[<>{}*]|(?:^|/)[A-Z]+(?:[/.]|$)")  # docs/*.md, scripts/PAPER/sweep.sh
EXAMPLES = {"methods/short_tokens.py"}  # files that readers of the pages create
CODE = [path for path in tracked("*.py", "*/*.py", "*/*/*.py", "*/*/*/*.py") if not path.startswith("tests/docs/")]
SCRIPTS = tracked("scripts/*.sh", "scripts/*/*.sh")


def python_prose(text: str) -> str:
    """Return the docstrings and comments of a Python file."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, nodes)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(docstrings + [token.string for token in tokens if token.type == tokenize.COMMENT])


def module_exists(dotted: str) -> bool:
    """Return whether `dotted` is a module of the project, or a name in one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:n])
        if path.with_suffix(".py").is_file() or (n == len(parts) and path.is_dir()):
            value = importlib.import_module(".".join(parts[:n])) if parts[n:] else None
            for attribute in parts[n:]:
                value = getattr(value, attribute, None)
            return not parts[n:] or value is not None
    return False


def missing_paths(text: str) -> list[str]:
    """Return the paths in `text` that do not exist. A path may leave out the ending .py."""
    paths = {path.rstrip(".") for path in PATH.findall(text) if not PLACEHOLDER.search(path)} - EXAMPLES
    return sorted(path for path in paths if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists())


def missing_modules(spans: list[str]) -> list[str]:
    """Return the spans of code that name a module or a function of the project that does not exist."""
    return sorted({span for span in spans if MODULE.fullmatch(span) and not module_exists(span)})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages(page):
    spans = inline_code(page.read_text(encoding="utf-8"))
    assert missing_paths("\n".join(spans)) + missing_modules(spans) == []


def test_docstrings_and_comments():
    missing = {}
    for path in CODE:
        prose = python_prose((ROOT / path).read_text(encoding="utf-8"))
        missing[path] = missing_paths(prose) + missing_modules(re.findall(r"`([^`\n]+)`", prose))
    assert {path: names for path, names in missing.items() if names} == {}


def test_comments_of_scripts():
    comments = {
        path: "\n".join(re.findall(r"#.*", (ROOT / path).read_text(encoding="utf-8")))
        for path in [*SCRIPTS, *tracked("configs/*/*.yaml"), ".ci/run", "pyproject.toml", *tracked("requirements*.txt")]
    }
    assert {path: names for path, text in comments.items() if (names := missing_paths(text))} == {}


def test_planted_faults():
    """Moved files and modules are reported; placeholders, and paths without their ending, are not."""
    text = "util/sharding.py, tests/test_tools.py, scripts/PAPER/sweep.sh, `util/data/*.py`, tools/plan."
    assert missing_paths(text) == ["tests/test_tools.py", "util/sharding.py"]
    spans = ["util.run", "util.training.run", "util.misc.save_model", "util.misc.no_such_name", "util"]
    assert missing_modules(spans) == ["util.misc.no_such_name", "util.run"]
