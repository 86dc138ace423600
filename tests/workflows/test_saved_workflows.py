"""Workflows that people have saved count inputs and outputs: new ones may only follow the old.

The table is of the first version that was given to others; what came later need not be in it.
"""

from __future__ import annotations

import pytest
from pack.tests.workflows.shipped import TYPES

# Names of inputs and outputs; spaces in those are written as "-".
FIRST: dict[str, tuple[str, str]] = {
    "LoraLoom_CacheDataset": (
        "dataset vae clip",
        "dataset report",
    ),
    "LoraLoom_ConfigFromToml": (
        "file toml",
        """
        model dataset lora optimizer lr_scheduler timesteps options output_name
        max_train_steps learning_rate network_dim seed
        """,
    ),
    "LoraLoom_ConfigToToml": (
        """
        model dataset output_name max_train_steps learning_rate network_dim seed
        save_every_n_steps preview_images lora optimizer lr_scheduler timesteps options
        """,
        "toml path",
    ),
    "LoraLoom_DatasetFromFolder": (
        """
        folder resolution batch_size num_repeats control_folder enable_bucket
        bucket_no_upscale caption_extension text_max_length
        """,
        "dataset contact-sheet report",
    ),
    "LoraLoom_DemoModel": (
        "",
        "model vae text-encoder training-model dataset",
    ),
    "LoraLoom_DemoTextEncode": (
        "text_encoder text",
        "conditioning",
    ),
    "LoraLoom_LoraSettings": (
        "network_alpha save_precision",
        "lora",
    ),
    "LoraLoom_LrScheduler": (
        """
        lr_scheduler lr_warmup_steps lr_scheduler_min_lr_ratio lr_scheduler_num_cycles
        lr_scheduler_power max_train_steps lr_decay_steps lr_scheduler_timescale
        rex_alpha rex_beta
        """,
        "lr-scheduler curve",
    ),
    "LoraLoom_Optimizer": (
        "optimizer_type optimizer_args max_grad_norm",
        "optimizer",
    ),
    "LoraLoom_TimestepSampling": (
        """
        timestep_sampling discrete_flow_shift sigmoid_scale logit_mean logit_std
        min_timestep max_timestep preserve_distribution_shape num_timestep_buckets
        weighting_scheme mode_scale guidance_scale shown_resolution model
        """,
        "timesteps histogram",
    ),
    "LoraLoom_TrainLora": (
        """
        model dataset output_name max_train_steps learning_rate network_dim seed
        save_every_n_steps preview_images existing_run lora optimizer lr_scheduler
        timesteps options vae
        """,
        "lora lora-path loss-map loss-curve previews report",
    ),
    "LoraLoom_TrainingModel": (
        "dit memory architecture mixed_precision",
        "model",
    ),
    "LoraLoom_TrainingOptions": (
        """
        max_train_epochs gradient_accumulation_steps save_every_n_epochs
        autosave_minutes infer_steps embedded_cfg_scale cpu_threads
        """,
        "options",
    ),
}


@pytest.mark.parametrize("name", FIRST)
def test_inputs_and_outputs_keep_their_places(name: str) -> None:
    inputs, outputs = (names.split() for names in FIRST[name])
    assert [one.name for one in TYPES[name].inputs({})][: len(inputs)] == inputs
    named = [one.name.replace(" ", "-") for one in TYPES[name].outputs]
    assert named[: len(outputs)] == outputs


@pytest.mark.parametrize("name", FIRST)
def test_a_prompt_without_the_new_inputs_is_whole(name: str) -> None:
    inputs = FIRST[name][0].split()
    later = [one for one in TYPES[name].inputs({}) if one.name not in inputs]
    assert not [one.name for one in later if one.required]
