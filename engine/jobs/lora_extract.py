"""Makes a LoRA of the difference between a model that was tuned and the one it began with.

Layer by layer: memory holds two weights of one layer and what was extracted so far.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import adapter_ranks, lora_targets, low_rank
from ..adapter_weights import AdapterWeights, FullWeights
from ..architectures.names import LAYER_NAMES
from ..errors import CheckpointError, ConfigError
from ..events import Progress, Reporter, Saved, silent
from ..hardware import find_device
from ..layer_names import row_of
from ..lora_metadata import derived
from ..low_rank import RankChoice
from ..model_difference import Change, ModelOnDisk, Parameter, difference, open_model
from . import lora_outputs
from .lora_inputs import dtype_named
from .lora_layer_report import LayerResult, in_words, rank_chart, size, table
from .tool_result import ToolResult, check_not_an_input, check_output

_DEFAULT_MAX_RANK = 128


@dataclass(frozen=True)
class ExtractSettings:
    """What is extracted, and how it is stored.

    Args:
        dtype: "bf16", "fp16" or "fp32".
        format: how keys are spelled.
        exclude: patterns of published names of layers that are left out; see `lora_targets`.
        include: patterns of those that are taken; nothing takes all layers.
        min_difference: layers that differ by no more than this anywhere are left out.
        clamp_quantile: every number of both factors is limited to this quantile of their
            magnitudes. Some tools do so by 0.99, to lessen outliers; it makes the error larger.
        full_rest: biases, norms and other parameters that differ become full differences.
        device: where the large products are computed.
        seed: of the sketches.
    """

    dtype: str = "bf16"
    format: str = "comfyui"
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    min_difference: float = 0.0
    clamp_quantile: float | None = None
    full_rest: bool = False
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.min_difference >= 0:
            raise ConfigError(f"min_difference = {self.min_difference}: it must be at least 0")
        if self.clamp_quantile is not None and not 0 < self.clamp_quantile <= 1:
            raise ConfigError(
                f"clamp_quantile = {self.clamp_quantile}: it must be above 0, at most 1"
            )


@dataclass
class _Found:
    """What was made so far."""

    adapters: dict[str, AdapterWeights] = field(default_factory=dict)
    results: list[LayerResult] = field(default_factory=list)
    unchanged: int = 0
    small: int = 0
    # Names of biases, norms and the like that differ, and by how much at most.
    rest: dict[str, float] = field(default_factory=dict)


def run(
    *,
    tuned: Path,
    base: Path,
    output: Path,
    ranks: RankChoice,
    settings: ExtractSettings | None = None,
    overwrite: bool = False,
    architecture: str = "auto",
    report: Reporter = silent,
) -> ToolResult:
    """Write the LoRA that, added to ``base``, comes nearest to ``tuned``.

    Both may be in the layout of the makers, of ComfyUI or of diffusers, and in different types;
    where one is quantized, its rounding is a part of the difference. Layers without a difference
    are left out. Errors in the report are those of what is written, rounding included.

    Args:
        ranks: without ``max_rank``, no layer gets more than 128 where an amount chooses.

    Raises:
        EngineError: a setting or file cannot be used, or the models do not belong together.
    """
    settings = settings or ExtractSettings()
    check_output(output, overwrite=overwrite)
    extraction = _Extraction(
        open_model(tuned, LAYER_NAMES, architecture),
        open_model(base, LAYER_NAMES, architecture),
        _limited(ranks),
        settings,
        dtype_named(settings.dtype, torch.bfloat16),
        find_device(settings.device),
    )
    inputs = [*extraction.tuned.checkpoint.paths, *extraction.base.checkpoint.paths]
    check_not_an_input(output, inputs)
    selected = _selected(extraction.tuned, extraction.base, settings)
    found = _extracted(extraction, selected, report)
    if not found.adapters:
        raise CheckpointError(
            f"{tuned}: nothing that would be in the LoRA differs from {base}, so that there is "
            "nothing to write"
        )
    names = extraction.tuned.stored.names
    metadata = {"ss_base_model_version": names.base_models[0]}
    operation = f"extracted: {tuned.name} - {base.name}"
    remarks = lora_outputs.write(
        output,
        found.adapters,
        names,
        text_keys={},
        format=settings.format,
        dtype=extraction.dtype,
        metadata=derived([metadata], title=output.stem, operation=operation),
    )
    report(Saved(str(output), "lora"))
    lines, picture = [*_summary(extraction, found), *remarks], None
    if found.results:
        lines += [table(found.results), in_words(found.results)]
        picture = rank_chart(found.results, name=output.name)
    return ToolResult("\n".join([*lines, size(output.stat().st_size)]), output, picture)


@dataclass(frozen=True)
class _Extraction:
    """Makes adapters of the differences between two models."""

    tuned: ModelOnDisk
    base: ModelOnDisk
    ranks: RankChoice
    settings: ExtractSettings
    dtype: torch.dtype
    device: torch.device

    def layer(self, name: str, found: _Found) -> None:
        """Add the adapter of one layer's weight, if it differs enough."""
        change, largest = self._change(Parameter(name, "weight"))
        if largest == 0:
            found.unchanged += 1
            return
        if largest <= self.settings.min_difference:
            found.small += 1
            return
        change_OJ = change.flatten(1)
        # Each layer has a generator of its own, so that what is selected changes no other.
        generator = torch.Generator().manual_seed(self.settings.seed)
        rank = min(self.ranks.limit or _DEFAULT_MAX_RANK, *change_OJ.shape)
        decomposition = low_rank.decompose(change_OJ, rank=rank, generator=generator)
        best = decomposition.truncated(self.ranks.of(decomposition))
        if self.settings.clamp_quantile is not None:
            best = _clamped(best, self.settings.clamp_quantile)
        lora = adapter_ranks.lora_of(best, shape=change.shape, dtype=self.dtype)
        up, down = adapter_ranks.factors(lora, torch.float32)
        error = low_rank.squared_error(change_OJ, up.to(change), down.to(change))
        found.adapters[name] = lora
        found.results.append(LayerResult(name, None, lora.rank, decomposition.squared_norm, error))

    def rest(self, parameter: Parameter, found: _Found) -> None:
        """Compare a bias, a norm or the like, and take the difference if that is wanted."""
        change, largest = self._change(parameter)
        if largest <= self.settings.min_difference:
            return
        found.rest[str(parameter)] = largest
        if self.settings.full_rest:
            _take(found.adapters, parameter, change.to("cpu", self.dtype))

    def _change(self, parameter: Parameter) -> Change:
        return difference(self.tuned, self.base, parameter, device=self.device)


