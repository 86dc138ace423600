from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from pack.engine.errors import CheckpointError
from pack.engine.weights import fingerprint, load_into, open_checkpoint, save_tensors
from pack.tests.conftest import ROOT
from pack.tests.references import tiny_checkpoints
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
    state = random_state()
    # Three pieces of the 4 MiB in which is read, the last one short.
    state["large"] = torch.randn(2_500_001, generator=torch.Generator().manual_seed(1))
    state |= {"scalar": torch.tensor(0.3), "empty": torch.empty(0, 3)}
    save_file(state, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    for name, tensor in state.items():
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
    index.write_text("<html>")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"{index}: this is not readable JSON; download it again"


def test_a_folder_with_several_models_asks_for_one(tmp_path: Path) -> None:
    for name in ("flux1-dev", "ae"):
        save_file(random_state(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: expected the files of one model, found ae.safetensors, "
        "flux1-dev.safetensors; name the file itself"
    )


def test_parts_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    for part in (1, 2):
        save_file(random_state(), tmp_path / f"m-0000{part}-of-00002.safetensors")
    second = tmp_path / "m-00002-of-00002.safetensors"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(second)
    assert str(caught.value) == (
        f"{second}: tensor '0.bias' is also in another part of the set; "
        "the parts do not belong together"
    )


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


WEB_PAGE = (
    "this is a web page that was saved under a model's name, not a model; download the file itself "
    "(a log-in or licence page may have been in the way)"
)
DAMAGED = "this is not a safetensors file or its header is damaged; download it again"
PICKLE = "this is a pickled PyTorch file, which can run code; use a .safetensors file"
POINTER = "this is a Git LFS pointer, not the model; run `git lfs pull` or download the file"


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty; download it again"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>" + b" " * 600, WEB_PAGE),
        (b"\n\n<html>" + b"x" * 100, WEB_PAGE),
        (b"\xef\xbb\xbf<!-- saved --><HTML>" + b"x" * 100, WEB_PAGE),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', WEB_PAGE),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", POINTER),
        (b"PK\x03\x04" + b"\0" * 100, PICKLE),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", PICKLE),
        (
            b"GGUF\x03\0\0\0" + b"\0" * 100,
            "this is a GGUF file, which is not supported; use a .safetensors file",
        ),
        (b"Entry not found", DAMAGED),
        (b"\0" * 1000, DAMAGED),
        (b"\xff" * 64, DAMAGED),
        (b"\x10\0\0\0\0\0\0\0not a json header", DAMAGED),
        (header("[1, 2]"), DAMAGED),
        (header('{"a": 1}'), DAMAGED),
        (header('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'), DAMAGED),
        (header("{}"), "the file holds no tensors; get it again"),
        (
            header('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}') + b"\0",
            "tensors of type F4 cannot be read; use a bf16, fp16 or fp32 file",
        ),
    ],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = write(tmp_path / "model.safetensors", content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: {sentence}"


def test_a_file_of_pytorch_s_own_is_named(tmp_path: Path) -> None:
    for is_zip in (True, False):
        path = tmp_path / "model.safetensors"
        torch.save(random_state(), path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(caught.value) == f"{path}: {PICKLE}"


def test_a_download_that_stopped_is_named_wherever_it_stopped(tmp_path: Path) -> None:
    save_file({f"tensor_{i}": torch.zeros(100) for i in range(50)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    assert data_start > 2000 and len(content) == data_start + 50 * 400

    for size in (9, 10, 600, data_start - 1, data_start, data_start + 1, len(content) - 1):
        path = write(tmp_path / "b.safetensors", content[:size])
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        there = (
            f"only {size:,} bytes are there and the header alone is longer"
            if size < data_start
            else f"{size:,} of {len(content):,} bytes are there"
        )
        assert str(caught.value) == (
            f"{path}: the download is incomplete, {there}; download it again"
        )
    for size in (1, 7):
        path = write(tmp_path / "b.safetensors", content[:size])
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(caught.value) == f"{path}: {DAMAGED}"


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    checkpoint = open_checkpoint(path)
    os.truncate(path, 500)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("a")
    assert str(caught.value) == f"{path}: the file became shorter while it was read"


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


@pytest.mark.parametrize("key", ["0.scale_weight", "scaled_fp8", "0.comfy_quant"])
def test_quantized_weights_are_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(random_state() | {key: torch.ones(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_into(empty_module(), open_checkpoint(path), {}, dtype=None)
    assert str(caught.value) == (
        f"{path}: the weights are quantized ({key}), which cannot be read by this version; "
        "use the bf16, fp16 or fp32 file"
    )


def test_without_a_type_the_module_gets_the_one_that_most_of_it_has(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in random_state().items()}
    state["1.bias"] = state["1.bias"].float()
    state["of.another.model"] = torch.zeros(1000)
    save_file(state, tmp_path / "a.safetensors")
    module = empty_module()
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    load_into(module, checkpoint, {}, dtype=None, ignore=["of.another.model"])
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.bfloat16}


def test_what_no_file_holds_reaches_the_device_too(tmp_path: Path) -> None:
    save_file(random_state(), tmp_path / "a.safetensors")
    module = empty_module()
    module.register_buffer("positions", torch.arange(3), persistent=False)
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    load_into(module, checkpoint, {}, dtype=None, device="meta")
    tensors = [*module.parameters(), *module.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


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
import json, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from engine.architectures.flux_kontext import FluxKontext

def resident_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10

small, big, dtype = Path(sys.argv[2]), Path(sys.argv[3]), getattr(torch, sys.argv[4])
FluxKontext().load_transformer(small, dtype=dtype)  # imports everything
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = resident_mib("VmRSS")
model = FluxKontext().load_transformer(big, dtype=dtype)
print(json.dumps({
    "peak": resident_mib("VmHWM") - before,
    "after": resident_mib("VmRSS") - before,
    "model": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
    "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")],
)
def test_loading_500_mb_needs_the_model_and_its_largest_tensor(
    tmp_path: Path, stored: str, wanted: str
) -> None:
    stored_dtype, wanted_dtype = getattr(torch, stored), getattr(torch, wanted)
    # As many bytes in the file whichever type it has.
    blocks = 1 if stored == "float32" else 2
    state = tiny_checkpoints.flux(hidden=1024, depth=2 * blocks, single=5 * blocks)
    state = {name: tensor.to(stored_dtype) for name, tensor in state.items()}
    save_file(state, tmp_path / "big.safetensors")
    save_file(tiny_checkpoints.flux(), tmp_path / "small.safetensors")
    assert (tmp_path / "big.safetensors").stat().st_size > 490e6
    num_elements = [tensor.numel() for tensor in state.values()]
    del state

    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(ROOT), str(tmp_path / "small.safetensors")]
        + [str(tmp_path / "big.safetensors"), wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)

    model_mib = sum(num_elements) * wanted_dtype.itemsize / 2**20
    largest_mib = max(num_elements) * wanted_dtype.itemsize / 2**20
    assert measured["dtypes"] == [f"torch.{wanted}"]
    assert measured["model"] == pytest.approx(model_mib, rel=1e-6)
    assert measured["peak"] <= (model_mib + largest_mib) * 1.1
    # A peak below the model's own size would mean that nothing was measured.
    assert model_mib * 0.95 <= measured["after"] <= measured["peak"]


@pytest.mark.parametrize("num_values", [1, 10, 700, 10**6])
def test_pieces_are_consecutive_rows(tmp_path: Path, num_values: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(33, 7, generator=generator).bfloat16(),
        "kernel": torch.randn(5, 3, 2, 2, generator=generator),
        "vector": torch.arange(50),
        "empty": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        next_row = 0
        for first, piece in checkpoint.pieces(name, num_values):
            assert first == next_row and piece.dtype == tensor.dtype
            assert torch.equal(piece, tensor[first : first + len(piece)])
            assert piece.numel() <= num_values or len(piece) == 1
            next_row += len(piece)
        assert next_row == len(tensor)


def test_threads_may_read_at_the_same_time(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(i): torch.randn(200_000, generator=generator) for i in range(24)}
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")

    def read(name: str) -> bool:
        pieces = [piece.clone() for _, piece in checkpoint.pieces(name, 30_000)]
        cast = checkpoint.read(name, torch.bfloat16)
        return torch.equal(torch.cat(pieces), tensors[name]) and torch.equal(
            cast, tensors[name].bfloat16()
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, tensors))


def test_the_order_of_the_file_is_that_of_offsets_and_parts(tmp_path: Path) -> None:
    # safetensors puts the largest types first.
    save_file(
        {"a": torch.zeros(1, dtype=torch.int8), "b": torch.zeros(1)}, tmp_path / "a.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    swapped = replace(checkpoint, entries=dict(reversed(checkpoint.entries.items())))
    assert checkpoint.in_file_order() == swapped.in_file_order() == ["b", "a"]
