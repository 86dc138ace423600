"""Uniform draws -> training times. Pure: the draws come from the caller.

Times are flow times in [0, 1], 1 = pure noise. Every choice is a mixture of distributions whose
inverse is known, so one draw gives one time, stratified draws stay stratified, and a range is cut
out of a distribution exactly, without trying again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import flow

# Probabilities are kept this far from 1 and 0, where the normal quantile is infinite.
_EDGE, _TINY = 1e-7, 1e-300
_BISECTIONS = 60


class Distribution(Protocol):
    """A distribution of times; draws and times are float64."""

    def mass(self, low: float, high: float) -> float:
        """The probability of a time between the two."""
        ...

    def times(self, u_B: Tensor, low: float, high: float) -> Tensor:
        """The quantiles ``u`` of what lies between ``low`` and ``high``."""
        ...


class Part(NamedTuple):
    """``logit(t)`` is normal with this mean and standard deviation in a ``share`` of all draws."""

    share: float
    mean: float
    std: float


@dataclass(frozen=True)
class LogitNormals:
    """A mixture of logit-normal distributions: a draw decides first the part, then the time.

    Esser et al. 2024, arXiv:2403.03206, section 3.1. A shift ``s t / (1 + (s - 1) t)`` adds
    ``ln s`` to a mean; a log signal-to-noise ratio ``L`` is ``-2 logit(t)``.
    """

    parts: tuple[Part, ...]

    def mass(self, low: float, high: float) -> float:
        return math.fsum(
            part.share * abs(last - first) for part, first, last, _ in self._cut(low, high)
        )

    def times(self, u_B: Tensor, low: float, high: float) -> Tensor:
        total = self.mass(low, high)
        columns: list[tuple[float, float, float, float]] = []
        edges = [0.0]
        for part, first, last, sign in self._cut(low, high):
            width = part.share * abs(last - first) / total
            slope = (last - first) / width if width else 0.0
            columns.append((first - slope * edges[-1], slope, part.mean, sign * part.std))
            edges.append(edges[-1] + width)
        table = torch.tensor(columns, dtype=u_B.dtype)
        if len(columns) == 1:
            offset, slope, mean, std = table[0]
        else:
            chosen_B = torch.zeros_like(u_B, dtype=torch.int32)
            for edge in edges[1:-1]:
                chosen_B += u_B >= edge
            offset, slope, mean, std = (
                column.contiguous().index_select(0, chosen_B) for column in table.T
            )
        probability_B = (offset + slope * u_B).clamp(_TINY, 1 - _EDGE)
        return torch.sigmoid(mean + std * torch.special.ndtri(probability_B))

    def _cut(self, low: float, high: float) -> Iterator[tuple[Part, float, float, int]]:
        """Each part with its probabilities up to ``low`` and ``high``.

        They are counted from the end of the line that is nearer, because 1 - p would lose the
        digits of a small p; the sign is -1 where that is the upper end.
        """
        for part in self.parts:
            first, last = ((_logit(t) - part.mean) / part.std for t in (low, high))
            sign = -1 if first + last > 0 else 1
            yield part, _normal(sign * first), _normal(sign * last), sign


@dataclass(frozen=True)
class Increasing:
    """``t = inverse(u)`` for a function that rises from 0 to 1."""

    inverse: Callable[[Tensor], Tensor]

    def mass(self, low: float, high: float) -> float:
        return self._draw(high) - self._draw(low)

    def times(self, u_B: Tensor, low: float, high: float) -> Tensor:
        first, last = self._draw(low), self._draw(high)
        return self.inverse(first + (last - first) * u_B)

    def _draw(self, t: float) -> float:
        """The draw that leads to ``t``."""
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            value = self.inverse(torch.tensor(middle, dtype=torch.float64)).item()
            low, high = (middle, high) if value < t else (low, middle)
        return high if t >= 1 else low


class TimestepSettings(NamedTuple):
    """What the choices are made from; see the settings of the same names.

    ``low`` and ``high`` are the range of times; ``keep_shape`` cuts it out of the distribution,
    else all of the distribution is squeezed into it.
    """

    scale: float = 1.0
    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: str = "none"
    low: float = 0.0
    high: float = 1.0
    keep_shape: bool = False


# (settings, tokens of 2x2 latents) -> distribution
Choice = Callable[[TimestepSettings, int], Distribution]


def uniform(settings: TimestepSettings, num_tokens: int) -> Distribution:
    """Every time equally often."""
    return Increasing(lambda u: u)


def sigmoid(settings: TimestepSettings, num_tokens: int) -> Distribution:
    """Middle times: ``sigmoid(scale z)`` with ``z`` standard normal."""
    return _logit_normal(0.0, settings.scale)


def shift(settings: TimestepSettings, num_tokens: int) -> Distribution:
    """`sigmoid`, moved towards noise by the user's shift."""
    return _logit_normal(math.log(settings.shift), settings.scale)


