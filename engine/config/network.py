"""The network that is trained, and what the model is given before."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from ..config_types import Paths, PathSetting, parse_arguments
from ..setting_words import expected
from .group import Group

_MOST_CHARACTERS = 1000  # of a pattern
Kind = Literal["lora", "loha", "lokr"]
_LORA_MODULES = ("lora", "lora_flux", "lora_wan", "lora_framepack", "lora_qwen_image")
# What the names of modules, which come from musubi-tuner, mean.
KINDS: dict[str, Kind] = {
    **{f"networks.{name}": "lora" for name in _LORA_MODULES},
    "networks.loha": "loha",
    "networks.lokr": "lokr",
}


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else list(value) if type(value) is tuple else value


def _check_patterns(values: list[str]) -> list[str]:
    for value in values:
        _check_pattern(value)
    return values


def _check_pattern(value: str) -> None:
    if len(value) > _MOST_CHARACTERS:
        raise ValueError(f"patterns of at most {_MOST_CHARACTERS} characters")
    if re.search(r"[\x00-\x1f]", value):
        raise ValueError(
            f"patterns without control characters (not {value!r}); write r before the quotes"
        )
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"regular expressions ({value!r} is none: {error})") from None


def _rank_patterns(value: Any) -> Any:
    """``{pattern: rank}`` or ``{pattern: (rank, alpha)}`` as pairs of pattern and both."""
    if not isinstance(value, dict):
        return value
    found: list[tuple[Any, Any, Any]] = []
    for pattern, given in value.items():
        rank, *alpha = given if isinstance(given, tuple | list) and given else (given,)
        if len(alpha) > 1:
            raise ValueError(f"a rank and at most an alpha for each pattern (not {given!r})")
        found.append((pattern, rank, alpha[0] if alpha else None))
    return found


def _check_rank_patterns(
    values: list[tuple[str, int, float | None]],
) -> list[tuple[str, int, float | None]]:
    for pattern, rank, alpha in values:
        _check_pattern(pattern)
        if not 1 <= rank <= 4096:
            raise ValueError(f"ranks from 1 to 4096 (not {rank} for {pattern!r})")
        if alpha is not None and not 0 <= alpha <= 1e6:
            raise ValueError(f"alphas from 0 to 1,000,000 (not {alpha} for {pattern!r})")
    return values


Patterns = Annotated[list[str], BeforeValidator(_texts), AfterValidator(_check_patterns)]
RankPatterns = Annotated[
    list[tuple[str, int, float | None]],
    BeforeValidator(_rank_patterns),
    AfterValidator(_check_rank_patterns),
]


class NetworkArguments(Group):
    """Entries of network_args"""

    loraplus_lr_ratio: float | None = Field(
        default=None,
        gt=0,
        le=10_000,
        description="LoRA+: the learning rate of the up side (B) is this many times the other; "
        "4 to 16 are usual.",
    )
    exclude_patterns: Patterns = Field(
        default=[],
        description="Layers to leave out: regular expressions that match the whole name, such as "
        r"double_blocks\.0\..*",
    )
    include_patterns: Patterns = Field(
        default=[],
        description="Layers to train: alone, only these; with exclude_patterns, these of what was "
        "left out are trained all the same.",
    )
    rank_patterns: RankPatterns = Field(
        default=[],
        description="Other ranks for some layers: {pattern: rank} or {pattern: (rank, alpha)}; "
        "the first pattern that matches counts.",
    )
    conv_dim: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Rank of convolutions larger than 1x1; unset: they are not trained.",
    )
    conv_alpha: float = Field(
        default=1.0, ge=0, le=1e6, description="Their alpha; 0 means their rank."
    )
    rank_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the ranks (LoHa, LoKr: of the outputs) left out of each step.",
    )
    module_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the layers left out of each step."
    )
    dora_wd: bool = Field(
        default=False,
        description="Train the magnitude of the weights separately (DoRA); LoRA only.",
    )
    factor: int = Field(
        default=-1,
        ge=-1,
        le=65536,
        description="Of LoKr: how the sizes are divided; -1: as equally as possible.",
    )
    verbose: bool = Field(default=False, description="Tell every layer that is trained.")


def parse_network_arguments(values: list[str]) -> NetworkArguments:
    """What ``network_args`` say.

    Raises:
        ValueError: completes the sentence "expected ...".
    """
    given = parse_arguments(values)
    known = NetworkArguments.model_fields
    for name in given:
        if name not in known:
            near = get_close_matches(name.lower(), list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"known keys (not {name!r}; {hint})")
    try:
        return NetworkArguments(**given)
    except ValidationError as error:
        detail = error.errors()[0]
        name = str(detail["loc"][0])
        reason = f"{_expected(name)} (not {given[name]!r})"
        if detail["type"] == "value_error":
            reason = str(detail.get("ctx", {})["error"])
        raise ValueError(f"for {name} {reason}") from None


def _expected(name: str) -> str:
    if name == "rank_patterns":
        return "{'pattern': rank} or {'pattern': (rank, alpha)}"
    return expected(NetworkArguments.model_fields[name])


def _check_network_arguments(values: list[str]) -> list[str]:
    parse_network_arguments(values)
    return values


def _check_multipliers(values: list[float], info: ValidationInfo) -> list[float]:
    num_files = len(info.data.get("base_weights", values))
    if len(values) > num_files:
        raise ValueError(f"at most one value for each of the {num_files} files of base_weights")
    return values


class NetworkConfig(Group):
    """Network"""

    network_module: Literal[
        "networks.lora",
        "networks.lora_flux",
        "networks.lora_wan",
        "networks.lora_framepack",
        "networks.lora_qwen_image",
        "networks.loha",
        "networks.lokr",
    ] = Field(
        default="networks.lora",
        description="LoRA (the names of families mean the same), LoHa or LoKr.",
    )
    network_dim: int = Field(default=16, ge=1, le=4096, description="Rank of the LoRA.")
    network_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="The LoRA is scaled by alpha / rank; unset or 0 means the rank (scale 1).",
    )
    network_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the values inside the LoRA that is left out of each step; LoRA only.",
    )
    network_args: Annotated[list[str], AfterValidator(_check_network_arguments)] = Field(
        default=[], description='More about the network as "key=value"; see below for the keys.'
    )
    scale_weight_norms: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="After each step, scale down what a layer's adapter adds to this norm.",
    )
    network_weights: PathSetting | None = Field(
        default=None, description="A LoRA to go on training; any kind of file of this family."
    )
    dim_from_weights: bool = Field(
        default=False,
        description="Take kind, layers, ranks and alphas from network_weights.",
    )
    base_weights: Paths = Field(
        default=[], description="LoRAs to merge into the model before the training."
    )
    base_weights_multiplier: Annotated[list[float], AfterValidator(_check_multipliers)] = Field(
        default=[], description="How strongly each is merged; 1 where missing."
    )

    @property
    def kind(self) -> Kind:
        return KINDS[self.network_module]

    @property
    def alpha(self) -> float:
        """The alpha that is used."""
        return float(self.network_alpha or self.network_dim)

    @property
    def arguments(self) -> NetworkArguments:
        """``network_args`` as values."""
        return parse_network_arguments(self.network_args)

    @property
    def base_loras(self) -> list[tuple[Any, float]]:
        """Path and multiplier of each of ``base_weights``."""
        missing = len(self.base_weights) - len(self.base_weights_multiplier)
        return list(
            zip(self.base_weights, [*self.base_weights_multiplier, *[1.0] * missing], strict=True)
        )
