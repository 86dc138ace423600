"""A recipe goes through the sockets and widgets of the nodes and comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.engine.config import FIELDS, GROUPS, Config
from pack.engine.config_file import Given, build_config, parse_config, to_toml
from pack.engine.errors import ConfigError, EngineError
from pack.tests.nodes.stand_ins import FolderPaths

# Another value than the default for every setting that goes through the nodes; paths are
# relative to ComfyUI.
OTHER: dict[str, Any] = {
    "architecture": "flux_kontext",
    "dit": Path("models/unet/flux.safetensors"),
    "vae": Path("models/vae/ae.safetensors"),
    "text_encoder1": Path("models/text_encoders/t5xxl.safetensors"),
    "text_encoder2": Path("models/text_encoders/clip_l.safetensors"),
    "tokenizer1": Path("models/text_encoders/t5"),
    "tokenizer2": Path("models/text_encoders/clip"),
    "vae_dtype": "fp32",
    "text_encoder_dtype": "bf16",
    "image_directory": Path('input/"cats" \\ & dögs'),
    "control_directory": Path("datasets/control"),
    "mask_directory": Path("datasets/masks"),
    "alpha_mask": True,
    "regularization_directory": Path("input/others"),
    "cache_directory": Path("user/cache"),
    "caption_extension": ".caption",
    "resolution": (512, 768),
    "enable_bucket": False,
    "bucket_no_upscale": True,
    "batch_size": 3,
    "num_repeats": 2,
    "text_max_length": 256,
    "network_module": "networks.lora_flux",
    "network_dim": 8,
    "network_alpha": 0.1,
    "network_dropout": 0.1,
    "network_args": [r"include_patterns=['.*\\.0\\..*']", "loraplus_lr_ratio=4.0"],
    "scale_weight_norms": 1.0,
    "network_weights": Path("models/loras/first.safetensors"),
    "dim_from_weights": True,
    "base_weights": [Path("models/loras/base.safetensors")],
    "base_weights_multiplier": [0.5],
    "optimizer_type": "torch.optim.SGD",
    "optimizer_args": ["weight_decay=0.1", "betas=(0.9, 0.99)"],
    "learning_rate": 3e-5,
    "lr_scheduler": "cosine_with_restarts",
    "lr_scheduler_type": "StepLR",
    "lr_scheduler_args": ["step_size=5", "gamma=0.5"],
    "lr_scheduler_min_lr_ratio": 0.1,
    "lr_scheduler_num_cycles": 3,
    "lr_scheduler_power": 2.0,
    "lr_decay_steps": 30,
    "lr_scheduler_timescale": 50,
    "rex_alpha": 0.5,
    "rex_beta": 0.5,
    "lr_warmup_steps": 0.05,
    "max_grad_norm": 0.0,
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.0,
    "sigmoid_scale": 0.7,
    "logit_mean": -6.0,
    "logit_std": 2.0,
    "weighting_scheme": "cosmap",
    "mode_scale": 0.5,
    "min_timestep": 100,
    "max_timestep": 900,
    "preserve_distribution_shape": True,
    "num_timestep_buckets": 4,
    "guidance_scale": 3.5,
    "loss_type": "huber",
    "huber_c": 0.3,
    "noise_offset": 0.05,
    "unmasked_weight": 0.1,
    "prior_loss_weight": 0.5,
    "regularization_target": "model",
    "trigger_word": "loomling",
    "preservation_class": "creature",
    "preservation_weight": 0.7,
    "max_train_steps": 123,
    "max_train_epochs": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "mixed_precision": "no",
    "on_divergence": "stop",
    "divergence_factor": 0.0,
    "dynamo_backend": "INDUCTOR",
    "dynamo_mode": "max-autotune",
    "dynamo_fullgraph": True,
    "dynamo_dynamic": True,
    "validation_directory": Path("datasets/held out"),
    "validation_split": 0.1,
    "validate_every_n_steps": 50,
    "validation_times": 2,
    "early_stop_patience": 3,
    "keep_best": True,
    "sample_prompts": Path("input/prompts.txt"),
    "sample_lines": ["a cat --w 512 --h 768", "a dog"],
    "sample_every_n_steps": 20,
    "sample_every_n_epochs": 2,
    "sample_at_first": True,
    "output_name": "猫 #1",
    "save_every_n_steps": 25,
    "save_every_n_epochs": 5,
    "save_last_n_steps": 100,
    "save_last_n_epochs": 6,
    "save_state": True,
    "save_last_n_steps_state": 50,
    "save_last_n_epochs_state": 3,
    "preview_images": 2,
    "autosave_minutes": 0.0,
    "save_precision": "fp32",
    "save_format": "kohya",
    "no_metadata": True,
    "training_comment": "two lines,\n of 'text'",
    "metadata_title": "Cats",
    "metadata_author": "me",
    "metadata_description": "All of my cats.",
    "metadata_license": "CC-BY-4.0",
    "metadata_tags": "cat, black",
    "metadata_reso": "512,768",
    "metadata_arch": "other",
    "fp8_scaled": True,
    "fp8_base": True,
    "fp8": True,
    "quantize_format": "int8",
    "quantize_mode": "channel",
    "quantize_block_size": 128,
    "quantize_scale_dtype": "bf16",
    "quantize_search": True,
    "quantize_compat": True,
    "quantize_exclude_patterns": [r"double_blocks\.0\..*"],
    "quantized_cache": Path("user/lora_loom/models"),
    "logging_dir": Path("output/lora_loom/logs"),
    "log_prefix": "cats_",
    "log_with": "all",
    "log_tracker_name": "cats",
    "wandb_run_name": "first",
    "log_tracker_config": Path("input/tracker.toml"),
    "log_config": True,
    "infer_steps": 8,
    "embedded_cfg_scale": 1.0,
    "flow_shift": 2.0,
    "seed": 2**32 - 1,
    "device": "cuda:1",
    "cpu_threads": 1,
}
LEFT_OUT = {
    **{name: "only for generating" for name in GROUPS["magcache"].model_fields},
    "output_dir": "the node writes where ComfyUI lists LoRAs",
    "resume": "the choice existing_run says it",
    "overwrite": "the choice existing_run says it",
    "show_timesteps": "the node Timestep Sampling draws it",
    "show_lr_scheduler": "the node LR Scheduler draws it",
    "save_state_on_train_end": "changes nothing",
    "sdpa": "changes nothing",
    "max_data_loader_n_workers": "changes nothing",
    "persistent_data_loader_workers": "changes nothing",
    "prompt": "only for generating",
    "from_file": "only for generating",
    "image_size": "only for generating",
    "lora_weight": "only for generating",
    "lora_multiplier": "only for generating",
    "control_image_path": "only for generating",
    "save_path": "only for generating",
}


@pytest.fixture
def config_files(load: Callable[[str], Any], comfyui: FolderPaths) -> Any:
    return load("config_files")


def read(config_files: Any, toml: str) -> dict[str, Any]:
    """What comes out of Training Config from TOML, by the names of its outputs."""
    outputs = config_files.ConfigFromToml.define_schema().outputs
    result = config_files.ConfigFromToml.execute(file="none", toml=toml)
    return dict(zip([output.display_name for output in outputs], result.values, strict=True))


def settings_in(outputs: dict[str, Any]) -> list[str]:
    """The settings that the outputs carry, in sockets or as themselves."""
    return [
        name
        for output, value in outputs.items()
        for name in (value if isinstance(value, dict) else [output])
    ]


def config_with(base: Path, **values: Any) -> Config:
    """A config whose relative paths are made whole."""

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(part) for part in value]
        return base / value if isinstance(value, Path) else value

    return build_config({name: Given("test", whole(value)) for name, value in values.items()})


def test_every_setting_goes_through_one_output_or_is_left_out_on_purpose(
    config_files: Any,
) -> None:
    carried = settings_in(read(config_files, "seed = 1"))
    assert len(carried) == len(set(carried))
    assert not set(carried) & LEFT_OUT.keys()
    assert set(carried) | LEFT_OUT.keys() == FIELDS.keys()


def test_every_setting_that_goes_through_is_tested_with_another_value(
    config_files: Any, comfyui: FolderPaths
) -> None:
    assert OTHER.keys() == set(settings_in(read(config_files, "seed = 1")))
    config = config_with(comfyui.base, **OTHER)
    assert not [name for name in OTHER if config.value(name) == Config().value(name)]


@given(names=st.sets(st.sampled_from(sorted(OTHER))))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_recipe_comes_back_as_it_was(
    config_files: Any, comfyui: FolderPaths, names: set[str]
) -> None:
    # A multiplier is for one of the files.
    names |= {"base_weights"} if "base_weights_multiplier" in names else set()
    config = config_with(
        comfyui.base, **{"output_name": "cats"} | {name: OTHER[name] for name in names}
    )
    inputs = read(config_files, to_toml(config))
    toml, path = config_files.ConfigToToml.execute(**inputs).values

    again = parse_config(toml, "again")
    for name in FIELDS.keys() - LEFT_OUT.keys():
        assert again.value(name) == config.value(name), name
    assert again.output.output_dir == comfyui.base / "output/loras"
    assert Path(path).read_text("utf-8") == toml
    assert Path(path) == comfyui.base / f"output/lora_loom/{config.output.output_name}.toml"


def test_outputs_that_workflows_have_linked_keep_their_places(config_files: Any) -> None:
    sockets = ["model", "dataset", "lora", "optimizer", "lr_scheduler", "timesteps", "options"]
    values = ["output_name", "max_train_steps", "learning_rate", "network_dim", "seed"]
    assert list(read(config_files, "seed = 1"))[:12] == sockets + values


def test_a_recipe_without_a_name_has_one_afterwards(config_files: Any) -> None:
    assert read(config_files, "seed = 1")["output_name"] == "my_lora"


def test_a_file_is_read_when_there_is_no_text(config_files: Any, comfyui: FolderPaths) -> None:
    (comfyui.base / "input/a.toml").write_text("seed = 5")
    from_toml = config_files.ConfigFromToml
    file, text = from_toml.define_schema().inputs
    assert file.options["options"] == ["none", "input/a.toml"]
    names = [output.display_name for output in from_toml.define_schema().outputs]
    for toml, seed in ((" \n", 5), ("seed = 6", 6)):
        values = from_toml.execute(file="input/a.toml", toml=toml).values
        assert dict(zip(names, values, strict=True))["seed"] == seed
    assert text.options["default"] == ""


@pytest.mark.parametrize(
    ("file", "toml", "message"),
    [
        ("none", "", "Training Config from TOML: choose a file, or paste a recipe into toml"),
        ("input/gone.toml", "", "file 'input/gone.toml': there is no such recipe"),
        ("none", "sede = 1", "toml: sede = 1: unknown setting; did you mean 'seed'?"),
        ("none", "seed", "toml: this is not valid TOML: "),
        (
            "none",
            "sample_lines = ['a cat --ci /etc/passwd']",
            "sample_lines, line 1: --ci = /etc/passwd: a recipe in a workflow may only",
        ),
        ("none", "logging_dir = './logs'", "logging_dir = logs: a recipe in a workflow may only"),
        (
            "none",
            "network_weights = '/etc/a.safetensors'",
            "network_weights = /etc/a.safetensors: a recipe in a workflow may only",
        ),
        (
            "none",
            "base_weights = ['/etc/a.safetensors']",
            "base_weights = /etc/a.safetensors: a recipe in a workflow may only",
        ),
        ("none", "dit = '/etc/passwd'", "dit = /etc/passwd: a recipe in a workflow may only"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_sentence(
    config_files: Any, file: str, toml: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_files.ConfigFromToml.execute(file=file, toml=toml)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_file_is_checked_as_a_text_is(config_files: Any, comfyui: FolderPaths) -> None:
    (comfyui.base / "input/a.toml").write_text("vae = '~/.ssh/id_rsa'")
    with pytest.raises(EngineError, match=r"^vae = .*id_rsa: a recipe in a workflow"):
        config_files.ConfigFromToml.execute(file="input/a.toml", toml="")


def test_paths_of_a_recipe_that_are_not_used_may_be_anywhere(config_files: Any) -> None:
    text = "output_dir = '/data/loras'\nsave_path = '/data/pictures'\nnetwork_dim = 7"
    values = config_files.ConfigFromToml.execute(file="none", toml=text)
    assert 7 in values.values
