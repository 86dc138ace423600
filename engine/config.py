"""Every setting, once: name, type, range, default and help.

Frozen models, grouped by subject; on the surface (files, command line, nodes) the names are flat,
so each is used in one group only. The reader, the command line, the documentation and later the
nodes take everything from here. Only jobs read a `Config`; below them values are passed.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
)

from .errors import ConfigError

_FORBIDDEN_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
# What neither a file system nor a TOML file can hold, or only by mistake: "C:\new" has a line end.
_FORBIDDEN_IN_PATHS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
# What AdamW takes besides the learning rate, and what the value must be.
_OPTIMIZER_ARGUMENTS = {
    "weight_decay": "a number from 0",
    "betas": "two numbers from 0 to below 1",
    "eps": "a number from 0",
}
# Other names of number types in the files of musubi-tuner.
_DTYPE_NAMES = {"float": "fp32", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _path(value: Any) -> Any:
    # pathlib's own expansion fails for "~name" unless there is such a user.
    return Path(os.path.expanduser(value)) if isinstance(value, str | Path) and value else value


def _check_path(value: Path) -> Path:
    if _FORBIDDEN_IN_PATHS.search(str(value)):
        raise ValueError(
            "a path without line ends and the like; backslashes in a TOML file need 'single quotes'"
        )
    return value


def _dtype_name(value: Any) -> Any:
    return _DTYPE_NAMES.get(value, value) if isinstance(value, str) else value


def _optimizer_name(value: Any) -> Any:
    return "AdamW" if isinstance(value, str) and value.lower() == "adamw" else value


def _size(value: Any) -> Any:
    """One number means a square."""
    return (value, value) if type(value) is int else tuple(value) if type(value) is list else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _share_or_steps(value: Any) -> Any:
    """ "10%" is the share 0.1."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return float(match[1]) / 100 if match else value


def _check_share_or_steps(value: int | float) -> int | float:
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError("whole steps without a dot, or a share of all steps below 1")
    return value


def _check_name(value: str) -> str:
    if not value.strip() or _FORBIDDEN_IN_NAMES.search(value) or value.strip(". ") != value:
        raise ValueError('a file name without folder, extension or any of < > : " / \\ | ? *')
    return value


def _check_device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise ValueError("one of auto, cpu, cuda, cuda:0 ..., xpu, mps")
    return value


def _check_extension(value: str) -> str:
    if not re.fullmatch(r"\.\w+", value):
        raise ValueError('an extension with its dot, such as ".txt"')
    return value


def _check_sdpa(value: bool) -> bool:
    if not value:
        raise ValueError("true; PyTorch's own attention is the only one there is")
    return value


def _check_optimizer_arguments(values: list[str]) -> list[str]:
    parse_optimizer_arguments(values)
    return values


def parse_optimizer_arguments(values: list[str]) -> dict[str, Any]:
    """``["weight_decay=0.01"]`` -> ``{"weight_decay": 0.01}``; values are Python literals.

    Raises:
        ValueError: an entry is not ``key=value``, or the key or value is not one AdamW takes.
    """
    parsed: dict[str, Any] = {}
    for entry in values:
        key, equals, text = (part.strip() for part in entry.partition("="))
        if not equals or key not in _OPTIMIZER_ARGUMENTS:
            known = ", ".join(_OPTIMIZER_ARGUMENTS)
            raise ValueError(f"entries key=value with key one of {known} (not {entry!r})")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = None
        numbers = value if key == "betas" and isinstance(value, tuple | list) else (value,)
        good = len(numbers) == (2 if key == "betas" else 1) and all(
            type(number) in (int, float) and 0 <= number < (1 if key == "betas" else 1e6)
            for number in numbers
        )
        if not good:
            raise ValueError(f"{_OPTIMIZER_ARGUMENTS[key]} for {key} (not {text!r})")
        parsed[key] = tuple(float(n) for n in numbers) if key == "betas" else float(numbers[0])
    return parsed


def _check_multipliers(values: list[float], info: ValidationInfo) -> list[float]:
    num_loras = len(info.data.get("lora_weight", values))
    if len(values) > num_loras:
        raise ValueError(f"at most one value for each of the {num_loras} LoRA files")
    return values


PathSetting = Annotated[Path, BeforeValidator(_path), AfterValidator(_check_path)]
Side = Annotated[int, Field(ge=16, le=8192)]
Size = Annotated[tuple[Side, Side], BeforeValidator(_size)]
Choice = Annotated[Literal["auto", "fp32", "bf16", "fp16"], BeforeValidator(_dtype_name)]


