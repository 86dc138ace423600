"""Prompts with options: lines of text with ``--w 512 --s 20`` behind it, or TOML or JSON tables.

Options and keys are those of musubi-tuner's prompt files. There an option also counts at the
beginning of a line, so that "I am a cat" is an image file; here the text comes first, always.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError, DataError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What no file name, tokenizer or PNG can hold.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class Prompt:
    """One picture to draw; what is None is for the settings to say.

    ``where`` names file and line for messages; ``unused`` are the options that were given but are
    of use to no family that there is.
    """

    text: str
    where: str
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    flow_shift: float | None = None
    control_images: tuple[Path, ...] = ()
    unused: tuple[str, ...] = ()


class _Option(NamedTuple):
    """``letters`` behind "--" in a line; ``neutral`` is what asks for nothing."""

    letters: str
    kind: type
    low: float = 0
    high: float = 0
    neutral: object = None


_OPTIONS: dict[str, _Option] = {
    "width": _Option("w", int, 16, 8192),
    "height": _Option("h", int, 16, 8192),
    "seed": _Option("d", int, 0, 2**64 - 1),
    "sample_steps": _Option("s", int, 1, 1000),
    "guidance_scale": _Option("g", float, 0, 1000),
    "discrete_flow_shift": _Option("fs", float, 0, 1000),  # 0 is the family's own
    "control_image_path": _Option("ci", Path),
}
# For videos, image-to-video and guidance by a negative prompt, which no family here has.
_UNUSED: dict[str, _Option] = {
    "frame_count": _Option("f", int, 1, 10_000, neutral=1),
    "cfg_scale": _Option("l", float, 0, 1000, neutral=1),
    "negative_prompt": _Option("n", str, neutral=""),
    "image_path": _Option("i", Path),
    "end_image_path": _Option("ei", Path),
    "control_video_path": _Option("cn", Path),
    "one_frame": _Option("of", str),
}
_ALL = _OPTIONS | _UNUSED
_KEY_OF = {option.letters: key for key, option in _ALL.items()}


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a .txt, .toml or .json file.

    A TOML file has a table ``prompt`` and in it a list ``subset`` of tables, each of which is a
    prompt that takes from ``prompt`` what it does not say; JSON is a list of such objects or
    lines.

    Raises:
        DataError: the file cannot be read.
        ConfigError: it holds no prompt, or something that is none.
    """
    if path.suffix.lower() not in (".txt", ".toml", ".json"):
        raise ConfigError(f"{path}: prompts are read from .txt, .toml and .json files; rename it")
    text = _read(path)
    if path.suffix.lower() == ".txt":
        found = parse_lines(text.splitlines(), str(path))
    else:
        found = [
            _of_entry(entry, f"{path}, prompt {number}")
            for number, entry in enumerate(_entries(text, path), start=1)
        ]
    if not found:
        raise ConfigError(f"{path}: there is no prompt in the file; write one a line")
    return found


def read_lines(path: Path) -> list[str]:
    """The prompts of a text file as they are; empty lines and those with # are left out.

    Raises:
        DataError: the file cannot be read.
    """
    return [line for _, line in _numbered(_read(path).splitlines())]


def parse_lines(lines: Iterable[str], where: str) -> list[Prompt]:
    """The prompts in the lines of ``where``; empty ones and those that begin with # are none.

    Raises:
        ConfigError: a line is no prompt.
    """
    return [parse_line(line, f"{where}, line {number}") for number, line in _numbered(lines)]


def parse_line(line: str, where: str) -> Prompt:
    """The prompt in one line: its text, then any options.

    Raises:
        ConfigError: there is no text, an option is unknown, comes twice or has no such value.
    """
    text, *options = _OPTION.split(line)
    values: dict[str, Any] = {}
    for option in options:
        letters, *words = option.split(maxsplit=1)
        key = _KEY_OF.get(letters.lower())
        if key is None:
            known = ", ".join(f"--{known}" for known in _KEY_OF)
            raise ConfigError(
                f"{where}: unknown option --{letters}; known are {known} (two dashes in the text "
                "need a space behind them)"
            )
        if key != "control_image_path" and key in values:
            raise ConfigError(f"{where}: --{letters} comes twice; keep one of them")
        value = _from_word(words[0].strip() if words else "", _ALL[key].kind)
        values[key] = [*values.get(key, []), value] if key == "control_image_path" else value
    return _prompt(text, values, where, {key: f"--{_ALL[key].letters}" for key in values})


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: the prompts cannot be read: this is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: the prompts cannot be read: {error.strerror}") from None


