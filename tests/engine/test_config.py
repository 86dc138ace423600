from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack.engine.config import (
    FIELDS,
    GROUPS,
    Config,
    DatasetConfig,
    GenerateConfig,
    ModelConfig,
    NetworkConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    TimestepConfig,
    TrainingConfig,
)
from pack.engine.config_types import parse_arguments
from pack.engine.errors import ConfigError
from pack.engine.jobs.plan import schedule_settings
from pydantic import ValidationError


def test_a_flat_name_belongs_to_one_group() -> None:
    assert sum(len(group.model_fields) for group in GROUPS.values()) == len(FIELDS)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_defaults_keep_their_own_rules(group: Any) -> None:
    # pydantic does not check a default unless it is given as a value.
    assert group(**dict(group())) == group()


def test_every_setting_says_what_it_is() -> None:
    silent = [name for name, field in FIELDS.items() if not (field.description or "").endswith(".")]
    assert not silent


def test_settings_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.runtime.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.runtime = RuntimeConfig(seed=1)


def test_a_setting_is_found_by_its_flat_name() -> None:
    config = Config(network=NetworkConfig(network_dim=8))
    assert config.value("network_dim") == 8


def test_a_misspelt_setting_is_refused_in_code_too() -> None:
    with pytest.raises(ValidationError, match="rnak"):
        NetworkConfig(rnak=4)


def test_all_needed_settings_that_are_missing_are_named_with_their_meaning() -> None:
    config = Config(model=ModelConfig(vae=Path("vae.safetensors")))
    config.require("vae", "seed")
    with pytest.raises(ConfigError, match=r"^1 needed setting is missing; give it .* --dit \.\.\."):
        config.require("dit", "vae")
    with pytest.raises(ConfigError) as caught:
        config.require("dit", "vae", "output_dir")
    first, *others = str(caught.value).splitlines()
    assert first.startswith("2 needed settings are missing") and "--output_dir ..." in first
    assert others == [f"  {name}: {FIELDS[name].description}" for name in ("dit", "output_dir")]


@pytest.mark.parametrize(
    ("network", "alpha"),
    [
        (NetworkConfig(network_dim=8), 8.0),
        (NetworkConfig(network_dim=8, network_alpha=0), 8.0),
        (NetworkConfig(network_dim=8, network_alpha=1), 1.0),
    ],
)
def test_alpha_is_the_rank_unless_it_is_given(network: NetworkConfig, alpha: float) -> None:
    assert network.alpha == alpha


@pytest.mark.parametrize(
    ("value", "steps"), [(0, 0), (20, 20), (0.1, 25), ("10%", 25), ("0.4%", 1), (0.0, 0)]
)
def test_the_warm_up_is_a_number_of_steps_or_a_share(value: Any, steps: int) -> None:
    assert schedule_settings(OptimizerConfig(lr_warmup_steps=value), 250).warmup_steps == steps


@pytest.mark.parametrize("value", [1.0, 1.5, "100%", -1, -0.1, True, "many", "10 %%"])
def test_a_warm_up_longer_than_the_run_is_no_share(value: Any) -> None:
    with pytest.raises(ValidationError):
        OptimizerConfig(lr_warmup_steps=value)


def test_arguments_become_values() -> None:
    entries = ["weight_decay=0.01", "betas = (0.9, 0.99)", "eps=1e-8", "flag=True"]
    parsed = {"weight_decay": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "flag": True}
    assert parse_arguments(entries) == parsed
    assert OptimizerConfig(optimizer_args=entries).arguments == parsed
    assert parse_arguments(["betas=0.5,0"]) == {"betas": (0.5, 0)}
    # Only the first "=" separates.
    assert OptimizerConfig(lr_scheduler_args=["rules='a=b'"]).scheduler_arguments == {
        "rules": "a=b"
    }


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (["weight_decay"], "key=value"),
        (["=1"], "key=value"),
        (["a b=1"], "key=value"),
        (["weight_decay="], "for weight_decay"),
        (["weight_decay=much"], "for weight_decay"),
        (["weight_decay={[]: 1}"], "for weight_decay"),
        (["weight_decay=__import__('os')"], "for weight_decay"),
        (["betas=(0.9"], "for betas"),
        (["eps=1", "eps=2"], "eps comes twice"),
    ],
)
def test_an_argument_that_means_nothing_is_refused(entries: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_arguments(entries)
    with pytest.raises(ValidationError, match=reason):
        OptimizerConfig(optimizer_args=entries)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("adamw", "AdamW"),
        ("ADAMW8BIT", "AdamW8bit"),
        ("schedulefree.AdamWScheduleFree", "AdamWScheduleFree"),
        ("torch.optim.SGD", "torch.optim.SGD"),
    ],
)
def test_an_optimizer_has_one_name(given: str, name: str) -> None:
    assert OptimizerConfig(optimizer_type=given).optimizer_type == name


