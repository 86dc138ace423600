"""How the keys of LoRA files are spelled: which module a key is for, and what of its adapter.

A key is ``<prefix><module><part>``. Three spellings are written: ComfyUI's
(``diffusion_model.<module>.lora_A.weight``), kohya's (``lora_unet_<module with
underscores>.lora_down.weight``) and that of diffusers (``transformer.<module>.lora_A.weight``).
Read are these and all others that trainers and converters are known to have left behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import file_kinds
from .errors import CheckpointError
from .key_table import Row
from .layer_names import LayerNames, Place, locate, row_of

FORMATS = ("comfyui", "kohya", "diffusers")

# What a module's name may begin with; the longer of two with the same start stands first.
_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "pipe.dit.",
    "unet.",
    "model.",
    "dit.",
    "lora_unet__",  # Wan-Fun
    "lora_unet_",
    "lora_transformer_",  # OneTrainer
    "lycoris_",  # SimpleTuner
)
_OTHER_MODELS = re.compile(
    r"(base_model\.model\.)?(lora_te\d*_|lora_prior_te_|text_encoder(_\d)?\.|text_encoders\.|"
    r"te\d?\.|clip_[lgh]\.|t5xxl\.|text_model\.|cond_stage_model\.|conditioner\.|bundle_emb\.|"
    r"emb_params|lora_vae_|first_stage_model\.)"
)
# peft's name of the adapter, between the part's name and ".weight".
_NAMED = r"(\.(?!weight$|bias$)\w+)?"
# Part of an adapter -> how the end of its key may be spelled.
_PARTS: dict[str, str] = {
    "down": rf"\.lora_A{_NAMED}(\.weight)?|\.lora_down(\.weight)?|[._]lora\.down(\.weight)?|"
    r"\.lora_linear_layer\.down(\.weight)?",
    "up": rf"\.lora_B{_NAMED}(\.weight)?|\.lora_up(\.weight)?|[._]lora\.up(\.weight)?|"
    r"\.lora_linear_layer\.up(\.weight)?",
    "up_bias": rf"\.lora_B{_NAMED}\.bias|\.lora_up\.bias|[._]lora\.up\.bias",
    "mid": r"\.lora_mid(\.weight)?",
    "alpha": r"\.alpha|_lora\.alpha|\.lora\.alpha|\.lora_alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude_vector": rf"\.lora_magnitude_vector{_NAMED}(\.weight)?",
    "diff": r"\.diff|\.w_norm",
    "bias_diff": r"\.diff_b|\.b_norm",
} | {
    name: rf"\.{name}{_NAMED}"
    for name in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1_a", "lokr_w1_b", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_w2", "lokr_t2"),
    )
}
_PART = re.compile("|".join(f"(?P<{part}>({end})$)" for part, end in _PARTS.items()))
# Keys of adapters that are something else, and what that is called.
_UNSUPPORTED: dict[str, str] = {
    "BOFT": r".*\.boft_[RSrs].*",
    "OFT": r".*\.oft_(blocks|[rRs]).*|.*\.(rescale)",
    "GLoRA": r".*\.([ab][12]|bm)\.weight",
    "IA3": r".*\.(ia3_l|on_input).*",
    "VeRA": r".*vera_(lambda|[AB]).*",
    "T-LoRA": r".*\.(lambda_layer|[qp]_layer\.weight)",
    "AdaLoRA": r".*\.lora_E.*",
    "FourierFT": r".*fourierft_.*",
    "XLabs' attention processors": r".*\.processor\.(qkv|proj)_lora\d?\..*",
    "replaced weights (a control LoRA)": r".*(set_weight|reshape_weight)|.*lora_controlnet",
    "quantized weights (SVDQuant)": r".*\.(qweight|wscales|smooth(_orig)?|proj_(down|up))",
}


@dataclass(frozen=True)
class Keys:
    """The keys of a file.

    Args:
        modules: name of a module as the file spells it -> part of its adapter -> key.
        other: keys that are not for the transformer (text encoders).
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)


