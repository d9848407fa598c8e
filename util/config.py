"""Flags from a file (`--config`): the args.json of a run, or YAML with a line for each flag.

The values of the file take the place of the defaults, so flags on the command line win. Each value is checked as that
of the flag is: by its type, its choices and its number of words.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

OPTION = "--config"
# What args.json has beside the flags that were given: facts of the process, its launcher, and how it was continued.
_OF_THE_PROCESS = "revision torch earlier distributed rank gpu world_size local_rank dist_on_itp dist_url dist_backend"
_OF_THE_PROCESS += " resume overwrite"


class BadConfig(ValueError):
    """A file that does not fit the command; the message is one sentence."""


def split_config(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command line without `--config FILE`, and the files. Raises BadConfig without a file."""
    rest, files, remaining = [], [], iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != OPTION:
            rest.append(word)
            continue
        files.append(value if equals else next(remaining, ""))
        if not files[-1] or files[-1].startswith("--"):
            raise BadConfig(f"{OPTION} needs a file: the args.json of a run, or YAML")
    return rest, files


def read_config(path: str) -> dict[str, Any]:
    """Return the flags in a file. Of the args.json of a run, what the run settled from other flags, and what belongs to
    its process, are left out. Raises BadConfig for a file that cannot be read, or is no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise BadConfig(f"{OPTION} {path}: {error.strerror or error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise BadConfig(f"{OPTION} {path} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise BadConfig(f"{OPTION} {path} must have a line `flag: value` for each flag")
    return as_given(content) if {"revision", "torch"} <= content.keys() else content


def as_given(record: dict[str, Any]) -> dict[str, Any]:
    """Return settled flags, such as those of args.json, as they could have been given: a rate, length or folder that
    was derived from others is derived again, for example for another number of processes."""
    flags = {name: value for name, value in record.items() if name not in _OF_THE_PROCESS.split()}
    derived = []
    if record.get("log_dir") == record.get("output_dir"):
        derived.append("log_dir")
    if record.get("max_steps") is not None:
        derived.append("epochs")
    if record.get("warmup_steps"):
        derived.append("warmup_epochs")
    batch = record.get("batch_size", 0) * record.get("accum_iter", 1) * record.get("world_size", 1)
    if record.get("blr") is not None and record.get("lr") == record["blr"] * batch / 256:
        derived.append("lr")
    return {name: value for name, value in flags.items() if name not in derived}


def apply_config(parser: argparse.ArgumentParser, path: str, namespace: argparse.Namespace) -> None:
    """Set the flags in a file on `namespace`. Raises BadConfig for a name that the command does not have, and for a
    value that does not fit."""
    for name, value in read_config(path).items():
        try:
            _apply(parser, name.replace("-", "_"), value, namespace)
        except argparse.ArgumentError as error:
            raise BadConfig(f"{OPTION} {path}: --{name}: {error.message}") from None
        except BadConfig as error:
            raise BadConfig(f"{OPTION} {path}: {error}") from None


def _apply(parser, name: str, value, namespace) -> None:
    others = ("help", "config", argparse.SUPPRESS)
    flags = [action for action in parser._actions if action.option_strings and action.dest not in others]
    of_value = [action for action in flags if action.dest == name]
    of_name = [action for action in flags if f"--{name}" in action.option_strings]
    if not of_value and not of_name:
        raise BadConfig(f"{parser.prog} has no flag --{name}{parser.did_you_mean_flag(name)}")
    action = (of_value or of_name)[0]
    if action.nargs == 0:
        _switch(action.dest, of_value, of_name, name, value, namespace)
    elif value is None:
        if action.default not in (None, argparse.SUPPRESS):
            raise BadConfig(f"--{name} needs a value; leave it out for {action.default}")
        vars(namespace).pop(action.dest, None)  # of an earlier file
    elif _is_default(action, value):
        vars(namespace).pop(action.dest, None)
    else:
        setattr(namespace, action.dest, parser._get_values(action, _words(action, name, value)))


def _is_default(action, value) -> bool:
    return value == action.default and isinstance(value, bool) == isinstance(action.default, bool)


def _switch(dest: str, of_value, of_name, name: str, value, namespace) -> None:
    """Set a switch: `pin_mem: false` gives the value of the flags called so, `no_pin_mem: true` gives the switch."""
    if not isinstance(value, bool):
        raise BadConfig(f"--{name} is a switch: true or false, not {value!r}")
    if not of_value:
        if value:
            setattr(namespace, dest, of_name[0].const)
        return
    if value in [action.const for action in of_value] or value == of_value[0].default:
        setattr(namespace, dest, value)
    elif value:
        raise BadConfig(f"--{name} cannot be turned on")


def _words(action, name: str, value) -> list[str]:
    """Return the words that give `value` on a command line."""
    values = value if isinstance(value, list) else [value]
    needed = {None: "one value", "+": "at least one value"}.get(action.nargs, f"{action.nargs} values")
    if isinstance(value, list) and len(value) != action.nargs and (action.nargs != "+" or not value):
        raise BadConfig(f"--{name} takes {needed}, not the list {value}")
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        raise BadConfig(f"--{name} takes {needed}, not {value!r}")
    wrong = [each for each in values if isinstance(each, (bool, dict, list)) or each is None]
    if wrong:
        raise BadConfig(f"--{name} takes numbers or words, not {wrong[0]!r}")
    return [str(each) for each in values]