@pytest.mark.parametrize("name", ["AdamX", "", "a..b", ".a", "os.system('x')", "torch optim.SGD"])
def test_what_names_no_optimizer_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="AdamWScheduleFree"):
        OptimizerConfig(optimizer_type=name)


def test_a_dynamo_backend_may_be_written_small_but_must_exist() -> None:
    assert TrainingConfig(dynamo_backend="inductor").dynamo_backend == "INDUCTOR"
    with pytest.raises(ValidationError, match="did you mean 'INDUCTOR'"):
        TrainingConfig(dynamo_backend="inducter")


def test_a_size_is_one_side_or_both() -> None:
    assert DatasetConfig(resolution=512).resolution == (512, 512)
    assert DatasetConfig(resolution=[512, 768]).resolution == (512, 768)
    assert GenerateConfig(image_size=(64, 32)).image_size == (64, 32)


@pytest.mark.parametrize("size", [8, [512], [512, 512, 3], [8, 512], 512.0, "512", True, None])
def test_anything_else_is_no_size(size: Any) -> None:
    with pytest.raises(ValidationError):
        DatasetConfig(resolution=size)


@pytest.mark.parametrize("name", ["a", "name with spaces", "v1.2", "猫", "-dash", "a" * 100])
def test_a_usable_file_name_is_taken_as_it_is(name: str) -> None:
    assert OutputConfig(output_name=name).output_name == name


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "a\\b", "..", ".a", "a.", " a", "a ", "a:b", "a\n"]
)
def test_a_name_that_some_file_system_refuses_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="a file name without folder"):
        OutputConfig(output_name=name)


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12", "xpu:1"])
def test_a_device_may_have_a_number(device: str) -> None:
    assert RuntimeConfig(device=device).device == device


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cpu:0", "cuda:0\n", "CUDA"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ValidationError, match="one of auto, cpu, cuda"):
        RuntimeConfig(device=device)


def test_a_tilde_is_the_home_folder_unless_it_is_part_of_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert ModelConfig(dit="~/flux.safetensors").dit == Path("/home/me/flux.safetensors")
    assert ModelConfig(dit=Path("~/flux.safetensors")).dit == Path("/home/me/flux.safetensors")
    assert ModelConfig(dit="~no such user/x").dit == Path("~no such user/x")


@pytest.mark.parametrize("path", ["C:\new\flux", "a\0b", "a\tb", "\udcff.safetensors"])
def test_a_path_with_characters_that_nobody_meant_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="single quotes"):
        ModelConfig(dit=path)
    with pytest.raises(ValidationError, match="single quotes"):
        GenerateConfig(lora_weight=[path])


def test_loras_without_a_multiplier_have_full_strength() -> None:
    generate = GenerateConfig(lora_weight=["a", "b"], lora_multiplier=[0.5])
    assert generate.loras == [(Path("a"), 0.5), (Path("b"), 1.0)]


def test_more_multipliers_than_loras_are_refused() -> None:
    with pytest.raises(ValidationError, match="at most one value for each of the 1 LoRA files"):
        GenerateConfig(lora_weight=["a"], lora_multiplier=[1.0, 0.5])


def test_names_of_musubi_tuner_mean_the_same() -> None:
    assert OptimizerConfig(optimizer_type="adamw").optimizer_type == "AdamW"
    assert ModelConfig(vae_dtype="bfloat16").vae_dtype == "bf16"
    assert OutputConfig(save_precision="float").save_precision == "fp32"


def test_a_range_of_timesteps_has_its_ends_in_order() -> None:
    with pytest.raises(ValidationError, match="a whole number above min_timestep, which is 500"):
        TimestepConfig(min_timestep=500, max_timestep=500)
    assert TimestepConfig(min_timestep=500, max_timestep=501).max_timestep == 501
