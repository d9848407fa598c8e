"""The argument parsers of the project's commands. To obtain its parser, a command is run in this process like
`python SCRIPT`, and is stopped when it parses its flags."""

import argparse
import contextlib
import functools
import io
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

from helpers.pages import ROOT

PARSE = argparse.ArgumentParser.parse_args
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")  # placeholders: N, FILE, BUDGET


class _Parser(BaseException):
    """Raised to hand over the parser of a command. A BaseException, because commands handle other exceptions."""


def _hand_over(parser, *_):
    raise _Parser(parser)


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the parser of a script, whose path is relative to the repository."""
    path = ROOT / script
    with (
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.object(sys, "argv", [str(path)]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", _hand_over),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Parser as handed_over:
            parser = handed_over.args[0]
        else:
            raise AssertionError(f"{script} parses no flags")
    _accept_placeholders(parser)
    return parser


def _accept_placeholders(parser) -> None:
    """Make a parser accept placeholders as values of any type and among choices."""
    value, check = parser._get_value, parser._check_value

    def get_value(action, text):
        is_text = action.type in (None, str, Path)
        return 1 if PLACEHOLDER.fullmatch(text) and not is_text else value(action, text)

    def check_value(action, given):
        is_placeholder = isinstance(given, str) and PLACEHOLDER.fullmatch(given)
        if not is_placeholder and not (given == 1 and action.type is not None):
            check(action, given)

    parser._get_value, parser._check_value = get_value, check_value


def parse_error(script: str, words: list[str], complete: bool = True) -> str:
    """Return the error message of the script's parser for these arguments, "" if there is none. With `complete=False`,
    required arguments may be missing."""
    parser, stderr = parser_of(script), io.StringIO()
    with contextlib.ExitStack() as stack:
        for action in () if complete else parser._actions:
            stack.enter_context(mock.patch.object(action, "required", False))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # of --help
        try:
            PARSE(parser, words)
        except SystemExit as end:
            if not end.code:
                return ""
            return f"python {script} {' '.join(words)}: {stderr.getvalue().strip().splitlines()[-1]}"
    return ""


def options(script: str) -> set[str]:
    """Return the flags of a script, hidden ones included."""
    return set(parser_of(script)._option_string_actions)


def tracked(*patterns: str) -> list[str]:
    """Return the tracked files that match, sorted, as paths relative to the repository."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
