"""What a MODEL of ComfyUI is and which part of a sampling run it makes, as MagCache has to know.

All is read from ComfyUI's objects; nothing is changed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.errors import ConfigError
from ..engine.weights import fingerprint

# Kind ("double_block" or "single_block") and index, as ComfyUI names a block to be replaced.
BlockName = tuple[str, int]

# ComfyUI's class of a diffusion model -> our family. These do nothing between their blocks.
_FAMILIES = {
    "Flux": "flux_kontext",
    "HunyuanVideo": "hunyuan_video",
    "QwenImageTransformer2DModel": "qwen_image",
    "WanModel": "wan",
    "CameraWanModel": "wan",
    "HumoWanModel": "wan",
    "VaceWanModel": "wan",
}
_MOST_STEPS = 1000
_TRIED = 80  # numbers of steps that a part of a run may be of; half a second
# Noise levels of the same step: in float32, or on the tables of 1000 and more that grids go by.
_EQUAL, _CLOSE = 1e-6, 1e-4


@dataclass(frozen=True)
class NativeModel:
    """A diffusion model of ComfyUI.

    ``identity`` tells its weights from others; LoRAs do not count. ``blocks`` are in the order in
    which they run. ``side_cost`` is the part of a step's time that skipping the blocks does not
    save. ``hindrance`` says why no step can be skipped, if so.
    """

    family: str
    name: str
    identity: str
    blocks: tuple[BlockName, ...]
    side_cost: float = 0.0
    hindrance: str = ""


@dataclass(frozen=True)
class Part:
    """The steps ``first`` to ``end - 1`` of a run of ``steps``."""

    first: int
    end: int
    steps: int

    @property
    def is_whole(self) -> bool:
        return self.end - self.first == self.steps

    def __str__(self) -> str:
        if self.is_whole:
            return f"{self.steps} steps"
        return f"steps {self.first + 1} to {self.end} of {self.steps}"


@dataclass(frozen=True)
class RunFacts:
    """What a curve of ratios depends on besides the model."""

    part: Part
    scheduler: str  # sampler and time grid
    shift: float


def native_model(patcher: Any) -> NativeModel:
    """What the MODEL is.

    Raises:
        ConfigError: it is of a family without MagCache.
    """
    diffusion_model = patcher.model.diffusion_model
    kinds = [kind.__name__ for kind in type(diffusion_model).__mro__]
    is_other_wan = kinds[0] not in _FAMILIES and "WanModel" in kinds
    family = "wan" if is_other_wan else _FAMILIES.get(kinds[0])
    if family is None:
        raise ConfigError(
            f"MagCache: the model is a {kinds[0]}; it works with FLUX.1, HunyuanVideo, Qwen-Image "
            "and Wan 2.1 and 2.2"
        )
    side_cost, hindrance = 0.0, ""
    if is_other_wan:
        hindrance = f"MagCache does not know this kind of Wan ({kinds[0]}): all steps are computed"
    elif kinds[0] == "VaceWanModel":
        side_cost, hindrance = _beside_the_blocks(diffusion_model)
    path = _file_of(patcher)
    identity = fingerprint(path) if path else _digest_of_shapes(diffusion_model)
    return NativeModel(
        family,
        path.name if path else "",
        identity,
        _blocks(diffusion_model, family),
        side_cost,
        hindrance,
    )


def run_facts(model_sampling: Any, sampler: Any, sigmas: Tensor) -> RunFacts:
    """What kind of run the noise levels ``sigmas`` [steps + 1] belong to.

    A run that does not begin with pure noise or does not end without any is a part of a longer
    one, whose length is found by the time that it takes.
    """
    from comfy.samplers import KSAMPLER

    steps = len(sigmas) - 1
    found = _grid(model_sampling, sigmas, [steps])
    if found is None:
        start, end = (_time(model_sampling, float(sigmas[index])) for index in (0, -1))
        part = _part(steps, start, end)
        # On some grids a step takes more or less time than the mean.
        likely = sorted(range(steps, 4 * steps + 3), key=lambda total: abs(total - part.steps))
        found = _grid(model_sampling, sigmas, likely[:_TRIED]) or (part, "custom")
    part, scheduler = found
    name = type(sampler).__name__
    if isinstance(sampler, KSAMPLER):
        name = sampler.sampler_function.__name__.removeprefix("sample_")
    return RunFacts(part, f"{name} {scheduler}", flow_shift(model_sampling))


def flow_shift(model_sampling: Any) -> float:
    """The factor that moves the time grid towards noise; 1 for none.

    FLUX's own setting of that name is the logarithm.
    """
    middle = float(model_sampling.percent_to_sigma(0.5))
    return middle / (1 - middle)


def _beside_the_blocks(vace: Any) -> tuple[float, str]:
    """The part of the time that VACE's second row of blocks takes, and what they hinder.

    ComfyUI adds their output after some of the blocks, in skipped steps, too. That is lost where
    a block follows, because the last one gives what was kept.
    """
    beside, blocks = len(vace.vace_blocks), len(vace.blocks)
    if blocks - 1 in vace.vace_layers_mapping:
        return 0.0, "this VACE model adds to what its last block gives: all steps are computed"
    return beside / (beside + blocks), ""


def _blocks(diffusion_model: Any, family: str) -> tuple[BlockName, ...]:
    lists: dict[str, Callable[[], list[tuple[str, Any]]]] = {
        "flux_kontext": lambda: _double_and_single(diffusion_model),
        "hunyuan_video": lambda: _double_and_single(diffusion_model),
        "qwen_image": lambda: [("double_block", diffusion_model.transformer_blocks)],
        "wan": lambda: [("double_block", diffusion_model.blocks)],
    }
    return tuple((kind, index) for kind, blocks in lists[family]() for index in range(len(blocks)))


def _double_and_single(diffusion_model: Any) -> list[tuple[str, Any]]:
    return [
        ("double_block", diffusion_model.double_blocks),
        ("single_block", diffusion_model.single_blocks),
    ]


def _file_of(patcher: Any) -> Path | None:
    """The file that the model was read from, if its loader says so."""
    from .eight_bit_model import ModelRequest

    if patcher.cached_patcher_init is None:
        return None
    _, arguments, *_ = patcher.cached_patcher_init
    first = arguments[0] if arguments else None
    path = first.path if isinstance(first, ModelRequest) else first
    return Path(path) if isinstance(path, str | Path) and Path(path).is_file() else None


def _digest_of_shapes(module: nn.Module) -> str:
    """The same for all models that are built alike: what is left where no file is known."""
    shapes = [(name, tuple(each.shape)) for name, each in module.named_parameters()]
    return hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest()[:16]


def _grid(model_sampling: Any, sigmas: Tensor, totals: list[int]) -> tuple[Part, str] | None:
    """The one of ComfyUI's time grids that has these noise levels, and which part of it they are.

    Args:
        totals: the numbers of steps to try.
    """
    from comfy.samplers import SCHEDULER_NAMES, calculate_sigmas

    wanted = sigmas.float().cpu()
    closest, found = _CLOSE, None
    # Some samplers leave out the last step but one of a longer grid.
    for more, total, name in itertools.product((0, 1), totals, SCHEDULER_NAMES):
        grid = calculate_sigmas(model_sampling, name, total + more).float().cpu()
        if more:
            grid = torch.cat([grid[:-2], grid[-1:]])
        first = int((grid - wanted[0]).abs().argmin())
        part = grid[first : first + len(wanted)]
        error = float((part - wanted).abs().max()) if part.shape == wanted.shape else closest
        if error < closest:
            closest, found = error, (Part(first, first + len(wanted) - 1, len(grid) - 1), name)
        if error < _EQUAL:
            break
    return found


def _part(steps: int, start: float, end: float) -> Part:
    """Where ``steps`` are that take the times ``start`` to ``end`` of a run from 0 to 1."""
    total = round(steps / max(end - start, steps / _MOST_STEPS))
    total = min(max(total, steps), _MOST_STEPS)
    first = min(round(start * total), total - steps)
    return Part(first, first + steps, total)


def _time(model_sampling: Any, sigma: float) -> float:
    """The part of a run, 0 to 1, after which the noise level is ``sigma``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if float(model_sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2
