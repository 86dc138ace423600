"""Everything an optimizer remembers, as JSON and named tensors, and back bit for bit.

An optimizer keeps tensors, numbers, texts and nested collections of them for each parameter, and
more of it in its groups (Schedule-Free's ``weight_sum``, Prodigy's ``d``). What a group holds that
is as the optimizer was constructed with is not stored: the settings say it again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .weights import DTYPES

# What the loop, `optimizers` and PyTorch's schedulers put into a group.
_OF_THE_RUN = frozenset({"params", "lr", "initial_lr", "name", "lr_ratio"})
_STORABLE = frozenset(DTYPES.values())


def pack(optimizer: Optimizer, tensors: dict[str, Tensor]) -> Any:
    """The state as JSON, whose tensors are put into ``tensors``, not copied.

    Raises:
        TypeError: it holds something else than plain values, collections of them and tensors.
    """
    state = optimizer.state_dict()
    groups = [_changed(group, optimizer.defaults) for group in state.pop("param_groups")]
    stored = {"state": state.pop("state"), "groups": groups, "more": state}
    return _encode(stored, "optimizer", tensors, {})


def unpack(optimizer: Optimizer, packed: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put a state back, of an optimizer that was constructed in the same way.

    Whatever the optimizer did since it was constructed is gone. The tensors become its own.

    Raises:
        ValueError: the state is of other parameters.
    """
    stored = _decode(packed, tensors)
    groups = optimizer.state_dict()["param_groups"]
    if len(groups) != len(stored["groups"]):
        raise ValueError(f"{len(stored['groups'])} groups of parameters, not {len(groups)}")
    restored = [
        {
            **{key: value for key, value in group.items() if key in _OF_THE_RUN},
            **{key: value for key, value in defaults.items() if key not in _OF_THE_RUN},
            **saved,
        }
        for group, saved in zip(groups, stored["groups"], strict=True)
        for defaults in [copy.deepcopy(optimizer.defaults)]
    ]
    state = {"state": stored["state"], "param_groups": restored, **stored["more"]}
    optimizer.load_state_dict(state)
    _undo_casts(optimizer, stored["state"])


def _changed(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer itself changed in a group, or added to it."""
    return {
        key: value
        for key, value in group.items()
        if key not in _OF_THE_RUN and not _is_default(value, key, defaults)
    }


def _is_default(value: Any, key: str, defaults: Mapping[str, Any]) -> bool:
    """Whether a plain value is as constructed.

    Of tensors and collections that cannot be said: they are the very objects of the defaults and
    change together with them.
    """
    plain = all(
        each is None or isinstance(each, bool | int | float | str)
        for each in (value if isinstance(value, tuple) else (value,))
    )
    return (
        plain and key in defaults and type(value) is type(defaults[key]) and value == defaults[key]
    )


def _encode(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": _store(value, name, tensors, seen)}
    if type(value) in (list, tuple):
        parts = [_encode(each, f"{name}.{i}", tensors, seen) for i, each in enumerate(value)]
        return parts if type(value) is list else {"tuple": parts}
    if isinstance(value, dict):
        # As pairs, because JSON has no other keys than texts.
        return {
            "dict": [
                [_encode(key, name, tensors, seen), _encode(each, f"{name}.{key}", tensors, seen)]
                for key, each in value.items()
            ]
        }
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be stored")


def _store(tensor: Tensor, name: str, tensors: dict[str, Tensor], seen: dict[int, str]) -> str:
    """Under which name a tensor is stored, which is done once however many places hold it."""
    if tensor.dtype not in _STORABLE or tensor.layout is not torch.strided:
        raise TypeError(f"{name} is a tensor of {tensor.dtype}, which cannot be stored")
    if id(tensor) not in seen:
        while name in tensors:
            name += "_"
        tensors[name] = tensor
        seen[id(tensor)] = name
    return seen[id(tensor)]


def _decode(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_decode(each, tensors) for each in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(each, tensors) for each in content)
    return {_decode(key, tensors): _decode(each, tensors) for key, each in content}


def _undo_casts(optimizer: Optimizer, saved: Mapping[Any, Mapping[str, Any]]) -> None:
    """Give the state its number types and texts back.

    PyTorch's ``load_state_dict`` turns every tensor into the type of its parameter, and a text
    into the description of a generator (2.13).
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for index, parameter in enumerate(parameters):
        entries = optimizer.state.get(parameter, {})
        for key in entries.keys() & saved.get(index, {}).keys():
            loaded = entries[key]
            device = loaded.device if isinstance(loaded, Tensor) else parameter.device
            entries[key] = _as_saved(saved[index][key], device)


def _as_saved(saved: Any, device: torch.device) -> Any:
    if isinstance(saved, Tensor):
        return saved.to(device)
    if isinstance(saved, list | tuple):
        return type(saved)(_as_saved(each, device) for each in saved)
    if isinstance(saved, dict):
        return {key: _as_saved(each, device) for key, each in saved.items()}
    return saved
