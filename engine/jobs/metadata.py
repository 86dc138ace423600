"""What is written into a LoRA file about how it was made.

The keys are those that trainers and model browsers of this field read: ``ss_*`` of kohya's
scripts, and ``modelspec.*`` of https://github.com/Stability-AI/ModelSpec. The whole recipe is in
``lora_loom.recipe``, without the folders of the machine.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path, PureWindowsPath
from typing import Any

from .. import seeds
from ..architectures.base import Architecture
from ..config import GROUPS, Config
from ..config_file import to_toml
from .plan import Plan

RECIPE = "lora_loom.recipe"
# Kept with no_metadata: what programs need to use the file, and we to know whether it is whole.
_ALWAYS = (
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_steps",
)
# ``ss_NAME`` is the setting NAME as it is.
_SETTINGS = (
    "output_name",
    "network_module",
    "network_dim",
    "network_dropout",
    "scale_weight_norms",
    "dim_from_weights",
    "training_comment",
    "learning_rate",
    "lr_scheduler",
    "lr_scheduler_type",
    "lr_warmup_steps",
    "lr_scheduler_min_lr_ratio",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_timescale",
    "lr_decay_steps",
    "max_grad_norm",
    "discrete_flow_shift",
    "sigmoid_scale",
    "guidance_scale",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "min_timestep",
    "max_timestep",
    "preserve_distribution_shape",
    "num_timestep_buckets",
    "loss_type",
    "huber_c",
    "noise_offset",
    "prior_loss_weight",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "mixed_precision",
    "dynamo_backend",
    "save_precision",
    "seed",
    "fp8_base",
    "fp8_scaled",
    "quantize_format",
    "quantize_mode",
)


def lora_metadata(
    config: Config,
    architecture: Architecture,
    plan: Plan,
    *,
    step: int,
    num_items: int,
    started: float,
) -> dict[str, str]:
    """All of it, but for the hashes, which are of the tensors.

    Args:
        step: optimizer steps that are done.
        started: seconds since 1970.
    """
    facts = {
        key: str(value) for key, value in _facts(config, architecture, plan, num_items).items()
    }
    facts |= {
        "ss_steps": str(step),
        "ss_epoch": str(plan.epoch_after(step)),
        "ss_session_id": str(seeds.derive(config.runtime.seed, f"session {started}") % 2**32),
        "ss_training_started_at": str(started),
        "ss_training_finished_at": str(datetime.now(timezone.utc).timestamp()),
    }
    modelspec = _modelspec(config, architecture)
    if config.metadata.no_metadata:
        return {key: facts[key] for key in _ALWAYS if key in facts} | modelspec
    return facts | modelspec | {RECIPE: to_toml(without_folders(config), with_help=False)}


def without_folders(config: Config) -> Config:
    """The settings with only the names of files and folders."""
    groups: dict[str, Any] = {}
    for key in GROUPS:
        group = getattr(config, key)
        changed = {name: _name_only(value) for name, value in vars(group).items()}
        groups[key] = group.model_copy(update=changed)
    return Config(**groups)


def _name_only(value: Any) -> Any:
    if isinstance(value, Path):
        return Path(PureWindowsPath(value).name or value.name)
    if isinstance(value, list):
        return [_name_only(part) for part in value]
    return value


def _facts(
    config: Config, architecture: Architecture, plan: Plan, num_items: int
) -> dict[str, Any]:
    """What does not change during the run."""
    network, optimizer, dataset = config.network, config.optimizer, config.dataset
    width, height = dataset.resolution
    sampling = config.timesteps.timestep_sampling
    if sampling == "auto":
        sampling = architecture.default_timestep_sampling
    batches = plan.total_steps * plan.batches_per_step
    facts = {f"ss_{name}": config.value(name) for name in _SETTINGS} | {
        "ss_base_model_version": architecture.name,
        "ss_network_alpha": network.alpha,
        "ss_optimizer": optimizer.optimizer_type,
        "ss_optimizer_args": " ".join(optimizer.optimizer_args),
        "ss_lr_scheduler_args": " ".join(optimizer.lr_scheduler_args),
        "ss_timestep_sampling": sampling,
        "ss_max_train_steps": plan.total_steps,
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
        "ss_num_epochs": -(-batches // plan.batches_per_epoch),
        "ss_batch_size_per_device": dataset.batch_size,
        "ss_num_train_items": num_items,
        "ss_resolution": f"({width}, {height})",
        "ss_datasets": json.dumps([_dataset(config, num_items)]),
        "ss_sd_model_name": config.model.dit.name if config.model.dit else "",
        "ss_vae_name": config.model.vae.name if config.model.vae else "",
        "ss_base_weights": ", ".join(f"{path.name} x {m:g}" for path, m in network.base_loras),
        "ss_network_weights": network.network_weights.name if network.network_weights else None,
    }
    if network.network_args:
        pairs = (entry.partition("=") for entry in network.network_args)
        arguments = {key.strip(): value.strip() for key, _, value in pairs}
        facts["ss_network_args"] = json.dumps(arguments)
    return facts


def _dataset(config: Config, num_items: int) -> dict[str, Any]:
    dataset = config.dataset
    return {
        "is_video": False,
        "resolution": list(dataset.resolution),
        "batch_size": dataset.batch_size,
        "num_repeats": dataset.num_repeats,
        "enable_bucket": dataset.enable_bucket,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "has_control": dataset.control_directory is not None,
        "num_items": num_items,
    }


def _modelspec(config: Config, architecture: Architecture) -> dict[str, str]:
    """The ``modelspec.*`` keys; those without a value are left out."""
    metadata = config.metadata
    width, height = config.dataset.resolution
    given = (metadata.metadata_reso or f"{width}x{height}").replace(" ", "").replace(",", "x")
    name = metadata.metadata_arch or architecture.modelspec_architecture
    times = config.timesteps
    limited = (times.min_timestep, times.max_timestep) != (0, 1000)
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{name}/lora",
        "implementation": "LoRA Loom",
        "title": metadata.metadata_title or str(config.output.output_name),
        "resolution": given if "x" in given else f"{given}x{given}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "author": metadata.metadata_author,
        "description": metadata.metadata_description,
        "license": metadata.metadata_license,
        "tags": metadata.metadata_tags,
        "merged_from": ", ".join(path.stem for path, _ in config.network.base_loras),
        "timestep_range": f"{times.min_timestep},{times.max_timestep}" if limited else None,
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value}
