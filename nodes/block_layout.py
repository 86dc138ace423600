"""Weights with a scale for each block, row or tensor as ComfyUI's own kind of quantized weight.

ComfyUI moves, patches, stores and computes with any ``QuantizedTensor`` whose layout is
registered. It has none for FP8 or INT8 in blocks with ordinary scales, so this is one. Nothing of
ComfyUI is imported before it is needed: what its layouts inherit from came with version 0.27.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine.codes import format_of
from ..engine.errors import EngineError
from ..engine.quantize import Quantized, dequantize, quantize
from ..engine.stochastic_rounding import round_stochastically

NAME = "LoraLoomBlockLayout"
_FORMAT = "lora_loom_blocks"
# What the file of a weight with one scale may call it, so that ComfyUI's own loader reads it.
_COMFYUI: dict[str, dict[str, Any]] = {
    "e4m3": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
    "e5m2": {"format": "float8_e5m2", "full_precision_matrix_mult": True},
    "int8": {"format": "int8_tensorwise"},
}


def check_comfyui() -> None:
    """See that this ComfyUI can have a layout of ours.

    Raises:
        EngineError: it is too old.
    """
    if not _has_what_it_takes():
        raise EngineError(
            "models in 8 bits need ComfyUI 0.27 or newer and its comfy-kitchen package; update "
            "ComfyUI and its requirements. The other nodes of LoRA Loom work without that"
        )


def quantized_weight(quantized: Quantized, dtype: torch.dtype) -> torch.nn.Parameter:
    """A weight as ComfyUI's ``QuantizedTensor``; the codes are not copied.

    Args:
        dtype: that it says to have, and is restored to.
    """
    from comfy.quant_ops import QuantizedTensor

    _layout()
    params = BlockParams(
        quantized.scale,
        dtype,
        tuple(quantized.codes.shape),
        quantized.mode,
        quantized.block_size,
    )
    weight: Any = QuantizedTensor(quantized.codes, NAME, params)
    return torch.nn.Parameter(weight, requires_grad=False)


def operations(dtype: torch.dtype) -> type:
    """The layers that ComfyUI builds a model of, to be given as its ``custom_operations``.

    A linear layer takes a weight of `quantized_weight`, and restores it to compute with it.

    Args:
        dtype: that is computed in, and that the weights say to have.
    """
    from comfy.ops import mixed_precision_ops
    from comfy.quant_ops import QUANT_ALGOS

    _layout()
    QUANT_ALGOS.setdefault(
        _FORMAT,
        {
            "storage_t": torch.float8_e4m3fn,
            "parameters": {"weight_scale"},
            "comfy_tensor_layout": NAME,
            "quantize_input": False,
        },
    )
    base: Any = mixed_precision_ops({}, dtype, full_precision_mm=True)
    linear = type("Linear", (_BlockLinear, base.Linear), {})
    return type("BlockOperations", (base,), {"Linear": linear})


def _has_what_it_takes() -> bool:
    try:
        from comfy.ops import mixed_precision_ops  # noqa: F401
        from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor  # noqa: F401
        from comfy_kitchen.tensor import QuantizedLayout, register_layout_class  # noqa: F401
    except ImportError:
        return False
    return hasattr(QuantizedTensor, "requantize_from_float")


def _layout() -> Any:
    """Our layout; registered when it is asked for first."""
    from comfy_kitchen.tensor import QuantizedLayout, get_layout_class, register_layout_class

    try:
        return get_layout_class(NAME)
    except KeyError:
        layout = type("BlockLayout", (_BlockLayout, QuantizedLayout), {})
        register_layout_class(NAME, layout)
        return layout


@dataclass(frozen=True)
class BlockParams:
    """All of a weight but the codes; the names of the first three are ComfyUI's."""

    scale: Tensor
    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]
    mode: str
    block_size: int | None

    def to_device(self, device: torch.device) -> BlockParams:
        """The same with the scales on another device."""
        return replace(self, scale=self.scale.to(device))

    def clone(self) -> BlockParams:
        """The same; the scales are shared.

        ComfyUI calls this for every view of a weight, such as ``weight.data``, and restores
        weights by writing into that: it has to reach the scales, too.
        """
        return replace(self)

    def copy_from(self, src: BlockParams, non_blocking: bool = False) -> None:
        """Take the scales of a weight that is stored in the same way."""
        self.scale.copy_(src.scale, non_blocking=non_blocking)


