from __future__ import annotations

import pytest
import torch
from pack.engine.key_table import Row, fusions, key_map, published_state_dict
from torch import nn

TABLE = (
    Row("blocks.{}.qkv", ("layers.{}.q", "layers.{}.kv")),
    Row("blocks.{}.norm", ("layers.{}.norm",), weight_name="scale"),
    Row("head.mod", ("head",), halves_swapped=True),
    Row("blocks.{}.gate", ("layers.{}.table",), bare=True),
    Row("position", ("ids",), bare=True),
)


def model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.layers = nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(3, 4), "kv": nn.Linear(3, 5), "norm": nn.RMSNorm(3)})
        for _ in range(12)
    )
    for layer in module.layers:
        layer.table = nn.Parameter(torch.randn(1, 2, 3))
    module.head = nn.Linear(3, 6)
    module.ids = nn.Parameter(torch.randn(4, 3))
    return module


def test_published_names_follow_the_models_own_order() -> None:
    names = [fusion.published for fusion in fusions(TABLE, model())]
    assert names[:4] == ["position", "blocks.0.gate", "blocks.0.qkv", "blocks.0.norm"]
    assert names.index("blocks.10.qkv") > names.index("blocks.9.qkv")
    assert len(names) == 38


def test_published_weights_are_stacked_swapped_and_renamed() -> None:
    module = model()
    published = published_state_dict(TABLE, module)
    layer = module.layers[2]
    assert torch.equal(published["blocks.2.qkv.weight"][:4], layer["q"].weight)
    assert torch.equal(published["blocks.2.qkv.bias"][4:], layer["kv"].bias)
    assert torch.equal(published["blocks.2.norm.scale"], layer["norm"].weight)
    assert torch.equal(published["head.mod.weight"][:3], module.head.weight[3:])
    assert torch.equal(published["blocks.2.gate"], layer.table)
    assert torch.equal(published["position"], module.ids)


def test_reading_by_the_map_undoes_writing() -> None:
    module = model()
    published = {f"x.{name}": value for name, value in published_state_dict(TABLE, module).items()}
    sources = key_map(TABLE, module, prefix="x.")
    for name, tensor in module.state_dict().items():
        source = sources[name]
        key, transform = source if isinstance(source, tuple) else (source, lambda value: value)
        assert torch.equal(transform(published[key]), tensor)


def test_a_bare_parameter_without_a_row_is_noticed() -> None:
    module = model()
    module.layers[3].scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"no published name for .*layers\.3\.scale"):
        published_state_dict(TABLE, module)


def test_a_module_without_a_row_is_noticed() -> None:
    module = model()
    module.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no published name for .*extra"):
        published_state_dict(TABLE, module)