def _numbered(lines: Iterable[str]) -> list[tuple[int, str]]:
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return [(number, line) for number, line in stripped if line and line[0] != "#"]


def _entries(text: str, path: Path) -> Sequence[object]:
    is_toml = path.suffix.lower() == ".toml"
    try:
        document = tomllib.loads(text) if is_toml else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if is_toml else "JSON"
        raise ConfigError(f"{path}: this is not valid {kind}: {error}") from None
    if not is_toml:
        if not isinstance(document, list):
            raise ConfigError(f"{path}: expected a list of prompts, [{{...}}, {{...}}]")
        return document
    common = document.get("prompt")
    if not isinstance(common, dict) or len(document) > 1:
        raise ConfigError(f"{path}: expected one table [prompt] with tables [[prompt.subset]]")
    subsets = common.pop("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise ConfigError(f"{path}: subset must be tables, each under [[prompt.subset]]")
    return [common | subset for subset in subsets]


def _of_entry(entry: object, where: str) -> Prompt:
    if isinstance(entry, str):
        return parse_line(entry, where)
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: expected an object or a line of text (not {_shown(entry)})")
    values = dict(entry)
    text = values.pop("prompt", "")
    if not isinstance(text, str):
        raise ConfigError(f"{where}: prompt = {_shown(text)}: expected a text")
    for key, value in values.items():
        if key not in _ALL:
            near = get_close_matches(key, list(_ALL), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are prompt, {', '.join(_ALL)}"
            raise ConfigError(f"{where}: unknown key {_shown(key)}; {hint}")
        if key == "control_image_path" and not isinstance(value, list):
            values[key] = [value]
    return _prompt(text, values, where, {key: key for key in values})


def _prompt(text: str, values: dict[str, Any], where: str, names: Mapping[str, str]) -> Prompt:
    """A prompt of values under the keys of `_ALL`, which ``names`` says how they were called."""
    if not text.strip() or _FORBIDDEN.search(text):
        raise ConfigError(f"{where}: expected a text without control characters, then any options")
    checked: dict[str, Any] = {}
    for key, value in values.items():
        many = value if key == "control_image_path" else [value]
        try:
            checked[key] = [_checked(each, _ALL[key]) for each in many]
        except ValueError as error:
            shown = _shown(value if len(many) != 1 else many[0])
            raise ConfigError(f"{where}: {names[key]} {shown}: expected {error}") from None
    single = {key: each[0] for key, each in checked.items() if key != "control_image_path"}
    unused = [key for key in _UNUSED if key in single and single[key] != _UNUSED[key].neutral]
    return Prompt(
        text.strip(),
        where,
        width=single.get("width"),
        height=single.get("height"),
        seed=single.get("seed"),
        steps=single.get("sample_steps"),
        guidance=single.get("guidance_scale"),
        flow_shift=single.get("discrete_flow_shift") or None,
        control_images=tuple(checked.get("control_image_path", ())),
        unused=tuple(names[key] for key in unused),
    )


def _from_word(word: str, kind: type) -> object:
    """A word as the number that is wanted; what is none is left for the check."""
    try:
        return kind(word) if kind in (int, float) else word
    except ValueError:
        return word


def _checked(value: object, option: _Option) -> object:
    """``value``; the text of the ``ValueError`` completes "expected"."""
    if option.kind in (int, float):
        kinds = int if option.kind is int else (int, float)
        if (
            not isinstance(value, kinds)
            or isinstance(value, bool)
            or not option.low <= value <= option.high
        ):
            what = "a whole number" if option.kind is int else "a number"
            raise ValueError(f"{what} from {option.low} to {option.high}")
        return value
    if not isinstance(value, str) or _FORBIDDEN.search(value):
        raise ValueError("a text without control characters")
    if option.kind is Path and not value:
        raise ValueError("the path of a file")
    # pathlib's own expansion fails for "~name" unless there is such a user.
    return Path(os.path.expanduser(value)) if option.kind is Path else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
