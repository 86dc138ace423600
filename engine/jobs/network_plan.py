"""Which network is trained: its layers, ranks and kinds, and what it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .. import lora_targets
from ..adapter_weights import AdapterWeights, FullWeights, LoHaWeights, LoKrWeights, LoRAWeights
from ..architectures.base import Architecture
from ..config import Config, NetworkConfig
from ..errors import CheckpointError, ConfigError
from ..layer_names import LayerOfModel, published_layers
from ..lora_file import LoRAFile, read_lora
from ..lora_targets import Target
from ..networks.lokr import factorization
from ..networks.network import Network, inject
from ..networks.settings import Dropouts, LayerSettings

_KIND_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


@dataclass(frozen=True)
class NetworkPlan:
    """What is trained on the layers of one model.

    ``start`` is what the adapters begin with; those of other targets begin anew.
    """

    layers: Mapping[str, LayerOfModel]
    targets: tuple[Target, ...]
    settings: Mapping[str, LayerSettings]
    dropouts: Dropouts
    start: Mapping[str, AdapterWeights]
    remarks: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weight of every layer that a LoRA may name."""
        return {name: layer.shape for name, layer in self.layers.items()}

    def put_on(self, transformer: nn.Module, generator: torch.Generator) -> Network:
        """The adapters, on the model that was planned for."""
        chosen = {
            name: (self.layers[name].inner, settings) for name, settings in self.settings.items()
        }
        network = inject(transformer, chosen, dropouts=self.dropouts, generator=generator)
        network.load(self.start)
        return network

    def summary(self) -> str:
        """Kind, ranks, number of layers and of trained numbers, in a line."""
        ranks = sorted({target.rank for target in self.targets})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        kind = " and ".join(dict.fromkeys(_kind_name(each) for each in self.settings.values()))
        num_trained = sum(target.num_parameters for target in self.targets)
        return f"{kind}: rank {rank}, layers: {len(self.targets)}, trained numbers: {num_trained:,}"

    def describe(self, *, verbose: bool) -> str:
        """A table of the targets."""
        return lora_targets.describe(self.targets, verbose=verbose)


def check(config: Config) -> None:
    """Whether the settings go together, as far as can be said without the model.

    Raises:
        ConfigError: they do not.
    """
    network, arguments = config.network, config.network.arguments
    kind = _KIND_NAMES[network.kind]
    if network.kind != "lora":
        unfit = {
            "network_dropout": network.network_dropout,
            "dora_wd": arguments.dora_wd,
            "conv_dim": arguments.conv_dim,
        }
        if wrong := [name for name, value in unfit.items() if value]:
            raise ConfigError(f"{wrong[0]}: {kind} does not have it; remove it, or train a LoRA")
    if network.kind != "lokr" and arguments.factor != -1:
        raise ConfigError(f"network_args: factor is for LoKr only, not {kind}; remove it")
    if arguments.dora_wd and arguments.rank_dropout:
        raise ConfigError("network_args: dora_wd does not go with rank_dropout; remove one")
    if arguments.dora_wd and config.output.save_format == "diffusers":
        raise ConfigError(
            "save_format diffusers: such files have no magnitudes for fused layers, and ComfyUI "
            "reads none; choose comfyui, or remove dora_wd from network_args"
        )
    if network.dim_from_weights and not network.network_weights:
        raise ConfigError("dim_from_weights needs network_weights; name the LoRA to begin with")
    if network.dim_from_weights and (arguments.exclude_patterns or arguments.include_patterns):
        raise ConfigError(
            "dim_from_weights takes the layers from network_weights, too; remove exclude_patterns "
            "and include_patterns, or dim_from_weights"
        )


def plan_network(config: Config, architecture: Architecture, transformer: nn.Module) -> NetworkPlan:
    """The network that the settings ask for.

    Args:
        transformer: of the run; it may be without weights.

    Raises:
        ConfigError: patterns match nothing, or the settings and ``network_weights`` differ.
        CheckpointError: ``network_weights`` cannot be read or is for another model.
    """
    network, names = config.network, architecture.layer_names
    layers = published_layers(names, transformer)
    shapes = {name: layer.shape for name, layer in layers.items()}
    arguments = network.arguments
    dropouts = Dropouts(network.network_dropout, arguments.rank_dropout, arguments.module_dropout)
    path = network.network_weights
    file = read_lora(path, [names], shapes=shapes) if path else None
    if file and network.dim_from_weights:
        settings = {
            name: _settings_of(file.path, name, weights) for name, weights in file.layers.items()
        }
        targets = tuple(
            Target(name, shapes[name], each.rank, each.alpha, num_parameters(shapes[name], each))
            for name, each in settings.items()
        )
        return NetworkPlan(layers, targets, settings, dropouts, file.layers, file.remarks)
    usual = LayerSettings(
        kind=network.kind,
        rank=network.network_dim,
        alpha=network.alpha,
        factor=arguments.factor,
        decompose=arguments.dora_wd,
    )
    targets = _targets(config.network, architecture, shapes, usual)
    settings = {each.name: replace(usual, rank=each.rank, alpha=each.alpha) for each in targets}
    start, remarks = _start(file, settings) if file else ({}, ())
    return NetworkPlan(layers, targets, settings, dropouts, start, remarks)


