"""The nodes LoRA Settings and LoRA Metadata: what their widgets become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack.engine.config import FIELDS, NetworkArguments
from pack.engine.config_file import Given, build_config
from pack.engine.errors import ConfigError, DataError
from pack.tests.nodes.stand_ins import FolderPaths

OLD = {"network_alpha": 8.0, "save_precision": "fp16"}  # of prompts that were saved long ago


@pytest.fixture
def lora_settings(node_types: dict[str, Any], comfyui: FolderPaths) -> Any:
    for name in ("first", "base"):
        (comfyui.base / f"models/loras/{name}.safetensors").touch()
    return node_types["LoraLoom_LoraSettings"]


def carried(kind: Any, **widgets: Any) -> dict[str, Any]:
    return kind.execute(**OLD | widgets).values[0]


def arguments(kind: Any, **widgets: Any) -> NetworkArguments:
    """What network_args say, through the config."""
    values = carried(kind, **widgets)
    return build_config({k: Given("test", v) for k, v in values.items()}).network.arguments


def test_an_argument_is_no_setting_of_the_same_name() -> None:
    assert not FIELDS.keys() & NetworkArguments.model_fields.keys()


def test_every_argument_of_the_network_has_a_widget(lora_settings: Any) -> None:
    widgets = {made.id: made for made in lora_settings.define_schema().inputs}
    assert NetworkArguments.model_fields.keys() <= widgets.keys()
    later = widgets.keys() - OLD.keys()
    assert list(widgets)[:2] == list(OLD)
    assert all(widgets[name].options["optional"] for name in later)


def test_a_prompt_of_before_means_what_it_meant(lora_settings: Any) -> None:
    values = carried(lora_settings)
    assert {name: value for name, value in values.items() if value} == OLD


def test_every_argument_arrives(lora_settings: Any) -> None:
    found = arguments(
        lora_settings,
        loraplus_lr_ratio=4.0,
        include_patterns=" .*\\.0\\..* \n\nfinal_layer\\.linear",
        exclude_patterns='it\'s a "pattern"',
        rank_patterns=".*img_mlp.* = 32\n(?=double).* = 4, 2.5",
        conv_dim=8,
        conv_alpha=4.0,
        rank_dropout=0.1,
        module_dropout=0.2,
        dora_wd=True,
        factor=4,
        verbose=True,
    )
    assert found == NetworkArguments(
        loraplus_lr_ratio=4.0,
        include_patterns=[r".*\.0\..*", r"final_layer\.linear"],
        exclude_patterns=['it\'s a "pattern"'],
        rank_patterns=[(".*img_mlp.*", 32, None), ("(?=double).*", 4, 2.5)],
        conv_dim=8,
        conv_alpha=4.0,
        rank_dropout=0.1,
        module_dropout=0.2,
        dora_wd=True,
        factor=4,
        verbose=True,
    )
    assert found.model_fields_set == NetworkArguments.model_fields.keys()


def test_the_other_settings_of_the_network_are_settings(
    lora_settings: Any, comfyui: FolderPaths
) -> None:
    values = carried(
        lora_settings,
        network_module="networks.lokr",
        network_dropout=0.1,
        scale_weight_norms=1.5,
        save_format="diffusers",
        network_weights="first.safetensors",
        dim_from_weights=True,
        base_weights=" base.safetensors: 0.5\n\nfirst.safetensors",
    )
    loras = comfyui.base / "models/loras"
    assert values == OLD | {
        "network_module": "networks.lokr",
        "network_args": [],
        "network_dropout": 0.1,
        "scale_weight_norms": 1.5,
        "save_format": "diffusers",
        "network_weights": loras / "first.safetensors",
        "dim_from_weights": True,
        "base_weights": [loras / "base.safetensors", loras / "first.safetensors"],
        "base_weights_multiplier": [0.5, 1.0],
    }


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        (
            {"include_patterns": "("},
            r"^LoRA Settings: expected for include_patterns regular expressions \('\(' is none: ",
        ),
        (
            {"include_patterns": "a" * 1001},
            "^LoRA Settings: expected for include_patterns patterns of at most 1000 characters$",
        ),
        (
            {"rank_patterns": "img_mlp"},
            r"^LoRA Settings: rank_patterns: expected lines such as .* \(not 'img_mlp'\)$",
        ),
        ({"rank_patterns": "a = many"}, r"\(not 'a = many'\)$"),
        ({"rank_patterns": "= 4"}, r"\(not '= 4'\)$"),
        ({"rank_patterns": "a = 1\na = 2"}, "rank_patterns: a stands in two lines; remove one$"),
        ({"rank_patterns": "a = 0"}, r"expected for rank_patterns ranks from 1 to 4096 \(not 0"),
        ({"conv_dim": 5000}, "expected for conv_dim a whole number from 1 up to 4,096"),
        ({"network_module": "networks.oft"}, '^LoRA Settings: network_module = "networks.oft": '),
        ({"base_weights": "base.safetensors: x"}, r"\(not 'base.safetensors: x'\)$"),
    ],
)
def test_what_cannot_be_is_told_with_its_node(
    lora_settings: Any, widgets: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        carried(lora_settings, **widgets)


@pytest.mark.parametrize(
    "widgets",
    [
        {"network_weights": "../../../etc/passwd"},
        {"base_weights": "gone.safetensors"},
        {"base_weights": "/etc/passwd: 1"},
    ],
)
def test_only_loras_of_the_list_can_be_named(lora_settings: Any, widgets: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^LoRA '.*': there is no such file in ComfyUI's loras"):
        carried(lora_settings, **widgets)


def test_metadata_are_settings(node_types: dict[str, Any]) -> None:
    kind = node_types["LoraLoom_LoraMetadata"]
    names = [made.id for made in kind.define_schema().inputs]
    values = dict.fromkeys(names, "") | {"no_metadata": False, "metadata_title": " Two words"}
    carried = kind.execute(**values).values[0]
    assert carried == dict.fromkeys(names) | {"no_metadata": False, "metadata_title": " Two words"}
    with pytest.raises(ConfigError, match=r'^LoRA Metadata: metadata_reso = "big": expected one'):
        kind.execute(**values | {"metadata_reso": "big"})


def test_what_the_nodes_carry_is_written_into_a_recipe_and_read_back(
    node_types: dict[str, Any], lora_settings: Any
) -> None:
    lora = carried(
        lora_settings,
        include_patterns=r".*\.0\..*",
        rank_patterns=".* = 3, 1",
        base_weights="base.safetensors: 0.5",
        network_weights="first.safetensors",
    )
    inputs = {
        "output_name": "cats",
        "max_train_steps": 5,
        "learning_rate": 1e-4,
        "network_dim": 4,
        "seed": 1,
        "save_every_n_steps": 0,
        "preview_images": 0,
        "model": {"dit": Path("/m/model.safetensors")},
        "dataset": {},
        "lora": lora,
        "metadata": {"metadata_author": "me"},
    }
    toml, _ = node_types["LoraLoom_ConfigToToml"].execute(**inputs).values
    from_toml = node_types["LoraLoom_ConfigFromToml"]
    text = toml.replace('dit = "/m/model.safetensors"', "")
    names = [made.display_name for made in from_toml.define_schema().outputs]
    read = dict(zip(names, from_toml.execute(file="none", toml=text).values, strict=True))
    assert {name: read["lora"][name] for name in lora} == lora
    assert read["metadata"]["metadata_author"] == "me"
    assert list(read)[-1] == "metadata"
