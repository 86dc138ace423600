"""Files of our diffusers format in diffusers itself, and files that it and peft wrote, in ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.adapter_weights import AdapterWeights, merged
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.key_table import published_state_dict
from pack.engine.layer_names import LayerNames, published_layers
from pack.engine.lora_file import read_lora, save_adapters
from pack.tests.references.qwen_inputs import text_lengths
from torch import Tensor, nn

from .lora_examples import adapter

pytest.importorskip("peft")


def flux() -> tuple[LayerNames, nn.Module, dict[str, Any]]:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 4),
    )
    inputs = {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "pooled_projections": torch.randn(1, 10),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return LAYER_NAMES["flux_kontext"], model.eval(), inputs


def qwen() -> tuple[LayerNames, nn.Module, dict[str, Any]]:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    inputs = {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 3)]],
        **text_lengths(model, batch=1, length=3),
    }
    return LAYER_NAMES["qwen_image"], model.eval(), inputs


def wan() -> tuple[LayerNames, nn.Module, dict[str, Any]]:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=20,
        num_layers=2,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "timestep": torch.tensor([500]),
    }
    return LAYER_NAMES["wan"], model.eval(), inputs


MODELS = pytest.mark.parametrize("build", [flux, qwen, wan])


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def with_adapters(
    names: LayerNames, model: nn.Module, adapters: dict[str, AdapterWeights]
) -> nn.Module:
    """Our merged weights in a copy of the model, layer by published layer."""
    layers = published_layers(names, model)
    published = published_state_dict(names.table, model)
    state = model.state_dict()
    for name, each in adapters.items():
        weight = merged(published[f"{name}.weight"], each)
        inner = layers[name].inner
        heights = [state[f"{module}.weight"].shape[0] for module in inner]
        for module, part in zip(inner, weight.split(heights), strict=True):
            state[f"{module}.weight"] = part
    model.load_state_dict(state)
    return model


def random_adapters(
    names: LayerNames, model: nn.Module, kind: str, ranks: tuple[int, ...]
) -> dict[str, AdapterWeights]:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, AdapterWeights] = {}
    for number, (name, layer) in enumerate(published_layers(names, model).items()):
        if kind == "dora_rows" and len(layer.shape) > 2:
            continue  # peft has other magnitudes for convolutions
        if kind == "loha" and min(layer.shape[:2]) <= 4:
            continue  # would be no smaller as a LoRA
        rank = ranks[number % len(ranks)]
        found[name] = adapter(kind, layer.shape, generator, rank=rank, alpha=0.3 * (number % 3 + 1))
    return found


@MODELS
@pytest.mark.parametrize(
    ("kind", "ranks"), [("lora", (2,)), ("lora", (1, 3, 2)), ("loha", (1, 2)), ("dora_rows", (2,))]
)
def test_diffusers_computes_what_our_merged_weights_do(
    tmp_path: Path, build, kind: str, ranks: tuple[int, ...]
) -> None:
    names, model, inputs = build()
    adapters = random_adapters(names, model, kind, ranks)
    shapes = {name: layer.shape for name, layer in published_layers(names, model).items()}
    path = tmp_path / "a.safetensors"
    save_adapters(
        path, adapters, names, shapes, format="diffusers", dtype=torch.float32, metadata={}
    )
    before = output(model, inputs)
    model.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix="transformer")
    theirs = output(model, inputs)
    _, base, _ = build()
    ours = output(with_adapters(names, base, adapters), inputs)
    assert (ours - before).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@MODELS
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_diffusers_saved_is_read_as_what_it_trained(
    tmp_path: Path, build, use_rslora: bool, use_dora: bool
) -> None:
    from peft import LoraConfig

    names, model, inputs = build()
    linear = [
        inner
        for layer in published_layers(names, model).values()
        for inner in layer.inner
        if len(layer.shape) == 2
    ]
    config = LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=linear,
        rank_pattern={f"^{linear[1]}": 2},
        alpha_pattern={f"^{linear[2]}": 5},
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
    theirs = output(model, inputs)
    model.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    read = read_lora(path, [names])
    _, base, _ = build()
    before = output(base, inputs)
    ours = output(with_adapters(names, base, read.layers), inputs)
    assert (ours - before).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
