"""Tests of what is made of the metadata of LoRA files, which others write as they like."""

from __future__ import annotations

import json
import random

import pytest
from pack.engine.training_facts import printable, steps_done, training_facts


def facts(**metadata: str) -> dict[str, str]:
    return dict(training_facts({key.replace("__", "."): text for key, text in metadata.items()}))


def test_a_file_of_musubi_tuner_or_of_this_pack() -> None:
    found = facts(
        ss_output_name="cat",
        ss_base_model_version="wan2.1",
        ss_sd_model_name="wan.safetensors",
        ss_network_module="networks.lora_wan",
        ss_network_dim="32",
        ss_network_alpha="16",
        ss_network_dropout="None",
        ss_learning_rate="0.0002",
        ss_lr_scheduler="constant",
        ss_lr_warmup_steps="0",
        ss_optimizer="adamw8bit",
        ss_steps="1600",
        ss_max_train_steps="2000",
        ss_epoch="8",
        ss_num_epochs="10",
        ss_num_train_items="40",
        ss_training_comment="first try",
        ss_training_started_at="1700000000.0",
        ss_training_finished_at="1700007500.0",
        ss_timestep_sampling="shift",
        ss_discrete_flow_shift="3.0",
        ss_mixed_precision="bf16",
        ss_seed="42",
        modelspec__timestep_range="0,900",
    )
    assert found == {
        "title": "cat",
        "comment": "first try",
        "base model": "wan2.1, wan.safetensors",
        "made with": "networks.lora_wan",
        "finished": "2023-11-15 00:18 UTC, after 2:05 h",
        "steps": "1,600 of 2,000",
        "epochs": "8 of 10",
        "learning rate": "0.0002, constant, warm-up 0",
        "optimizer": "adamw8bit",
        "images": "40",
        "noise levels": "shift, shift 3.0, range 0,900",
        "network": "dim 32, alpha 16",
        "precision": "bf16",
        "seed": "42",
    }


def test_a_file_of_sd_scripts_names_its_folders_and_tags() -> None:
    found = facts(
        ss_num_train_images="230",
        ss_dataset_dirs=json.dumps({"10_cat": {"n_repeats": 10, "img_count": 23}}),
        ss_tag_frequency=json.dumps({"10_cat": {"ohwx cat": 23, "grass": 4}, "b": {"grass ": 40}}),
        ss_unet_lr="1e-4",
        ss_steps="500",
        ss_max_train_steps="500",
    )
    assert found["images"] == "230: 10_cat (23 x 10)"
    assert found["frequent tags"] == "grass (44), ohwx cat (23)"
    assert found["learning rate"] == "1e-4" and found["steps"] == "500"


def test_a_file_of_ai_toolkit() -> None:
    found = facts(
        name="my_lora",
        ss_base_model_version="flux1",
        software=json.dumps({"name": "ai-toolkit", "version": "0.1.0"}),
        training_info=json.dumps({"step": 1500, "epoch": 7}),
    )
    assert found == {
        "title": "my_lora",
        "base model": "flux1",
        "made with": "ai-toolkit 0.1.0",
        "steps": "1,500",
        "epochs": "7",
    }


def test_what_a_tool_made_says_of_what() -> None:
    note = json.dumps({"files": [{}, {}, {}]})
    found = facts(
        **{"lora_loom.ema": note, "lora_loom.operation": "resized"}, modelspec__merged_from="a, b"
    )
    assert found == {"made by": "resized; mean of 3 checkpoints", "made from": "a, b"}


def test_a_file_without_metadata_has_no_facts() -> None:
    assert training_facts({}) == []


@pytest.mark.parametrize(
    ("metadata", "steps"),
    [
        ({"ss_steps": "120"}, 120),
        ({"ss_steps": "None", "training_info": '{"step": 7}'}, 7),
        ({"training_info": '{"step": "8"}'}, 8),
        ({"ss_steps": "-3"}, None),
        ({"ss_steps": "1e3"}, None),
        ({"ss_steps": "\u0663"}, None),  # a digit, but not one of ours
        ({"ss_steps": "9" * 5000}, None),
        ({"training_info": "[1]"}, None),
        ({}, None),
    ],
)
def test_steps_are_known_where_a_whole_number_says_so(
    metadata: dict[str, str], steps: int | None
) -> None:
    assert steps_done(metadata) == steps


def test_what_others_write_cannot_command_a_terminal_or_fill_it() -> None:
    found = facts(
        modelspec__title="\x1b[2Jevil\r\n\u202etitle\x00", ss_training_comment="x" * 10**6
    )
    assert found["title"] == "[2Jevil title"
    assert len(found["comment"]) == 100 and found["comment"].endswith("...")
    assert printable("  a \t b ") == "a b"


def test_no_metadata_can_make_it_fail() -> None:
    odd = [
        "",
        "None",
        "{",
        "[" * 50_000,
        "nan",
        "1e400",
        "-1",
        "null",
        "[]",
        "{}",
        '{"a": 3}',
        '{"a": {"b": "c"}}',
        '{"name": null, "step": true, "files": 3, "a": [1]}',
        "\ud800",
        "9" * 400,
    ]
    keys = [f"ss_{name}" for name in ("steps", "max_train_steps", "epoch", "num_epochs")]
    keys += ["ss_training_started_at", "ss_training_finished_at", "ss_dataset_dirs"]
    keys += ["ss_tag_frequency", "software", "training_info", "lora_loom.ema", "modelspec.title"]
    draw = random.Random(0)
    for _ in range(300):
        metadata = {key: draw.choice(odd) for key in keys}
        for name, text in training_facts(metadata):
            assert name and text and text.isprintable() and len(text) <= 100
