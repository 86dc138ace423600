"""The specification's examples, defaults and ranges; docs/specification.md says where all else is.

Examples are the specification's own words, but for the trainer's name in front of them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.engine.__main__ import main
from pack.engine.config import FIELDS, Config
from pack.engine.config_file import load_config, to_toml
from pack.engine.errors import ConfigError
from pack.engine.options import add_options, given_words
from pack.tests.engine.specification_examples import given_settings, options_of, settings_of
from pack.tests.engine.test_config_file import configs

FILE = """
# config.toml
dit = "/path/to/dit"
dataset_config = "/path/to/dataset.toml"
network_module = "networks.lora"
network_dim = 32
network_alpha = 16

[optimizer]
optimizer_type = "AdamW"
learning_rate = 1e-4

[training]
max_train_epochs = 10
save_every_n_epochs = 2
mixed_precision = "bf16"

[output]
output_dir = "/path/to/output"
output_name = "my_lora"
logging_dir = "./logs"
"""
MEANT = {
    "dit": Path("/path/to/dit"),
    "network_module": "networks.lora",
    "network_dim": 32,
    "network_alpha": 16.0,
    "optimizer_type": "AdamW",
    "learning_rate": 1e-4,
    "max_train_epochs": 10,
    "save_every_n_epochs": 2,
    "mixed_precision": "bf16",
    "output_dir": Path("/path/to/output"),
    "output_name": "my_lora",
    "logging_dir": Path("logs"),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def config_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The specification's example in the current folder, without the line for the data set."""
    monkeypatch.chdir(tmp_path)
    path = Path("config.toml")
    path.write_text(re.sub("dataset_config.*\n", "", FILE), "utf-8")
    return path


# The configuration file


