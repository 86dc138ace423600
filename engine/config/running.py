"""How a run goes and what it leaves behind: length, measurements, samples, files, logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config_types import (
    DeviceName,
    Dtype,
    DynamoBackend,
    FileName,
    LogPrefix,
    PathSetting,
    Prompts,
    Sdpa,
)
from .group import Group


class TrainingConfig(Group):
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
    on_divergence: Literal["rewind", "stop"] = Field(
        default="rewind",
        description="When the loss explodes or is NaN, go back to the last good state and either "
        "go on with half the learning rate, three times at most, or stop.",
    )
    divergence_factor: float = Field(
        default=5.0,
        ge=0,
        le=1e6,
        description="The loss explodes when its median over 20 steps is this many times the lowest "
        "there was; 0 looks for NaN only.",
    )
    dynamo_backend: DynamoBackend = Field(
        default="NO", description="Compile the model's blocks with this backend of torch.compile."
    )
    dynamo_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        default="default", description="How much the compiler tries; for dynamo_backend INDUCTOR."
    )
    dynamo_fullgraph: bool = Field(
        default=False, description="Fail rather than compile a block in several pieces."
    )
    dynamo_dynamic: bool = Field(
        default=False, description="Compile once for all sizes rather than once for each."
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


class ValidationConfig(Group):
    """Validation"""

    validation_directory: PathSetting | None = Field(
        default=None,
        description="Folder of images and captions that are not trained, only measured.",
    )
    validation_split: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the training images to measure rather than train.",
    )
    validate_every_n_steps: int | None = Field(
        default=None,
        ge=1,
        description="Measure the loss of the validation images every n-th optimizer step; unset: "
        "after every epoch.",
    )
    validation_times: int = Field(
        default=4,
        ge=1,
        le=100,
        description="Noise levels at which each image is measured: the middles of so many equal "
        "parts of the trained range.",
    )
    early_stop_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many measurements without a new lowest loss.",
    )
    keep_best: bool = Field(
        default=False, description="Also keep the LoRA of the lowest validation loss, as NAME-best."
    )


class SamplesConfig(Group):
    """Samples during training"""

    sample_prompts: PathSetting | None = Field(
        default=None,
        description="File of prompts to draw during training: .txt with one a line and options "
        "such as --w 512 --h 512 --s 20 --d 1 behind it, .toml or .json.",
    )
    sample_lines: Prompts = Field(
        default=[], description="Prompts to draw during training, as the lines of a .txt file."
    )
    sample_every_n_steps: int | None = Field(
        default=None, ge=1, description="Draw the prompts every n-th optimizer step."
    )
    sample_every_n_epochs: int | None = Field(
        default=None, ge=1, description="Draw the prompts after every n-th epoch."
    )
    sample_at_first: bool = Field(
        default=False, description="Draw the prompts before the first step, too."
    )


class OutputConfig(Group):
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
    save_last_n_steps: int | None = Field(
        default=None,
        ge=1,
        description="Of the LoRAs kept by step, remove those older than this many steps.",
    )
    save_last_n_epochs: int | None = Field(
        default=None,
        ge=1,
        description="Of the LoRAs kept by epoch, keep only the last so many.",
    )
    save_state: bool = Field(
        default=False,
        description="Keep a state to resume from beside every LoRA kept by step or epoch.",
    )
    save_last_n_steps_state: int | None = Field(
        default=None, ge=1, description="As save_last_n_steps, for the states beside the LoRAs."
    )
    save_last_n_epochs_state: int | None = Field(
        default=None, ge=1, description="As save_last_n_epochs, for the states beside the LoRAs."
    )
    save_state_on_train_end: bool = Field(
        default=False,
        description="Accepted for compatibility; the state is always saved at the end.",
    )
    autosave_minutes: float = Field(
        default=10.0,
        ge=0,
        le=100_000,
        description="Save the state to resume this often; 0 turns it off.",
    )
    save_precision: Dtype = Field(default="bf16", description="Number type of the LoRA file.")
    save_format: Literal["comfyui", "kohya", "diffusers"] = Field(
        default="comfyui",
        description="How the layers are called in it; ComfyUI reads all of them for FLUX and "
        "Qwen-Image, the first two for every family.",
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


class LoggingConfig(Group):
    """Logging"""

    logging_dir: PathSetting | None = Field(
        default=None, description="Folder for TensorBoard and wandb; each run gets one inside."
    )
    log_prefix: LogPrefix = Field(
        default="", description="What the name of the run's folder begins with, before the date."
    )
    log_with: Literal["tensorboard", "wandb", "all"] | None = Field(
        default=None, description="Logger; unset: tensorboard if logging_dir is given."
    )
    log_tracker_name: FileName = Field(
        default="network_train", description="Name of the project in the logs."
    )
    wandb_run_name: str | None = Field(default=None, description="Name of the run in wandb.")
    log_tracker_config: PathSetting | None = Field(
        default=None,
        description="TOML file with more arguments for the start of a logger, under its name.",
    )
    log_config: bool = Field(
        default=False, description="Log the settings, too; folders and files are left out."
    )


class RuntimeConfig(Group):
    """Machine"""

    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="Seed of every random draw.")
    device: DeviceName = Field(default="auto", description="auto, cpu, cuda, cuda:N, xpu or mps.")
    show_timesteps: Literal["console", "image"] | None = Field(
        default=None,
        description="Instead of training, show how often each noise level would be trained: as "
        "text, or as a PNG in output_dir.",
    )
    show_lr_scheduler: Literal["console", "image"] | None = Field(
        default=None,
        description="Instead of training, show the learning rate of every step: as text, or as a "
        "PNG in output_dir.",
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads for work on the CPU; unset: PyTorch's choice. Tiny models want 1.",
    )
