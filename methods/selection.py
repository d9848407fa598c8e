"""Which methods the flags turn on, and whether they can be combined."""

import argparse

from methods.base import Method
from util.errors import UserError


def add_method_arguments(parser: argparse.ArgumentParser, known: list[type[Method]]) -> None:
    """One titled group of flags per method; an option that several methods share is in the group of the first."""
    added = set()
    for method in known:
        group = parser.add_argument_group(method.title, method.summary or None)
        method.switch.add_to(group, always=True)
        for option in method.options:
            if option.name not in added:
                option.add_to(group)
                added.add(option.name)


def enabled_methods(args: argparse.Namespace, known: list[type[Method]]) -> list[type[Method]]:
    """The methods that the flags ask for; UserError when two of them cannot run together, or when a flag has no effect
    because no method that knows it is on. Options that were not given get their defaults."""
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
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            if one.slot is not None and one.slot == other.slot:
                raise UserError(f"{one.flag} and {other.flag} both decide the {one.slot}: give one of them")
            excluded = other.name in one.excludes or one.name in other.excludes
            if excluded or one.exclusive or other.exclusive:
                raise UserError(f"{one.flag} and {other.flag} cannot be combined: give one of them")
    return chosen
