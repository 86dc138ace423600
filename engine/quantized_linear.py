"""A linear layer whose weight stays in 8 bits, in training too.

Its weight is restored for the forward pass and again for the backward pass; between them only
codes and scales exist. Left to autograd, the restored weights of all layers would be kept.

Shapes: T tokens, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .quantize import Quantized, dequantize, quantize
from .workspace import Workspace

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class QuantizedLinear(nn.Module):
    """``x @ W^T + bias`` with the weight ``W`` of `Quantized`, computed in the type of ``x``.

    Nothing in it is trained: there is a gradient for ``x`` only. ``to(dtype)`` does not change
    the type of codes and scales.

    Args:
        quantized: a matrix [O, I]; not copied.
        bias: [O].
        chunk: how many weights are restored at once, in whole rows or blocks: it bounds the
            memory and costs a little time. None is all of them.
        workspace: where weights are restored on a CPU, best shared by all layers of a model.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        quantized: Quantized,
        bias: Tensor | None = None,
        *,
        chunk: int | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.codes.shape
        self.mode = quantized.mode
        self.block_size = quantized.block_size
        self.chunk = chunk
        self.workspace = workspace
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        format: str = "e4m3",
        mode: str = "block",
        block_size: int = 64,
        scale_dtype: torch.dtype | None = None,
        search: bool = False,
        compat: bool = False,
    ) -> QuantizedLinear:
        """The layer with its weight rounded; options as of `quantize`, which may raise."""
        quantized = quantize(
            linear.weight,
            format=format,
            mode=mode,
            block_size=block_size,
            scale_dtype=scale_dtype,
            search=search,
            compat=compat,
        )
        return cls(quantized, linear.bias).train(linear.training)

    @property
    def quantized(self) -> Quantized:
        """The weight as it is stored; not a copy."""
        return Quantized(self.codes, self.scale, self.mode, self.block_size)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] that the layer computes with."""
        return dequantize(self.quantized, dtype)

    def requantize(self, weight_OI: Tensor, *, search: bool = False) -> None:
        """Take another weight, rounded in the way of the present one, into the same memory.

        Raises:
            ValueError: it has another shape, or values that are NaN or infinite.
        """
        if weight_OI.shape != self.codes.shape:
            raise ValueError(f"{list(weight_OI.shape)} is not the shape {list(self.codes.shape)}")
        new = quantize(
            weight_OI,
            format=self.quantized.format,
            mode=self.mode,
            block_size=self.block_size or 64,
            scale_dtype=self.scale.dtype,
            search=search,
        )
        self.codes.copy_(new.codes)
        self.scale.copy_(new.scale)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        workspace = None if torch.compiler.is_compiling() else self.workspace
        chunk = self.codes.numel() if self.chunk is None else self.chunk
        kind = self.mode, self.block_size, chunk, workspace
        return _FrozenProduct.apply(x, self.codes, self.scale, bias, *kind)

    def extra_repr(self) -> str:
        """As of `nn.Linear`, and how the weight is stored."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.quantized.format}, mode={self.mode}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # In another type, codes would mean nothing and be two to four times as large. Integers
        # are moved by the same functions, but not converted.
        stored = {"codes": self.codes, "scale": self.scale}
        for name, tensor in stored.items():
            self._buffers[name] = tensor.view(_INTEGERS[tensor.element_size()])
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in stored.items():
                self._buffers[name] = self.get_buffer(name).view(tensor.dtype)
        return self


class _FrozenProduct(torch.autograd.Function):
    """``F.linear`` that keeps the weight for the backward pass as it is stored."""

    @staticmethod
    def forward(
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        mode: str,
        block_size: int | None,
        chunk: int,
        workspace: Workspace | None,
    ) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type in _OPAQUE_FORWARD:
            return _opaque_product(x, codes, scale, bias, mode, block_size, chunk)
        return _product(x, codes, scale, bias, mode, block_size, chunk, workspace)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes, scale, _, ctx.mode, ctx.block_size, ctx.chunk, ctx.workspace = inputs
        ctx.save_for_backward(codes, scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 8
        (grad,), (codes, scale) = grad_outputs, ctx.saved_tensors
        kind = ctx.mode, ctx.block_size, ctx.chunk
        if torch.compiler.is_compiling():
            back = _opaque_back_product(grad, codes, scale, *kind)
        else:
            back = _back_product(grad, codes, scale, *kind, ctx.workspace)
        return back, *(None,) * 7


def _product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    mode: str,
    block_size: int | None,
    chunk: int,
    workspace: Workspace | None = None,
) -> Tensor:
    quantized = Quantized(codes, scale, mode, block_size)
    out_features, in_features = codes.shape
    step = max(1, chunk // in_features)
    if step >= out_features:
        return F.linear(x, _restored(quantized, x, workspace), bias)
    workspace = workspace or Workspace()
    x_TI = x.reshape(-1, in_features)
    out_TO = x_TI.new_empty(x_TI.shape[0], out_features)
    for first in range(0, out_features, step):
        part = slice(first, min(first + step, out_features))
        weight = _restored(quantized.rows(part.start, part.stop), x, workspace)
        if bias is None:
            torch.mm(x_TI, weight.t(), out=out_TO[:, part])
        else:
            torch.addmm(bias[part], x_TI, weight.t(), out=out_TO[:, part])
    return out_TO.view(*x.shape[:-1], out_features)


def _back_product(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    mode: str,
    block_size: int | None,
    chunk: int,
    workspace: Workspace | None = None,
) -> Tensor:
    """``grad @ W``, some columns at once: each sum over O is done in one go, as without chunks."""
    quantized = Quantized(codes, scale, mode, block_size)
    out_features, in_features = codes.shape
    unit = block_size or 1
    step = max(1, chunk // (out_features * unit)) * unit
    if step >= in_features:
        return grad @ _restored(quantized, grad, workspace)
    workspace = workspace or Workspace()
    grad_TO = grad.reshape(-1, out_features)
    back_TI = grad_TO.new_empty(grad_TO.shape[0], in_features)
    for first in range(0, in_features, step):
        end = min(first + step, in_features)
        weight = _restored(quantized.columns(first, end), grad, workspace)
        torch.mm(grad_TO, weight, out=back_TI[:, first:end])
    return back_TI.view(*grad.shape[:-1], in_features)


def _restored(quantized: Quantized, like: Tensor, workspace: Workspace | None) -> Tensor:
    """The weight in the type of ``like``, until the next one is restored in the workspace."""
    if workspace is None:
        return dequantize(quantized, like.dtype)
    out = workspace.empty("weight", quantized.codes.shape, like.dtype, like.device)
    return dequantize(quantized, like.dtype, out=out, workspace=workspace)


# Compiled, the two passes become one graph, which restores the weight once and keeps it from the
# forward to the backward pass. It cannot look into these. The forward pass alone may be compiled:
# on a GPU that makes one kernel of the restoring, while on a CPU ours is the faster one.
_OPAQUE_FORWARD = ("cpu",)
_opaque_product = torch.library.custom_op(
    "lora_loom::quantized_product",
    _product,
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scale, Tensor? bias, str mode, int? block_size, "
    "int chunk) -> Tensor",
)
_opaque_back_product = torch.library.custom_op(
    "lora_loom::quantized_back_product",
    _back_product,
    mutates_args=(),
    schema="(Tensor grad, Tensor codes, Tensor scale, str mode, int? block_size, int chunk) "
    "-> Tensor",
)


@_opaque_product.register_fake
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_opaque_back_product.register_fake
def _(grad: Tensor, codes: Tensor, *_: object) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], codes.shape[1])
