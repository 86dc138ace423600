"""What a setting may be: its types, its choices, and both in words."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

_LIMITS = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}


def base_types(annotation: Any) -> set[Any]:
    """The plain types and ``Literal`` members an annotation is made of."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return base_types(get_args(annotation)[0])
    if origin is Literal:
        return {annotation}
    if origin in (Union, types.UnionType, list, tuple):
        found = {origin} if origin in (list, tuple) else set()
        return found.union(*(base_types(part) for part in get_args(annotation)))
    return {annotation}


def expected(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    kinds = base_types(field.annotation)
    if choices := choices_of(field):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if tuple in kinds:
        return "[width, height] or one whole number, each from 16 to 8192"
    single = " or ".join(
        word for kind, word in {**names, Path: "a path"}.items() if kind in kinds
    ).replace("a whole number or a number", "a whole number or a share")
    words = [single]
    for item in field.metadata:
        for name, word in _LIMITS.items():
            if (limit := getattr(item, name, None)) is not None:
                words.append(f"{word} {limit:,.10g}")
    return f"a list, each {' '.join(words)}" if list in kinds else " ".join(words)


def choices_of(field: FieldInfo) -> list[str]:
    """The texts that a setting may be, if it is chosen from some."""
    kinds = base_types(field.annotation)
    return sorted(name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind))
