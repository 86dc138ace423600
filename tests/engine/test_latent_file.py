from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.errors import DataError
from pack.engine.latent_file import read_latents, save_latents
from safetensors.torch import load_file


def test_latents_come_back_in_float32(tmp_path: Path) -> None:
    path = tmp_path / "a.latent"
    assert read_latents(path) is None
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    save_latents(path, latents.bfloat16())
    found = read_latents(path)
    assert found is not None and torch.equal(found, latents.bfloat16().float())
    # The names that ComfyUI's LoadLatent reads; without the mark it would scale them.
    assert load_file(path).keys() == {"latent_tensor", "latent_format_version_0"}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.latent"
    path.write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"a\.latent: the latents are damaged"):
        read_latents(path)