def parse(path: Path, keys: Iterable[str]) -> Keys:
    """Which module every key of a LoRA file is for, and what it is of its adapter.

    Raises:
        CheckpointError: this is no LoRA, a key is not known, or two keys are the same thing.
    """
    found = Keys()
    unknown: list[str] = []
    for key in keys:
        if _OTHER_MODELS.match(key):
            found.other.append(key)
        elif match := _PART.search(key):
            part = match.lastgroup or ""
            parts = found.modules.setdefault(_module(key[: match.start()]), {})
            if part in parts:
                raise CheckpointError(
                    f"{path}: {parts[part]} and {key} are the same part of one layer; "
                    "the file holds two LoRAs, save each in a file of its own"
                )
            parts[part] = key
        elif match := re.fullmatch(r"(.*)\.diff_m", key):
            # The modulation of a block of Wan, which is a parameter without a module.
            found.modules.setdefault(f"{_module(match[1])}.modulation", {})["diff"] = key
        else:
            unknown.append(key)
    _refuse_unknown(path, unknown, is_lora=bool(found.modules))
    if not found.modules:
        raise CheckpointError(
            f"{path}: the LoRA is for text encoders only ({found.other[0]}); "
            "it has nothing for the model itself"
        )
    return found


def place_of(names: LayerNames, module: str) -> Place | None:
    """What a module of a file is in a family; None if the family has no such layer."""
    for name in _without_prefixes(module):
        if place := locate(names, name):
            return place
        # Diffusers of 2023 called a layer as the list that it is in.
        if name.endswith("to_out") and (place := locate(names, f"{name}.0")):
            return place
        stem, _, last = name.rpartition(".")
        place = locate(names, stem) if stem else None
        if place and last in ("weight", place.row.weight_name):
            return place
    return None


def plain_name(module: str) -> str:
    """The name without anything that it may begin with."""
    return list(_without_prefixes(module))[-1]


def spelling(module: str, place: Place) -> str:
    """Which of the formats a module of a file is spelled in."""
    if "." not in module and "_" in module.removeprefix("lora_unet_"):
        return "kohya"
    if place.part is not None or module.startswith(("transformer.", "base_model.model.")):
        return "diffusers"
    if module.startswith(("diffusion_model.", "model.diffusion_model.")):
        return "comfyui"
    name, row = re.sub(r"\d+", "{}", plain_name(module)), place.row
    makers = {re.sub(r"\d+", "{}", each) for each in (row.published, *row.aliases)}
    inner = {re.sub(r"\d+", "{}", each) for each in row.inner}
    return "comfyui" if name in makers - inner else "diffusers"


def stem(format: str, names: LayerNames, published: str, *, low_rank: bool = True) -> str:
    """What the keys of a published layer begin with in "comfyui" or "kohya"."""
    row, indices = _row(names, published)
    comfyui = row.aliases[0].format(*indices) if row.aliases else published
    if format == "kohya":
        return f"lora_unet_{comfyui.replace('.', '_')}"
    # ComfyUI knows the makers' names of linear layers in the blocks, but only its own of others.
    makers = low_rank and published.startswith(names.blocks)
    return f"diffusion_model.{published if makers else comfyui}"


def inner_names(names: LayerNames, published: str) -> list[str]:
    """The modules of diffusers that a published layer is made of."""
    row, indices = _row(names, published)
    return [name.format(*indices) for name in row.inner]


def _row(names: LayerNames, published: str) -> tuple[Row, tuple[str, ...]]:
    found = row_of(names, published)
    if found is None:
        raise ValueError(f"{published} is no layer of {names.family}")
    return found


def _module(name: str) -> str:
    return name.replace(".processor.", ".")


def _without_prefixes(module: str) -> Iterator[str]:
    """The name as it is, then with one prefix less each time."""
    name = module
    while True:
        yield name
        prefix = next((each for each in _PREFIXES if name.startswith(each)), None)
        if prefix is None:
            return
        name = name[len(prefix) :]


def _refuse_unknown(path: Path, unknown: list[str], *, is_lora: bool) -> None:
    for key in unknown:
        for algorithm, pattern in _UNSUPPORTED.items():
            if re.fullmatch(pattern, key):
                raise CheckpointError(
                    f"{path}: {key} belongs to {algorithm}, which is not supported; "
                    "use a LoRA, LoHa, LoKr or full difference"
                )
    if unknown and not is_lora:
        raise CheckpointError(
            f"{path}: expected a LoRA with keys like diffusion_model...lora_A.weight, "
            f"but this is {file_kinds.describe(unknown)}"
        )
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]!r} is not a key of any kind of LoRA that is known, so it would "
            "be lost; get the file again or remove the key"
        )
