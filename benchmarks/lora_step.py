"""Steps of a model with adapters divided by the same ones without, interleaved in one run.

Bare is the frozen model: its forward pass and the gradient of its input, which nobody can avoid.
The clock is CPU time where there is no accelerator, so that other programs hardly matter.
Run from the repository root: ``python -m benchmarks.lora_step``. Prints, for every kind of adapter
and setting, the median over all rounds of (time with adapters / time of the bare step before it).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from engine.networks.network import inject
from engine.networks.settings import Dropouts, LayerSettings

NAMES = ("q", "k", "v", "o", "up", "down")
RANK = 16
PEFT = [f"peft {kind}" for kind in ("lora", "dora", "loha", "lokr")]
KINDS = {
    "lora": (LayerSettings("lora", RANK, RANK), Dropouts()),
    "lora dropout": (LayerSettings("lora", RANK, RANK), Dropouts(0.1, 0.1, 0.1)),
    "dora": (LayerSettings("lora", RANK, RANK, decompose=True), Dropouts()),
    "loha": (LayerSettings("loha", RANK, RANK), Dropouts()),
    "lokr": (LayerSettings("lokr", RANK, RANK), Dropouts()),
    "lokr 8": (LayerSettings("lokr", RANK, RANK, factor=8), Dropouts()),
}


class Block(nn.Module):
    """Attention and a feed-forward network, each with shift, scale and gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Parameter(torch.randn(6, width) * 0.1)

    def forward(self, x_BTI: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation
        width = x_BTI.shape[-1]
        inner = F.layer_norm(x_BTI, (width,)) * (1 + scale) + shift
        heads = (-1, width // 64)
        q, k, v = (
            layer(inner).unflatten(-1, heads[::-1]).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BTI = x_BTI + gate * self.o(mixed)
        inner = F.layer_norm(x_BTI, (width,)) * (1 + scale_2) + shift_2
        return x_BTI + gate_2 * self.down(F.gelu(self.up(inner), approximate="tanh"))


class Model(nn.Module):
    """A small diffusion transformer without its ends."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.is_checkpointing = False

    def forward(self, x_BTI: Tensor) -> Tensor:
        for block in self.blocks:
            if self.is_checkpointing:
                x_BTI = checkpoint(block, x_BTI, use_reentrant=False)  # pyright: ignore
            else:
                x_BTI = block(x_BTI)
        return x_BTI


def with_adapters(model: Model, kind: str) -> Model:
    """A copy of the model with adapters of a kind on all its linear layers."""
    model = copy.deepcopy(model)
    if kind.startswith("peft "):
        return _with_peft(model, kind.removeprefix("peft "))
    settings, dropouts = KINDS[kind]
    layers = {
        path: ((path,), settings)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    inject(model, layers, dropouts=dropouts, generator=torch.Generator().manual_seed(0))
    return model


def _with_peft(model: Model, kind: str) -> Model:
    """What the library peft puts there, in the type of the model."""
    import peft

    shared = {"r": RANK, "target_modules": list(NAMES)}
    if kind == "loha":
        config: peft.PeftConfig = peft.LoHaConfig(alpha=RANK, **shared)
    elif kind == "lokr":
        config = peft.LoKrConfig(alpha=RANK, **shared)
    else:
        config = peft.LoraConfig(lora_alpha=RANK, use_dora=kind == "dora", **shared)
    return peft.inject_adapter_in_model(config, model)  # pyright: ignore


def step_of(model: Model, x_BTI: Tensor) -> Callable[[], None]:
    """Forward and backward of the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        out = model(x_BTI.detach().requires_grad_())
        out.float().square().mean().backward()

    return step


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of work that one call takes."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        run()
        torch.accelerator.synchronize(device)
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(
    model: Model, x_BTI: Tensor, kinds: Sequence[str], rounds: int
) -> tuple[float, dict[str, float]]:
    """Median seconds of the bare step, and the median ratio of each kind."""
    bare = step_of(model, x_BTI)
    steps = {kind: step_of(with_adapters(model, kind), x_BTI) for kind in kinds}
    for step in (bare, *steps.values()):
        step()
    seconds: list[float] = []
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, step in steps.items():
            seconds.append(timed(bare, x_BTI.device))
            ratios[kind].append(timed(step, x_BTI.device) / seconds[-1])
    found = {kind: statistics.median(values) for kind, values in ratios.items()}
    return statistics.median(seconds), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS, *PEFT], help="of adapters")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    for dtype in (torch.float32, torch.bfloat16):
        for is_checkpointing in (False, True):
            torch.manual_seed(0)
            model = Model(arguments.width, arguments.blocks).requires_grad_(False)
            model = model.to(device, dtype).train()
            model.is_checkpointing = is_checkpointing
            x_BTI = torch.randn(1, arguments.tokens, arguments.width, device=device, dtype=dtype)
            bare, ratios = measure(model, x_BTI, arguments.kinds, arguments.rounds)
            name = f"{str(dtype).removeprefix('torch.')}{' checkpointed' * is_checkpointing}"
            shown = "  ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
            sys.stdout.write(f"{name:22s} bare {bare * 1000:7.1f} ms  {shown}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
