"""Memory that a forward and backward pass needs, found without running it.

The model lies on the "meta" device, where tensors have shapes but no data, and every storage that
an operation makes is counted for as long as something holds it. That is exact for any model that
allocates through PyTorch, with and without gradient checkpointing, and needs no formula for a
family. Blocks of one kind are followed through once; the others are stood in for by one operation
that holds as much, so that 57 blocks cost little more than two.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Leaves = tuple[Tensor, ...]


def peak_bytes(loss: Callable[[], Tensor], blocks: Sequence[nn.Module]) -> int:
    """The most bytes that hold activations and gradients at one moment.

    Args:
        loss: the forward pass, all on the meta device; gives what is differentiated.
        blocks: parts of the model that repeat; nothing is computed in them afterwards.
    """
    live = _Live()
    with live, _standing_in(blocks, live):
        with _FlashAttention():
            value = loss()
        value.backward()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that were made inside and are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage] | None] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Weights and inputs were there before; views of them are not new.
        for given in _tensors(args):
            self._storages.setdefault(given.untyped_storage()._cdata, None)
        result = func(*args, **kwargs or {})
        for made in _tensors((result,)):
            self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def forget(_: object) -> None:
            del self._storages[key]
            self.now -= num_bytes

        self._storages[key] = weakref.ref(storage, forget)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


class _FlashAttention(TorchFunctionMode):
    """Attention as CPUs and GPUs compute it: without the matrix of all pairs of tokens.

    The meta device would choose the textbook form.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = {**kwargs, **dict(zip(("query", "key", "value"), args, strict=False))}
            if given["query"].is_meta:
                return _Attention.apply(given["query"], given["key"], given["value"])
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@dataclass(frozen=True)
class _Cost:
    """What one block allocates; ``*_extra_bytes`` are needed for a moment, beyond what stays.

    Args:
        kept_bytes: held for the backward pass besides inputs, outputs and parameters.
        keeps_inputs, keeps_outputs: which of those are held, too.
        outputs: shape, type and whether it has a gradient, of each.
    """

    kept_bytes: int
    keeps_inputs: tuple[bool, ...]
    keeps_outputs: tuple[bool, ...]
    forward_extra_bytes: int
    backward_extra_bytes: int
    outputs: tuple[tuple[torch.Size, torch.dtype, bool], ...]
    structure: TreeSpec


@contextmanager
def _standing_in(blocks: Sequence[nn.Module], live: _Live) -> Iterator[None]:
    costs: dict[Hashable, _Cost] = {}
    for block in blocks:
        block.forward = partial(_stand_in, block, block.forward, costs, live)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _stand_in(
    block: nn.Module,
    forward: Callable[..., Any],
    costs: dict[Hashable, _Cost],
    live: _Live,
    *args: Any,
    **kwargs: Any,
) -> Any:
    leaves, structure = tree_flatten((args, kwargs))
    inputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    trained = tuple(weight for weight in block.parameters() if weight.requires_grad)
    kind = (
        _structure(block),
        tuple((leaf.shape, leaf.dtype, leaf.requires_grad) for leaf in inputs),
        torch.is_grad_enabled(),
    )
    if kind not in costs:
        detached = [
            leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        costs[kind] = _measure(forward, detached, structure, trained, live)
    outputs = _Block.apply(costs[kind], *inputs, *trained)
    return tree_unflatten(list(outputs), costs[kind].structure)


def _structure(block: nn.Module) -> Hashable:
    """Equal for blocks that compute the same: classes, numbers in them and sizes of weights."""
    modules = tuple(
        (
            type(module),
            tuple((n, v) for n, v in vars(module).items() if isinstance(v, int | float | str)),
        )
        for module in block.modules()
    )
    weights = tuple((w.shape, w.dtype, w.requires_grad) for w in block.parameters())
    return modules, weights


def _measure(
    forward: Callable[..., Any],
    leaves: Sequence[Any],
    structure: TreeSpec,
    trained: Leaves,
    live: _Live,
) -> _Cost:
    """Follow one block forward and backward, as if it were alone."""
    args, kwargs = tree_unflatten(list(leaves), structure)
    inputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    peak, before, live.peak = live.peak, live.now, live.now
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage()._cdata)
        return tensor.detach()

    # Innermost hooks win, so that checkpointing around the block does not change what is seen.
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(*args, **kwargs)
    outputs, output_structure = tree_flatten(result)
    sizes = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in outputs}
    kept = live.now - before - sum(sizes.values())
    forward_extra = live.peak - live.now

    gradients = [torch.empty_like(leaf) for leaf in outputs if leaf.requires_grad]
    live.peak = entered = live.now
    wanted = [leaf for leaf in (*inputs, *trained) if leaf.requires_grad]
    differentiable = [leaf for leaf in outputs if leaf.requires_grad]
    if differentiable:
        torch.autograd.grad(differentiable, wanted, gradients, allow_unused=True)
    cost = _Cost(
        kept_bytes=max(kept, 0),
        keeps_inputs=tuple(leaf.untyped_storage()._cdata in saved for leaf in inputs),
        keeps_outputs=tuple(leaf.untyped_storage()._cdata in saved for leaf in outputs),
        forward_extra_bytes=forward_extra,
        backward_extra_bytes=live.peak - entered,
        outputs=tuple((leaf.shape, leaf.dtype, leaf.requires_grad) for leaf in outputs),
        structure=output_structure,
    )
    live.peak = peak
    return cost


class _Block(torch.autograd.Function):
    """Allocates what a block would."""

    @staticmethod
    def forward(ctx: Any, cost: _Cost, *inputs: Tensor) -> Leaves:
        kept = _bytes(cost.kept_bytes)
        outputs = tuple(
            torch.empty(shape, dtype=dtype, device="meta") for shape, dtype, _ in cost.outputs
        )
        _bytes(cost.forward_extra_bytes)
        held = [*compress(inputs, cost.keeps_inputs), *compress(outputs, cost.keeps_outputs)]
        ctx.save_for_backward(kept, *held)
        ctx.mark_non_differentiable(
            *(leaf for leaf, (*_, has) in zip(outputs, cost.outputs, strict=True) if not has)
        )
        ctx.extra_bytes = cost.backward_extra_bytes
        ctx.inputs = [(leaf.shape, leaf.dtype) for leaf in inputs]
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _held = ctx.saved_tensors
        _bytes(ctx.extra_bytes)
        return None, *(
            torch.empty(shape, dtype=dtype, device="meta") if needed else None
            for (shape, dtype), needed in zip(ctx.inputs, ctx.needs_input_grad[1:], strict=True)
        )


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")
