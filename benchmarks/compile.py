"""Forward and backward with compiled blocks divided by the same without, interleaved in one run.

The model has adapters, as in training. Run from the repository root:
``python -m benchmarks.compile``. Prints per size the seconds that compiling took, the medians and
their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from engine import seeds
from engine.architectures.flux_kontext import FluxKontext
from engine.compile import CompileSettings, check, compile_blocks, uncompiled
from engine.config import Config
from engine.jobs.network_plan import plan_network

ARCHITECTURE = FluxKontext()
SIZES = {  # hidden, double blocks, single blocks, batch, latent side, text tokens
    "demo": (128, 2, 4, 4, 8, 32),
    "wide": (768, 2, 2, 1, 64, 64),
}


class Case:
    """One model with adapters and a fixed batch."""

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype) -> None:
        hidden, double, single, batch, side, text = SIZES[size]
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=hidden // 128,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
        )
        nn.Module.to(transformer, device, dtype)
        self.transformer = transformer.requires_grad_(False).train()
        planned = plan_network(Config(), ARCHITECTURE, transformer)
        network = planned.put_on(transformer, seeds.generator(0, "lora"))
        self.parameters = list(network.parameters())
        self.noisy = torch.randn(batch, 16, 1, side, side, device=device)
        self.t_B = torch.rand(batch, device=device)
        self.conditions = {
            "text_embeds": torch.randn(batch, text, 64, device=device),
            "pooled": torch.randn(batch, 64, device=device),
            "guidance": torch.ones(batch, device=device),
        }

    def seconds(self) -> float:
        """Of one forward and backward pass."""
        for parameter in self.parameters:
            parameter.grad = None
        start = time.perf_counter()
        velocity = ARCHITECTURE.predict_velocity(
            self.transformer, self.noisy, self.t_B, self.conditions
        )
        velocity.float().square().mean().backward()
        if self.noisy.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(case: Case, settings: CompileSettings, rounds: int) -> tuple[float, float, float]:
    """Seconds (of compiling, and medians without and with it), alternating pass by pass."""
    compile_blocks(ARCHITECTURE.blocks(case.transformer), settings, num_shapes=1)
    compiling = case.seconds()
    eager: list[float] = []
    compiled: list[float] = []
    for _ in range(rounds):
        with uncompiled():
            eager.append(case.seconds())
        compiled.append(case.seconds())
    return compiling, statistics.median(eager), statistics.median(compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--rounds", type=int, default=15, help="passes of each kind")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--backend", default="INDUCTOR", help="as dynamo_backend")
    parser.add_argument("--mode", default="default", help="as dynamo_mode")
    parser.add_argument("--bf16", action="store_true", help="the model in bfloat16")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    settings = CompileSettings(given.backend, given.mode, fullgraph=True)
    check(settings, device)
    for size in SIZES:
        case = Case(size, device, torch.bfloat16 if given.bf16 else torch.float32)
        compiling, eager, compiled = measure(case, settings, given.rounds)
        sys.stdout.write(
            f"{size:6s} compile {compiling:5.1f} s  eager {eager * 1000:8.1f} ms  "
            f"compiled {compiled * 1000:8.1f} ms  ratio {compiled / eager:.3f}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
