"""LoRA files as other tools spell them, written out by hand rather than by our writer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pack.engine.adapter_weights import AdapterWeights, FullWeights, LoHaWeights, LoRAWeights
from safetensors.torch import save_file
from torch import Tensor

# Layers in the blocks -> the modules that diffusers makes of them, in the order of their rows.
_FLUX = {
    r"double_blocks.(\d+).img_attn.qkv": "transformer_blocks.{}.attn.to_[q,k,v]",
    r"double_blocks.(\d+).txt_attn.qkv": "transformer_blocks.{}.attn.add_[q_proj,k_proj,v_proj]",
    r"double_blocks.(\d+).img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
    r"double_blocks.(\d+).txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
    r"double_blocks.(\d+).img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
    r"double_blocks.(\d+).img_mlp.2": "transformer_blocks.{}.ff.net.2",
    r"double_blocks.(\d+).txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
    r"double_blocks.(\d+).txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
    r"double_blocks.(\d+).img_mod.lin": "transformer_blocks.{}.norm1.linear",
    r"double_blocks.(\d+).txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
    r"single_blocks.(\d+).linear1": "single_transformer_blocks.{}.[attn.to_q,attn.to_k,attn.to_v,"
    "proj_mlp]",
    r"single_blocks.(\d+).linear2": "single_transformer_blocks.{}.proj_out",
    r"single_blocks.(\d+).modulation.lin": "single_transformer_blocks.{}.norm.linear",
}
DIFFUSERS: dict[str, dict[str, str]] = {
    "flux_kontext": _FLUX,
    "hunyuan_video": {
        name.replace("_attn.", "_attn_")
        .replace("mlp.0", "mlp.fc1")
        .replace("mlp.2", "mlp.fc2")
        .replace(".lin", ".linear")
        .replace("linearear", "linear"): modules
        for name, modules in _FLUX.items()
    },
    "qwen_image": {r"(transformer_blocks..*)": "{}"},
    "wan": {
        r"blocks.(\d+).self_attn.([qkv])": "blocks.{}.attn1.to_{}",
        r"blocks.(\d+).self_attn.o": "blocks.{}.attn1.to_out.0",
        r"blocks.(\d+).cross_attn.([qkv])": "blocks.{}.attn2.to_{}",
        r"blocks.(\d+).cross_attn.o": "blocks.{}.attn2.to_out.0",
        r"blocks.(\d+).cross_attn.([kv])_img": "blocks.{}.attn2.add_{}_proj",
        r"blocks.(\d+).ffn.0": "blocks.{}.ffn.net.0.proj",
        r"blocks.(\d+).ffn.2": "blocks.{}.ffn.net.2",
    },
}
SUFFIXES = {
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "peft": ("lora_A.default.weight", "lora_B.default.weight"),
    "old diffusers": ("lora.down.weight", "lora.up.weight"),
}


@dataclass(frozen=True)
class Spelling:
    """How one tool writes.

    Args:
        prefix: of every key.
        suffixes: one of `SUFFIXES`; only kohya's come with alpha.
        underscores: in place of the dots in the module's name.
        diffusers: modules are those of diffusers rather than the published layers.
    """

    prefix: str
    suffixes: str
    underscores: bool = False
    diffusers: bool = False

    def stem(self, module: str) -> str:
        return self.prefix + (module.replace(".", "_") if self.underscores else module)


def modules_of(family: str, layer: str) -> list[str]:
    """Diffusers' modules of a published layer, in the order of their rows."""
    for pattern, template in DIFFUSERS[family].items():
        if match := re.fullmatch(pattern, layer):
            whole = template.format(*match.groups())
            start, _, rest = whole.partition("[")
            ends = rest.removesuffix("]").split(",")
            return [start + end for end in ends]
    raise KeyError(layer)


def heights_of(modules: list[str], num_rows: int) -> list[int]:
    """Rows of each; the half of the MLP has four times those of the others."""
    shares = [4 if module.endswith("proj_mlp") else 1 for module in modules]
    return [share * num_rows // sum(shares) for share in shares]


def save(
    path: Path,
    adapters: Mapping[str, AdapterWeights],
    spelling: Spelling,
    *,
    alpha: Callable[[float], Tensor] = torch.tensor,
) -> None:
    """Write adapters of modules; ``alpha`` makes a tensor of each."""
    tensors: dict[str, Tensor] = {}
    for module, adapter in adapters.items():
        found = _tensors(adapter, SUFFIXES[spelling.suffixes])
        if spelling.suffixes == "kohya" and not isinstance(adapter, FullWeights):
            found["alpha"] = alpha(adapter.alpha)
        stem = spelling.stem(module)
        tensors |= {f"{stem}.{end}": tensor.contiguous() for end, tensor in found.items()}
    save_file(tensors, path)


def _tensors(adapter: AdapterWeights, pair: tuple[str, str]) -> dict[str, Tensor]:
    if isinstance(adapter, LoRAWeights):
        return {pair[0]: adapter.down, pair[1]: adapter.up}
    if isinstance(adapter, LoHaWeights):
        return {
            "hada_w1_a": adapter.w1_a,
            "hada_w1_b": adapter.w1_b,
            "hada_w2_a": adapter.w2_a,
            "hada_w2_b": adapter.w2_b,
        }
    if isinstance(adapter, FullWeights):
        assert adapter.diff is not None
        return {"diff": adapter.diff}
    return _factor("lokr_w1", adapter.w1) | _factor("lokr_w2", adapter.w2)


def _factor(name: str, factor: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    if isinstance(factor, tuple):
        return {f"{name}_a": factor[0], f"{name}_b": factor[1]}
    return {name: factor}
