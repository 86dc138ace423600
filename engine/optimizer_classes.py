"""Classes of optimizers by name, and how they are constructed."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from . import plugins
from .errors import ConfigError

SETTING = "optimizer_type"


class ParameterGroup(NamedTuple):
    """Parameters with a learning rate of their own, ``lr_ratio`` times that of the run."""

    name: str
    parameters: Sequence[nn.Parameter]
    lr_ratio: float = 1.0


@runtime_checkable
class Averaging(Protocol):
    """An optimizer whose parameters are not, while it trains, the ones to use."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def _adamw(given: Mapping[str, Any]) -> dict[str, Any]:
    """One fused kernel per step unless another is asked for (2.7x the loop's speed on a CPU)."""
    others = "fused" in given or given.get("foreach") or given.get("differentiable")
    return {} if others else {"fused": True}


def _adafactor(given: Mapping[str, Any]) -> dict[str, Any]:
    """Follow ``learning_rate`` unless relative steps are asked for, as the paper has them.

    Shazeer and Stern 2018, arXiv:1804.04235.
    """
    if given.get("relative_step"):
        return {"lr": None}
    return {"relative_step": False, "scale_parameter": False}


# Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Dettmers et al. 2022, arXiv:2110.02861
# (8 bit); Defazio et al. 2024, arXiv:2405.15682 (Schedule-Free); Mishchenko and Defazio 2024,
# arXiv:2306.06101 (Prodigy); Chen et al. 2023, arXiv:2302.06675 (Lion); Liu et al. 2025,
# arXiv:2502.16982 (Muon; adjust_lr_fn='match_rms_adamw' makes it learn at AdamW's rates).
CLASSES: dict[str, str] = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "Adafactor": "transformers.optimization.Adafactor",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
    "Prodigy": "prodigyopt.Prodigy",
    "Lion": "lion_pytorch.Lion",
    "Muon": "torch.optim.Muon",
}
# Class -> (the arguments that are given) -> our own defaults of others.
_DEFAULTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    CLASSES["AdamW"]: _adamw,
    CLASSES["Adafactor"]: _adafactor,
}


def find(name: str, allowed: Collection[str]) -> type[Optimizer]:
    """One of the listed classes, or ``package.Class`` of an allowed package.

    Raises:
        ConfigError: there is none, or it is not allowed.
    """
    if name == "Muon" and not hasattr(torch.optim, name):
        raise ConfigError(
            f"{SETTING} = {name!r}: PyTorch {torch.__version__} has none; update it to 2.9 or "
            "later, or use AdamW"
        )
    dotted = CLASSES.get(name, name)
    packages = plugins.WELL_KNOWN if name in CLASSES else allowed
    return plugins.load_class(dotted, base=Optimizer, setting=SETTING, allowed=packages)


def construct(
    name: str,
    found: type[Optimizer],
    groups: Sequence[ParameterGroup],
    *,
    lr: float,
    arguments: Mapping[str, Any],
    warmup_steps: int,
) -> Optimizer:
    """The optimizer, ready for its first step; raises whatever the class raises.

    Every group keeps its name as "name" and its ratio as "lr_ratio".
    """
    known = inspect.signature(found).parameters
    own_defaults = _DEFAULTS.get(CLASSES.get(name, name))
    values: dict[str, Any] = {"lr": lr} if "lr" in known else {}
    values |= own_defaults(arguments) if own_defaults else {}
    values |= {key: _as_declared(value, known.get(key)) for key, value in arguments.items()}
    rate = values.get("lr", lr)
    if issubclass(found, Averaging) and "warmup_steps" in known:
        values = {"warmup_steps": warmup_steps, **values}
    described = [
        {
            "params": list(group.parameters),
            "lr": None if rate is None else rate * group.lr_ratio,
            "name": group.name,
            "lr_ratio": group.lr_ratio,
        }
        for group in groups
    ]
    with redirect_stdout(io.StringIO()):  # Prodigy prints what its arguments mean
        optimizer = found(described, **values)
    if isinstance(optimizer, Averaging):
        optimizer.train()
    return optimizer


def require_known(name: str, found: type[Optimizer], arguments: Mapping[str, Any]) -> None:
    """Make sure that the class has these arguments.

    Raises:
        ConfigError: it does not, and has those that are listed; or they are set elsewhere.
    """
    if "lr" in arguments:
        raise ConfigError("optimizer_args: lr is not set here; set learning_rate")
    _, *parameters = inspect.signature(found).parameters.values()  # the first are those to train
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return
    known = [
        each.name
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name != "lr"
    ]
    for key in arguments:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ConfigError(f"optimizer_args: {name} has no argument {key!r}; {hint}")


def _as_declared(value: Any, parameter: inspect.Parameter | None) -> Any:
    """A whole number as a float where the class's own value is one.

    Otherwise a power of steps, such as Schedule-Free's ``r``, could be a number that fills memory.
    """
    if type(value) is int and parameter is not None and isinstance(parameter.default, float):
        return float(value)
    return value


def shown_defaults(found: type[Optimizer], keys: Collection[str]) -> str:
    """The class's own values of some arguments, as text; empty if it has none."""
    parameters = inspect.signature(found).parameters
    return ", ".join(
        f"{key}={parameters[key].default!r}"
        for key in keys
        if key in parameters and parameters[key].default is not inspect.Parameter.empty
    )
