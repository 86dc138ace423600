"""Which layers of a family are kept in 8 bits: the linear ones of the blocks, but for some.

Those are nearly all of a model. Left out are the layers outside of the blocks, norms, and the
layers that make scales and shifts from time and text, which are few and delicate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .errors import ConfigError
from .layer_names import LayerNames
from .layer_patterns import matches, quoted

_SETTING = "quantize_exclude_patterns"


def layers_to_quantize(
    shapes: Mapping[str, tuple[int, ...]], names: LayerNames, *, exclude: Sequence[str] = ()
) -> list[str]:
    """Published names of the layers, in the order of ``shapes``.

    Args:
        shapes: published name -> shape of the weight.
        exclude: patterns of whole names of layers that are to stay as they are.

    Raises:
        ConfigError: a pattern matches none of the layers, or they leave none.
    """
    usual = [name for name in linears_of_blocks(shapes, names) if not _is_never(name, names)]
    excluded = matches(
        exclude, usual, names, setting=_SETTING, kind="layers that are kept in 8 bits"
    )
    left_out = {name for found in excluded.values() for name in found}
    chosen = [name for name in usual if name not in left_out]
    if exclude and not chosen:
        raise ConfigError(
            f"{_SETTING}: {quoted(exclude)} leave none of the {len(usual)} layers; remove one, or "
            "turn fp8_scaled off"
        )
    return chosen


def linears_of_blocks(shapes: Mapping[str, tuple[int, ...]], names: LayerNames) -> list[str]:
    """Every linear layer of the blocks, those that are never quantized by us included."""
    return [
        name for name, shape in shapes.items() if name.startswith(names.blocks) and len(shape) == 2
    ]


def _is_never(name: str, names: LayerNames) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in names.never_quantized)