class _Group(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ModelConfig(_Group):
    """Model files"""

    architecture: Literal["auto", "flux_kontext"] = Field(
        default="auto", description="Model family; auto finds it from the diffusion model file."
    )
    dit: PathSetting | None = Field(
        default=None,
        description="Diffusion model: a .safetensors file or part of a set, or a folder.",
    )
    vae: PathSetting | None = Field(
        default=None, description="Autoencoder: a .safetensors file or folder."
    )
    text_encoder1: PathSetting | None = Field(
        default=None, description="T5-XXL text encoder: a .safetensors file or Hugging Face folder."
    )
    text_encoder2: PathSetting | None = Field(
        default=None, description="CLIP-L text encoder: a .safetensors file or Hugging Face folder."
    )
    tokenizer1: PathSetting | None = Field(
        default=None, description="T5 tokenizer folder, needed beside a single text_encoder1 file."
    )
    tokenizer2: PathSetting | None = Field(
        default=None,
        description="CLIP tokenizer folder, needed beside a single text_encoder2 file.",
    )
    vae_dtype: Choice = Field(
        default="auto", description="Number type of the VAE; auto: as in its file."
    )
    text_encoder_dtype: Choice = Field(
        default="auto", description="Number type of the text encoders; auto: as in their files."
    )


class DatasetConfig(_Group):
    """Training images"""

    image_directory: PathSetting | None = Field(
        default=None, description="Folder of images, each with a caption file of the same name."
    )
    control_directory: PathSetting | None = Field(
        default=None,
        description="Folder of control images (for editing models) with the same names.",
    )
    caption_extension: Annotated[str, AfterValidator(_check_extension)] = Field(
        default=".txt", description="Extension of the caption files."
    )
    resolution: Size = Field(
        default=(1024, 1024),
        description="Area of the training images in pixels, as [width, height] or one side.",
    )
    enable_bucket: bool = Field(
        default=True,
        description="Group images by aspect ratio instead of cropping all to one size.",
    )
    bucket_no_upscale: bool = Field(
        default=False, description="Leave images smaller than the resolution at their own size."
    )
    batch_size: int = Field(default=1, ge=1, le=4096, description="Images per batch and device.")
    num_repeats: int = Field(
        default=1, ge=1, le=100_000, description="Times each image is used per epoch."
    )
    cache_directory: PathSetting | None = Field(
        default=None, description="Folder of the cache; default .loom_cache inside image_directory."
    )
    text_max_length: int = Field(
        default=512, ge=1, le=512, description="Tokens the T5 text is padded or cut to."
    )


class NetworkConfig(_Group):
    """LoRA"""

    network_module: Literal["networks.lora", "networks.lora_flux"] = Field(
        default="networks.lora", description="Kind of network; both names mean LoRA."
    )
    network_dim: int = Field(default=16, ge=1, le=4096, description="Rank of the LoRA.")
    network_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="The LoRA is scaled by alpha / rank; unset or 0 means the rank (scale 1).",
    )

    @property
    def alpha(self) -> float:
        """The alpha that is used."""
        return float(self.network_alpha or self.network_dim)


class OptimizerConfig(_Group):
    """Optimizer"""

    optimizer_type: Annotated[Literal["AdamW"], BeforeValidator(_optimizer_name)] = Field(
        default="AdamW", description="Optimizer; upper and lower case are the same."
    )
    learning_rate: float = Field(
        default=1e-4, gt=0, le=10, description="Learning rate after the warm-up."
    )
    optimizer_args: Annotated[list[str], AfterValidator(_check_optimizer_arguments)] = Field(
        default=[], description='More arguments as "key=value": weight_decay, betas, eps.'
    )
    lr_scheduler: Literal["constant", "constant_with_warmup"] = Field(
        default="constant",
        description="Learning-rate schedule; both are constant after the warm-up.",
    )
    lr_warmup_steps: Annotated[
        int | float, BeforeValidator(_share_or_steps), AfterValidator(_check_share_or_steps)
    ] = Field(
        default=0,
        ge=0,
        description='Warm-up in optimizer steps, or as a share of all steps (0.1 or "10%").',
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="Gradients are scaled down to this norm; 0 turns it off.",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """``optimizer_args`` as values."""
        return parse_optimizer_arguments(self.optimizer_args)

    def warmup_steps(self, total_steps: int) -> int:
        """The warm-up in optimizer steps."""
        value = self.lr_warmup_steps
        return value if isinstance(value, int) else round(value * total_steps)


class TimestepConfig(_Group):
    """Timesteps"""

    timestep_sampling: Literal["auto", "uniform", "sigmoid", "shift", "flux_shift"] = Field(
        default="auto", description="How training times are drawn; auto is the family's own choice."
    )
    discrete_flow_shift: float = Field(
        default=1.0, gt=0, le=1000, description="Shift towards noise of timestep_sampling shift."
    )
    sigmoid_scale: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Spread of all choices but uniform; 1 is the published one.",
    )
    guidance_scale: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Guidance value that the model is given while it trains.",
    )