class _BlockLayout:
    """What ComfyUI asks a layout to do."""

    Params = BlockParams

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: str | None = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        like: Quantized | None = None,
    ) -> tuple[Tensor, Any]:
        """Codes and parameters of another weight, stored as ``like``.

        Args:
            scale: the word "recalculate" or None; scales are always found anew.
            stochastic_rounding: a seed; rounded to nearest where it is 0 or None.
            inplace_ops: whether ``tensor`` may be spoiled, which it never is.
        """
        if not isinstance(scale, str | None):
            raise ValueError("a weight with scales for blocks cannot be given one scale")
        made = quantize(
            tensor,
            format="e4m3" if like is None else like.format,
            mode="block" if like is None else like.mode,
            block_size=(like and like.block_size) or 64,
            scale_dtype=torch.float32 if like is None else like.scale.dtype,
        )
        if stochastic_rounding:
            generator = torch.Generator(tensor.device).manual_seed(stochastic_rounding)
            round_stochastically(made, tensor, generator=generator)
        shape = tuple(tensor.shape)
        return made.codes, BlockParams(made.scale, tensor.dtype, shape, made.mode, made.block_size)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """The weight in the type that it says to have."""
        return dequantize(_quantized(qdata, params), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        return qtensor._qdata, qtensor.params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """What is written to a file, by what follows the key of the weight."""
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor: Any) -> dict[str, Any]:
        """What `quantize` needs to store another weight in the same way."""
        return {"like": _quantized(qtensor._qdata, qtensor.params)}


class _BlockLinear:
    """What our linear layers have before what those of ComfyUI have."""

    weight: Any
    factory_kwargs: dict[str, Any]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        key = f"{prefix}weight"
        weight = state_dict.get(key)
        if not _is_ours(weight):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        del state_dict[key]
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
        if key in missing_keys:
            missing_keys.remove(key)
        self.quant_format, self.layout_type = _FORMAT, NAME
        self.weight = weight

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any
    ) -> Any:
        """As of ComfyUI's, but for what the file says of the weight."""
        found = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        if _is_ours(self.weight):
            found[f"{prefix}comfy_quant"] = self.comfy_quant
        return found

    @property
    def weight_scale(self) -> Tensor:
        """Of its name in the state dict; ComfyUI's nodes that merge models look for it."""
        return self.weight.params.scale

    @property
    def comfy_quant(self) -> Tensor:
        """JSON as bytes: how a file has the weight.

        Where ComfyUI has no format like it there is none, so that its own loader refuses the file
        instead of taking the codes for weights.
        """
        params = self.weight.params
        words: dict[str, Any] = {"scales": params.mode, "block_size": params.block_size}
        if params.mode == "tensor" and params.scale.dtype == torch.float32:
            words = _COMFYUI[format_of(self.weight._qdata)]
        return torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As of ComfyUI's, but hooks may change weights: that asserts ``inplace_update`` is False.

        It is never done in place. ComfyUI keeps what the weight was, to restore it later, in a
        copy that shares its memory.
        """
        return super().set_weight(weight, seed=seed, return_weight=return_weight, **kwargs)

    def _forward(self, input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        if not _is_ours(weight):
            return super()._forward(input, weight, bias)
        if not (torch.is_grad_enabled() and input.requires_grad):
            return torch.nn.functional.linear(input, weight.dequantize(), bias)
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        params = weight.params
        kind = params.mode, params.block_size
        product = _FrozenProduct.apply(input, weight._qdata, params.scale, *kind)
        return product if bias is None else product + bias.to(product.dtype)


class _FrozenProduct(torch.autograd.Function):
    """``input @ weight^T`` that keeps codes and scales for the backward pass, not the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        codes: Tensor,
        scale: Tensor,
        mode: str,
        block_size: int | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.kind = mode, block_size
        weight_OI = dequantize(Quantized(codes, scale, mode, block_size), input.dtype)
        return torch.nn.functional.linear(input, weight_OI)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (codes, scale) = grad_outputs, ctx.saved_tensors
        weight_OI = dequantize(Quantized(codes, scale, *ctx.kind), gradient.dtype)
        return gradient @ weight_OI, None, None, None, None


def _is_ours(weight: Any) -> bool:
    """Whether a weight is a `quantized_weight`."""
    from comfy.quant_ops import QuantizedTensor

    return isinstance(weight, QuantizedTensor) and weight._layout_cls == NAME


def _quantized(qdata: Tensor, params: Any) -> Quantized:
    return Quantized(qdata, params.scale, params.mode, params.block_size)
