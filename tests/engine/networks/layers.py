"""A model whose published layers are split over modules, and adapters of every kind on it."""

from __future__ import annotations

import torch
from pack.engine.adapter_weights import AdapterWeights, merged
from pack.engine.networks.network import Network, inject
from pack.engine.networks.settings import Dropouts, LayerSettings
from torch import Tensor, nn

FUSED = {"qkv": ("q", "k", "v"), "out": ("o",)}
SETTINGS = {
    "lora": LayerSettings("lora", rank=3, alpha=6.0),
    "dora": LayerSettings("lora", rank=3, alpha=6.0, decompose=True),
    "loha": LayerSettings("loha", rank=2, alpha=6.0),
    "loha of a high rank": LayerSettings("loha", rank=5, alpha=6.0),
    "lokr": LayerSettings("lokr", rank=1, alpha=2.0),
    "lokr with a whole factor": LayerSettings("lokr", rank=1, alpha=2.0, full_matrix=True),
}
KINDS = list(SETTINGS)


class Attention(nn.Module):
    """Split projections, as our classes have them; the parts cut through Kronecker rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 6)
        self.o = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1).sin())


def build(dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    return Attention().to(dtype).requires_grad_(False)


def adapters(
    model: nn.Module,
    kind: str,
    *,
    trained: bool = True,
    dropouts: Dropouts | None = None,
    generator: torch.Generator | None = None,
) -> Network:
    """Adapters of a kind on both layers; ``trained`` ones change them."""
    generator = generator or torch.Generator().manual_seed(1)
    layers = {name: (inner, SETTINGS[kind]) for name, inner in FUSED.items()}
    network = inject(model, layers, dropouts=dropouts or Dropouts(), generator=generator)
    if trained:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return network


def merged_model(model: Attention, weights: dict[str, AdapterWeights]) -> Attention:
    """The model with adapters in the weights of its published layers."""
    for name, inner in FUSED.items():
        parts = [model.get_submodule(path).get_parameter("weight") for path in inner]
        whole = merged(torch.cat([part.detach() for part in parts]), weights[name])
        sizes = [len(part) for part in parts]
        for part, value in zip(parts, whole.to(parts[0].dtype).split(sizes), strict=True):
            part.copy_(value)
    return model
