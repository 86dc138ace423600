"""What a training run is going to need of memory and disk, found without loading its model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .. import activations, hardware, memory, optimizers, plugins, seeds
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import KEEP_IN_MEMORY_BYTES, CachedItem
from ..networks.network import Network
from ..quantized_model import scratch_bytes
from .network_plan import NetworkPlan, check_base_weights, plan_network
from .plan import Plan

# oneDNN makes machine code for every size of product in half precision when it first comes: about
# this much for a FLUX of any size on a CPU.
_HALF_PRECISION_CODE_BYTES = 40 * 2**20
# Of the header of a safetensors file, for each tensor and for the metadata of a LoRA.
_ENTRY_BYTES, _METADATA_BYTES = 200, 16384
_TENSORS_PER_ADAPTER = 3


@dataclass(frozen=True)
class Needs:
    """All of it for one configuration.

    Args:
        transformer: without weights, on the meta device, with the adapters of ``network``.
        items: what is trained.
        device: where.
    """

    config: Config
    architecture: Architecture
    transformer: nn.Module
    network: Network
    planned: NetworkPlan
    items: Sequence[CachedItem]
    plan: Plan
    device: torch.device

    @cached_property
    def num_trained(self) -> int:
        """Numbers that are trained, in all adapters together."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @cached_property
    def optimizer_bytes(self) -> int:
        """What the optimizer keeps."""
        settings = self.config.optimizer

        def make(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
            return optimizers.create(
                settings.optimizer_type,
                [optimizers.ParameterGroup("lora", parameters)],
                lr=settings.learning_rate,
                arguments=settings.arguments,
                allowed=plugins.allowed_packages(os.environ),
            )

        shapes = [parameter.shape for parameter in self.network.parameters()]
        return memory.optimizer_bytes(shapes, make, device=self.device)

    @property
    def lora_bytes(self) -> int:
        """Of one LoRA file."""
        dtype = hardware.DTYPES[self.config.output.save_precision]
        entries = _TENSORS_PER_ADAPTER * len(self.network.adapters)
        return self.num_trained * dtype.itemsize + entries * _ENTRY_BYTES + _METADATA_BYTES

    @property
    def state_bytes(self) -> int:
        """Of one file to continue from."""
        entries = 5 * len(self.network.adapters)
        numbers = torch.float32.itemsize * self.num_trained
        return numbers + self.optimizer_bytes + entries * _ENTRY_BYTES + _METADATA_BYTES

    def available_bytes(self) -> int | None:
        """What the device has for the run, all that the process has already included."""
        free = hardware.available_bytes(self.device)
        on_cpu = self.device.type == "cpu"
        return free + hardware.resident_bytes() if free and on_cpu else free

    def memory(self, *, gradient_checkpointing: bool) -> memory.MemoryEstimate:
        """The peak of the run on its device, with or without that setting."""
        shapes, batch_size = self._largest_batch()
        batch = {
            name: torch.empty(batch_size, *shape, device="meta") for name, shape in shapes.items()
        }
        on_cpu = self.device.type == "cpu"
        kept = sum(item.num_bytes for item in self.items)
        dtype = hardware.DTYPES[self.config.training.mixed_precision]
        if on_cpu:
            _warm_up(dtype)
        code = 0 if dtype == torch.float32 else _HALF_PRECISION_CODE_BYTES
        host = memory.Host(
            program_bytes=hardware.resident_bytes() + code,
            dataset_bytes=kept if kept <= KEEP_IN_MEMORY_BYTES else 0,
            is_continued=self.plan.start > 0,
        )
        return memory.estimate(
            model_bytes=memory.frozen_bytes(self.transformer)
            + scratch_bytes(self.transformer, dtype),
            num_trained=self.num_trained,
            optimizer_bytes=self.optimizer_bytes,
            activation_bytes=self._activation_bytes(batch, gradient_checkpointing),
            batch_bytes=sum(tensor.nbytes for tensor in batch.values()),
            host=host if on_cpu else None,
        )

    def _activation_bytes(self, batch: dict[str, Tensor], gradient_checkpointing: bool) -> int:
        transformer: Any = self.transformer
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        else:
            transformer.disable_gradient_checkpointing()
        for parameter in self.network.parameters():
            parameter.grad = None
        return activations.peak_bytes(
            lambda: _loss(self.architecture, transformer, batch),
            self.architecture.blocks(transformer),
        )

    def _largest_batch(self) -> tuple[dict[str, tuple[int, ...]], int]:
        """Shapes of one item of it without the batch dimension, and how many items it has."""
        counts: Counter[tuple[tuple[str, tuple[int, ...]], ...]] = Counter()
        for item in self.items:
            counts[item.shapes] += item.repeats
        most = self.config.dataset.batch_size
        shapes, count = max(
            counts.items(), key=lambda each: _num_elements(each[0]) * min(most, each[1])
        )
        return dict(shapes), min(most, count)


def _loss(
    architecture: Architecture, transformer: nn.Module, batch: Mapping[str, Tensor]
) -> Tensor:
    """As the optimizer step computes it, as far as memory goes."""
    latents = batch["latents"]
    noise, noisy = torch.empty_like(latents), torch.empty_like(latents)
    t_B = latents.new_empty(len(latents))
    conditions = {**batch, "guidance": torch.empty_like(t_B)}
    velocity = architecture.predict_velocity(transformer, noisy, t_B, conditions)
    return F.mse_loss(velocity.float(), noise - latents)


def _num_elements(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    return sum(torch.Size(shape).numel() for _, shape in shapes)


def _warm_up(dtype: torch.dtype) -> None:
    """Let PyTorch load the code that training needs, up to 40 MiB of it."""
    x = torch.ones(1, 2, 256, 64, dtype=dtype, requires_grad=True)
    y = F.scaled_dot_product_attention(x, x, x)
    y = F.layer_norm(F.gelu(F.linear(y, y.detach()[0, 0, :64]), approximate="tanh"), (64,))
    y.float().square().mean().backward()


def needs_of(
    config: Config,
    architecture: Architecture,
    transformer: nn.Module,
    items: Sequence[CachedItem],
    plan: Plan,
    device: torch.device,
) -> Needs:
    """Puts adapters on ``transformer``, which is an `Architecture.empty_transformer`."""
    # Not its own method, in which diffusers warns about types that no model of ours has.
    nn.Module.to(transformer, dtype=hardware.DTYPES[config.training.mixed_precision])
    planned = plan_network(config, architecture, transformer)
    check_base_weights(config, architecture, planned.shapes)
    with torch.device("meta"):
        generator = seeds.generator(config.runtime.seed, "lora")
        network = planned.put_on(transformer.train(), generator)
    return Needs(config, architecture, transformer, network, planned, items, plan, device)


def num_batch_shapes(items: Sequence[CachedItem], batch_size: int) -> int:
    """How many different shapes the batches have, the short last one of each size included."""
    counts: Counter[object] = Counter()
    for item in items:
        counts[item.shapes, item.is_regularization] += item.repeats
    return sum((count >= batch_size) + (count % batch_size > 0) for count in counts.values())
