"""Selection of the methods that the flags turn on, and the check that they can be combined."""

import argparse
from collections.abc import Iterable

from methods.base import Method
from util.errors import UserError


def add_method_arguments(parser: argparse.ArgumentParser, known: list[type[Method]]) -> None:
    """Add one titled group of flags per method. An option of several methods goes into the group of the first one."""
    added = set()
    for method in known:
        group = parser.add_argument_group(method.title, method.summary or None)
        method.switch.add_to(group, always=True)
        for option in method.options:
            if option.name not in added:
                option.add_to(group)
                added.add(option.name)


def settings(args: argparse.Namespace, chosen: Iterable[type[Method]]) -> list[str]:
    """Return the flags of the methods `chosen` with their values, each once: those that `--help` shows, and the others
    where they are not at their defaults."""
    shown = {}
    for method in chosen:
        for option in (method.switch, *method.options):
            value = getattr(args, option.name)
            if value not in (None, False) and not (option.rare and value == option.default):
                words = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                shown[option.name] = f"--{option.name}" if value is True else f"--{option.name} {words}"
    return list(shown.values())


def enabled_methods(args: argparse.Namespace, known: list[type[Method]]) -> list[type[Method]]:
    """Return the methods that the flags turn on, and set the defaults of their options that were not given.

    Raises UserError if two of them cannot be combined, or if a flag belongs only to methods that are off.
    """
    chosen = [method for method in known if method.enabled(args)]
    in_use = {option.name for method in chosen for option in method.options}
    for dest in vars(args):
        owners = [method.flag for method in known if any(option.name == dest for option in method.options)]
        if owners and dest not in in_use:
            raise UserError(f"--{dest} has no effect without {' or '.join(owners)}")
    for method in chosen:
        for option in method.options:
            if not hasattr(args, option.name):
                setattr(args, option.name, option.default)
        method.check(args)
    alone = next((method for method in chosen if method.exclusive), None)
    if alone and len(chosen) > 1:
        others = " and ".join(method.flag for method in chosen if method is not alone)
        raise UserError(f"{alone.flag} runs alone and cannot be combined with {others}: give one or the other")
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            if one.slot is not None and one.slot == other.slot:
                raise UserError(f"{one.flag} and {other.flag} both decide the {one.slot}: give one of them")
            if other.name in one.excludes or one.name in other.excludes:
                raise UserError(f"{one.flag} and {other.flag} cannot be combined: give one of them")
    return chosen
