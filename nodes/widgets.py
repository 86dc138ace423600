"""Settings as widgets: defaults, ranges, choices and tooltips come from the config models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from comfy_api.latest import io
from pydantic.fields import FieldInfo

from ..engine.config import FIELDS, Config, NetworkArguments
from ..engine.config_file import Given, build_config
from ..engine.setting_words import base_types

Settings = Mapping[str, Any]

# What a widget can be for: settings, and the keys of network_args.
_FIELDS = FIELDS | NetworkArguments.model_fields
# The choice that stands for no value where a setting may have none.
UNSET = "unset"
# What one click changes a number by; it also decides how many digits are shown.
_STEPS = {"learning_rate": 1e-6}
_STEP = 0.01
_LARGEST = 2**53 - 1  # the largest whole number that a browser keeps exact
_LIMITS = {"min": ("ge", "gt"), "max": ("le", "lt")}


def widget(name: str, *, advanced: bool = False, **changes: Any) -> io.Input:
    """The widget of a setting, or of a key of network_args.

    Settings without a value become 0, an empty text or the choice "unset"; a list has one entry
    per line.

    Args:
        changes: what differs from the config model, such as ``default`` or ``tooltip``; with
            ``options`` a text is chosen from them.
    """
    field = _FIELDS[name]
    kinds = base_types(field.annotation)
    optional = type(None) in kinds
    options = {"tooltip": field.description, "advanced": advanced or None}
    if choices := changes.get("options") or _choices(kinds, optional=optional):
        default = UNSET if field.default is None else field.default
        return io.Combo.Input(name, **{**options, "options": choices, "default": default} | changes)
    if kinds & {int, float} and bool not in kinds:
        options |= _range(field, optional=optional)
        if optional:
            options["tooltip"] = f"{field.description} 0: unset."
        if float in kinds:
            options |= {"step": _STEPS.get(name, _STEP), "round": False}
            return io.Float.Input(name, **options | changes)
        return io.Int.Input(name, **options | changes)
    if bool in kinds:
        return io.Boolean.Input(name, **{**options, "default": field.default} | changes)
    default = "\n".join(field.default) if list in kinds else field.default or ""
    options |= {"default": default, "multiline": list in kinds}
    return io.String.Input(name, **options | changes)


def settings(where: str, widgets: Mapping[str, Any]) -> dict[str, Any]:
    """The values of widgets by setting, checked; ``where`` names the node in messages.

    Raises:
        ConfigError: lists every value that cannot be.
    """
    values = {name: value_of(name, value) for name, value in widgets.items()}
    build_config({name: Given(where, value) for name, value in values.items()})
    return values


def combine(*parts: Settings | None, where: str) -> Config:
    """The config that all settings together make; later ones win, unless they are unset.

    Raises:
        ConfigError: lists every value that cannot be.
    """
    merged = {
        name: value for part in parts for name, value in (part or {}).items() if value is not None
    }
    return build_config({name: Given(where, value) for name, value in merged.items()})


def value_of(name: str, value: Any) -> Any:
    """What the widget of a setting means; checked by nobody yet."""
    field = _FIELDS[name]
    kinds = base_types(field.annotation)
    if list in kinds:
        return [line.strip() for line in value.splitlines() if line.strip()]
    if type(None) in kinds and (not value or value == UNSET and _choices(kinds, optional=True)):
        return None
    if {int, float} <= kinds and isinstance(value, float) and value >= 1 and value.is_integer():
        return int(value)
    if tuple in kinds:
        return (value, value)
    return value


def _choices(kinds: set[Any], *, optional: bool) -> list[str]:
    names = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    return [UNSET, *names] if names and optional else names


def _range(field: FieldInfo, *, optional: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"default": field.default or 0}
    for end, names in _LIMITS.items():
        for item in field.metadata:
            for name in names:
                if (limit := getattr(item, name, None)) is not None:
                    found[end] = limit
    if optional:
        found["min"] = 0
    return {"min": 0, "max": _LARGEST, **found}
