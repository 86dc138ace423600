"""Averages the LoRA files that a training saved on its way: post-hoc EMA.

Tensors are averaged key by key, as the published tool does, so that keys, kinds and formats stay
as they are. While it is made, memory holds the mean and two more tensors, however many files
there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor

from .. import ema, lora_plots, text_charts
from ..errors import CheckpointError, ConfigError, NotFiniteError
from ..events import Message, Progress, Reporter, Saved, silent
from ..lora_metadata import with_hashes
from ..text_charts import Row
from ..weights import save_tensors
from .lora_inputs import dtype_named
from .lora_layer_report import percent, size
from .lora_series import SavedLora, check_alike, check_steps, described, open_series
from .outputs import explained
from .tool_result import ToolResult, check_output

_BETA = 0.95  # the published tool's
_REPORT_WIDTH = 100
_LARGE_WEIGHT = 0.5


@dataclass(frozen=True)
class Averaging:
    """How much each file counts: by ``beta`` (0.95 if nothing is given) or by ``sigma_rel``.

    Args:
        beta: part of the mean so far that every file leaves of it, in [0, 1).
        beta2: that of the newest file; those between have even steps from ``beta``.
        sigma_rel: width of the power function profile, as a part of the training.
        keep_first: with ``sigma_rel``, the oldest file counts too.
        by_steps: with ``sigma_rel``, each file counts for the optimizer steps since the one
            before it, and the oldest for all before.

    Raises:
        ConfigError: they contradict each other, or one is out of range.
    """

    beta: float | None = None
    beta2: float | None = None
    sigma_rel: float | None = None
    keep_first: bool = False
    by_steps: bool = False

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("beta2", self.beta2)):
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} = {value}: it must be at least 0 and below 1")
        if self.sigma_rel is None:
            if self.keep_first or self.by_steps:
                name = "keep_first" if self.keep_first else "by_steps"
                raise ConfigError(f"{name}: it needs sigma_rel; give one such as 0.2")
            return
        if self.beta is not None or self.beta2 is not None:
            raise ConfigError("sigma_rel: it takes the place of beta and beta2; give one or other")
        try:
            ema.gamma_of(self.sigma_rel)
        except ValueError:
            raise ConfigError(
                f"sigma_rel = {self.sigma_rel}: it must be above 0 and at most "
                f"{math.floor(ema.WIDEST_SIGMA_REL * 1e4) / 1e4}, where all files count the same; "
                "the usual range is 0.05 to 0.25"
            ) from None

    def betas(self, steps: Sequence[int | None]) -> list[float]:
        """Of all files but the oldest, whose ``steps`` are known where they are needed."""
        if self.sigma_rel is None:
            beta = _BETA if self.beta is None else self.beta
            return ema.betas(len(steps), beta=beta, beta2=self.beta2)
        gamma = ema.gamma_of(self.sigma_rel)
        if self.by_steps:
            return ema.step_betas([step or 0 for step in steps], gamma=gamma)
        return ema.power_betas(len(steps), gamma=gamma, keep_first=self.keep_first)

    def in_words(self) -> str:
        """The settings, for people."""
        if self.sigma_rel is None:
            beta = f"beta {_BETA if self.beta is None else self.beta:g}"
            return beta if self.beta2 is None else f"{beta} to {self.beta2:g}"
        width = f"sigma_rel {self.sigma_rel:g} (gamma {ema.gamma_of(self.sigma_rel):.4g})"
        return f"{width}, by steps" if self.by_steps else width


_DEFAULT = Averaging()


def run(
    *,
    sources: Sequence[Path],
    output: Path,
    averaging: Averaging = _DEFAULT,
    sort: str = "time",
    dtype: str | None = None,
    overwrite: bool = False,
    architecture: str = "auto",
    report: Reporter = silent,
) -> ToolResult:
    """Write the mean of LoRA files of one training; the picture shows how much each counts.

    Args:
        sources: at least two.
        sort: what says which file is older: the "time" it was changed, the number of "steps" in
            it or in its name, its "name" (numbers in it by value), or the order "given".
        dtype: "bf16", "fp16" or "fp32"; None keeps the type of each tensor.
        architecture: the family; "auto" finds out, and lets pass what is of none we know.

    Raises:
        EngineError: a setting or file cannot be used, or the files do not fit each other.
    """
    check_output(output, overwrite=overwrite)
    number_type = None if dtype is None else dtype_named(dtype, torch.float32)
    files = open_series(sources, sort)
    if output.resolve() in [path.resolve() for path in sources]:
        raise ConfigError(f"{output}: the file to write is one of the sources; choose another name")
    if averaging.by_steps:
        check_steps(files)
    alphas = check_alike(files)
    about = described(files[-1], architecture)
    steps = [file.step for file in files]
    weights = ema.weights_of(averaging.betas(steps))
    remarks = [*_remarks(files, weights, averaging, sort)]
    for remark in remarks:
        report(Message(remark, "warning"))
    tensors = _averaged(files, weights, alphas, number_type, report)
    with explained(output):
        save_tensors(output, tensors, _metadata(files, weights, averaging, tensors))
    report(Saved(str(output), "lora", files[-1].step))
    lines = [
        f"mean of {len(files)} files ({about}) by {averaging.in_words()}",
        _table(files, weights),
        f"it is as steady as the mean of {ema.effective_number(weights):.1f} files that count "
        "the same",
        *(f"- {remark}" for remark in remarks),
        f"written: {output} ({size(output.stat().st_size)})",
    ]
    title = f"{output.stem}: {averaging.in_words()}"
    return ToolResult("\n".join(lines), output, _picture(files, weights, title))


# The mean


def _averaged(
    files: Sequence[SavedLora],
    weights: Sequence[float],
    fixed: set[str],
    dtype: torch.dtype | None,
    report: Reporter,
) -> dict[str, Tensor]:
    counting = [(file, weight) for file, weight in zip(files, weights, strict=True) if weight]
    keys = files[-1].checkpoint.keys()
    result: dict[str, Tensor] = {}
    for done, key in enumerate(keys):
        if done % 16 == 0:
            report(Progress("averaging", done, len(keys), "tensor"))
        if key in fixed:
            result[key] = files[-1].checkpoint.read(key)
            continue
        tensors = (file.checkpoint.read(key) for file, _ in counting)
        mean = ema.weighted_sum(tensors, (weight for _, weight in counting))
        stored = mean.to(dtype or _common_type(files, key))
        if not stored.isfinite().all():
            _refuse_not_finite([file for file, _ in counting], key, mean, stored.dtype)
        result[key] = stored
    report(Progress("averaging", len(keys), len(keys), "tensor"))
    return result


def _refuse_not_finite(
    files: Sequence[SavedLora], key: str, mean: Tensor, dtype: torch.dtype
) -> NoReturn:
    # A value that is not finite makes the mean so; only then is it worth looking for its file.
    for file in files:
        if not file.checkpoint.read(key, torch.float64).isfinite().all():
            raise CheckpointError(
                f"{file.path}: {key} has values that are NaN or infinite; leave this file out"
            )
    name = str(dtype).removeprefix("torch.")
    raise NotFiniteError(
        f"{files[-1].path}: {key} has values up to {mean.abs().max().item():.3g}, too large for "
        f"{name}; choose bf16 or fp32"
    )


def _common_type(files: Sequence[SavedLora], key: str) -> torch.dtype:
    found = {file.checkpoint.dtype(key) for file in files}
    return found.pop() if len(found) == 1 else torch.float32


def _metadata(
    files: Sequence[SavedLora],
    weights: Sequence[float],
    averaging: Averaging,
    tensors: dict[str, Tensor],
) -> dict[str, str]:
    """That of the newest file, and what was done."""
    parts = [
        {"file": file.path.name, "step": file.step, "weight": weight}
        for file, weight in zip(files, weights, strict=True)
    ]
    note = json.dumps({**asdict(averaging), "files": parts})
    return with_hashes(tensors, files[-1].metadata | {"lora_loom.ema": note})


# In words


def _remarks(
    files: Sequence[SavedLora], weights: Sequence[float], averaging: Averaging, sort: str
) -> list[str]:
    remarks: list[str] = []
    steps = [file.step for file in files if file.step is not None]
    if sort != "steps" and steps != sorted(steps):
        remarks.append(
            f"by {'their order' if sort == 'given' else sort} the files are not in the order of "
            "their steps; if that is not meant, sort by steps"
        )
    if twice := next((step for step in steps if steps.count(step) > 1), None):
        remarks.append(f"several files are of step {twice:,}, so that it counts several times")
    if not weights[0]:
        if averaging.sigma_rel is not None:
            remarks.append(
                f"the oldest file, {files[0].path.name}, has no part in the mean, as in the "
                "published tool; with keep_first or by_steps it has"
            )
    elif weights[0] > _LARGE_WEIGHT and averaging.sigma_rel is None:
        remarks.append(
            f"the oldest file alone makes {percent(weights[0])} of the mean, because a mean by "
            f"beta begins with it and there are only {len(files)} files; a smaller beta or "
            "sigma_rel gives more to the newer ones"
        )
    return remarks


def _table(files: Sequence[SavedLora], weights: Sequence[float]) -> str:
    with_steps = any(file.step is not None for file in files)
    rows: list[Row] = []
    for file, weight in zip(files, weights, strict=True):
        step = ("-" if file.step is None else f"{file.step:,}",) if with_steps else ()
        rows.append(Row((file.path.name, *step, f"{weight:.2%}"), weight))
    headings = ("file", *(("step",) if with_steps else ()), "weight")
    return text_charts.bar_chart(headings, rows, width=_REPORT_WIDTH)


def _picture(files: Sequence[SavedLora], weights: Sequence[float], title: str) -> Image.Image:
    steps = [f"{file.step:,}" for file in files if file.step is not None]
    if len(steps) == len(files):
        return lora_plots.checkpoint_weights(weights, steps, title=title, axis="optimizer step")
    names = [file.path.stem for file in files]
    axis = "file, from the oldest to the newest"
    return lora_plots.checkpoint_weights(weights, names, title=title, axis=axis)
