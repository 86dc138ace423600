"""The files of a training run: where they are, that none is overwritten, what they say."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ..config import Config
from ..errors import ConfigError


@dataclass(frozen=True)
class RunFiles:
    """All files of the run ``name`` in ``folder``."""

    folder: Path
    name: str

    @property
    def lora(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def state(self) -> Path:
        return self.folder / f"{self.name}-state.safetensors"

    @property
    def recipe(self) -> Path:
        return self.folder / f"{self.name}.toml"

    @property
    def history(self) -> Path:
        return self.folder / f"{self.name}.loss_history.jsonl"

    def lora_at_step(self, step: int) -> Path:
        return self.folder / f"{self.name}-step{step:08d}.safetensors"

    def lora_at_epoch(self, epoch: int) -> Path:
        return self.folder / f"{self.name}-{epoch:06d}.safetensors"


def find_start(config: Config) -> tuple[RunFiles, Path | None]:
    """The run's files and the state to continue from, if any.

    Raises:
        ConfigError: a new run would replace the files of another one, or the state that was
            named does not exist.
    """
    output = config.output
    assert output.output_dir is not None and output.output_name is not None
    files = RunFiles(output.output_dir, output.output_name)
    if isinstance(output.resume, Path):
        if not output.resume.exists():
            raise ConfigError(f"resume: {output.resume} does not exist; give a -state.safetensors")
        return files, output.resume
    if output.resume:
        return files, files.state if files.state.exists() else None
    present = [path.name for path in (files.lora, files.state) if path.exists()]
    if present and not output.overwrite:
        raise ConfigError(
            f"{files.folder} already holds {' and '.join(present)}; use --resume to continue that "
            "run, another output_name for a new one, or --overwrite to replace it"
        )
    return files, None


def lora_metadata(
    config: Config, architecture: str, *, step: int, epoch: int, num_items: int, started: float
) -> dict[str, str]:
    """What is written into a LoRA file about how it was made (``ss_*`` and ``modelspec.*``).

    The keys are those that trainers and model browsers of this field read:
    https://github.com/Stability-AI/ModelSpec and the ``ss_`` keys of kohya's scripts.
    """
    network, optimizer, training = config.network, config.optimizer, config.training
    width, height = config.dataset.resolution
    facts = {
        "ss_output_name": config.output.output_name,
        "ss_base_model_version": architecture,
        "ss_network_module": network.network_module,
        "ss_network_dim": network.network_dim,
        "ss_network_alpha": network.alpha,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_optimizer": optimizer.optimizer_type,
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_lr_warmup_steps": optimizer.lr_warmup_steps,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_timestep_sampling": config.timesteps.timestep_sampling,
        "ss_discrete_flow_shift": config.timesteps.discrete_flow_shift,
        "ss_sigmoid_scale": config.timesteps.sigmoid_scale,
        "ss_guidance_scale": config.timesteps.guidance_scale,
        "ss_max_train_steps": training.max_train_steps,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_mixed_precision": training.mixed_precision,
        "ss_batch_size_per_device": config.dataset.batch_size,
        "ss_num_train_items": num_items,
        "ss_resolution": f"({width}, {height})",
        "ss_seed": config.runtime.seed,
        "ss_sd_model_name": config.model.dit.name if config.model.dit else "",
        "ss_steps": step,
        "ss_epoch": epoch,
        "ss_training_started_at": started,
        "ss_training_finished_at": datetime.now(timezone.utc).timestamp(),
    }
    return {key: str(value) for key, value in facts.items()}


def modelspec_metadata(config: Config, modelspec_architecture: str) -> dict[str, str]:
    """The ``modelspec.*`` keys of a LoRA file."""
    width, height = config.dataset.resolution
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{modelspec_architecture}/lora",
        "modelspec.implementation": "LoRA Loom",
        "modelspec.title": str(config.output.output_name),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