def check_base_weights(
    config: Config, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Whether ``base_weights`` can be merged into a model with these layers.

    Raises:
        CheckpointError: a file is no LoRA, or one for another model.
    """
    for path, _ in config.network.base_loras:
        read_lora(path, [architecture.layer_names], shapes=shapes)


def _targets(
    network: NetworkConfig,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    usual: LayerSettings,
) -> tuple[Target, ...]:
    arguments = network.arguments
    selected = lora_targets.select(
        shapes,
        architecture.layer_names,
        exclude=arguments.exclude_patterns,
        include=arguments.include_patterns,
        convolutions=arguments.conv_dim is not None,
    )
    conv_dim = arguments.conv_dim
    return tuple(
        lora_targets.targets(
            shapes,
            selected,
            architecture.layer_names,
            dim=(usual.rank, usual.alpha),
            conv_dim=(conv_dim, arguments.conv_alpha) if conv_dim else None,
            rank_patterns=arguments.rank_patterns,
            count=lambda shape, rank: num_parameters(shape, replace(usual, rank=rank)),
        )
    )


def num_parameters(shape: tuple[int, ...], settings: LayerSettings) -> int:
    """How many numbers are trained for a layer with a weight of this shape."""
    rank = settings.rank
    if settings.kind == "lora":
        return lora_targets.lora_parameters(shape, rank) + settings.decompose * shape[1]
    if settings.kind == "loha":
        return lora_targets.loha_parameters(shape, rank)
    (out_l, out_k), (in_m, in_n) = (factorization(size, settings.factor) for size in shape[:2])
    is_whole = settings.full_matrix or rank >= max(out_k, in_n) / 2
    return out_l * in_m + (out_k * in_n if is_whole else rank * (out_k + in_n))


def _start(
    file: LoRAFile, settings: Mapping[str, LayerSettings]
) -> tuple[dict[str, AdapterWeights], tuple[str, ...]]:
    """The file's adapters as those that are trained, and sentences on both.

    Raises:
        ConfigError: the settings say another layer, kind or rank.
    """
    if foreign := [name for name in file.layers if name not in settings]:
        raise ConfigError(
            f"{file.path}: the LoRA has {foreign[0]}, which is not trained with these settings; "
            "set dim_from_weights, or include that layer"
        )
    start: dict[str, AdapterWeights] = {}
    for name, weights in file.layers.items():
        found, wanted = _settings_of(file.path, name, weights), settings[name]
        same = replace(found, alpha=wanted.alpha, factor=wanted.factor, full_matrix=False)
        if same != wanted or num_parameters(weights.shape or (), found) != num_parameters(
            weights.shape or (), wanted
        ):
            raise ConfigError(
                f"{file.path}: {name} is a {_in_words(found)}, but a {_in_words(wanted)} is to be "
                "trained; set dim_from_weights, or the settings of the file"
            )
        start[name] = weights
    new = len(settings) - len(start)
    fresh = (f"{file.path.name} has nothing for {new} of the layers, which begin anew",)
    return start, (*file.remarks, *(fresh if new else ()))


def _in_words(settings: LayerSettings) -> str:
    return f"{_kind_name(settings)} of rank {settings.rank}"


def _kind_name(settings: LayerSettings) -> str:
    return "DoRA" if settings.decompose else _KIND_NAMES[settings.kind]


def _settings_of(path: Path, name: str, weights: AdapterWeights) -> LayerSettings:
    """The settings that train an adapter of a file.

    Raises:
        CheckpointError: it cannot be trained further.
    """
    if isinstance(weights, FullWeights):
        raise CheckpointError(
            f"{path}: {name} has a full difference, which cannot be trained further; turn the file "
            "into a LoRA first with the tool resize"
        )
    if weights.bias_diff is not None:
        raise CheckpointError(
            f"{path}: {name} changes a bias, too, which is not trained further and would be lost; "
            "merge the file with base_weights instead"
        )
    if isinstance(weights, LoRAWeights):
        if weights.magnitude is not None and weights.magnitude.shape[0] > 1:
            raise CheckpointError(
                f"{path}: {name} has a magnitude for each output, which cannot be trained further"
            )
        decompose = weights.magnitude is not None
        return LayerSettings("lora", weights.rank, weights.alpha, decompose=decompose)
    if weights.magnitude is not None:
        raise CheckpointError(
            f"{path}: {name} has a magnitude besides its factors, which cannot be trained further"
        )
    if isinstance(weights, LoHaWeights):
        return LayerSettings("loha", weights.rank, weights.alpha)
    return _lokr_settings(path, name, weights)


def _lokr_settings(path: Path, name: str, weights: LoKrWeights) -> LayerSettings:
    if isinstance(weights.w1, tuple):
        raise CheckpointError(
            f"{path}: the first factor of {name} is a product itself, which cannot be trained "
            "further"
        )
    out_l, in_m = weights.w1.shape
    out_features, in_features = weights.shape[:2]
    for factor in (-1, out_l, in_m):
        sizes = (factorization(out_features, factor)[0], factorization(in_features, factor)[0])
        if sizes == (out_l, in_m):
            rank, whole = weights.rank or max(weights.shape), weights.rank is None
            return LayerSettings("lokr", rank, weights.alpha, factor=factor, full_matrix=whole)
    raise CheckpointError(
        f"{path}: {name} is divided into {out_l} x {in_m} parts, which no setting gives, so it "
        "cannot be trained further"
    )