def _extracted(extraction: _Extraction, selected: Sequence[str], report: Reporter) -> _Found:
    tuned = extraction.tuned
    chosen = set(selected)
    parameters = [parameter for parameter in tuned.parameters() if parameter.layer in chosen]
    matrices = [parameter.layer for parameter in parameters if _is_matrix(tuned, parameter)]
    found = _Found()
    start = time.monotonic()
    for done, name in enumerate(matrices):
        eta = (time.monotonic() - start) / done * (len(matrices) - done) if done > 1 else None
        report(Progress("extracting", done, len(matrices), "layer", eta_seconds=eta))
        extraction.layer(name, found)
    for parameter in parameters:
        if not _is_matrix(tuned, parameter):
            extraction.rest(parameter, found)
    report(Progress("extracting", len(matrices), len(matrices), "layer"))
    return found


def _limited(ranks: RankChoice) -> RankChoice:
    if ranks.amount is None:
        return ranks
    if ranks.method == "cumulative":
        raise ConfigError(
            "method = 'cumulative' needs all singular values of whole weights, which takes hours; "
            "choose energy, frobenius or ratio"
        )
    return replace(ranks, max_rank=ranks.max_rank or _DEFAULT_MAX_RANK)


def _is_matrix(model: ModelOnDisk, parameter: Parameter) -> bool:
    """Whether it is the weight of a linear layer or a convolution."""
    found = row_of(model.stored.names, parameter.layer)
    bare = found is not None and found[0].bare
    return parameter.kind == "weight" and len(model.shape(parameter)) > 1 and not bare


