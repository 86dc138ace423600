"""LoRA Settings and LoRA Metadata: which network is trained, and what its file says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..engine.config import FIELDS, NetworkArguments
from ..engine.config.network import parse_network_arguments
from ..engine.errors import ConfigError
from . import paths
from .sockets import CATEGORY, LoraType, MetadataType
from .widgets import settings, value_of, widget

_MENU = f"{CATEGORY}/settings"
_WHERE = "LoRA Settings"
# The other names of modules mean the first one.
_MODULES = ["networks.lora", "networks.loha", "networks.lokr"]
_ADVANCED = (
    "network_dropout",
    "rank_dropout",
    "module_dropout",
    "scale_weight_norms",
    "dora_wd",
    "factor",
    "conv_dim",
    "conv_alpha",
    "verbose",
    "save_format",
    "dim_from_weights",
)


class LoraSettings(io.ComfyNode):
    """How the LoRA is built and stored."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_LoraSettings",
            display_name="LoRA Settings",
            category=_MENU,
            description="Which network is trained on which layers, what it begins with and how it "
            "is stored; its rank is set on Train LoRA.",
            search_aliases=["loha", "lokr", "dora", "lora+", "target modules"],
            inputs=[widget("network_alpha"), widget("save_precision"), *_later_inputs()],
            outputs=[LoraType.Output(display_name="lora")],
        )

    @classmethod
    def execute(
        cls, network_weights: str = paths.NO_FOLDER, base_weights: str = "", **widgets: Any
    ) -> io.NodeOutput:
        values = network_settings(widgets)
        values["network_weights"] = paths.chosen_lora(network_weights)
        files = base_loras(base_weights)
        values["base_weights"] = [paths.lora(name) for name, _ in files]
        values["base_weights_multiplier"] = [multiplier for _, multiplier in files]
        return io.NodeOutput(values)


class LoraMetadata(io.ComfyNode):
    """What is written into the LoRA file for people and programs that browse it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_LoraMetadata",
            display_name="LoRA Metadata",
            category=_MENU,
            description="What the LoRA file says of itself: title, author, license, or nothing.",
            inputs=[
                widget("metadata_title"),
                widget("metadata_author"),
                widget("metadata_description", multiline=True),
                widget("metadata_license"),
                widget("metadata_tags", placeholder="style, painting"),
                widget("training_comment"),
                widget("no_metadata"),
                widget("metadata_reso", advanced=True, placeholder="1024,1024"),
                widget("metadata_arch", advanced=True),
            ],
            outputs=[MetadataType.Output(display_name="metadata")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        return io.NodeOutput(settings("LoRA Metadata", widgets))


def network_settings(widgets: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that widgets mean; keys of network_args become its entries.

    Raises:
        ConfigError: lists the values that cannot be.
    """
    keys = NetworkArguments.model_fields
    given = {name: value_of(name, value) for name, value in widgets.items() if name in keys}
    if given.get("rank_patterns"):
        given["rank_patterns"] = _rank_patterns(given["rank_patterns"])
    entries = [f"{name}={value!r}" for name, value in given.items() if value != keys[name].default]
    try:
        parse_network_arguments(entries)
    except ValueError as error:
        raise ConfigError(f"{_WHERE}: expected {error}") from None
    rest = {name: value for name, value in widgets.items() if name not in keys}
    return settings(_WHERE, rest) | {"network_args": entries}


def base_loras(text: str) -> list[tuple[str, float]]:
    """Name and multiplier of each line ``name`` or ``name: 0.5``.

    Raises:
        ConfigError: a multiplier is no number.
    """
    files: list[tuple[str, float]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        # A name may have a colon, too, but ends with what tells the kind of file.
        name, colon, number = line.rpartition(":")
        if not colon or "." not in name:
            files.append((line, 1.0))
            continue
        try:
            files.append((name.strip(), float(number)))
        except ValueError:
            raise ConfigError(
                f"{_WHERE}: base_weights: expected lines such as name.safetensors: 0.5 (not "
                f"{line!r})"
            ) from None
    return files


def _rank_patterns(lines: list[str]) -> dict[str, tuple[int, float] | int]:
    """Of lines ``pattern = rank`` or ``pattern = rank, alpha``."""
    found: dict[str, tuple[int, float] | int] = {}
    for line in lines:
        pattern, equals, numbers = (part.strip() for part in line.rpartition("="))
        rank, comma, alpha = numbers.partition(",")
        try:
            value = (int(rank), float(alpha)) if comma else int(rank)
        except ValueError:
            value = None
        if not equals or not pattern or value is None:
            raise ConfigError(
                f"{_WHERE}: rank_patterns: expected lines such as .*img_mlp.* = 32 or "
                f".*img_mlp.* = 32, 16 for rank and alpha (not {line!r})"
            )
        if pattern in found:
            raise ConfigError(f"{_WHERE}: rank_patterns: {pattern} stands in two lines; remove one")
        found[pattern] = value
    return found


def _later_inputs() -> list[io.Input]:
    """What saved prompts may lack."""
    return [
        widget("network_module", options=_MODULES, optional=True),
        widget("loraplus_lr_ratio", optional=True, step=0.5),
        widget(
            "include_patterns",
            optional=True,
            tooltip=f"{NetworkArguments.model_fields['include_patterns'].description} One a line.",
            placeholder=r"double_blocks\.\d+\..*",
        ),
        widget(
            "exclude_patterns",
            optional=True,
            tooltip=f"{NetworkArguments.model_fields['exclude_patterns'].description} One a line.",
        ),
        io.String.Input(
            "rank_patterns",
            default="",
            multiline=True,
            optional=True,
            tooltip="Other ranks for some layers, one a line: pattern = rank, or pattern = rank, "
            "alpha. The first pattern that matches counts.",
            placeholder=".*img_mlp.* = 32, 16",
        ),
        *(widget(name, advanced=True, optional=True) for name in _ADVANCED),
        io.Combo.Input(
            "network_weights",
            options=[paths.NO_FOLDER, *paths.loras()],
            optional=True,
            advanced=True,
            tooltip=FIELDS["network_weights"].description,
        ),
        io.String.Input(
            "base_weights",
            default="",
            multiline=True,
            optional=True,
            advanced=True,
            tooltip=f"{FIELDS['base_weights'].description} One a line as in ComfyUI's list of "
            "LoRAs, with its strength where it is not 1: name.safetensors: 0.5.",
            placeholder="name.safetensors: 0.5",
        ),
    ]
