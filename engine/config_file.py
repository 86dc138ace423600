"""Settings from a TOML file and the command line -> `Config`, and back to TOML.

The command line wins over the file, the file over defaults. Tables in the file only group keys:
all are flattened. Everything that is wrong is reported together, before anything else starts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .config import FIELDS, GROUP_OF, GROUPS, Config
from .errors import ConfigError
from .options_not_yet import NOT_YET
from .setting_words import base_types, choices_of, expected

_SECRETS = ("wandb_api_key", "huggingface_token")


@dataclass(frozen=True)
class Given:
    """One value as it was given: where, for messages, and what."""

    where: str
    value: Any


def load_config(
    path: Path | None, command_line: Mapping[str, Sequence[str]], environ: Mapping[str, str]
) -> Config:
    """The settings of a file, overridden by the command line.

    Args:
        path: the TOML file; ``.toml`` may be left out.
        command_line: setting -> its words, as the shell gave them.
        environ: the mixed precision that ``accelerate launch`` was told is taken from here when
            neither file nor command line say one.

    Raises:
        ConfigError: lists every problem of both, one line each.
    """
    problems: list[str] = []
    given: dict[str, Given] = {}
    if path:
        path, document = _read(path)
        given = _flatten(str(path), document, problems)
    for name, words in command_line.items():
        value = _from_words(FIELDS[name], words) if name in FIELDS else " ".join(words) or True
        given[name] = Given("command line", value)
    launched = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no" and "mixed_precision" not in given:
        given["mixed_precision"] = Given("accelerate launch", launched)
    return build_config(given, problems)


def parse_config(text: str, where: str) -> Config:
    """The settings in a TOML text; ``where`` names it in messages.

    Raises:
        ConfigError: lists every problem, one line each.
    """
    problems: list[str] = []
    return build_config(_flatten(where, _parse(text, where), problems), problems)


def build_config(given: Mapping[str, Given], problems: Sequence[str] = ()) -> Config:
    """The `Config` with these settings and defaults for all others.

    Args:
        given: by flat name.
        problems: what was found wrong before; reported together with what is found here.

    Raises:
        ConfigError: lists every problem, one line each.
    """
    problems = list(problems)
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for name, item in given.items():
        if name in FIELDS:
            groups[GROUP_OF[name]][name] = item.value
        else:
            problems.append(_unknown(name, item))
    built: dict[str, Any] = {}
    for key, group in GROUPS.items():
        try:
            built[key] = group(**groups[key])
        except ValidationError as error:
            wrong = {str(detail["loc"][0]): detail for detail in error.errors()}
            problems += [
                _problem(name, given[name], wrong[name]) for name in groups[key] if name in wrong
            ]
    if problems:
        raise ConfigError("\n".join(problems))
    return Config(**built)


def to_toml(config: Config, *, with_help: bool = True) -> str:
    """The complete settings as TOML; reading it gives an equal `Config`.

    Args:
        with_help: with what each setting means, and those without a value.
    """
    lines: list[str] = []
    for key, group in GROUPS.items():
        lines += [f"# {group.__doc__}", f"[{key}]"] if with_help else [f"[{key}]"]
        for name, field in group.model_fields.items():
            value = config.value(name)
            if with_help:
                lines.append(f"# {field.description}")
            if value is not None:
                lines.append(f"{name} = {_toml_value(value)}")
            elif with_help:
                lines.append(f"# {name} =")
        lines.append("")
    return "\n".join(lines)


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    try:
        if path.suffix != ".toml" and path.name and (path.is_dir() or not path.exists()):
            path = path.with_name(f"{path.name}.toml")
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file; check --config_file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this is not UTF-8 text; save it as UTF-8") from None
    return path, _parse(text, str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        hint = "; write Windows paths in 'single quotes'" if "\\" in text else ""
        raise ConfigError(f"{where}: this is not valid TOML: {error}{hint}") from None


def _flatten(
    source: str, document: Mapping[str, Any], problems: list[str], section: str = ""
) -> dict[str, Given]:
    where = f"{source} [{section}]" if section else source
    given: dict[str, Given] = {}
    for key, value in document.items():
        if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            problems.append(
                f"{where}: [[{key}]] = {_shown(value)}: lists of tables are not read; "
                f"write the settings once, under [{key}]"
            )
        elif not isinstance(value, Mapping):
            given[key] = Given(where, value)
    for key, value in document.items():
        if isinstance(value, Mapping):
            inner = f"{section}.{key}" if section else key
            for name, item in _flatten(source, value, problems, inner).items():
                if name in given:
                    problems.append(
                        f"{item.where}: {name} = {_shown(item.value)}: also set in "
                        f"{given[name].where}; keep one of them"
                    )
                given[name] = item
    return given


def _from_words(field: FieldInfo, words: Sequence[str]) -> Any:
    """Words of the shell as the value they mean; what does not fit is left for validation."""
    kinds = base_types(field.annotation)
    values = [_from_word(kinds, word) for word in words]
    if list in kinds:
        return values
    if tuple in kinds:
        return values if len(values) > 1 else values[0]
    return values[0] if len(values) == 1 else True if not values and bool in kinds else values


def _from_word(kinds: set[Any], word: str) -> Any:
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(word)
            except ValueError:
                continue
    return word


def _unknown(name: str, item: Given) -> str:
    # Messages are stored and shown, so they repeat no key.
    shown = "..." if name in _SECRETS else _shown(item.value)
    start = f"{item.where}: {name} = {shown}:"
    if name in NOT_YET:
        return f"{start} this option is not supported by this version; {NOT_YET[name]}"
    near = get_close_matches(name.lower(), list(FIELDS), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see docs/options.md for all settings"
    return f"{start} unknown setting; {hint}"


def _problem(name: str, item: Given, detail: Any) -> str:
    reason = f"expected {expected(FIELDS[name])}"
    choices = choices_of(FIELDS[name])
    if detail["type"] == "value_error":
        reason = f"expected {detail['ctx']['error']}"
    elif len(choices) > 1 and (near := get_close_matches(str(item.value), choices, n=1)):
        reason += f"; did you mean {near[0]!r}?"
    return f"{item.where}: {name} = {_shown(item.value)}: {reason}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(part) for part in value)}]"
    return _toml_string(str(value))


def _toml_string(text: str) -> str:
    """A basic string."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    parts = [
        escapes.get(
            letter, f"\\u{ord(letter):04x}" if ord(letter) < 32 or ord(letter) == 127 else letter
        )
        for letter in text
    ]
    return f'"{"".join(parts)}"'
