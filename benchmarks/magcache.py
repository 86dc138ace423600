"""MagCache: the errors of its plans, what they cost in quality, and what they save in time.

``plans`` compares the published rule with the optimal plan of as many computed steps on every
published curve. ``quality`` draws prompts with the embedded tiny model, whose curve it calibrates
on others, and compares with all steps: residuals reused, followed along a line, and scaled to the
size that the ratios say; the model's output reused in four ways at the same steps; and a run of as
many steps as are computed. ``time`` samples with a random FLUX whose blocks take nearly all of the
time, in turn with and without. Run from the repository root: ``python -m benchmarks.magcache all``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import flow, media, samplers
from engine.block_cache import cached_blocks, calibrated_blocks
from engine.demo import __file__ as demo_file
from engine.demo import draw, measure
from engine.demo.pictures import SIDE, Picture, all_pictures
from engine.jobs.picture import SamplingSettings, initial_noise, sample
from engine.magcache import (
    PRESETS,
    Plan,
    Rule,
    describe,
    even_plan,
    full_plan,
    greedy_plan,
    optimal_plan,
)
from engine.magcache_curves import (
    CONDITIONAL,
    families_with_published,
    published_curve,
    published_variants,
)
from engine.magcache_forecast import Predict, linear, reuse
from engine.magcache_plots import Quality, curve_and_plan, quality_curves

STEPS = 24
RULES = {name: rule for name, rule in PRESETS.items() if rule} | {
    "spec's second": Rule(threshold=0.12, k=3)
}
FLUX = draw.ARCHITECTURE
# (t, latents, velocity) of the computed steps so far, t, latents -> velocity
Output = Callable[[list[tuple[float, Tensor, Tensor]], float, Tensor], Tensor]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def compare_plans() -> None:
    """Greedy against optimal at equal numbers of computed steps."""
    changes: list[float] = []
    seen: set[tuple[float, ...]] = set()  # some models are published with the ratios of others
    for family in families_with_published():
        for variant in published_variants(family):
            curve = published_curve(family, variant=variant)
            assert curve
            if curve.of(CONDITIONAL) in seen:
                continue
            seen.add(curve.of(CONDITIONAL))
            for steps in sorted({25, curve.steps}):
                for name, rule in RULES.items():
                    greedy = greedy_plan(curve.of(CONDITIONAL), steps, rule)
                    number = greedy.num_computed
                    best = optimal_plan(curve.of(CONDITIONAL), steps, number, k=rule.k)
                    change = best.error / greedy.error - 1 if greedy.error else 0.0
                    changes.append(change)
                    say(
                        f"{variant:26s} {steps:3d} {name:14s} {number:3d} computed, "
                        f"{greedy.speedup():.2f}x, error {greedy.error:.4f} -> {best.error:.4f} "
                        f"{100 * change:+.1f} %"
                    )
    below = sum(change < -1e-9 for change in changes)
    least, most = max(changes), min(changes)
    say(
        f"lower in {below} of {len(changes)}; change: median "
        f"{100 * statistics.median(changes):.1f} %, least {100 * least:.1f} %, "
        f"most {100 * most:.1f} %"
    )
    ratios = published_curve("framepack", variant="HunyuanVideo 540p")
    assert ratios
    for steps, number in ((25, 10), (50, 19)):
        start = time.perf_counter()
        for _ in range(200):
            optimal_plan(ratios.of(CONDITIONAL), steps, number)
        say(f"optimal plan of {steps} steps: {(time.perf_counter() - start) / 200 * 1e6:.0f} us")


class Difference(NamedTuple):
    """From the pictures of all steps: RMSE of latents, mean PSNR in dB, mean SSIM."""

    rmse: float
    psnr: float
    ssim: float

    def __str__(self) -> str:
        return f"RMSE {self.rmse:.4f}  PSNR {self.psnr:5.2f} dB  SSIM {self.ssim:.4f}"


class Studio:
    """The tiny model, prompts, and their pictures with all steps."""

    def __init__(self, pictures: Sequence[Picture], *, seed: int) -> None:
        self.model = draw.load_model(Path(demo_file).parent / "model")
        self.noise, self.conditions = self._prepared(pictures, seed)
        shift = FLUX.timestep_shift(*self.noise.shape[-2:])
        self.settings = SamplingSettings(STEPS, shift, 2.5)
        self.latents = self.sampled(STEPS)
        self.pixels = self.model.autoencoder.decode(self.latents)

    def sampled(self, num_steps: int) -> Tensor:
        settings = SamplingSettings(num_steps, self.settings.shift, self.settings.guidance)
        return sample(FLUX, self.model.transformer, self.noise, self.conditions, settings)

    def cached(self, plan: Plan, predict: Predict) -> Tensor:
        with cached_blocks(FLUX, self.model.transformer, plan, predict=predict):
            return self.sampled(STEPS)

    def with_outputs(self, plan: Plan, output: Output) -> Tensor:
        """Sampling in which a skipped step's velocity is made of those of computed ones."""
        guidance = torch.full((len(self.noise),), self.settings.guidance)
        conditions = self.conditions | {"guidance": guidance}
        seen: list[tuple[float, Tensor, Tensor]] = []
        now = iter(plan.computed)

        def velocity(latents: Tensor, t: float) -> Tensor:
            if not next(now):
                return output(seen, t, latents)
            t_B = torch.full((len(latents),), t)
            found = FLUX.predict_velocity(self.model.transformer, latents, t_B, conditions)
            seen.append((t, latents, found))
            return found

        return samplers.euler(velocity, self.noise, flow.sampling_times(STEPS, self.settings.shift))

    def difference(self, latents: Tensor) -> Difference:
        pixels = self.model.autoencoder.decode(latents)
        rmse = (latents - self.latents).square().flatten(1).mean(1).sqrt().mean().item()
        # Pixels are in -1..1, so the largest difference is 2.
        squares = (pixels - self.pixels).square().flatten(1).mean(1).clamp(min=1e-10)
        psnr = (10 * (4 / squares).log10()).mean().item()
        pairs = zip(pixels, self.pixels, strict=True)
        ssim = [measure.similarity(media.to_image(a), media.to_image(b)) for a, b in pairs]
        return Difference(rmse, psnr, statistics.mean(ssim))

    def _prepared(self, pictures: Sequence[Picture], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        noise = [
            initial_noise(FLUX, width=SIDE, height=SIDE, seed=seed + index)
            for index in range(len(pictures))
        ]
        captions = [picture.caption() for picture in pictures]
        encoded = FLUX.encode_text(self.model.text_encoders, captions, 512)
        return torch.cat(noise), {
            name: torch.stack([item[name] for item in encoded]) for name in encoded[0]
        }


def output_reused(seen: list[tuple[float, Tensor, Tensor]], t: float, latents: Tensor) -> Tensor:
    """The last velocity."""
    return seen[-1][2]


def output_offset(seen: list[tuple[float, Tensor, Tensor]], t: float, latents: Tensor) -> Tensor:
    """The last difference of velocity and latents: EasyCache, arXiv:2507.02860."""
    _, before, velocity = seen[-1]
    return latents + velocity - before


def output_line(seen: list[tuple[float, Tensor, Tensor]], t: float, latents: Tensor) -> Tensor:
    """The line through the last two velocities."""
    if len(seen) < 2:
        return output_reused(seen, t, latents)
    (first, _, one), (second, _, two) = seen[-2:]
    return two + (two - one) * ((t - second) / (second - first))


def offset_line(seen: list[tuple[float, Tensor, Tensor]], t: float, latents: Tensor) -> Tensor:
    """The line through the last two differences of velocity and latents."""
    offsets = [(time, before, velocity - before) for time, before, velocity in seen[-2:]]
    return latents + output_line(offsets, t, latents)


OUTPUTS: dict[str, Output] = {
    "velocity reused": output_reused,
    "velocity, line": output_line,
    "EasyCache's offset reused": output_offset,
    "EasyCache's offset, line": offset_line,
}


def ways(studio: Studio, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The latents of everything that can be done at the steps of a plan."""

    def scaled(step: int, computed: Sequence[int]) -> dict[int, float]:
        return {computed[-1]: plan.products[step]}

    yield "residual reused", studio.cached(plan, reuse)
    yield "residual, line", studio.cached(plan, linear)
    if plan.error:  # unknown without ratios
        yield "residual scaled by ratios", studio.cached(plan, scaled)
    for name, output in OUTPUTS.items():
        yield name, studio.with_outputs(plan, output)


@torch.no_grad()
def compare_quality(num_prompts: int, folder: Path | None) -> None:
    """All presets, plans and ways to skip, against all steps."""
    trained = [picture for picture in all_pictures() if not picture.held_out]
    tuning = Studio(random.Random(1).sample(trained, 8), seed=1000)
    with calibrated_blocks(FLUX, tuning.model.transformer, STEPS) as cache:
        tuning.sampled(STEPS)
    ratios = cache.calibration()[CONDITIONAL].ratios
    studio = Studio(draw.held_out_pictures(num_prompts, seed=0), seed=0)
    assert torch.equal(studio.cached(full_plan(STEPS), reuse), studio.latents)
    points: dict[str, list[Quality]] = {}
    for name, rule in RULES.items():
        greedy = greedy_plan(ratios, STEPS, rule)
        number = greedy.num_computed
        say(f"{name}: {describe(greedy)}")
        few = studio.difference(studio.sampled(number))
        say(f"  {'so few steps':38s}{few}")
        points.setdefault("fewer steps", []).append(Quality(STEPS / number, few.psnr))
        plans = {
            "greedy": greedy,
            "optimal": optimal_plan(ratios, STEPS, number, k=rule.k),
            "even": even_plan(STEPS, number),
        }
        for kind, plan in plans.items():
            for way, latents in ways(studio, plan):
                found = studio.difference(latents)
                say(f"  {kind:8s}{way:30s}{found}")
                if kind != "even" and way in ("residual reused", "residual, line"):
                    label = f"{kind}, {way}"
                    points.setdefault(label, []).append(Quality(plan.speedup(), found.psnr))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        title = f"MagCache on the tiny model, {STEPS} steps, {num_prompts} prompts"
        picture = quality_curves(points, title=title, measure="PSNR in dB, against all steps")
        media.save_png(folder / "magcache_quality.png", picture)
        picture = curve_and_plan({CONDITIONAL: ratios}, greedy_plan(ratios, STEPS), title="tiny")
        media.save_png(folder / "magcache_plan.png", picture)


@torch.no_grad()
def compare_time(hidden: int, rounds: int) -> None:
    """CPU time of computed and skipped steps, in turn with runs without the cache.

    The medians of single steps are compared, since other work on the machine slows whole runs.
    """
    transformer, conditions, noise = random_flux(hidden)
    curve = published_curve("flux_kontext", variant="FLUX.1-dev")
    assert curve
    plans = {name: greedy_plan(curve.of(CONDITIONAL), 25, rule) for name, rule in RULES.items()}
    plain: list[float] = []
    computed: list[float] = []
    skipped: list[float] = []

    def timed() -> list[float]:
        marks = [time.process_time()]
        settings = SamplingSettings(25, 1.5, 2.5)
        sample(FLUX, transformer, noise, conditions, settings, lambda *_: marks.append(now()))
        return [later - earlier for earlier, later in pairwise(marks)]

    now = time.process_time
    for _ in range(rounds):
        plain += timed()
        for plan in plans.values():
            with cached_blocks(FLUX, transformer, plan):
                for seconds, ran in zip(timed(), plan.computed, strict=True):
                    (computed if ran else skipped).append(seconds)
    one, ours, less = map(statistics.median, (plain, computed, skipped))
    say(
        f"a step takes {1000 * one:.0f} ms; with the cache a computed one {ours / one:.3f} of it, "
        f"a skipped one {less / one:.4f}"
    )
    for name, plan in plans.items():
        num_skipped = plan.steps - plan.num_computed
        speedup = plan.steps * one / (plan.num_computed * ours + num_skipped * less)
        say(
            f"{name:14s} {plan.num_computed:2d} of {plan.steps} computed: {speedup:.2f}x, "
            f"{speedup / plan.speedup():.3f} of steps / computed"
        )


def random_flux(hidden: int) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A model of a few blocks, conditions and noise of 256 tokens."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=3,
        num_single_layers=6,
        num_attention_heads=hidden // 128,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        guidance_embeds=True,
    ).eval()
    conditions = {"text_embeds": torch.randn(1, 64, 256), "pooled": torch.randn(1, 64)}
    return transformer, conditions, torch.randn(1, 16, 1, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("plans", "quality", "time", "all"))
    parser.add_argument("--prompts", type=int, default=50, help="for quality")
    parser.add_argument("--output", type=Path, help="folder for the plots of quality")
    parser.add_argument("--hidden", type=int, default=768, help="of the model for time")
    parser.add_argument("--rounds", type=int, default=3, help="for time")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.part in ("plans", "all"):
        compare_plans()
    if arguments.part in ("quality", "all"):
        compare_quality(arguments.prompts, arguments.output)
    if arguments.part in ("time", "all"):
        compare_time(arguments.hidden, arguments.rounds)


if __name__ == "__main__":
    main()
