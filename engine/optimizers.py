"""Optimizers by name: made, tried out before a model is loaded, and used.

Besides the listed ones, every optimizer class of an allowed package can be used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import optimizer_classes
from .errors import ConfigError
from .optimizer_classes import SETTING, Averaging, ParameterGroup
from .optimizer_trial import try_out


def check(
    name: str,
    arguments: Mapping[str, Any],
    allowed: Collection[str],
    *,
    device: torch.device | str = "cpu",
) -> None:
    """Make sure that an optimizer is there, works, takes the arguments, and can be continued.

    Args:
        arguments: for the class's constructor, all but the learning rate.
        allowed: packages that classes may come from, see `plugins`.
        device: where it is to work.

    Raises:
        ConfigError: it does not; says what does.
    """
    found = optimizer_classes.find(name, allowed)
    optimizer_classes.require_known(name, found, arguments)

    def failure(some: Mapping[str, Any]) -> BaseException | None:
        def make(parameters: Sequence[nn.Parameter]) -> Optimizer:
            groups = [ParameterGroup("trial", parameters)]
            return optimizer_classes.construct(
                name, found, groups, lr=1e-4, arguments=some, warmup_steps=0
            )

        try:
            try_out(make, evaluating, torch.device(device))
        # Code of others, given anything; Lion without triton ends the whole program.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            return error
        return None

    error = failure(arguments)
    if error is None:
        return
    if not arguments or failure({}):
        raise ConfigError(
            f"{SETTING} = {name!r}: it does not work on {device} ({_reason(error)}); use AdamW"
        ) from error
    alone = {key: value for key, value in arguments.items() if failure({key: value})}
    blamed = alone or arguments
    shown = ", ".join(f"{key}={value!r}" for key, value in blamed.items())
    usual = optimizer_classes.shown_defaults(found, blamed)
    raise ConfigError(
        f"optimizer_args: {name} does not work with {_short(shown)} ({_reason(error)}); "
        f"{f'its own values are {_short(usual)}' if usual else 'change or remove that'}"
    ) from error


def create(
    name: str,
    groups: Sequence[ParameterGroup],
    *,
    lr: float,
    arguments: Mapping[str, Any],
    allowed: Collection[str],
    warmup_steps: int = 0,
) -> Optimizer:
    """The optimizer that a setting names, ready for its first step.

    Args:
        lr: of groups whose ratio is 1. Prodigy multiplies its own estimate with it and wants 1.
        arguments: of the class, see `check`.
        warmup_steps: for optimizers that have a warm-up in place of a schedule, unless
            ``arguments`` has one. There the rate rises to ``lr`` in as many equal steps.

    Raises:
        ConfigError: there is no such optimizer, or it does not take the groups or arguments.
    """
    found = optimizer_classes.find(name, allowed)
    optimizer_classes.require_known(name, found, arguments)
    try:
        optimizer = optimizer_classes.construct(
            name, found, groups, lr=lr, arguments=arguments, warmup_steps=warmup_steps
        )
    except (Exception, SystemExit) as error:  # code of others, given anything
        raise ConfigError(
            f"{SETTING} = {name!r}: it cannot train this network ({_reason(error)}); use AdamW, "
            "or correct optimizer_args"
        ) from error
    one_rate = "d" in optimizer.param_groups[0] or optimizer.param_groups[0]["lr"] is None
    if one_rate and len({group.lr_ratio for group in groups}) > 1:
        raise ConfigError(
            f"{SETTING} = {name!r}: it finds one learning rate for all, but "
            f"{' and '.join(group.name for group in groups)} are to have different ones; use AdamW"
        )
    return optimizer


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group this learning rate, times the group's own ratio.

    An optimizer that computes its rate itself (Adafactor with relative steps) goes on doing so.
    """
    for group in optimizer.param_groups:
        if group["lr"] is not None:
            group["lr"] = lr * group["lr_ratio"]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate of each group by its name, of those that have one.

    Schedule-Free optimizers tell that of the last step, with their warm-up. Where the optimizer
    estimates the size ``d`` of its steps there is "NAME d*lr", too.
    """
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name, rate = group["name"], group["lr"]
        if rate is None:
            continue
        rates[name] = float(group.get("scheduled_lr", rate))
        if "d" in group:
            rates[f"{name} d*lr"] = float(group["d"]) * float(rate)
    return rates


def uses_schedule(optimizer: Optimizer) -> bool:
    """Whether the learning rate is to follow a schedule.

    It is not where the optimizer averages instead (Schedule-Free) or computes the rate itself
    (Adafactor with relative steps).
    """
    computes_it = all(group["lr"] is None for group in optimizer.param_groups)
    return not computes_it and not isinstance(optimizer, Averaging)


def averages(optimizer: Optimizer) -> bool:
    """Whether it keeps another point than the one that it trains (Schedule-Free)."""
    return isinstance(optimizer, Averaging)


def remarks(optimizer: Optimizer, *, lr_scheduler: str, warmup_steps: int) -> list[str]:
    """Sentences on what is set, but does not apply or makes little sense with this optimizer."""
    group, name = optimizer.param_groups[0], type(optimizer).__name__
    unused: list[str] = []
    if not uses_schedule(optimizer):
        unused += ["learning_rate"] if group["lr"] is None else []
        unused += [] if lr_scheduler.startswith("constant") else ["lr_scheduler"]
        unused += ["lr_warmup_steps"] if warmup_steps and "warmup_steps" not in group else []
    found = [f"{name} does not use {' and '.join(unused)}"] if unused else []
    rate = group["lr"]
    if "d" in group and rate is not None and rate < 0.1:
        found.append(
            f"{name} multiplies the learning rate that it finds with learning_rate, which is "
            f"{rate:g}; 1 is usual"
        )
    return found


@contextmanager
def evaluating(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters are the ones to use; afterwards bit for bit what they were.

    Schedule-Free trains at one point and means another, the average; most optimizers have only
    one. The parameters are copied, because the way to the average and back rounds.
    """
    if not isinstance(optimizer, Averaging):
        yield
        return
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it ends the program"
    return _short(" ".join(str(error).split()) or type(error).__name__)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."
