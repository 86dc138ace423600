from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.checkpoint_layers import Piece, StoredModel, stored_model
from pack.engine.errors import CheckpointError, ConfigError
from pack.engine.quantized_layout import layout_of
from pack.engine.weights import open_checkpoint
from pack.tests.references import tiny_checkpoints
from safetensors.torch import save_file
from torch import Tensor

FAMILIES = {
    "flux_kontext": tiny_checkpoints.flux,
    "hunyuan_video": tiny_checkpoints.hunyuan_video,
    "wan": tiny_checkpoints.wan,
    "qwen_image": tiny_checkpoints.qwen_image,
}


def found(tmp_path: Path, tensors: dict[str, Tensor], architecture: str = "auto") -> StoredModel:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    return stored_model(checkpoint, layout_of(checkpoint), LAYER_NAMES, architecture)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_published_file_belongs_to_a_layer(
    tmp_path: Path, family: str, prefix: str
) -> None:
    state = FAMILIES[family]()
    others = {"text_encoders.t5.weight": torch.ones(1), "vae.decoder.conv_in.weight": torch.ones(1)}
    model = found(tmp_path, {**{prefix + key: t for key, t in state.items()}, **others})
    assert (model.names.family, model.prefix) == (family, prefix)
    pieces = [piece for layer in model.layers.values() for piece in (*layer.weight, *layer.bias)]
    assert {piece.key.removeprefix(prefix) for piece in pieces} == state.keys()
    for piece in pieces:
        assert (piece.first, piece.end) == (0, state[piece.key.removeprefix(prefix)].shape[0])
    assert not any(layer.halves_swapped for layer in model.layers.values())


def split_attention() -> dict[str, Tensor]:
    """FLUX in diffusers' names: heights differ, so that a wrong order shows."""
    block = "transformer_blocks.0"
    heights = {"to_q": 4, "to_k": 4, "to_v": 4}
    single = {"to_q": 4, "to_k": 4, "to_v": 4}
    state = {f"{block}.attn.{name}.weight": torch.ones(h, 8) for name, h in heights.items()}
    state |= {f"{block}.attn.{name}.bias": torch.ones(h) for name, h in heights.items()}
    prefix = "single_transformer_blocks.0"
    state |= {f"{prefix}.attn.{name}.weight": torch.ones(h, 8) for name, h in single.items()}
    state[f"{prefix}.proj_mlp.weight"] = torch.ones(16, 8)
    state["norm_out.linear.weight"] = torch.ones(8, 4)
    state["x_embedder.weight"] = torch.ones(8, 4)
    state["context_embedder.weight"] = torch.ones(8, 4)
    state["time_text_embed.guidance_embedder.linear_1.weight"] = torch.ones(8, 4)
    return state


def test_pieces_of_a_layer_are_stacked_in_the_order_of_the_table(tmp_path: Path) -> None:
    model = found(tmp_path, split_attention(), "flux_kontext")
    name = "transformer_blocks.0.attn"
    qkv = model.layers["double_blocks.0.img_attn.qkv"]
    assert qkv.weight == (
        Piece(f"{name}.to_q.weight", 0, 4),
        Piece(f"{name}.to_k.weight", 4, 8),
        Piece(f"{name}.to_v.weight", 8, 12),
    )
    assert [piece.key for piece in qkv.bias] == [f"{name}.to_{part}.bias" for part in "qkv"]
    linear1 = model.layers["single_blocks.0.linear1"]
    assert linear1.shape == (28, 8)
    assert linear1.weight[-1] == Piece("single_transformer_blocks.0.proj_mlp.weight", 12, 28)
    assert model.layers["final_layer.adaLN_modulation.1"].halves_swapped
    assert model.shapes()["double_blocks.0.img_attn.qkv"] == (12, 8)


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    state = split_attention()
    del state["transformer_blocks.0.attn.to_k.weight"]
    with pytest.raises(CheckpointError, match="double_blocks.0.img_attn.qkv is not whole"):
        found(tmp_path, state, "flux_kontext")


def test_names_of_several_families_ask_for_the_architecture(tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_out.0.weight"
    with pytest.raises(ConfigError, match="say which with architecture") as caught:
        found(tmp_path, {name: torch.ones(2, 2)})
    assert "flux_kontext" in str(caught.value)
    assert found(tmp_path, {name: torch.ones(2, 2)}, "qwen_image").layers


def test_a_file_of_something_else_is_called_what_it_is(tmp_path: Path) -> None:
    state = {
        "encoder.down_blocks.0.a.weight": torch.ones(1),
        "decoder.conv_in.weight": torch.ones(1),
    }
    with pytest.raises(CheckpointError, match=r"autoencoder.* of a known family"):
        found(tmp_path, state)
    with pytest.raises(CheckpointError, match="of wan"):
        found(tmp_path, state, "wan")
    with pytest.raises(ConfigError, match="'wann' is unknown"):
        found(tmp_path, state, "wann")
    with pytest.raises(CheckpointError, match="of wan"):
        found(tmp_path, FAMILIES["flux_kontext"](), "wan")
