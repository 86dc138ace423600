"""Learning-rate schedules that are classes of PyTorch or of a package the user allows.

Such an object has a state, and some have no formula for a step. It is stepped once through the
whole run on an optimizer that trains nothing; what it gave is then a function of the step like
any other schedule, known before the training and the same after a resume.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from . import plugins
from .errors import ConfigError

_SETTING = "lr_scheduler_type"
_PYTORCH = "torch.optim.lr_scheduler"
# A step takes 2 to 4 microseconds (one CPU thread), so this many take half a minute.
_MOST_STEPS = 10**7
_REFUSED = {
    "LRScheduler": "it is what all others are made from, not a schedule",
    "LambdaLR": "it needs a function, which a setting cannot be",
    "MultiplicativeLR": "it needs a function, which a setting cannot be",
    "SequentialLR": "it needs other schedulers, which a setting cannot be",
    "ChainedScheduler": "it needs other schedulers, which a setting cannot be",
    "ReduceLROnPlateau": "it needs a loss that is measured during the run, so the learning rate "
    "of a step could not be known before",
}
# What a class may raise when its arguments, or their combination, are wrong.
_WRONG_ARGUMENTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def find_class(name: str, *, allowed: Collection[str]) -> type[LRScheduler]:
    """A class of ``torch.optim.lr_scheduler`` by its bare name, or ``package.Class``.

    Raises:
        ConfigError: there is none, its package is not allowed, or it cannot be used here.
    """
    dotted = name if "." in name else f"{_PYTORCH}.{name}"
    found = plugins.load_class(
        dotted, base=LRScheduler, setting=_SETTING, allowed=(*allowed, _PYTORCH)
    )
    if found.__module__ == _PYTORCH and found.__name__ in _REFUSED:
        raise ConfigError(
            f"{_SETTING} = {name!r}: {_REFUSED[found.__name__]}; choose another class, or "
            "lr_scheduler"
        )
    return found


def class_multipliers(
    found: type[LRScheduler],
    arguments: Mapping[str, Any],
    *,
    learning_rate: float,
    num_steps: int,
) -> array[float]:
    """What ``learning_rate`` is multiplied with at each of ``num_steps`` optimizer steps.

    Raises:
        ConfigError: the class does not take the arguments, or gives no usable rate at some step.
    """
    _check_arguments(found, arguments)
    if num_steps > _MOST_STEPS:
        raise ConfigError(
            f"{_SETTING}: a class is asked for every step before the training, and for no more "
            f"than {_MOST_STEPS:,}; the run has {num_steps:,}, use lr_scheduler"
        )
    optimizer = SGD([torch.nn.Parameter(torch.zeros(()))], lr=learning_rate)
    group = optimizer.param_groups[0]
    rates = array("d")
    try:
        scheduler = found(optimizer, **arguments)
        optimizer.step()  # does nothing, but a scheduler warns without it
        while len(rates) < num_steps:
            rates.append(_checked(float(group["lr"])))
            if len(rates) < num_steps:
                scheduler.step()
    except _WRONG_ARGUMENTS as error:
        raise ConfigError(
            f"lr_scheduler_args: {found.__name__} fails at step {len(rates) + 1} of {num_steps}: "
            f"{error}; change its arguments"
        ) from None
    return array("d", (rate / learning_rate for rate in rates))


def cycles_momentum(found: type[LRScheduler], arguments: Mapping[str, Any]) -> bool:
    """Whether the class would also change the optimizer's momentum, which is not done here."""
    parameter = inspect.signature(found).parameters.get("cycle_momentum")
    return parameter is not None and bool(arguments.get("cycle_momentum", parameter.default))


def _checked(rate: float) -> float:
    if not 0 <= rate < torch.inf:
        raise ValueError(f"the learning rate would be {rate:g}")
    return rate


def _check_arguments(found: type[LRScheduler], arguments: Mapping[str, Any]) -> None:
    """Whether the class takes these and needs no others."""
    # The first is the optimizer; last_epoch is for a state, which there is none of.
    _, *parameters = inspect.signature(found).parameters.values()
    known = {
        each.name: each
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        and each.name != "last_epoch"
    }
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters)
    unknown = [key for key in arguments if key not in known and not takes_any]
    missing = [
        name for name, each in known.items() if each.default is each.empty and name not in arguments
    ]
    if unknown:
        raise ConfigError(
            f"lr_scheduler_args: {found.__name__} has no argument {', '.join(unknown)}; it takes "
            f"{', '.join(known)}"
        )
    if missing:
        raise ConfigError(
            f"lr_scheduler_args: {found.__name__} needs {', '.join(missing)}; it takes "
            f"{', '.join(known)}"
        )
