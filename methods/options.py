"""The declaration of a method's flag: what the parser, the defaults and the refusals are made from."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from util.parser import rare


@dataclass(frozen=True)
class Option:
    """One flag, `--name`. It takes values of the type of `default`; where that is None, of `type`, else text. A bool is
    a switch, and one that is on has a second flag, `--no_name`, whose help is `negated`.

    `rare`: `--help` leaves it to `--help_all`.
    """

    name: str
    default: object
    help: str
    type: Callable[[str], object] | None = None
    choices: tuple = ()
    metavar: str | None = None
    rare: bool = False
    negated: str = ""

    def add_to(self, group: argparse._ArgumentGroup, always: bool = False) -> None:
        """Add the flag to `group`. Unless `always`, it is absent from the parsed flags where it was not given, so that
        `enabled_methods` can tell; its default is settled there."""
        kwargs = {"default": self.default if always else argparse.SUPPRESS, "help": self.help}
        if isinstance(self.default, bool):
            kwargs["action"] = "store_true"
        else:
            own = type(self.default) if isinstance(self.default, (int, float)) else None
            kwargs |= {"type": self.type or own, "choices": self.choices or None, "metavar": self.metavar}
        added = [group.add_argument(f"--{self.name}", **kwargs)]
        if self.negated:
            kwargs |= {"action": "store_false", "help": self.negated, "dest": self.name}
            added.append(group.add_argument(f"--no_{self.name}", **kwargs))
        for action in added:
            action.settled = self.default
            if self.rare:
                rare(action)
