"""The settings as command-line options and as the reference in docs/options.md."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import FIELDS, GROUPS, NetworkArguments
from .errors import ConfigError
from .setting_words import base_types, expected

_INTRODUCTION = """# Options

Every setting can stand in a TOML file (`--config_file run.toml`) or on the command line
(`--name value`); the command line wins. Section names in the file do not matter. Lists are written
`["a", "b"]` in the file and `--name a b` on the command line, where they replace the file's list.
`true` settings are turned off with `--no-name`.

`python -m engine <job> ... --print_config` prints the complete settings of a run as a TOML file.
This page is made by `python -m engine options`.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option per setting, grouped by subject; values are taken as the words they are."""
    # As from Python 3.14 on: "-1e-3" is a number, too, and no option.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    for group in GROUPS.values():
        section = parser.add_argument_group(group.__doc__)
        for name, field in group.model_fields.items():
            kinds = base_types(field.annotation)
            help_text = f"{field.description} [{_default(field.default)}]".replace("%", "%%")
            settings: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
            if bool in kinds:
                section.add_argument(
                    f"--{name}", nargs="?", const="true", metavar="true|false", **settings
                )
                section.add_argument(
                    f"--no-{name}",
                    dest=name,
                    action="store_const",
                    const="false",
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )
            elif list in kinds:
                section.add_argument(f"--{name}", nargs="*", metavar="VALUE", **settings)
            elif tuple in kinds:
                section.add_argument(f"--{name}", nargs="+", metavar="N", **settings)
            else:
                section.add_argument(f"--{name}", metavar="VALUE", **settings)


def given_words(arguments: argparse.Namespace, unknown: Sequence[str]) -> dict[str, list[str]]:
    """The settings that the command line named, with their words; also those nobody knows.

    Raises:
        ConfigError: a word belongs to no option.
    """
    words = {
        name: value if isinstance(value, list) else [value]
        for name, value in vars(arguments).items()
        if name in FIELDS
    }
    name = None
    for word in unknown:
        if word.startswith("--") and word != "--":
            name, equals, value = word[2:].partition("=")
            words[name] = [value] if equals else []
        elif name is None:
            dash = f"write a value with a dash as --name={word}"
            hint = dash if word.startswith("-") else "a value with spaces needs quotes"
            raise ConfigError(f"command line: {word!r} belongs to no option; {hint}")
        else:
            words[name].append(word)
    return words


def reference() -> str:
    """docs/options.md."""
    lines = [_INTRODUCTION]
    for group in (*GROUPS.values(), NetworkArguments):
        lines += [f"## {group.__doc__}", "", "| Option | Value | Default | |", "|---|---|---|---|"]
        for name, field in group.model_fields.items():
            value = expected(field).replace("|", "\\|")
            description = (field.description or "").replace("|", "\\|")
            lines.append(f"| `{name}` | {value} | {_default(field.default)} | {description} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _default(value: Any) -> str:
    if value is None or value == []:
        return "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value)
    return value.as_posix() if isinstance(value, Path) else f"{value}"
