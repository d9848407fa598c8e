"""The declaration of a method's flag, from which parser entry, default and error messages are made."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from util.parser import rare


@dataclass(frozen=True)
class Option:
    """One flag, `--name`.

    Its values have the type of `default` or, if that is None, `type` (text without one). A bool is a switch. One that
    is on by default, or whose default None is settled later, has a second flag, `--no_name`, with the help text
    `negated`. A `rare` flag is shown by `--help_all` only.
    """

    name: str
    default: object
    help: str
    type: Callable[[str], object] | None = None
    choices: tuple = ()
    metavar: str | None = None
    rare: bool = False
    negated: str = ""
    nargs: int | None = None  # number of values; the default is then a tuple

    def add_to(self, group: argparse._ArgumentGroup, always: bool = False) -> None:
        """Add the flag to `group`. Unless `always`, a flag that was not given is absent from the parsed flags;
        `enabled_methods` can then detect flags without effect, and sets the defaults."""
        kwargs = {"default": self.default if always else argparse.SUPPRESS, "help": self.help}
        if isinstance(self.default, bool) or self.negated:
            kwargs["action"] = "store_true"
        else:
            own = type(self.default) if isinstance(self.default, (int, float)) else None
            kwargs |= {"type": self.type or own, "choices": self.choices or None, "metavar": self.metavar}
            kwargs |= {"nargs": self.nargs} if self.nargs else {}
        added = [group.add_argument(f"--{self.name}", **kwargs)]
        if self.negated:
            kwargs |= {"action": "store_false", "help": self.negated, "dest": self.name}
            added.append(group.add_argument(f"--no_{self.name}", **kwargs))
        for action in added:
            vars(action)["settled"] = self.default  # read by `util.parser.default_of`
            if self.rare:
                rare(action)