def test_of_the_example_file_only_the_data_set_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(FILE, "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {}, {})
    (problem,) = str(caught.value).splitlines()
    assert problem.startswith(f'{path}: dataset_config = "/path/to/dataset.toml": this option is ')


def test_all_else_of_the_example_file_means_what_it_says(config_toml: Path) -> None:
    launched = (
        "accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 "
        "src/musubi_tuner/hv_train_network.py --config_file config.toml"
    )
    config = settings_of(launched)
    assert {name: config.value(name) for name in MEANT} == MEANT
    assert config == load_config(config_toml, {}, {})


def test_the_example_on_the_command_line_overrides_the_file(config_toml: Path) -> None:
    launched = (
        "accelerate launch --mixed_precision bf16 src/musubi_tuner/hv_train_network.py "
        "--config_file config --learning_rate 2e-4"
    )
    config = settings_of(launched)
    assert {name: config.value(name) for name in MEANT} == MEANT | {"learning_rate": 2e-4}


def words_of(config: Config) -> list[str]:
    """The options of a command line that gives every setting that has a value."""
    words: list[str] = []
    for name in FIELDS:
        value = config.value(name)
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


@settings(max_examples=40, deadline=None)
@given(config=configs(st.sampled_from(["a b", "naïve", "x=y", "猫.png"])))
def test_any_setting_means_the_same_in_a_file_and_on_the_command_line(
    tmp_path_factory: pytest.TempPathFactory, config: Config
) -> None:
    path = tmp_path_factory.getbasetemp() / "same.toml"
    path.write_text(to_toml(config), "utf-8")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    command_line = given_words(*parser.parse_known_args(words_of(config)))
    assert load_config(None, command_line, {}) == load_config(path, {}, {}) == config


# The other examples

EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("--magcache_calibration", {"magcache_calibration": True}),
    ("--magcache_mag_ratios 0", {"magcache_mag_ratios": "0"}),
    (
        "--magcache_mag_ratios 1.00000,1.26562,1.08594",
        {"magcache_mag_ratios": "1.00000,1.26562,1.08594"},
    ),
    (
        "--magcache_retention_ratio 0.2 --magcache_threshold 0.12 --magcache_k 3",
        {
            "magcache_threshold": 0.12,
            "magcache_k": 3,
        },
    ),
    ("--fp8 --fp8_scaled", {"fp8": True, "fp8_scaled": True}),
    ("--fp8_base --fp8_scaled", {"fp8_base": True, "fp8_scaled": True}),
    ('--network_args "verbose=True"', {"network_args": ["verbose=True"]}),
    (
        '--network_module networks.lora --network_dim 32 --network_args "loraplus_lr_ratio=4"',
        {"network_dim": 32, "network_args": ["loraplus_lr_ratio=4"]},
    ),
    (
        """--network_args "exclude_patterns=[r'.*single_blocks.*']" """,
        {"network_args": ["exclude_patterns=[r'.*single_blocks.*']"]},
    ),
    (
        """--network_args "exclude_patterns=[r'.*']" """
        r""""include_patterns=[r'.*single_blocks\.\d{2}\.linear.*']" """,
        {
            "network_args": [
                "exclude_patterns=[r'.*']",
                r"include_patterns=[r'.*single_blocks\.\d{2}\.linear.*']",
            ]
        },
    ),
    ("--logging_dir=logs", {"logging_dir": Path("logs")}),
    (
        "--logging_dir=logs --log_prefix=lora_setting1_",
        {"logging_dir": Path("logs"), "log_prefix": "lora_setting1_"},
    ),
    ("--log_with wandb", {"log_with": "wandb"}),
    ("--log_with tensorboard", {"log_with": "tensorboard"}),
    (
        "--log_with all --log_tracker_name my_project",
        {"log_with": "all", "log_tracker_name": "my_project"},
    ),
    (
        "python src/musubi_tuner/hv_train_network.py --dynamo_backend INDUCTOR "
        "--dynamo_mode default",
        {"dynamo_backend": "INDUCTOR"},
    ),
    (
        "python src/musubi_tuner/hv_train_network.py --dynamo_backend INDUCTOR "
        "--dynamo_mode max-autotune --dynamo_fullgraph",
        {"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune", "dynamo_fullgraph": True},
    ),
    ("--dynamo_dynamic", {"dynamo_dynamic": True}),
    (
        "... \\\n    --timestep_sampling logsnr \\\n    --logit_mean -6.0 \\\n    --logit_std 2.0",
        {"timestep_sampling": "logsnr", "logit_mean": -6.0, "logit_std": 2.0},
    ),
    (
        "... \\\n    --timestep_sampling qinglong_flux \\\n    --logit_mean -6.0 \\\n"
        "    --logit_std 2.0",
        {"timestep_sampling": "qinglong_flux", "logit_mean": -6.0, "logit_std": 2.0},
    ),
    ("--timestep_sampling qinglong_qwen", {"timestep_sampling": "qinglong_qwen"}),
    ("--min_timestep 500 --max_timestep 1000", {"min_timestep": 500}),
    ("--min_timestep 0 --max_timestep 500", {"max_timestep": 500}),
    (
        "--min_timestep 200 --max_timestep 800 --preserve_distribution_shape",
        {"min_timestep": 200, "max_timestep": 800, "preserve_distribution_shape": True},
    ),
    ("--show_timesteps image", {"show_timesteps": "image"}),
    ("--show_timesteps console", {"show_timesteps": "console"}),
    ("... \\\n    --num_timestep_buckets 5", {"num_timestep_buckets": 5}),
    (
        "--optimizer_type schedulefree.AdamWScheduleFree "
        '--optimizer_args "weight_decay=0.01" "betas=(0.9,0.95)"',
        {
            "optimizer_type": "AdamWScheduleFree",
            "optimizer_args": ["weight_decay=0.01", "betas=(0.9,0.95)"],
        },
    ),
    (
        '--lr_scheduler rex --lr_scheduler_args "rex_alpha=0.1" "rex_beta=0.9"',
        {"lr_scheduler": "rex", "lr_scheduler_args": ["rex_alpha=0.1", "rex_beta=0.9"]},
    ),
]


@pytest.mark.parametrize(("command", "meant"), EXAMPLES, ids=[text for text, _ in EXAMPLES])
def test_an_example_is_understood(command: str, meant: dict[str, Any]) -> None:
    assert given_settings(settings_of(command)) == meant


