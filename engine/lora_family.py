"""Which model family a LoRA file is for: by what it says, and by how its layers are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from .errors import CheckpointError, ConfigError
from .layer_names import LayerNames, Place
from .lora_formats import place_of, plain_name


@dataclass(frozen=True)
class Located:
    """A family and where each module of the file (by the file's own name) is in it."""

    names: LayerNames
    places: dict[str, Place]
    remarks: tuple[str, ...] = ()


def find(
    path: Path,
    modules: Sequence[str],
    families: Iterable[LayerNames],
    *,
    metadata: Mapping[str, str],
    layers: Iterable[str] | None = None,
) -> Located:
    """The family of a file.

    Args:
        modules: as the file calls them.
        families: that come into question.
        layers: published names of the layers of the model at hand.

    Raises:
        CheckpointError: a module is in none of the families.
        ConfigError: several families fit.
    """
    located = [_located(names, modules) for names in families]
    if not located:
        raise ValueError("no family was given")
    claimed = [each for each in located if _claims(metadata, each.names)]
    whole = [each for each in located if len(each.places) == len(modules)]
    if not whole:
        likely = max(claimed or located, key=lambda each: len(each.places))
        raise CheckpointError(f"{path}: {_unknown(likely, modules)}")
    if len(located) == 1:
        return _with_remarks(whole[0], metadata)
    if sure := [each for each in whole if each in claimed]:
        whole = sure
    return _only(path, whole, None if layers is None else set(layers))


def claim(metadata: Mapping[str, str]) -> str | None:
    """What a file says it is for."""
    base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    return base.split("/")[0] if base else None


def _located(names: LayerNames, modules: Iterable[str]) -> Located:
    places = {module: place_of(names, module) for module in modules}
    return Located(names, {module: place for module, place in places.items() if place})


def _claims(metadata: Mapping[str, str], names: LayerNames) -> bool:
    said = (metadata.get("ss_base_model_version"), metadata.get("modelspec.architecture"))
    known = {base.lower() for base in names.base_models}
    return any(each is not None and each.split("/")[0].lower() in known for each in said)


def _only(path: Path, located: list[Located], layers: set[str] | None) -> Located:
    """The one family that is left when all that numbers of blocks tell is used."""
    found = located
    for rule in (
        lambda each: not _beyond(each),
        lambda each: layers is None or all(p.published in layers for p in each.places.values()),
        _reaches_last_blocks,
    ):
        if len(found) > 1 and (fewer := [each for each in found if rule(each)]):
            found = fewer
    if len(found) > 1:
        families = " or ".join(each.names.family for each in found)
        raise ConfigError(
            f"{path}: the layers are called as in {families}, and nothing in the file tells which; "
            "set the architecture"
        )
    return found[0]


def _last_blocks(located: Located) -> dict[str, int]:
    """The highest index in each list of blocks."""
    last: dict[str, int] = {}
    for place in located.places.values():
        if match := re.match(r"(\w+)\.(\d+)\.", place.published):
            last[match[1]] = max(last.get(match[1], -1), int(match[2]))
    return last


def _beyond(located: Located) -> str | None:
    """A block that the published model does not have."""
    last = _last_blocks(located)
    for blocks, depth in located.names.depth:
        if last.get(blocks, -1) >= depth:
            return f"{blocks}.{last[blocks]}"
    return None


def _reaches_last_blocks(located: Located) -> bool:
    last = _last_blocks(located)
    depths = dict(located.names.depth)
    return bool(depths) and all(
        index == depths[blocks] - 1 for blocks, index in last.items() if blocks in depths
    )


def _with_remarks(located: Located, metadata: Mapping[str, str]) -> Located:
    remarks: list[str] = []
    family, said = located.names.family, claim(metadata)
    if said and not _claims(metadata, located.names):
        remarks.append(f"the file says that it is for {said}, but was read as one for {family}")
    if block := _beyond(located):
        remarks.append(f"{block} is beyond the blocks of the published {family} model")
    return Located(located.names, located.places, tuple(remarks))


def _unknown(located: Located, modules: Iterable[str]) -> str:
    module = next(each for each in modules if each not in located.places)
    family = located.names.family
    if not located.places:
        return f"{module!r} is no layer of {family} or of any other model that is supported"
    near = nearest(located.names, module)
    hint = f"; the nearest is {near!r}" if near else ""
    return f"{module!r} is for a layer that {family} does not have{hint}"


def nearest(names: LayerNames, module: str) -> str | None:
    """The layer whose name is most like that of ``module``."""
    name = plain_name(module)
    numbers = re.findall(r"(?<![a-zA-Z])\d+", name)
    masked = re.sub(r"(?<![a-zA-Z])\d+", "{}", name).replace("_", ".")
    known = {
        each.replace("_", "."): each
        for row in names.table
        for each in (*row.inner, *row.aliases, row.published)
    }
    found = get_close_matches(masked, list(known), n=1)
    if not found:
        return None
    template = known[found[0]]
    return template.format(*numbers[: template.count("{}")], *["0"] * template.count("{}"))
