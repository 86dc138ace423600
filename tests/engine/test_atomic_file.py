from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pack.engine.atomic_file import replacing, write_text
from safetensors.torch import save_file


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old\n")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old\n"
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_a_file_that_a_library_made_private_gets_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with replacing(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)
        temporary.chmod(0o600)
    assert (tmp_path / "a.safetensors").stat().st_mode == plain.stat().st_mode