def test_network_args_mean_what_the_specification_says() -> None:
    patterns = (
        r"""--network_args "loraplus_lr_ratio=4" "include_patterns=[r'.*\.\d{2}\.linear.*']" """
    )
    arguments = settings_of(patterns).network.arguments
    assert arguments.loraplus_lr_ratio == 4.0 and not arguments.verbose
    assert arguments.include_patterns == [r".*\.\d{2}\.linear.*"]
    assert settings_of('--network_args "verbose=True"').network.arguments.verbose


def test_a_key_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = '--network_args "verbose=True" "key1=1" "key2=2"'
    assert main(["train", *options_of(command), "--print_config"]) == 2
    assert "expected known keys (not 'key1'; known: loraplus_lr_ratio" in capsys.readouterr().err


def test_the_words_behind_the_script_are_the_options() -> None:
    launched = "accelerate launch --mixed_precision bf16 a/train.py --dit ... \\\n --seed 1"
    assert options_of(launched) == ["--dit", "--seed", "1"]
    assert options_of('--optimizer_args "betas=(0.9, 0.95)"') == [
        "--optimizer_args",
        "betas=(0.9, 0.95)",
    ]


# Defaults, ranges and choices

DEFAULTS: dict[str, Any] = {
    "optimizer_type": "AdamW",
    "log_prefix": "",
    "dynamo_backend": "NO",
    "dynamo_mode": "default",
    "dynamo_fullgraph": False,
    "dynamo_dynamic": False,
    "min_timestep": 0,
    "max_timestep": 1000,
    "preserve_distribution_shape": False,
    "num_timestep_buckets": None,
    "rex_alpha": 0.1,
    "rex_beta": 0.9,
    "lr_warmup_steps": 0,
    "magcache_retention_ratio": 0.2,
    "magcache_threshold": 0.24,
    "magcache_k": 6,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_that_of_the_specification(name: str) -> None:
    assert Config().value(name) == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "usable", "unusable"),
    [
        ("min_timestep", ["0", "999"], ["-1", "1000", "0.5"]),
        ("max_timestep", ["1", "1000"], ["0", "1001", "999.5"]),
        ("num_timestep_buckets", ["2", "4", "10"], ["0", "-1", "2.5"]),
        ("log_with", ["tensorboard", "wandb", "all"], ["none", "aim"]),
        ("dynamo_mode", ["default", "reduce-overhead", "max-autotune"], ["fast"]),
        ("show_timesteps", ["image", "console"], ["both"]),
        (
            "dynamo_backend",
            ["NO", "INDUCTOR", "CUDAGRAPHS", "inductor"],
            # What the specification calls two of them is no backend of accelerate.
            ["NVFUSER", "CUDAGRAPHS_FALLBACK"],
        ),
    ],
)
def test_a_setting_takes_what_the_specification_lists(
    name: str, usable: Sequence[str], unusable: Sequence[str]
) -> None:
    for word in usable:
        found = load_config(None, {name: [word]}, {}).value(name)
        assert str(found).lower() == word.lower()
    for word in unusable:
        with pytest.raises(ConfigError, match=f"^command line: {name} = .*: expected "):
            load_config(None, {name: [word]}, {})


@pytest.mark.parametrize("std", ["2.0", "3.0"])
def test_what_the_paper_recommends_can_be_set(std: str) -> None:
    config = settings_of(f"--timestep_sampling logsnr --logit_mean=-6.0 --logit_std={std}")
    assert (config.timesteps.logit_mean, config.timesteps.logit_std) == (-6.0, float(std))


# What there is not yet

NOT_BUILT = [
    "--fp8_fast",
    "--dataset_config dataset.toml",
    "--dit_high_noise model.safetensors",
    "--wandb_api_key 0123456789abcdef",
]


@pytest.mark.parametrize("command", NOT_BUILT)
@pytest.mark.parametrize("job", ["train", "generate"])
def test_what_is_not_built_yet_is_refused_and_never_ignored(
    capsys: pytest.CaptureFixture[str], command: str, job: str
) -> None:
    assert main([job, *options_of(command), "--print_config"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    unknown = {
        word.removeprefix("--")
        for word in options_of(command)
        if word.startswith("--") and word[2:] not in FIELDS
    }
    problems = errors.removeprefix("error: ").splitlines()
    assert len(problems) == len(unknown) > 0
    assert all("this option is not supported by this version" in each for each in problems)
