from __future__ import annotations

import json
from pathlib import Path

from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.config_file import parse_config
from pack.engine.jobs.metadata import RECIPE, lora_metadata, without_folders
from pack.engine.jobs.plan import Plan
from pack.tests.engine.jobs import tiny

FLUX = FluxKontext()
PLAN = Plan(0, batches_per_epoch=10, batches_per_step=2, total_steps=60, multiplier=lambda _: 1.0)


def metadata(**changes: object) -> dict[str, str]:
    config = tiny.config(dit=Path("/home/me/models/flux.safetensors"), output_name="a", **changes)
    return lora_metadata(config, FLUX, PLAN, step=10, num_items=20, started=1.5)


def test_the_metadata_say_how_the_lora_was_made() -> None:
    config = tiny.config(
        dit=Path("models/flux.safetensors"),
        output_name="style",
        resolution=(768, 512),
        network_dim=8,
        learning_rate=2e-4,
        max_train_epochs=3,
        batch_size=2,
        seed=7,
    )
    facts = lora_metadata(config, FLUX, PLAN, step=10, num_items=20, started=1.5)
    assert float(facts.pop("ss_training_finished_at")) > 1.7e9
    assert facts.pop("modelspec.date")[:2] == "20"
    assert all(type(text) is str for text in facts.values())
    expected = {
        "ss_output_name": "style",
        "ss_base_model_version": "flux_kontext",
        "ss_sd_model_name": "flux.safetensors",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "8.0",
        "ss_learning_rate": "0.0002",
        "ss_steps": "10",
        "ss_max_train_steps": "60",
        "ss_epoch": "2",
        "ss_num_train_items": "20",
        "ss_batch_size_per_device": "2",
        "ss_resolution": "(768, 512)",
        "ss_timestep_sampling": "flux_shift",
        "ss_seed": "7",
        "ss_training_started_at": "1.5",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Flux.1-dev/lora",
        "modelspec.title": "style",
        "modelspec.resolution": "768x512",
    }
    assert expected.items() <= facts.items()


def test_the_recipe_is_in_the_file_without_the_folders_of_the_machine() -> None:
    facts = metadata(image_directory=Path("/home/me/pictures"), lora_weight=[Path("C:\\a\\b.x")])
    recipe = parse_config(facts[RECIPE], "recipe")
    assert recipe.model.dit == Path("flux.safetensors")
    assert recipe.dataset.image_directory == Path("pictures")
    assert recipe.generate.lora_weight == [Path("b.x")]
    assert "/home" not in json.dumps(facts) and "C:" not in json.dumps(facts)


def test_a_config_without_paths_stays_as_it_is() -> None:
    config = tiny.config(output_name="a")
    assert without_folders(config) == config


def test_network_args_are_json() -> None:
    facts = metadata(network_args=["loraplus_lr_ratio=4", "include_patterns=[r'a=b.*']"])
    arguments = json.loads(facts["ss_network_args"])
    assert arguments == {"loraplus_lr_ratio": "4", "include_patterns": "[r'a=b.*']"}
    assert "ss_network_args" not in metadata()


def test_without_metadata_only_what_is_needed_is_written() -> None:
    facts = metadata(
        no_metadata=True, training_comment="secret", network_args=["factor=8"], metadata_tags="a,b"
    )
    kept = {key for key in facts if not key.startswith("modelspec.")}
    assert kept == {
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "ss_steps",
    }
    assert facts["modelspec.tags"] == "a,b"


def test_what_the_user_says_of_the_lora_is_written() -> None:
    facts = metadata(
        metadata_title="My style",
        metadata_author="me",
        metadata_license="CC0",
        metadata_description="drawings",
        metadata_reso="640, 480",
        metadata_arch="Flux.1-kontext",
        training_comment="first try",
        min_timestep=100,
        base_weights=[Path("/home/me/speed.safetensors")],
    )
    expected = {
        "modelspec.title": "My style",
        "modelspec.author": "me",
        "modelspec.license": "CC0",
        "modelspec.description": "drawings",
        "modelspec.resolution": "640x480",
        "modelspec.architecture": "Flux.1-kontext/lora",
        "modelspec.timestep_range": "100,1000",
        "modelspec.merged_from": "speed",
        "ss_training_comment": "first try",
        "ss_base_weights": "speed.safetensors x 1",
    }
    assert expected.items() <= facts.items()
    assert "modelspec.merged_from" not in metadata()
