"""Patterns of users for layers: regular expressions that match a whole published name.

A pattern that matches nothing is a mistake, and the message says what may have been meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from .errors import ConfigError
from .layer_names import LayerNames, other_names

_MOST_CHARACTERS = 1000  # of a pattern
_BLOCK = re.compile(r"\.\d+\.")


def matches(
    patterns: Sequence[str],
    layers: Collection[str],
    names: LayerNames,
    *,
    setting: str,
    kind: str = "layers",
    precautions: bool = False,
) -> dict[str, list[str]]:
    """Pattern -> those of ``layers`` that it matches, in their order.

    Args:
        patterns: regular expressions.
        layers: published names.
        names: of the family, for its other names.
        setting: where the patterns come from, for messages.
        kind: what ``layers`` are, for messages.
        precautions: whether a pattern may be for norms and the like, or for layers that other
            models of the family have. All others match one layer at least.

    Raises:
        ConfigError: a pattern is no regular expression or matches nothing.
    """
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        compiled = _compiled(pattern, setting)
        found[pattern] = [name for name in layers if compiled.fullmatch(name)]
        if not found[pattern] and not (precautions and _is_in_table(compiled, names)):
            raise ConfigError(
                f"{setting}: '{pattern}' matches none of the {len(layers)} {kind}"
                f"{_hint(pattern, compiled, layers, names)}"
            )
    return found


def quoted(patterns: Sequence[str]) -> str:
    """For messages; ``repr`` would double the backslashes."""
    return ", ".join(f"'{pattern}'" for pattern in patterns)


def _compiled(pattern: str, setting: str) -> re.Pattern[str]:
    if len(pattern) > _MOST_CHARACTERS:
        raise ConfigError(
            f"{setting}: '{pattern[:40]}...' has {len(pattern)} characters; write patterns of at "
            f"most {_MOST_CHARACTERS}"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{setting}: '{pattern}' is no regular expression ({error}); .* stands for any "
            r"characters and \. for a dot"
        ) from None


def _is_in_table(pattern: re.Pattern[str], names: LayerNames) -> bool:
    return any(pattern.fullmatch(row.published.replace("{}", "0")) for row in names.table)


def _hint(
    pattern: str, compiled: re.Pattern[str], layers: Collection[str], names: LayerNames
) -> str:
    """What may have been meant."""
    for name in layers:
        if compiled.search(name):
            whole = f".*({pattern}).*" if "|" in pattern else f".*{pattern}.*"
            return f", only a part of {name}; a pattern must match the whole name: '{whole}'"
    for name in layers:
        for other in other_names(names, name):
            if compiled.fullmatch(other):
                return f"; {other} is called {name} here"
    # One of each kind, or the same layer of three blocks would be the nearest.
    kinds: dict[str, str] = {}
    for name in layers:
        kinds.setdefault(_BLOCK.sub(".{}.", name, count=1), name)
    plain = re.sub(r"\\(.)", r"\1", pattern.replace(".*", "").replace(r"\d+", "0"))
    examples = list(kinds.values())
    near = get_close_matches(plain, examples, n=3, cutoff=0.4) or examples[:3]
    return f"; the layers are called {', '.join(near)}, for example"
