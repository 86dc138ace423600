"""``log_tracker_config``: a TOML file with more arguments for the start of a logger.

One table for each logger. A key of wandb's is not among them, because whoever reads the file or a
workflow that names it would have it; ``wandb login`` keeps it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .errors import ConfigError

# By logger, of which type each is.
_ARGUMENTS: dict[str, dict[str, type]] = {
    "tensorboard": {"filename_suffix": str, "flush_secs": int, "max_queue": int},
    "wandb": {
        "entity": str,
        "group": str,
        "job_type": str,
        "mode": str,
        "name": str,
        "notes": str,
        "tags": list,
    },
}
_MODES = ("online", "offline", "disabled")


def read_arguments(path: Path | None) -> dict[str, dict[str, Any]]:
    """What a ``log_tracker_config`` adds to the start of each logger, by the logger's name.

    Raises:
        ConfigError: the file cannot be read, or says what no logger takes.
    """
    if path is None:
        return {}
    try:
        document = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"log_tracker_config: {path} cannot be read ({error.strerror}); check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"log_tracker_config: {path} is not valid TOML ({error}); see docs/logging.md"
        ) from None
    for name, table in document.items():
        if name not in _ARGUMENTS or not isinstance(table, Mapping):
            raise ConfigError(
                f"log_tracker_config: {path} has {name!r}; write what a logger shall take under "
                f"[{'] or ['.join(_ARGUMENTS)}]"
            )
        for key, value in table.items():
            if problem := _problem_of_argument(name, key, value):
                raise ConfigError(f"log_tracker_config: {path} [{name}]: {key}: {problem}")
    return document


def _problem_of_argument(logger: str, key: str, value: Any) -> str:
    """What is wrong with an argument for a logger, or nothing."""
    known = _ARGUMENTS[logger]
    if key not in known:
        return f"this is not taken; there are {', '.join(known)}"
    kind = known[key]
    of_kind = type(value) is kind and (
        kind is not list or all(isinstance(part, str) for part in value)
    )
    if not of_kind:
        words = {str: "a text", int: "a whole number", list: "a list of texts"}
        return f"expected {words[kind]}, not {value!r}"
    if key == "mode" and value not in _MODES:
        return f"expected one of {', '.join(_MODES)}, not {value!r}"
    return ""
