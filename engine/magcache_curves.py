"""Curves of ratios for MagCache: what they are, how they are written, and published ones.

``ratios/FAMILY.json`` beside this file are what the authors of MagCache published, with the
address of each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"

_PUBLISHED = Path(__file__).parent / "ratios"
_DECIMALS = 5  # as MagCache prints them


@dataclass(frozen=True)
class Curve:
    """Ratios by branch of the guidance, one for each step.

    ``origin`` says for people where it is from; ``handover`` is the step at which the second of
    two models took over.
    """

    origin: str
    ratios: Mapping[str, tuple[float, ...]]
    handover: int | None = None

    @property
    def steps(self) -> int:
        return len(self.of(CONDITIONAL))

    def of(self, branch: str) -> tuple[float, ...]:
        """The branch's ratios; those of the conditional one if it has none of its own."""
        return self.ratios.get(branch) or self.ratios[CONDITIONAL]


@dataclass(frozen=True)
class Calibration:
    """What one branch of the guidance did in a run that computed every step; a value per step.

    All compare the residuals of a step, one per token, with those of the step before it; the
    first step has ratio 1 and otherwise 0.

    Attributes:
        ratios: mean over the tokens of the residuals' ratio of lengths.
        deviations: standard deviation of that.
        distances: mean over the tokens of ``1 - cosine`` of the angle between them.
    """

    ratios: tuple[float, ...]
    deviations: tuple[float, ...]
    distances: tuple[float, ...]


def parse_ratios(text: str, where: str = "magcache_mag_ratios") -> tuple[float, ...]:
    """The numbers of a comma-separated list, one for each step.

    Raises:
        ConfigError: begins with ``where``; they are not numbers above 0, or fewer than two.
    """
    ratios: list[float] = []
    for number, word in enumerate(text.strip().strip(",").split(","), start=1):
        try:
            ratio = float(word)
        except ValueError:
            ratio = math.nan
        if not (math.isfinite(ratio) and ratio > 0):
            raise ConfigError(
                f"{where}: value {number} is {word.strip()!r}; a ratio is a number above 0. Give "
                "them with commas between, or 0 for the published ones"
            )
        ratios.append(ratio)
    if len(ratios) < 2:
        raise ConfigError(
            f"{where}: {text.strip()} is a single ratio; give one for each step of the "
            "calibration, or 0 for the published ones"
        )
    return tuple(ratios)


def format_ratios(ratios: Sequence[float]) -> str:
    """The text that `parse_ratios` reads."""
    return ",".join(f"{ratio:.{_DECIMALS}f}" for ratio in ratios)


def mean_of(curves: Sequence[Sequence[float]], weights: Sequence[float] = ()) -> tuple[float, ...]:
    """The mean of each step, of curves of several prompts or sections.

    Raises:
        ConfigError: they have different numbers of steps.
    """
    lengths = sorted({len(curve) for curve in curves})
    if len(lengths) != 1:
        raise ConfigError(
            f"curves of {' and '.join(map(str, lengths)) or 'no'} steps have no mean; calibrate "
            "with the same number of steps"
        )
    weights = weights or [1.0] * len(curves)
    total = sum(weights)
    return tuple(
        sum(weight * value for weight, value in zip(weights, values, strict=True)) / total
        for values in zip(*curves, strict=True)
    )


def mean_calibration(
    calibrations: Sequence[Calibration], weights: Sequence[float] = ()
) -> Calibration:
    """The mean of each number, of several prompts or sections.

    Raises:
        ConfigError: they have different numbers of steps.
    """
    parts = zip(*(vars(each).values() for each in calibrations), strict=True)
    return Calibration(*(mean_of(part, weights) for part in parts))


def families_with_published() -> list[str]:
    return sorted(path.stem for path in _PUBLISHED.glob("*.json"))


def published_variants(family: str) -> list[str]:
    """The models of a family for which there are published curves."""
    return list(dict.fromkeys(entry["variant"] for entry in _entries(family)))


def published_curve(
    family: str,
    *,
    file_name: str = "",
    num_blocks: int | None = None,
    steps: int | None = None,
    variant: str | None = None,
) -> Curve | None:
    """The published curve of the model that fits best; None if none fits.

    Args:
        file_name: of the model; its words tell apart what is built alike.
        num_blocks: curves of models with other numbers are left out.
        steps: which of several curves of a model to take: that of the nearest number.
        variant: one of `published_variants`, instead of file name and blocks.
    """
    entries = list(_entries(family))
    if variant is not None:
        entries = [entry for entry in entries if entry["variant"] == variant]
        words = ""
    else:
        entries = [entry for entry in entries if num_blocks in (None, entry["blocks"])]
        words = re.sub(r"[^a-z0-9]", "", file_name.lower())
    if not entries:
        return None

    def rank(entry: dict[str, Any]) -> tuple[int, float]:
        found = sum(word in words for word in entry["words"])
        length = len(entry["ratios"][CONDITIONAL])
        return -found, abs(math.log(length / (steps or length)))

    return _published(min(entries, key=rank))


def default_curve(family: str, *, file_name: str = "", steps: int | None = None) -> Curve:
    """What the ratios ``0`` mean: the published curve of the family.

    Raises:
        ConfigError: the family has none.
    """
    if family not in families_with_published():
        raise ConfigError(
            f"magcache_mag_ratios = 0: there are no published ratios for {family}; calibrate first "
            "with magcache_calibration"
        )
    variant = _table(family).get("default")
    curve = published_curve(family, file_name=file_name, steps=steps, variant=variant)
    assert curve
    return curve


def _table(family: str) -> dict[str, Any]:
    return json.loads((_PUBLISHED / f"{family}.json").read_text("utf-8"))


def _entries(family: str) -> Iterator[dict[str, Any]]:
    if family in families_with_published():
        yield from _table(family)["curves"]


def _published(entry: dict[str, Any]) -> Curve:
    ratios = {branch: tuple(values) for branch, values in entry["ratios"].items()}
    steps = len(ratios[CONDITIONAL])
    remark = f", {entry['remark']}" if "remark" in entry else ""
    origin = f"published for {entry['variant']} with {steps} steps{remark} ({entry['source']})"
    return Curve(origin, ratios, entry.get("handover"))
