"""All adapters of one transformer: put on its layers, trained, saved, switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..adapter_weights import AdapterWeights
from ..optimizer_classes import ParameterGroup
from .adapter import Adapted, Adapter, AnyLinear
from .convolution import ConvolutionAdapter
from .decomposition import Decomposition
from .loha import LoHaAdapter
from .lokr import LoKrAdapter
from .lora import LoRAAdapter
from .settings import Dropouts, LayerSettings


class NormReport(NamedTuple):
    """What limiting the norms did; tensors on the device, so that nothing waits for it.

    The norms are those of every ``delta W`` afterwards.
    """

    num_scaled: Tensor
    mean_norm: Tensor
    max_norm: Tensor


@dataclass(frozen=True)
class Network:
    """All adapters of one transformer, by published name."""

    adapters: dict[str, Adapter]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable parameter, in a fixed order."""
        for adapter in self.adapters.values():
            yield from adapter.parameters()

    def parameter_groups(self, up_ratio: float | None) -> list[ParameterGroup]:
        """The parameters for an optimizer; with ``up_ratio`` the up side has its own rate.

        That is LoRA+ (Hayou et al. 2024, arXiv:2402.12354).
        """
        if up_ratio is None:
            return [ParameterGroup("lora", list(self.parameters()))]
        up = [each for adapter in self.adapters.values() for each in adapter.up_side()]
        ids = {id(parameter) for parameter in up}
        others = [parameter for parameter in self.parameters() if id(parameter) not in ids]
        return [ParameterGroup("lora", others), ParameterGroup("lora plus", up, up_ratio)]

    def named_tensors(self) -> dict[str, Tensor]:
        """Every trainable tensor as ``"<published>.<its name>"``, for training states."""
        return {
            f"{layer}.{name}": tensor
            for layer, adapter in self.adapters.items()
            for name, tensor in adapter.tensors().items()
        }

    def weights(self) -> dict[str, AdapterWeights]:
        """The adapters' tensors, detached, not copied."""
        return {name: adapter.weights() for name, adapter in self.adapters.items()}

    def load(self, weights: Mapping[str, AdapterWeights]) -> None:
        """Start from existing adapters; layers that ``weights`` does not have stay as they are.

        The scale of each adapter stays, too: where a file's is another, the up side makes up for
        it.

        Raises:
            ValueError: a layer has no adapter here, or one of another kind or shape.
        """
        for name, layer in weights.items():
            if name not in self.adapters:
                raise ValueError(f"{name} has no adapter")
            try:
                self.adapters[name].load(layer)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    @property
    def has_dropout(self) -> bool:
        return any(adapter.dropouts.any for adapter in self.adapters.values())

    @torch.no_grad()
    def limit_norms(self, maximum: float) -> NormReport:
        """Scale down, in place, every adapter whose ``||delta W||_F`` exceeds ``maximum``.

        The factors of an adapter take equal shares. A magnitude is left as it is.
        """
        adapters = list(self.adapters.values())
        norms = torch.stack([adapter.squared_norm() for adapter in adapters]).sqrt_()
        ratios = (maximum / norms).clamp_(max=1.0)  # x / 0 is infinite, so it is 1 there
        for adapter, ratio in zip(adapters, ratios.unbind(), strict=True):
            factors = adapter.factors()
            for factor in factors:
                factor.mul_(ratio ** (1 / len(factors)))
        limited = norms * ratios
        return NormReport((ratios < 1).sum(), limited.mean(), limited.max())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is what it was without adapters, bit for bit.

        Nothing is differentiated inside: gradient checkpointing would compute it again later,
        outside, with the adapters.
        """
        before = {adapter: adapter.enabled for adapter in self.adapters.values()}
        try:
            for adapter in before:
                adapter.enabled = False
            with torch.no_grad():
                yield
        finally:
            for adapter, enabled in before.items():
                adapter.enabled = enabled


def inject(
    transformer: nn.Module,
    layers: Mapping[str, tuple[tuple[str, ...], LayerSettings]],
    *,
    dropouts: Dropouts = Dropouts(),  # noqa: B008  (frozen)
    generator: torch.Generator,
) -> Network:
    """Put a fresh adapter on each layer; the model's output does not change yet.

    Args:
        transformer: changed in place; its own parameters are frozen already.
        layers: published name -> the modules it is made of, in stacking order, and what to put
            there. Several modules must be linear.
        generator: on the CPU; decides the initial values.

    Raises:
        ValueError: there are no layers, or one cannot take what it should.
    """
    if not layers:
        raise ValueError("no layer to put an adapter on")
    adapters: dict[str, Adapter] = {}
    for name, (inner, settings) in layers.items():
        bases = [transformer.get_submodule(path) for path in inner]
        for path, base in zip(inner, bases, strict=True):
            _check(path, base, len(bases), settings, dropouts)
        adapter = _adapter(bases, settings, dropouts, generator).to(_device(bases[0]))
        adapter.train(bases[0].training)
        first = 0
        for path, base in zip(inner, bases, strict=True):
            end = first + _height(base)
            transformer.set_submodule(path, Adapted(base, adapter, first, end))
            first = end
        adapters[name] = adapter
    return Network(adapters)


def _check(
    path: str, base: nn.Module, num_parts: int, settings: LayerSettings, dropouts: Dropouts
) -> None:
    kind = type(base).__name__
    is_convolution = isinstance(base, nn.Conv2d | nn.Conv3d)
    if not is_convolution and not isinstance(base, AnyLinear):
        raise ValueError(f"{path}: a layer of class {kind} takes no adapter")
    if is_convolution and (settings.kind != "lora" or settings.decompose or num_parts > 1):
        raise ValueError(f"{path}: a layer of class {kind} takes a plain LoRA of its own only")
    if any(parameter.requires_grad for parameter in base.parameters()):
        raise ValueError(f"{path} is not frozen; its own weights would get no gradient")
    if settings.kind != "lora" and dropouts.neuron:
        raise ValueError(
            f"{path}: a {settings.kind} has no values between two factors, so there is no neuron "
            "dropout; use rank or module dropout"
        )


def _adapter(
    bases: Sequence[nn.Module],
    settings: LayerSettings,
    dropouts: Dropouts,
    generator: torch.Generator,
) -> Adapter:
    base, rank, alpha = bases[0], settings.rank, settings.alpha
    if isinstance(base, nn.Conv2d | nn.Conv3d):
        return ConvolutionAdapter(
            base, rank=rank, alpha=alpha, dropouts=dropouts, generator=generator
        )
    assert isinstance(base, AnyLinear)
    sizes = (base.in_features, sum(_height(part) for part in bases))
    if settings.kind == "loha":
        return LoHaAdapter(*sizes, rank=rank, alpha=alpha, dropouts=dropouts, generator=generator)
    if settings.kind == "lokr":
        return LoKrAdapter(*sizes, settings=settings, dropouts=dropouts, generator=generator)
    adapter = LoRAAdapter(*sizes, rank=rank, alpha=alpha, dropouts=dropouts, generator=generator)
    if settings.decompose:
        adapter.decomposition = Decomposition(bases)
    return adapter


def _height(base: nn.Module) -> int:
    if isinstance(base, nn.Conv2d | nn.Conv3d):
        return base.out_channels
    assert isinstance(base, AnyLinear)
    return base.out_features


def _device(base: nn.Module) -> torch.device:
    tensors = (*base.parameters(), *base.buffers())
    return tensors[0].device