class TrainingConfig(_Group):
    """Training"""

    max_train_steps: int = Field(
        default=1600, ge=1, le=10**8, description="Optimizer steps to train."
    )
    max_train_epochs: int | None = Field(
        default=None, ge=1, le=10**6, description="Epochs to train; replaces max_train_steps."
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=10_000, description="Batches whose gradients make one optimizer step."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, slower.",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="bf16",
        description="Number type of the model; no is float32. The LoRA is always float32.",
    )
    sdpa: Annotated[bool, AfterValidator(_check_sdpa)] = Field(
        default=True, description="Accepted for compatibility; PyTorch's attention is always used."
    )
    max_data_loader_n_workers: int = Field(
        default=8, ge=0, le=1024, description="Accepted for compatibility; one reader works ahead."
    )
    persistent_data_loader_workers: bool = Field(
        default=False,
        description="Accepted for compatibility; the reader lives as long as the run.",
    )


class OutputConfig(_Group):
    """Output of training"""

    output_dir: PathSetting | None = Field(
        default=None, description="Folder of the LoRA and its state."
    )
    output_name: Annotated[str, AfterValidator(_check_name)] | None = Field(
        default=None, description="Name of the LoRA, without extension."
    )
    save_every_n_steps: int | None = Field(
        default=None, ge=1, description="Also keep the LoRA of every n-th optimizer step."
    )
    save_every_n_epochs: int | None = Field(
        default=None, ge=1, description="Also keep the LoRA of every n-th epoch."
    )
    autosave_minutes: float = Field(
        default=10.0,
        ge=0,
        le=100_000,
        description="Save the state to resume this often; 0 turns it off.",
    )
    save_precision: Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(_dtype_name)] = (
        Field(default="bf16", description="Number type of the LoRA file.")
    )
    preview_images: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Pictures that the finished LoRA draws from captions of the dataset.",
    )
    resume: bool | PathSetting = Field(
        default=False,
        description="Continue the run of this name, or from the state file named here.",
    )
    overwrite: bool = Field(
        default=False,
        description="Let a new run replace the files of an older one of the same name.",
    )


class GenerateConfig(_Group):
    """Generating"""

    prompt: Annotated[list[str], BeforeValidator(_one_or_many)] = Field(
        default=[], description="What to draw; several prompts give several pictures."
    )
    from_file: PathSetting | None = Field(
        default=None, description="Text file with one prompt per line; lines with # are left out."
    )
    image_size: Size = Field(
        default=(1024, 1024),
        description="Size of the picture in pixels, as [width, height] or one side.",
    )
    infer_steps: int = Field(default=25, ge=1, le=1000, description="Sampling steps.")
    embedded_cfg_scale: float = Field(
        default=2.5, ge=0, le=1000, description="Guidance value that the model is given."
    )
    flow_shift: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Shift towards noise; unset: the family's for the size.",
    )
    lora_weight: list[PathSetting] = Field(default=[], description="LoRA files to apply.")
    lora_multiplier: Annotated[list[float], AfterValidator(_check_multipliers)] = Field(
        default=[], description="Strength of each LoRA, in the same order; 1.0 where missing."
    )
    control_image_path: list[PathSetting] = Field(
        default=[], description="Control images, for editing models."
    )
    save_path: PathSetting | None = Field(default=None, description="Folder of the pictures.")

    @property
    def loras(self) -> list[tuple[Path, float]]:
        """Each LoRA file with its multiplier."""
        missing = len(self.lora_weight) - len(self.lora_multiplier)
        return list(zip(self.lora_weight, [*self.lora_multiplier, *[1.0] * missing], strict=True))


class RuntimeConfig(_Group):
    """Machine"""

    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="Seed of every random draw.")
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        default="auto", description="auto, cpu, cuda, cuda:N, xpu or mps."
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads for work on the CPU; unset: PyTorch's choice. Tiny models want 1.",
    )


class Config(BaseModel):
    """All settings of all jobs; each job needs only some of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    timesteps: TimestepConfig = TimestepConfig()
    training: TrainingConfig = TrainingConfig()
    output: OutputConfig = OutputConfig()
    generate: GenerateConfig = GenerateConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def require(self, *names: str) -> None:
        """Check that settings without a default are given.

        Raises:
            ConfigError: names all that are missing, with what they are.
        """
        missing = [name for name in names if self.value(name) is None]
        if missing:
            lines = [f"  {name}: {FIELDS[name].description}" for name in missing]
            raise ConfigError(
                f"{len(missing)} needed setting{'s are' if len(missing) > 1 else ' is'} missing; "
                f"give {'them' if len(missing) > 1 else 'it'} in the config file or as "
                f"{' '.join(f'--{name} ...' for name in missing)}\n" + "\n".join(lines)
            )

    def value(self, name: str) -> Any:
        """A setting by its flat name."""
        return getattr(getattr(self, GROUP_OF[name]), name)


GROUPS: dict[str, type[_Group]] = {
    name: group.annotation  # pyright: ignore[reportAssignmentType]
    for name, group in Config.model_fields.items()
}
# Flat name of every setting -> the group it is in, and its declaration.
GROUP_OF = {name: key for key, group in GROUPS.items() for name in group.model_fields}
FIELDS = {name: GROUPS[key].model_fields[name] for name, key in GROUP_OF.items()}
