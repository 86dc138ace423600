"""Commands as the specification writes them, read as the shell reads ours."""

from __future__ import annotations

import io
import shlex
from contextlib import redirect_stdout
from typing import Any

from pack.engine.__main__ import main
from pack.engine.config import FIELDS, Config
from pack.engine.config_file import parse_config


def options_of(command: str) -> list[str]:
    """The words of a command behind its script; without one, all of them. "..." is left out."""
    words = shlex.split(command.replace("\\\n", " "))
    scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
    return [word for word in words[scripts[0] + 1 if scripts else 0 :] if word != "..."]


def settings_of(command: str) -> Config:
    """What ``python -m engine train`` understands by a command's options."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["train", *options_of(command), "--print_config"]) == 0, command
    return parse_config(printed.getvalue(), command)


def given_settings(config: Config) -> dict[str, Any]:
    """What differs from the defaults."""
    values = {name: (config.value(name), Config().value(name)) for name in FIELDS}
    return {name: value for name, (value, default) in values.items() if value != default}
