"""What the settings of MagCache mean: a curve and a plan."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError
from .magcache import Plan, Rule, computed_for, even_plan, greedy_plan, optimal_plan
from .magcache_curves import CONDITIONAL, Curve, default_curve, parse_ratios
from .magcache_store import Identity, find_curve

AUTO, DEFAULT = "auto", "0"
_NEAR = 1.5  # numbers of steps that differ by less than this have nearly the same curve


def choose_curve(
    text: str,
    identity: Identity,
    *,
    folder: Path | None = None,
    file_name: str = "",
    num_blocks: int | None = None,
) -> Curve:
    """The curve that ``magcache_mag_ratios`` asks for.

    Args:
        text: "auto" for the best one there is, "0" for the published one of the family, or ratios
            with commas between.
        identity: of the run that is to be made.
        folder: of measured curves.
        file_name, num_blocks: of the model, to find its published curve.

    Raises:
        ConfigError: the text is none of these, or there is no such curve.
        DataError: a file in the folder is damaged.
    """
    text = text.strip()
    if text == DEFAULT:
        return default_curve(identity.family, file_name=file_name, steps=identity.steps)
    if text.lower() != AUTO:
        ratios = parse_ratios(text)
        return Curve(f"{len(ratios)} ratios of the settings", {CONDITIONAL: ratios})
    curve = find_curve(folder, identity, file_name=file_name, num_blocks=num_blocks)
    if curve is None:
        raise ConfigError(
            f"magcache_mag_ratios = auto: there is no curve for {file_name or identity.family}, "
            "neither measured nor published; calibrate first with magcache_calibration"
        )
    return curve


def choose_plan(
    curve: Curve | None,
    steps: int,
    rule: Rule,
    *,
    num_computed: int | None = None,
    speedup: float | None = None,
    other_cost: float = 0.0,
) -> Plan:
    """The plan that the settings ask for.

    By the published rule; or, if a number of computed steps or a speed-up is wanted, the best
    placement of so many. Without a curve these are spread evenly.

    Args:
        other_cost: as for `Plan.speedup`.

    Raises:
        ConfigError: both or, without a curve, neither of them is given, or it is out of reach.
    """
    if num_computed is not None and speedup is not None:
        raise ConfigError(
            f"magcache_steps = {num_computed} and a speed-up of {speedup:g} are given, which both "
            "say how many steps are computed; leave one of them out"
        )
    if speedup is not None:
        num_computed = computed_for(steps, speedup, other_cost=other_cost)
    retention = rule.retention_ratio
    if curve is None:
        if num_computed is None:
            raise ConfigError(
                "MagCache needs ratios or a number of steps; give magcache_mag_ratios or "
                "magcache_steps"
            )
        return even_plan(steps, num_computed, retention_ratio=retention)
    ratios = curve.of(CONDITIONAL)
    if num_computed is None:
        return greedy_plan(ratios, steps, rule)
    return optimal_plan(ratios, steps, num_computed, retention_ratio=retention, k=rule.k)


def curve_remark(curve: Curve, steps: int) -> str:
    """A sentence on where the curve is from, and whether it fits the number of steps."""
    text = f"MagCache uses the curve {curve.origin}"
    if max(curve.steps, steps) >= _NEAR * min(curve.steps, steps):
        text += f", which may not fit {steps} steps well; calibrate with as many to be sure"
    return text