def flux_shift(settings: TimestepSettings, num_tokens: int) -> LogitNormals:
    """`sigmoid`, moved towards noise by what FLUX.1 uses for this number of tokens."""
    return _logit_normal(math.log(flow.flux_shift(num_tokens)), settings.scale)


def qwen_shift(settings: TimestepSettings, num_tokens: int) -> LogitNormals:
    """`sigmoid`, moved towards noise by what Qwen-Image uses for this number of tokens."""
    return _logit_normal(math.log(flow.qwen_shift(num_tokens)), settings.scale)


def logsnr(settings: TimestepSettings, num_tokens: int) -> Distribution:
    """A normal log signal-to-noise ratio; a mean of -6 trains style at high noise.

    Choi et al. 2024, arXiv:2411.14793.
    """
    return _logit_normal(-settings.logit_mean / 2, settings.logit_std / 2)


def sigma(settings: TimestepSettings, num_tokens: int) -> Distribution:
    """All times, or as the weighting scheme says.

    "logit_normal" and "mode" are densities of Esser et al. 2024, arXiv:2403.03206, section 3.1;
    as in diffusers' training scripts they are of the place in the schedule, which runs from noise
    to data, so a positive logit_mean leads towards data.
    """
    if settings.weighting == "logit_normal":
        return _logit_normal(-settings.logit_mean, settings.logit_std)
    if settings.weighting == "mode":
        scale = settings.mode_scale
        return Increasing(lambda u: u + scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u))
    return uniform(settings, num_tokens)


def qinglong_flux(settings: TimestepSettings, num_tokens: int) -> Distribution:
    """Mostly `flux_shift`, some style at high and some detail at low noise."""
    return _qinglong(flux_shift(settings, num_tokens), settings)


def qinglong_qwen(settings: TimestepSettings, num_tokens: int) -> Distribution:
    """Mostly `qwen_shift`, some style at high and some detail at low noise."""
    return _qinglong(qwen_shift(settings, num_tokens), settings)


# How often each part of the qinglong choices comes: stable, style, detail.
QINGLONG_PARTS = (0.80, 0.075, 0.125)
_DETAIL = (5.36, 1.0)  # mean and standard deviation of the log signal-to-noise ratio

CHOICES: dict[str, Choice] = {
    "uniform": uniform,
    "sigmoid": sigmoid,
    "shift": shift,
    "flux_shift": flux_shift,
    "qwen_shift": qwen_shift,
    "logsnr": logsnr,
    "sigma": sigma,
    "qinglong_flux": qinglong_flux,
    "qinglong_qwen": qinglong_qwen,
}


def sample_times(
    name: str, u_B: Tensor, settings: TimestepSettings, *, latent_size: tuple[int, int]
) -> Tensor:
    """Times [B], float32 and never outside the range, of uniform draws [B].

    A draw first chooses the part of a mixture, and what is left of it the time.

    Args:
        name: a key of `CHOICES`.
        latent_size: height and width in latents.

    Raises:
        ValueError: ``keep_shape`` and the distribution has no mass in the range.
    """
    num_tokens = (latent_size[0] // 2) * (latent_size[1] // 2)
    distribution = CHOICES[name](settings, num_tokens)
    low, high = (settings.low, settings.high) if settings.keep_shape else (0.0, 1.0)
    if not distribution.mass(low, high):
        raise ValueError(f"{name} has no times between {low:g} and {high:g}")
    t_B = distribution.times(u_B.double(), low, high)
    if not settings.keep_shape:
        t_B = settings.low + (settings.high - settings.low) * t_B
    return t_B.float().clamp(settings.low, settings.high)


def stratified_draws(count: int, *, num_strata: int, generator: torch.Generator) -> Tensor:
    """``count`` uniform draws in random order, as evenly many in each of equal parts of [0, 1].

    The numbers per part differ by at most one; which parts have one more is random.
    """
    whole = torch.arange(num_strata).repeat(count // num_strata)
    rest = torch.randperm(num_strata, generator=generator)[: count % num_strata]
    strata = torch.cat([whole, rest])[torch.randperm(count, generator=generator)]
    inside = torch.rand(count, generator=generator, dtype=torch.float64)
    return (strata + inside) / num_strata


def _logit_normal(mean: float, std: float) -> LogitNormals:
    return LogitNormals((Part(1.0, mean, std),))


def _qinglong(stable: LogitNormals, settings: TimestepSettings) -> LogitNormals:
    """The log signal-to-noise ratios are those of `logsnr` for style, and of `_DETAIL`."""
    moments = (
        stable.parts[0][1:],
        (-settings.logit_mean / 2, settings.logit_std / 2),
        (-_DETAIL[0] / 2, _DETAIL[1] / 2),
    )
    return LogitNormals(
        tuple(Part(share, *part) for share, part in zip(QINGLONG_PARTS, moments, strict=True))
    )


def _logit(t: float) -> float:
    return math.log(t / (1 - t)) if 0 < t < 1 else math.inf * (1 if t >= 1 else -1)


def _normal(z: float) -> float:
    """The probability of a standard normal number below ``z``."""
    return math.erfc(-z / math.sqrt(2)) / 2
