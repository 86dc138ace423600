"""Every setting, once: name, type, range, default and help.

Frozen models, grouped by subject; on the surface (files, command line, nodes) the names are flat,
so each is used in one group only. The reader, the command line, the documentation and later the
nodes take everything from here. Only jobs read a `Config`; below them values are passed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .config_types import (
    DeviceName,
    Dtype,
    DtypeOrAuto,
    Extension,
    FileName,
    Multipliers,
    OptimizerArguments,
    OptimizerName,
    PathSetting,
    Prompts,
    Sdpa,
    ShareOrSteps,
    Size,
    TimestepEnd,
    parse_optimizer_arguments,
)
from .errors import ConfigError


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
    vae_dtype: DtypeOrAuto = Field(
        default="auto", description="Number type of the VAE; auto: as in its file."
    )
    text_encoder_dtype: DtypeOrAuto = Field(
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
    caption_extension: Extension = Field(
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

    optimizer_type: OptimizerName = Field(
        default="AdamW", description="Optimizer; upper and lower case are the same."
    )
    learning_rate: float = Field(
        default=1e-4, gt=0, le=10, description="Learning rate after the warm-up."
    )
    optimizer_args: OptimizerArguments = Field(
        default=[], description='More arguments as "key=value": weight_decay, betas, eps.'
    )
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "rex",
    ] = Field(
        default="constant",
        description="Learning-rate schedule after the warm-up; the first two are the same.",
    )
    lr_warmup_steps: ShareOrSteps = Field(
        default=0,
        ge=0,
        description='Warm-up in optimizer steps, or as a share of all steps (0.1 or "10%").',
    )
    lr_scheduler_min_lr_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Lowest part of the learning rate; unset: 0, for rex 0.01.",
    )
    lr_scheduler_num_cycles: int = Field(
        default=1, ge=1, le=1000, description="Restarts of cosine_with_restarts."
    )
    lr_scheduler_power: float = Field(
        default=1.0, gt=0, le=100, description="Exponent of polynomial."
    )
    lr_decay_steps: ShareOrSteps | None = Field(
        default=None,
        ge=0,
        description="Last steps of warmup_stable_decay, or their share of all steps; unset: a "
        "fifth of what follows the warm-up.",
    )
    lr_scheduler_timescale: int | None = Field(
        default=None,
        ge=1,
        description="Steps of inverse_sqrt after which the rate is divided by 1.41; unset: as the "
        "warm-up, or 10,000.",
    )
    rex_alpha: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="Of rex, with rex_beta: (1-p) / (alpha + beta (1-p)).",
    )
    rex_beta: float = Field(
        default=0.9, ge=0, le=100, description="Of rex; the paper has 0.5 for both."
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


class TimestepConfig(_Group):
    """Timesteps"""

    timestep_sampling: Literal[
        "auto",
        "uniform",
        "sigmoid",
        "shift",
        "flux_shift",
        "qwen_shift",
        "logsnr",
        "sigma",
        "qinglong_flux",
        "qinglong_qwen",
    ] = Field(
        default="auto", description="How training times are drawn; auto is the family's own choice."
    )
    discrete_flow_shift: float = Field(
        default=1.0, gt=0, le=1000, description="Shift towards noise of timestep_sampling shift."
    )
    sigmoid_scale: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Spread of sigmoid and the choices with a shift; 1 is the published one.",
    )
    logit_mean: float = Field(
        default=0.0,
        ge=-100,
        le=100,
        description="Mean of logsnr, of its part in qinglong, and of weighting logit_normal.",
    )
    logit_std: float = Field(
        default=1.0, gt=0, le=100, description="Standard deviation that goes with logit_mean."
    )
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = Field(
        default="none",
        description="logit_normal and mode: how timestep_sampling sigma draws; cosmap and "
        "sigma_sqrt: weight of the loss at each time.",
    )
    mode_scale: float = Field(
        default=1.29, ge=-1, le=1.75, description="Strength of weighting_scheme mode."
    )
    min_timestep: int = Field(
        default=0, ge=0, le=999, description="Lowest noise level to train, in thousandths."
    )
    max_timestep: TimestepEnd = Field(
        default=1000, ge=1, le=1000, description="Highest noise level to train, in thousandths."
    )
    preserve_distribution_shape: bool = Field(
        default=False,
        description="Cut the range out of the distribution instead of squeezing all of it in.",
    )
    num_timestep_buckets: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Draw equally often from this many equal parts of the distribution in each "
        "epoch.",
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
    sdpa: Sdpa = Field(
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
    output_name: FileName | None = Field(
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
    save_precision: Dtype = Field(default="bf16", description="Number type of the LoRA file.")
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

    prompt: Prompts = Field(
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
    lora_multiplier: Multipliers = Field(
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
    device: DeviceName = Field(default="auto", description="auto, cpu, cuda, cuda:N, xpu or mps.")
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
