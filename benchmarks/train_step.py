"""Our optimizer step divided by the bare one, interleaved in one run.

Bare is what nobody can avoid: forward, backward and fused AdamW of the same module with the same
adapters on one fixed batch. Ours is all that the training loop does: batches read from the cache
in the background, noise, times, clipping, warm-up, divergence guard, statistics of the loss, loss
history and events.
Run from the repository root: ``python -m benchmarks.train_step``. Prints one line per size and the
ratio of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812

from engine import events, optimizers, schedules, seeds, timesteps
from engine.architectures.flux_kontext import FluxKontext
from engine.config import Config
from engine.dataset import BatchReader, CachedItem, Planned, epoch_batches, read_item
from engine.jobs.guard import DivergenceGuard
from engine.jobs.network_plan import plan_network
from engine.jobs.step import OptimizerStep, VelocityModel
from engine.jobs.step_log import StepLog
from engine.loss_history import LossHistory, Smoothed
from engine.weights import save_tensors

ARCHITECTURE = FluxKontext()
SIZES = {  # hidden, double blocks, single blocks, batch, latent side, text tokens
    "demo": (128, 2, 4, 4, 8, 32),
    "small": (512, 2, 4, 1, 32, 64),
}


class Case:
    """One model with adapters, its optimizer and a fixed batch."""

    def __init__(self, size: str, device: torch.device) -> None:
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
        transformer = transformer.requires_grad_(False).to(device).train()
        planned = plan_network(Config(), ARCHITECTURE, transformer)
        network = planned.put_on(transformer, seeds.generator(0, "lora"))
        self.model = VelocityModel(ARCHITECTURE, transformer)
        self.parameters = list(network.parameters())
        group = optimizers.ParameterGroup("lora", self.parameters)
        self.optimizer = optimizers.create("AdamW", [group], lr=1e-4, arguments={}, allowed=())
        self.batch = {
            "latents": torch.randn(batch, 16, 1, side, side, device=device),
            "text_embeds": torch.randn(batch, text, 64, device=device),
            "pooled": torch.randn(batch, 64, device=device),
        }
        self.noisy = torch.randn_like(self.batch["latents"])
        self.target = torch.randn_like(self.batch["latents"])
        self.t_B = torch.rand(batch, device=device)
        self.conditions = {k: v for k, v in self.batch.items() if k != "latents"} | {
            "guidance": torch.ones(batch, device=device)
        }

    def bare_step(self) -> None:
        """Forward, backward and AdamW, nothing else."""
        self.optimizer.zero_grad(set_to_none=True)
        velocity = self.model(self.noisy, self.t_B, self.conditions)
        F.mse_loss(velocity, self.target).backward()
        self.optimizer.step()


def our_steps(case: Case, device: torch.device, folder: Path) -> Iterator[None]:
    """The training loop's own step on the same case; each ``next`` is one step."""
    schedule = schedules.ScheduleSettings(total_steps=10**6, warmup_steps=100)
    take_step = OptimizerStep(
        model=case.model,
        parameters=case.parameters,
        optimizer=case.optimizer,
        scaler=GradScaler(device.type, enabled=False),
        draw_times=lambda index, count: torch.rand(count),
        sample_times=lambda draws_B, height, width: timesteps.sample_times(
            "flux_shift", draws_B, timesteps.TimestepSettings(), latent_size=(height, width)
        ),
        guidance=1.0,
        max_grad_norm=1.0,
        seed=0,
    )
    with (
        LossHistory(folder / "loss.jsonl") as history,
        BatchReader(*_cached(case, folder), pin_memory=device.type == "cuda") as reader,
    ):
        log = StepLog(
            DivergenceGuard(factor=5.0).observe,
            [lambda step, smoothed: history.append(step)],
            events.silent,
            total_steps=10**6,
            smoothed=Smoothed(()),
        )
        for step, (index, batch) in enumerate(reader):
            rate = 1e-4 * schedules.multiplier("constant", step, schedule)
            optimizers.set_learning_rate(case.optimizer, rate)
            on_device = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            result = take_step.accumulate([(index, on_device)], 1)
            log.record(step + 1, 1, rate, result, norm=take_step.update())
            yield


def _cached(case: Case, folder: Path) -> tuple[list[CachedItem], Iterator[Planned]]:
    """Sixteen items like those of the fixed batch in a cache on disk, and an endless plan."""
    items: list[CachedItem] = []
    for number in range(16):
        latents, text = folder / f"{number}.safetensors", folder / f"{number}_text.safetensors"
        first = {name: tensor[0].cpu() for name, tensor in case.batch.items()}
        save_tensors(latents, {"latents": first.pop("latents")}, {})
        save_tensors(text, first, {})
        items.append(read_item(latents, text, str(number), repeats=1))
    batch_size = len(case.batch["latents"])
    batches = (
        batch
        for epoch in itertools.count()
        for batch in epoch_batches(items, batch_size=batch_size, seed=0, epoch=epoch)
    )
    return items, enumerate(batches)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(size: str, device: torch.device, rounds: int, folder: Path) -> tuple[float, float]:
    """Median seconds (bare, ours), alternating step by step."""
    case = Case(size, device)
    steps = our_steps(case, device, folder)
    for _ in range(5):
        case.bare_step()
        next(steps)
    bare: list[float] = []
    ours: list[float] = []
    for _ in range(rounds):
        bare.append(timed(case.bare_step, device))
        ours.append(timed(lambda: next(steps), device))
    return statistics.median(bare), statistics.median(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--rounds", type=int, default=100, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            bare, ours = measure(size, device, arguments.rounds, Path(folder))
        sys.stdout.write(
            f"{size:6s} bare {bare * 1000:8.2f} ms  ours {ours * 1000:8.2f} ms  "
            f"ratio {ours / bare:.3f}\n"
        )


if __name__ == "__main__":
    main()
