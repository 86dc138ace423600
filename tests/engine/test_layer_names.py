from __future__ import annotations

import pytest
import torch
from pack.engine.key_table import Row
from pack.engine.layer_names import (
    LayerNames,
    locate,
    other_names,
    published_layers,
    row_of,
)
from torch import nn

QKV = Row(
    "blocks.{}.attn_qkv", ("layers.{}.to_q", "layers.{}.to_kv"), aliases=("blocks.{}.attn.a",)
)
NAMES = LayerNames(
    family="toy",
    base_models=("toy",),
    table=(
        QKV,
        Row("blocks.{}.conv", ("layers.{}.conv",)),
        Row("blocks.{}.gate", ("layers.{}.table",), bare=True),
        Row("blocks.{}.norm", ("layers.{}.norm",)),
        Row("labels", ("labels",)),
        Row("patches", ("embed.proj",)),
        Row("last.mod", ("norm_out",), halves_swapped=True),
    ),
    blocks=("blocks.",),
)


def model() -> nn.Module:
    module = nn.Module()
    module.embed = nn.ModuleDict({"proj": nn.Conv3d(4, 6, (1, 2, 2))})
    module.layers = nn.ModuleList()
    for _ in range(2):
        block = nn.ModuleDict(
            {
                "to_q": nn.Linear(6, 5),
                "to_kv": nn.Linear(6, 7),
                "conv": nn.Conv2d(6, 3, 3),
                "norm": nn.LayerNorm(6),
            }
        )
        block.table = nn.Parameter(torch.zeros(1, 2, 6))
        module.layers.append(block)
    module.labels = nn.Embedding(2, 6)
    module.norm_out = nn.Linear(6, 12)
    return module


def test_layers_that_may_be_adapted_have_the_shape_of_the_published_weight() -> None:
    assert published_layers(NAMES, model()) == {
        "patches": (("embed.proj",), (6, 4, 1, 2, 2)),
        "blocks.0.attn_qkv": (("layers.0.to_q", "layers.0.to_kv"), (12, 6)),
        "blocks.0.conv": (("layers.0.conv",), (3, 6, 3, 3)),
        "blocks.1.attn_qkv": (("layers.1.to_q", "layers.1.to_kv"), (12, 6)),
        "blocks.1.conv": (("layers.1.conv",), (3, 6, 3, 3)),
    }


@pytest.mark.parametrize(
    ("name", "published", "part"),
    [
        ("blocks.11.attn_qkv", "blocks.11.attn_qkv", None),
        ("blocks_11_attn_qkv", "blocks.11.attn_qkv", None),
        ("blocks.11.attn.a", "blocks.11.attn_qkv", None),
        ("layers.11.to_q", "blocks.11.attn_qkv", 0),
        ("layers_11_to_kv", "blocks.11.attn_qkv", 1),
        ("layers.3.table", "blocks.3.gate", None),
        ("norm_out", "last.mod", 0),  # in the other order, so it is not the same
        ("last_mod", "last.mod", None),
    ],
)
def test_a_name_is_understood_however_it_is_spelled(
    name: str, published: str, part: int | None
) -> None:
    place = locate(NAMES, name)
    assert place and (place.published, place.part) == (published, part)


@pytest.mark.parametrize("name", ["blocks.x.conv", "blocks.0.conv.weight", "xblocks.0.conv", ""])
def test_an_unknown_name_is_told_from_the_others(name: str) -> None:
    assert locate(NAMES, name) is None
    assert row_of(NAMES, name) is None
    assert other_names(NAMES, name) == []


def test_a_published_name_leads_to_its_row_and_its_other_names() -> None:
    assert row_of(NAMES, "blocks.4.attn_qkv") == (QKV, ("4",))
    assert other_names(NAMES, "blocks.4.attn_qkv") == [
        "blocks.4.attn.a",
        "layers.4.to_q",
        "layers.4.to_kv",
    ]
    assert other_names(NAMES, "labels") == []  # it has only one
