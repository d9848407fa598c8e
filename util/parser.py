"""The parser of every command: `--help` leaves out the rare flags, and mistakes are reported in one line."""

import argparse
import copy
import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable

from util.config import OPTION, BadConfig, apply_config, split_config
from util.memory import flags_in_use

WIDEST = 100  # columns of --help on a wider terminal: longer lines are hard to read


class Flags(argparse.Namespace):
    """Parsed flags. A main settles those that were not given and then freezes them: from there on, every assignment and
    deletion raises AttributeError."""

    __slots__ = ("_frozen",)  # a slot, so that it is not among the flags of `vars`

    @property
    def frozen(self) -> bool:
        return getattr(self, "_frozen", False)

    def freeze(self) -> None:
        self._frozen = True

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Flags":
        """Return `args` if they are flags that can be settled, else a copy of them that can: of a plain Namespace, or
        of the flags of an earlier run in this process."""
        return args if isinstance(args, cls) and not args.frozen else cls(**vars(args))

    def __copy__(self) -> "Flags":
        return self.__deepcopy__({}, copy_value=lambda value, _: value)

    def __deepcopy__(self, memo: dict, copy_value=copy.deepcopy) -> "Flags":
        copied = Flags(**{name: copy_value(value, memo) for name, value in vars(self).items()})
        if self.frozen:
            copied.freeze()
        return copied

    def __reduce__(self):
        """Pickle as a plain Namespace, which can be read without this project."""
        return argparse.Namespace, (), dict(vars(self))

    def __setattr__(self, name: str, value) -> None:
        self._refuse_if_frozen(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_if_frozen(name)
        super().__delattr__(name)

    def _refuse_if_frozen(self, name: str) -> None:
        if self.frozen:
            raise AttributeError(
                f"--{name} cannot change any more: flags are settled before a run begins; parse them again for another"
            )


def rare(action: argparse.Action) -> argparse.Action:
    """Mark the flag of `add_argument` as one that `--help` leaves to `--help_all`."""
    vars(action)["rare"] = True  # argparse does not know it
    return action


def settled_later(action: argparse.Action, default) -> argparse.Action:
    """Mark the flag of `add_argument` as one that is None where it is not given, until the main settles it, by
    `default` unless a checkpoint has another value."""
    vars(action)["settled"], action.default = default, None
    return action


def default_of(action: argparse.Action):
    """Return the value of a flag that is not given. A method's option, which is then absent from the parsed flags, and
    a flag that is `settled_later` have it in `settled`; other flags have argparse's default."""
    return getattr(action, "settled", action.default)


def shown_default(action: argparse.Action) -> str:
    """Return the default of a flag as `--help` shows it, such as "(default: 20)"; "" where it shows none."""
    value = default_of(action)
    if action.nargs == 0:  # of two switches of one value, the default one is marked
        return "(default)" if action.const is not None and action.const == value else ""
    if value is None or value == argparse.SUPPRESS or value in ("", []):
        return ""
    if isinstance(value, (list, tuple)):
        everything = action.choices and list(value) == list(action.choices)
        return f"(default: {'all' if everything else ' '.join(map(_shown, value))})"
    return f"(default: {_shown(value)})"


def _shown(value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(text) if " " in text else text


class HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of every flag (the others are kept for old commands), short metavars, and each default
    once."""

    def __init__(self, prog: str, **kwargs):
        width = min(shutil.get_terminal_size().columns, WIDEST) - 2
        super().__init__(prog, **{"max_help_position": 28, "width": width} | kwargs)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        both = isinstance(action, (argparse.BooleanOptionalAction, argparse._HelpAction))
        names = ", ".join(action.option_strings if both else action.option_strings[:1])
        if action.nargs == 0:
            return names
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action):
        if action.type is int:
            return "N"
        return "X" if action.type is float else action.dest.rsplit("_", 1)[-1].upper()

    def _get_default_metavar_for_positional(self, action):
        return action.dest.upper()

    def _get_help_string(self, action):
        default = shown_default(action).replace("%", "%%")
        return f"{action.help or ''} {default}".strip()

    def _fill_text(self, text, width, indent):
        """Wrap all paragraphs except indented ones, which are commands."""
        paragraphs = text.strip("\n").split("\n\n")
        lines = [[p] if p.startswith("  ") else self._split_lines(p, width - len(indent)) for p in paragraphs]
        return "\n\n".join("\n".join(indent + line for line in paragraph) for paragraph in lines)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def closest(word: str, known: Iterable[str]) -> str:
    """Return the name among `known` that is most like `word`, "" if none is. Capitals, and dashes in place of
    underscores, make no difference."""
    names = {name.lower().replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), names, n=1)
    return names[close[0]] if close else ""


def did_you_mean(*names: str | None) -> str:
    """Return "; did you mean X, Y?" for the given names that are not empty, "" without any."""
    given = ", ".join(dict.fromkeys(filter(None, names)))
    return f"; did you mean {given}?" if given else ""


class HelpAll(argparse.Action):
    """`--help_all`: print the help with the rare flags, and exit."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        assert isinstance(parser, Parser)
        parser._print_message(parser.format_help(everything=True), sys.stdout)
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage of all flags, and on rank 0 only. It returns
    `Flags`.

    `usual`: the flags of a usual call, for the usage line, which always has the positional arguments and the required
    flags.
    """

    def __init__(self, description: str | None, usual: str = ""):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.usual = usual
        self._positionals.title, self._optionals.title = "arguments", "flags"
        self.add_argument("--help_all", action=HelpAll, help="show this message with the rarely used flags")
        self.add_argument(
            OPTION, metavar="FILE", default=argparse.SUPPRESS,
            help="flags from the args.json of a run or from YAML; those of the command line win",
        )  # fmt: skip

    def parse_known_args(self, args=None, namespace=None):
        namespace = Flags() if namespace is None else namespace
        required = [action for action in self._actions if action.required and action.option_strings]
        try:
            self._words, files = split_config(sys.argv[1:] if args is None else args)
            for file in files:
                apply_config(self, file, namespace)
        except BadConfig as error:
            self.error(str(error))
        for action in required:  # argparse looks for required flags on the command line alone
            action.required = not hasattr(namespace, action.dest)
        try:
            parsed, unknown = super().parse_known_args(self._words, namespace)
        finally:
            for action in required:
                action.required = True
        for name in [action.dest for action in self._actions if hasattr(parsed, action.dest)]:
            vars(parsed)[name] = vars(parsed).pop(name)  # the order of --help, also for those of a config
        flags_in_use.clear()
        flags_in_use.update(vars(parsed))
        return parsed, unknown

    def did_you_mean_flag(self, word: str) -> str:
        """Return a question that names the flag of this command that resembles `word`, "" if none does."""
        names = [name.removeprefix("--") for action in self._actions for name in action.option_strings]
        name = closest(word, names)
        return did_you_mean(name and f"--{name}")

    def _suggestions(self) -> str:
        """Return a question that names the flags of this command that resemble the unknown ones that were given."""
        names = [name for action in self._actions for name in action.option_strings]
        flags = {name.removeprefix("--"): name for name in names if name.startswith("--")}
        given = [word.partition("=")[0] for word in self._words if re.match("-+[A-Za-z]", word)]
        return did_you_mean(*(flags.get(closest(word.lstrip("-"), flags)) for word in given if word not in names))

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(closest(str(value), map(str, action.choices or ())))
            raise

    def error(self, message):
        # A required flag may be there under a wrong name.
        if message.startswith("unrecognized arguments") or "arguments are required" in message:
            message += self._suggestions()
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)

    def usage_line(self) -> str:
        """Return "PROGRAM POSITIONAL --required FLAG [flags]". Positional arguments come first: after a flag that takes
        a list, they would be part of the list."""
        formatter = self._get_formatter()
        words = [self.prog]
        for action in self._actions:
            if not action.option_strings:
                words.append(formatter._format_args(action, action.dest.upper()))
        for action in self._actions:
            if action.option_strings and action.required:
                words.append(formatter._format_action_invocation(action))
        return " ".join([*words, *filter(None, [self.usual]), "[flags]"])

    def format_usage(self) -> str:
        return f"usage: {self.usage_line()}\n"

    def format_help(self, everything: bool = False) -> str:
        """Return the help, without the rare flags unless `everything`."""
        rare_flags = [action for action in self._actions if hasattr(action, "rare")]
        left_out = [] if everything else rare_flags
        if not rare_flags:
            left_out = [action for action in self._actions if isinstance(action, HelpAll)]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage_line().replace("%", "%%"), [], [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            actions = [action for action in group._group_actions if action not in left_out]
            formatter.start_section(group.title)
            formatter.add_text(group.description if actions else None)
            formatter.add_arguments(actions)
            formatter.end_section()
        if rare_flags and not everything:
            formatter.add_text(f"{len(rare_flags)} rarely used flags are left out here: see --help_all.")
        return formatter.format_help()
