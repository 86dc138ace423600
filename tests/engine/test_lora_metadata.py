from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.lora_file import read_lora, write_lora
from pack.engine.lora_metadata import derived, with_hashes, without_hashes
from safetensors.torch import load_file, save_file

from .lora_examples import adapter

WAN = LAYER_NAMES["wan"]
METADATA = {"ss_seed": "1", "modelspec.title": "a", "note": "b"}


def test_hashes_are_those_of_a_file_with_only_the_metadata_of_training(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(500_000), "a": torch.randn(3, 5).bfloat16()}
    found = with_hashes(tensors, METADATA | {"sshs_model_hash": "stale"})
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"ss_seed": "1"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    whole = hashlib.sha256(content[start:]).hexdigest()
    assert found == {
        **METADATA,
        "sshs_model_hash": whole,
        "sshs_legacy_hash": hashlib.sha256(content[2**20 : 2**20 + 2**16]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{whole}",
    }


def test_small_files_have_the_legacy_hash_of_nothing() -> None:
    found = with_hashes({"a": torch.zeros(2)}, {"ss_seed": "1"})
    assert found["sshs_legacy_hash"] == "e3b0c442"
    assert "modelspec.hash_sha256" not in found
    assert without_hashes(found) == {"ss_seed": "1"}


def test_the_hash_in_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    given = {"blocks.0.ffn.0": adapter("lora", (8, 6), torch.Generator().manual_seed(0))}
    write_lora(path, given, WAN, dtype=torch.bfloat16, metadata=METADATA)
    content = path.read_bytes()
    payload = content[8 + int.from_bytes(content[:8], "little") :]
    metadata = read_lora(path, [WAN]).metadata
    assert metadata["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()
    again = with_hashes(load_file(path), metadata)
    assert again == metadata


def test_what_was_made_of_one_file_keeps_what_is_known_of_its_training() -> None:
    source = METADATA | {
        "sshs_model_hash": "1",
        "modelspec.hash_sha256": "0x1",
        "lora_adapter_metadata": json.dumps({}),
        "modelspec.date": "2024-01-01",
    }
    found = derived([source], title="new", operation="resized to rank 4")
    date = found.pop("modelspec.date")
    assert date.startswith("20") and date != "2024-01-01"
    assert found == {
        "ss_seed": "1",
        "note": "b",
        "modelspec.title": "new",
        "modelspec.sai_model_spec": "1.0.0",
        "lora_loom.operation": "resized to rank 4",
    }


def test_what_was_made_of_several_names_them_and_keeps_what_they_agree_on() -> None:
    sources = [
        {"ss_base_model_version": "wan", "ss_seed": "1", "modelspec.title": "first"},
        {"ss_base_model_version": "wan", "ss_seed": "2", "ss_output_name": "second"},
        {"ss_base_model_version": "wan"},
    ]
    found = derived(sources, title="sum", operation="added")
    assert found["modelspec.merged_from"] == "first, second, unnamed"
    assert found["ss_base_model_version"] == "wan"
    assert "ss_seed" not in found
