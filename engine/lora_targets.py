"""Which layers of a model get an adapter, of what rank, and how large that is.

Users choose by regular expressions that match the whole published name of a layer:

- Without patterns, the family's default is trained: the layers of the repeated blocks, but for
  those that the family leaves out.
- *exclude* leaves out more of them.
- *include* alone trains only the layers that it matches, wherever they are in the model.
- Together, what include matches is trained whatever leaves it out, and nothing else of what
  exclude matches.

Convolutions larger than 1x1 take part only where they have a rank of their own.

Shapes: a weight is [O, I, *K], O out features, I in features, K kernel of a convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .errors import ConfigError
from .layer_names import LayerNames
from .layer_patterns import matches, quoted

Shape = tuple[int, ...]
# Shape of a weight, rank -> number of values in its adapter.
Count = Callable[[Shape, int], int]

_MOST_SPANS = 6  # of blocks, named one by one in a table
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Target:
    """A layer that gets an adapter; ``shape`` is that of its weight."""

    name: str
    shape: Shape
    rank: int
    alpha: float
    num_parameters: int


def select(
    layers: Mapping[str, Shape],
    names: LayerNames,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    convolutions: bool = False,
) -> list[str]:
    """The published names of the layers that get an adapter, in the order of ``layers``.

    Args:
        layers: every layer of the model that may have one, with the shape of its weight.
        exclude: patterns; see the top of this file.
        include: patterns.
        convolutions: whether convolutions larger than 1x1 take part.

    Raises:
        ConfigError: a pattern is no regular expression or matches nothing, or nothing is left.
    """
    excluded = matches(exclude, layers, names, setting="exclude_patterns", precautions=True)
    included = matches(include, layers, names, setting="include_patterns")
    if not convolutions:
        _refuse_convolutions(included, layers)
    chosen = {name for found in included.values() for name in found}
    if exclude or not include:
        left_out = {name for found in excluded.values() for name in found}
        chosen |= _default(layers, names, replaced=bool(exclude)) - left_out
    if not convolutions:
        chosen = {name for name in chosen if not is_wide(layers[name])}
    if not chosen:
        raise ConfigError(
            f"exclude_patterns: {quoted(exclude)} leave no layer to train; exclude "
            "less, or name the layers to train with include_patterns"
            if exclude
            else f"the model has no layer that {names.family} trains by default; name some with "
            "include_patterns"
        )
    return [name for name in layers if name in chosen]


def targets(
    layers: Mapping[str, Shape],
    selected: Sequence[str],
    names: LayerNames,
    *,
    dim: tuple[int, float],
    conv_dim: tuple[int, float] | None = None,
    rank_patterns: Sequence[tuple[str, int, float | None]] = (),
    count: Count,
) -> list[Target]:
    """The selected layers with the rank and alpha of each.

    Args:
        layers: every layer of the model, with the shape of its weight.
        selected: as `select` gives them.
        dim: rank and alpha; an alpha of 0 means the rank, here and below.
        conv_dim: those of convolutions larger than 1x1.
        rank_patterns: (pattern, rank, alpha) of some layers; the first whose pattern matches the
            whole name counts. An alpha of None keeps the scale alpha / rank that the layer would
            have had.
        count: number of values in an adapter of that kind.

    Raises:
        ConfigError: a pattern is no regular expression or matches none of the selected layers.
    """
    among = {name: layers[name] for name in selected}
    patterns = [pattern for pattern, _, _ in rank_patterns]
    matched = matches(
        patterns, among, names, setting="rank_patterns", kind="layers that are trained"
    )
    found: list[Target] = []
    for name, shape in among.items():
        rank, alpha = conv_dim if conv_dim and is_wide(shape) else dim
        alpha = alpha or rank
        for pattern, own_rank, own_alpha in rank_patterns:
            if name in matched[pattern]:
                same_scale = alpha * own_rank / rank
                rank, alpha = own_rank, same_scale if own_alpha is None else own_alpha or own_rank
                break
        found.append(Target(name, shape, rank, float(alpha), count(shape, rank)))
    return found


def is_wide(shape: Shape) -> bool:
    """Whether a weight of this shape is that of a convolution larger than 1x1."""
    return math.prod(shape[2:]) > 1


def lora_parameters(shape: Shape, rank: int) -> int:
    """Values in a LoRA: ``R (I K + O)``."""
    return rank * (math.prod(shape[1:]) + shape[0])


def loha_parameters(shape: Shape, rank: int) -> int:
    """Values in a LoHa, which is the elementwise product of two."""
    return 2 * lora_parameters(shape, rank)


def describe(targets: Sequence[Target], *, verbose: bool = False) -> str:
    """A table for people of what is trained, with totals.

    The same layer of several blocks is one line, unless ``verbose``.
    """
    groups: dict[tuple[str, Shape, int, float], list[Target]] = {}
    for target in targets:
        kind = target.name if verbose else _BLOCK.sub(".{}.", target.name, count=1)
        key = (kind, target.shape, target.rank, target.alpha)
        groups.setdefault(key, []).append(target)
    lines = [("layer", "", "weight", "rank", "alpha", "parameters")]
    for (kind, shape, rank, alpha), group in groups.items():
        number = f"x{len(group)}" if len(group) > 1 else ""
        size = " x ".join(map(str, shape))
        total = sum(target.num_parameters for target in group)
        lines.append((_folded(kind, group), number, size, str(rank), f"{alpha:g}", f"{total:,}"))
    return "\n".join([*_aligned(lines), "", _totals(targets)])


# Selection


def _default(layers: Mapping[str, Shape], names: LayerNames, *, replaced: bool) -> set[str]:
    """What is trained without include patterns; ``replaced`` if the user has exclude patterns."""
    excludes = list(names.always_excludes)
    if not (replaced and names.own_excludes_replace):
        excludes += names.default_excludes
    patterns = [re.compile(pattern) for pattern in excludes]
    return {
        name
        for name in layers
        if name.startswith(names.blocks) and not any(p.fullmatch(name) for p in patterns)
    }


def _refuse_convolutions(
    included: Mapping[str, Sequence[str]], layers: Mapping[str, Shape]
) -> None:
    """A pattern that matches others too, such as ``.*``, just does not mean them."""
    for pattern, found in included.items():
        if all(is_wide(layers[name]) for name in found):
            kernel = "x".join(map(str, layers[found[0]][2:]))
            raise ConfigError(
                f"include_patterns: '{pattern}' matches {found[0]}, a convolution of {kernel}; "
                "set conv_dim (and conv_alpha) to train it"
            )


# Description


def _folded(kind: str, group: Sequence[Target]) -> str:
    """``blocks.{}.q`` with the blocks that it stands for, such as ``blocks.0-18.q``."""
    if "{}" not in kind:
        return kind
    blocks = [int(found[1]) for target in group if (found := _BLOCK.search(target.name))]
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    if len(spans) > _MOST_SPANS:
        spans = [*spans[: _MOST_SPANS - 2], "...", spans[-1]]
    return kind.format(",".join(spans))


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _totals(targets: Sequence[Target]) -> str:
    num_wide = sum(is_wide(target.shape) for target in targets)
    wide = f" ({num_wide} of them convolutions larger than 1x1)" if num_wide else ""
    total = sum(target.num_parameters for target in targets)
    plural = "layer" if len(targets) == 1 else "layers"
    return (
        f"{len(targets)} {plural}{wide}, {total:,} parameters: "
        f"{total * 2 / 2**20:,.1f} MiB in bf16, {total * 4 / 2**20:,.1f} MiB in fp32"
    )
