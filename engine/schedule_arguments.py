"""``lr_scheduler_args``: what each schedule takes, under the names of transformers and diffusers.

They win over the settings that mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import ConfigError
from .schedules import FALLS, RISES, ScheduleSettings

# A text may hold numbers that no float can, and counts that no run has.
_TOO_LARGE, _TOO_MANY = 1e300, 2**53


class Argument(NamedTuple):
    """Where a value goes in `ScheduleSettings`, and how it is read.

    ``read`` gets the value and the learning rate; its ``ValueError`` completes "expected ...".
    """

    field: str
    read: Callable[[Any, float], Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < _TOO_LARGE


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and type(value) is not bool and value < _TOO_MANY


def _above_zero(value: Any, learning_rate: float) -> float:
    if not _is_number(value) or value <= 0:
        raise ValueError("a number above 0")
    return float(value)


def _not_negative(value: Any, learning_rate: float) -> float:
    if not _is_number(value) or value < 0:
        raise ValueError("a number from 0 up")
    return float(value)


def _part(value: Any, learning_rate: float) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError("a part of the learning rate, from 0 to 1")
    return float(value)


def _rate(value: Any, learning_rate: float) -> float:
    """A learning rate, as a part of the highest one."""
    if not _is_number(value) or not 0 <= value <= learning_rate:
        raise ValueError(f"a learning rate from 0 to that of the run, {learning_rate:g}")
    return value / learning_rate


def _steps(value: Any, learning_rate: float) -> int:
    if not _is_whole(value) or value < 0:
        raise ValueError("whole steps from 0 up")
    return value


def _timescale(value: Any, learning_rate: float) -> int:
    if not _is_whole(value) or value < 1:
        raise ValueError("whole steps from 1 up")
    return value


def _one_of(names: Mapping[str, object]) -> Callable[[Any, float], str]:
    def read(value: Any, learning_rate: float) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"one of {', '.join(map(repr, names))}")
        return value

    return read


def _rules(value: Any, learning_rate: float) -> tuple[tuple[float, float], ...]:
    """ "1:10,0.1" is 1 before step 10, then 0.1: ((10, 1.0), (inf, 0.1))."""
    expected = ValueError(
        "text such as '1:10,0.1:20,0.01': a multiplier up to each step, then the last one"
    )
    if not isinstance(value, str):
        raise expected
    *before, last = value.split(",")
    try:
        pairs = [entry.split(":") for entry in before]
        ends: dict[float, float] = {int(end): float(multiplier) for multiplier, end in pairs}
        rules = (*sorted(ends.items()), (math.inf, float(last)))
    except ValueError:
        raise expected from None
    if len(ends) < len(before) or min(ends, default=1) < 1:
        raise expected
    if not all(0 <= multiplier < math.inf for _, multiplier in rules):
        raise ValueError("multipliers from 0 up")
    return rules


_WAVES = Argument("waves", _above_zero)
# Where None is transformers' own default, it means what it means there: not given.
_MAY_BE_NONE = {"min_lr", "min_lr_rate", "num_stable_steps", "timescale"}
ARGUMENTS: dict[str, dict[str, Argument]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {"num_cycles": _WAVES},
    "cosine_with_restarts": {"num_cycles": Argument("num_cycles", _above_zero)},
    "cosine_with_min_lr": {
        "num_cycles": _WAVES,
        "min_lr": Argument("min_ratio", _rate),
        "min_lr_rate": Argument("min_ratio", _part),
    },
    "polynomial": {
        "power": Argument("power", _above_zero),
        "lr_end": Argument("min_ratio", _rate),
    },
    "inverse_sqrt": {"timescale": Argument("timescale", _timescale)},
    "warmup_stable_decay": {
        "num_decay_steps": Argument("decay_steps", _steps),
        "num_stable_steps": Argument("stable_steps", _steps),
        "min_lr_ratio": Argument("min_ratio", _part),
        "warmup_type": Argument("rises", _one_of(RISES)),
        "decay_type": Argument("falls", _one_of(FALLS)),
        "num_cycles": _WAVES,
    },
    "piecewise_constant": {"step_rules": Argument("rules", _rules)},
    "rex": {
        "rex_alpha": Argument("rex_alpha", _above_zero),
        "rex_beta": Argument("rex_beta", _not_negative),
    },
}


def with_arguments(
    settings: ScheduleSettings, name: str, arguments: Mapping[str, Any], *, learning_rate: float
) -> ScheduleSettings:
    """``settings`` with the arguments that the schedule ``name`` is given.

    Raises:
        ConfigError: it does not take one of them, or not with that value, or needs another.
    """
    known = ARGUMENTS[name]
    changes: dict[str, Any] = {}
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(f"lr_scheduler_args: {unknown_argument(key, name, known)}")
        if value is None and key in _MAY_BE_NONE:
            continue
        field, read = known[key]
        if field in changes:
            same = [other for other in arguments if other in known and known[other].field == field]
            raise ConfigError(f"lr_scheduler_args: {' and '.join(same)} mean the same; give one")
        try:
            changes[field] = read(value, learning_rate)
        except ValueError as error:
            raise ConfigError(f"lr_scheduler_args: {key}={value!r}: expected {error}") from None
    if name == "piecewise_constant" and "rules" not in changes:
        raise ConfigError(
            "lr_scheduler_args: piecewise_constant needs its rules, such as "
            "\"step_rules='1:10,0.1:20,0.01'\": a multiplier up to each step, then the last one"
        )
    return settings._replace(**changes)


def unknown_argument(key: str, name: str, known: Mapping[str, object]) -> str:
    """A sentence about an argument that the schedule ``name`` does not have."""
    if not known:
        return f"{name} takes no arguments; remove {key}"
    return f"{name} has no argument {key}; it takes {', '.join(known)}"
