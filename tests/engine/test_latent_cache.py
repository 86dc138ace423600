from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.errors import DataError
from pack.engine.latent_cache import (
    cache_paths,
    facts_digest,
    file_digest,
    read_facts,
    write_cache,
)


def test_images_that_share_a_stem_never_share_a_cache_file(tmp_path: Path) -> None:
    names = ["cat.png", "cat.jpg", "cat_flux.png"]
    paths = {path for name in names for path in cache_paths(tmp_path, Path(name), "flux_kontext")}
    assert len(paths) == 6


def test_facts_come_back_and_a_damaged_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert read_facts(path) is None
    write_cache(path, {"latents": torch.zeros(4, 4)}, {"image": "a.png", "size": [64, 64]})
    assert read_facts(path) == {"format": "1", "image": "a.png", "size": [64, 64]}
    path.write_bytes(path.read_bytes()[:-8])
    assert read_facts(path) is None


def test_digests_depend_on_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"y")
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")
    assert (
        facts_digest({"a": 1, "b": 2}) == facts_digest({"b": 2, "a": 1}) != facts_digest({"a": 1})
    )


def test_what_is_not_finite_is_not_cached(tmp_path: Path) -> None:
    tensors = {"latents": torch.tensor([1.0, float("nan")])}
    with pytest.raises(DataError, match=r"cat\.png: the encoder gave NaN"):
        write_cache(tmp_path / "a.safetensors", tensors, {"image": "cat.png"})
    assert list(tmp_path.iterdir()) == []
