from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from pack.engine.errors import CheckpointError
from pack.engine.weights import fingerprint, load_into, open_checkpoint, save_tensors
from pack.tests.conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "0.weight": torch.randn(6, 4, generator=generator),
        "0.bias": torch.randn(6, generator=generator),
        "1.weight": torch.randn(2, 6, generator=generator),
        "1.bias": torch.randn(2, generator=generator),
    }


def empty_module() -> nn.Module:
    with init_empty_weights():
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
)
def test_tensors_come_back_with_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: (tensor * 3).to(dtype) for name, tensor in random_state().items()}
    tensors["scalar"] = torch.tensor(2).to(dtype)
    tensors["empty"] = torch.empty(0, 3, dtype=dtype)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"made": "here"})

    checkpoint = open_checkpoint(tmp_path / "a.safetensors")

    assert checkpoint.metadata == {"made": "here"}
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == dtype and read.shape == tensor.shape
        assert torch.equal(read.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_a_cast_while_reading_equals_a_cast_afterwards(tmp_path: Path) -> None:
    save_file(random_state(), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    for name, tensor in random_state().items():
        assert torch.equal(checkpoint.read(name, torch.bfloat16), tensor.bfloat16())


def test_a_split_set_is_found_from_any_part(tmp_path: Path) -> None:
    state = random_state()
    save_file(
        {k: v for k, v in state.items() if k[0] == "0"}, tmp_path / "m-00001-of-00002.safetensors"
    )
    save_file(
        {k: v for k, v in state.items() if k[0] == "1"}, tmp_path / "m-00002-of-00002.safetensors"
    )
    for path in (tmp_path / "m-00002-of-00002.safetensors", tmp_path):
        checkpoint = open_checkpoint(path)
        assert {key: checkpoint.read(key).tolist() for key in checkpoint.entries} == {
            key: value.tolist() for key, value in state.items()
        }


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    save_file(random_state(), tmp_path / "m-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="1 of 2 parts are missing, first m-00002-of-00002"):
        open_checkpoint(tmp_path / "m-00001-of-00002.safetensors")


def test_a_folder_with_an_index_gives_all_files_it_names(tmp_path: Path) -> None:
    state = random_state()
    weight_map = {}
    for name, tensor in state.items():
        file = f"part_{name[0]}.safetensors"
        weight_map[name] = file
        existing = load_file(tmp_path / file) if (tmp_path / file).exists() else {}
        save_file(existing | {name: tensor}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(open_checkpoint(tmp_path).entries) == sorted(state)
    (tmp_path / "part_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names 1 files that are missing"):
        open_checkpoint(tmp_path)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>" + b" " * 600, "a web page"),
        (b"\n\n<html>" + b"x" * 100, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
        (b"PK\x03\x04" + b"\0" * 100, "a pickled PyTorch file"),
        (b"GGUF\x03\0\0\0" + b"\0" * 100, "a GGUF file"),
        (b"\x10\0\0\0\0\0\0\0not a json header", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}", "holds no tensors"),
    ],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = write(tmp_path / "model.safetensors", content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_a_truncated_download_is_named(tmp_path: Path, kept: float) -> None:
    save_file({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    short = write(tmp_path / "b.safetensors", content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match="the download is incomplete"):
        open_checkpoint(short)


def test_a_header_cut_short_is_an_incomplete_download(tmp_path: Path) -> None:
    save_file({f"tensor_{i}": torch.zeros(1) for i in range(50)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="header alone is longer"):
        open_checkpoint(write(tmp_path / "b.safetensors", content[:200]))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_checkpoint(tmp_path / "nothing.safetensors")


def test_a_module_built_without_memory_is_filled_exactly(tmp_path: Path) -> None:
    save_file(random_state(), tmp_path / "a.safetensors")
    module = empty_module()
    load_into(module, open_checkpoint(tmp_path / "a.safetensors"), {}, dtype=torch.float64)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, random_state()[name].double())


def test_parts_of_a_fused_tensor_go_to_their_modules(tmp_path: Path) -> None:
    state = random_state()
    fused = {"ab.weight": torch.cat([state["0.weight"], state["0.weight"] + 1])}
    save_file(fused, tmp_path / "a.safetensors")
    with init_empty_weights():
        module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False))
    key_map = {
        "0.weight": ("ab.weight", lambda tensor: tensor[:6]),
        "1.weight": ("ab.weight", lambda tensor: tensor[6:]),
    }
    load_into(module, open_checkpoint(tmp_path / "a.safetensors"), key_map, dtype=None)
    assert torch.equal(module[1].weight, state["0.weight"] + 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("1.bias"), "1.bias is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra does not belong"),
        (lambda state: state.update({"1.bias": torch.zeros(3)}), r"shape \[3\], but .* \[2\]"),
    ],
)
def test_loading_is_strict(tmp_path: Path, change, sentence: str) -> None:
    state = random_state()
    change(state)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        load_into(empty_module(), open_checkpoint(tmp_path / "a.safetensors"), {}, dtype=None)


def test_a_fingerprint_changes_with_any_byte_and_only_then(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", random_state(), {})
    first = fingerprint(tmp_path / "a.safetensors")
    os.utime(tmp_path / "a.safetensors", (1, 1))
    assert fingerprint(tmp_path / "a.safetensors") == first
    changed = random_state()
    changed["1.bias"][1] += 1e-6
    save_tensors(tmp_path / "a.safetensors", changed, {})
    assert fingerprint(tmp_path / "a.safetensors") != first


def test_a_folder_has_one_fingerprint_over_its_weights_and_texts(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", random_state(), {})
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert fingerprint(tmp_path) != first


MEMORY_PROBE = """
import resource, sys, torch
from pathlib import Path
from accelerate import init_empty_weights
from torch import nn
sys.path.insert(0, sys.argv[1])
from engine.weights import load_into, open_checkpoint
from engine.architectures.flux_kontext import FluxKontext
from diffusers import FluxTransformer2DModel

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def now():
    pages = open("/proc/self/statm").read().split()[1]
    return int(pages) * resource.getpagesize() / 2**20

path, dtype = Path(sys.argv[2]), getattr(torch, sys.argv[3])
FluxKontext().load_transformer(Path(sys.argv[4]), dtype=dtype)  # warms up imports
before = now()
assert peak() - before < 40, "the warm-up used more than the process has now"
model = FluxKontext().load_transformer(path, dtype=dtype)
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(peak() - before, size, now() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_500_mb_needs_the_model_and_one_tensor(tmp_path: Path, dtype: str) -> None:
    from pack.tests.references.tiny_checkpoints import flux

    state = flux(hidden=1024, depth=2, single=5)
    save_file(state, tmp_path / "big.safetensors")
    stored_mib = (tmp_path / "big.safetensors").stat().st_size / 2**20
    assert stored_mib > 490
    largest_mib = max(tensor.numel() * 4 for tensor in state.values()) / 2**20
    save_file(flux(), tmp_path / "small.safetensors")
    del state

    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(ROOT), str(tmp_path / "big.safetensors"), dtype]
        + [str(tmp_path / "small.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak_mib, model_mib, _ = (float(word) for word in result.stdout.split())

    assert model_mib == pytest.approx(stored_mib / (2 if dtype == "bfloat16" else 1), rel=0.01)
    assert peak_mib <= (model_mib + largest_mib) * 1.1
