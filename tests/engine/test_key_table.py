from __future__ import annotations

import pytest
import torch
from pack.engine.key_table import Row, fusions, key_map, published_state_dict
from torch import nn

TABLE = (
    Row("blocks.{}.qkv", ("layers.{}.q", "layers.{}.kv")),
    Row("blocks.{}.norm", ("layers.{}.norm",), weight_name="scale"),
    Row("head.mod", ("head",), halves_swapped=True),
)


def model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.layers = nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(3, 4), "kv": nn.Linear(3, 5), "norm": nn.RMSNorm(3)})
        for _ in range(12)
    )
    module.head = nn.Linear(3, 6)
    return module


def test_published_names_follow_the_models_own_order() -> None:
    names = [fusion.published for fusion in fusions(TABLE, model())]
    assert names[0] == "blocks.0.qkv" and names[2] == "blocks.1.qkv"
    assert names.index("blocks.10.qkv") > names.index("blocks.9.qkv")
    assert len(names) == 25


def test_published_weights_are_stacked_swapped_and_renamed() -> None:
    module = model()
    published = published_state_dict(TABLE, module)
    layer = module.layers[2]
    assert torch.equal(published["blocks.2.qkv.weight"][:4], layer["q"].weight)
    assert torch.equal(published["blocks.2.qkv.bias"][4:], layer["kv"].bias)
    assert torch.equal(published["blocks.2.norm.scale"], layer["norm"].weight)
    assert torch.equal(published["head.mod.weight"][:3], module.head.weight[3:])


def test_reading_by_the_map_undoes_writing() -> None:
    module = model()
    published = {f"x.{name}": value for name, value in published_state_dict(TABLE, module).items()}
    sources = key_map(TABLE, module, prefix="x.")
    for name, tensor in module.state_dict().items():
        source = sources[name]
        key, transform = source if isinstance(source, tuple) else (source, lambda value: value)
        assert torch.equal(transform(published[key]), tensor)


def test_a_module_without_a_row_is_noticed() -> None:
    module = model()
    module.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no published name for .*extra"):
        published_state_dict(TABLE, module)