def _selected(tuned: ModelOnDisk, base: ModelOnDisk, settings: ExtractSettings) -> list[str]:
    """The layers to compare; all of them, without patterns.

    Raises:
        EngineError: the models are of different families, a layer is only in one of them, or the
            patterns do not fit.
    """
    families = [model.stored.names.family for model in (tuned, base)]
    if families[0] != families[1]:
        raise CheckpointError(
            f"{tuned.path}: this is a model of {families[0]}, but {base.path} is one of "
            f"{families[1]}; extract from two models of one family"
        )
    shapes = base.stored.shapes() | tuned.stored.shapes()
    selected = lora_targets.select(
        shapes,
        # Tuning may have changed any layer, also those that a training of LoRAs leaves out.
        replace(tuned.stored.names, blocks=("",), default_excludes=(), always_excludes=()),
        exclude=settings.exclude,
        include=settings.include,
        convolutions=True,
    )
    chosen = set(selected)
    models = {model.path: set(model.parameters()) for model in (tuned, base)}
    for parameter in (*tuned.parameters(), *base.parameters()):
        absent = [path for path, parameters in models.items() if parameter not in parameters]
        if parameter.layer in chosen and absent:
            raise CheckpointError(
                f"{absent[0]}: there is no {parameter}, which the other model has; the models are "
                "not of one kind, or this layer has to be excluded"
            )
    return selected


def _clamped(best: low_rank.LowRank, quantile: float) -> low_rank.LowRank:
    magnitudes = torch.cat([best.up_OR.flatten(), best.down_RI.flatten()]).abs()
    position = max(1, round(quantile * len(magnitudes)))
    limit = float(magnitudes.kthvalue(position).values)
    return replace(
        best, up_OR=best.up_OR.clamp(-limit, limit), down_RI=best.down_RI.clamp(-limit, limit)
    )


def _take(adapters: dict[str, AdapterWeights], parameter: Parameter, change: Tensor) -> None:
    adapter = adapters.get(parameter.layer)
    if parameter.kind == "bias":
        adapter = FullWeights(None) if adapter is None else adapter
        adapters[parameter.layer] = replace(adapter, bias_diff=change)
    elif isinstance(adapter, FullWeights):
        adapters[parameter.layer] = replace(adapter, diff=change)
    else:
        adapters[parameter.layer] = FullWeights(change)


def _summary(extraction: _Extraction, found: _Found) -> list[str]:
    tuned = extraction.tuned
    compared = len(found.results) + found.unchanged + found.small
    lines = [
        f"{tuned.stored.names.family}: {compared} weights compared, {len(found.results)} "
        f"extracted, {found.unchanged} without a difference"
    ]
    if found.small:
        lines.append(f"{found.small} weights differ by no more than min_difference")
    if found.rest:
        name, largest = max(found.rest.items(), key=lambda each: each[1])
        fate = "not in the LoRA, which full_rest changes"
        if extraction.settings.full_rest:
            fate = "in the LoRA as full differences"
        lines.append(
            f"{len(found.rest)} biases, norms and other parameters differ, by up to "
            f"{largest:.3g} ({name}); they are {fate}"
        )
    for model in (tuned, extraction.base):
        if words := model.layout.in_words():
            lines.append(f"{model.path.name} is quantized, {words}: its rounding is extracted too")
    if left_over := tuned.left_over():
        lines.append(
            f"{len(left_over)} tensors of {tuned.path.name} are of no layer of the family and were "
            f"not compared ({min(left_over)})"
        )
    return lines
