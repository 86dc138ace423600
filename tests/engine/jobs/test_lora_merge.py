"""Whole files merged and compared with float64 sums, family by family and layout by layout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import AdapterWeights, FullWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError, ConfigError, EngineError
from pack.engine.events import Event, Progress, silent
from pack.engine.jobs import lora_merge
from pack.engine.jobs.tool_result import ToolResult
from pack.engine.key_table import Row
from pack.engine.layer_names import row_of
from pack.engine.lora_file import write_lora
from pack.engine.quantize import quantize
from pack.engine.quantized_layout import HEADER_FIELD, layout_of
from pack.engine.weights import open_checkpoint
from pack.tests.references import random_adapters, tiny_checkpoints
from pack.tests.references.random_adapters import Draw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FAMILIES = {
    "flux_kontext": tiny_checkpoints.flux,
    "hunyuan_video": tiny_checkpoints.hunyuan_video,
    "wan": tiny_checkpoints.wan,
    "qwen_image": tiny_checkpoints.qwen_image,
}
State = dict[str, Tensor]


def cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    return {key: tensor.to(dtype) for key, tensor in state.items()}


def write(path: Path, layers: Mapping[str, AdapterWeights], family: str, **options: str) -> Path:
    write_lora(
        path, layers, LAYER_NAMES[family], dtype=torch.float32, metadata={"ss_x": "1"}, **options
    )
    return path


def merged_by_hand(
    state: Mapping[str, Tensor], layers: Mapping[str, AdapterWeights], multiplier: float
) -> State:
    """In float64, under published names."""
    result = {key: tensor.double() for key, tensor in state.items()}
    for name, adapter in layers.items():
        key = next(f"{name}.{end}" for end in ("weight", "scale") if f"{name}.{end}" in state)
        base = result[key]
        if adapter.shape is not None:
            trained = base + delta(adapter, torch.float64)
            magnitude = None if isinstance(adapter, FullWeights) else adapter.magnitude
            if magnitude is not None:
                assert magnitude.shape[0] == 1
                norm = trained.transpose(0, 1).flatten(1).norm(dim=1)
                ratio = magnitude.double().flatten() / norm
                trained = trained * ratio.view(1, -1, *[1] * (trained.dim() - 2))
            result[key] = base + multiplier * (trained - base)
        if adapter.bias_diff is not None:
            result[f"{name}.bias"] += multiplier * adapter.bias_diff.double()
    return result


def assert_rounded_once(found: Tensor, expected: Tensor, key: str = "") -> None:
    """Half a unit in the last place, and what sums in float32 may differ by."""
    info = torch.finfo(found.dtype)
    sums = float(expected.abs().amax()) * 2**-20
    bound = expected.abs() * info.eps / 2 + info.smallest_normal * info.eps + sums
    assert ((found.double() - expected).abs() <= bound).all(), key


def run(dit: Path, loras: list[tuple[Path, float]], output: Path, **options: object) -> ToolResult:
    return lora_merge.run(dit=dit, loras=loras, output=output, report=silent, **options)


@pytest.mark.parametrize("kind", random_adapters.KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_file_is_base_plus_delta_in_every_family(
    tmp_path: Path, family: str, kind: str
) -> None:
    dtype = {"lora": torch.bfloat16, "loha": torch.float16}.get(kind, torch.float32)
    state = cast(FAMILIES[family](), dtype)
    save_file(state, tmp_path / "dit.safetensors")
    layers = random_adapters.KINDS[kind](FAMILIES[family]())
    lora = write(tmp_path / "lora.safetensors", layers, family)
    output = tmp_path / "out.safetensors"
    result = run(tmp_path / "dit.safetensors", [(lora, 0.7)], output)
    found, expected = load_file(output), merged_by_hand(state, layers, 0.7)
    assert result.path == output and family in result.report
    assert f"in {len(layers)} layers" in result.report
    assert list(found) == list(load_file(tmp_path / "dit.safetensors"))
    for key, tensor in found.items():
        assert tensor.dtype == dtype
        assert_rounded_once(tensor, expected[key], key)
        if torch.equal(expected[key], state[key].double()):
            assert torch.equal(tensor, state[key])


def split(state: Mapping[str, Tensor], family: str) -> State:
    """Under the names of diffusers' modules."""
    result: State = {}
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        found = row_of(LAYER_NAMES[family], module)
        if found is None or found[0].bare:
            row, index = _bare(key, family)
            result[row.inner[0].format(*index)] = tensor
            continue
        row, index = found
        if row.halves_swapped:
            tensor = torch.cat([*tensor.chunk(2)[::-1]])
        ours = "bias" if parameter == "bias" else "weight"
        parts = tensor.split(row.heights(tensor.shape[0]))
        for inner, part in zip(row.inner, parts, strict=True):
            result[f"{inner.format(*index)}.{ours}"] = part.clone()
    return result


def _bare(key: str, family: str) -> tuple[Row, tuple[str, ...]]:
    found = row_of(LAYER_NAMES[family], key)
    assert found is not None, key
    return found


@pytest.mark.parametrize("kind", random_adapters.KINDS)
@pytest.mark.parametrize("family", ["flux_kontext", "hunyuan_video", "wan"])
def test_a_folder_in_the_names_of_diffusers_gives_the_same_model(
    tmp_path: Path, family: str, kind: str
) -> None:
    state = FAMILIES[family]()
    layers = random_adapters.KINDS[kind](state)
    pieces = split(state, family)
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    names = sorted(pieces)
    files = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2],
    }
    for file, keys in files.items():
        save_file({key: pieces[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    lora = write(tmp_path / "lora.safetensors", layers, family)
    output = tmp_path / "out.safetensors"
    run(tmp_path / "pipeline", [(lora, -0.4)], output, architecture=family)
    expected = split(merged_by_hand(state, layers, -0.4), family)
    found = load_file(output)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert_rounded_once(tensor, expected[key], key)


def test_several_loras_add_up_and_what_is_not_the_transformer_is_copied(tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    state = cast(tiny_checkpoints.flux(), torch.bfloat16)
    others = {
        "vae.decoder.conv_in.weight": torch.randn(3, 4),
        "text_encoders.t5.shared.weight": torch.randn(5, 5).to(torch.float8_e4m3fn),
        "text_encoders.t5.scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
    }
    dit = tmp_path / "full.safetensors"
    save_file(
        {**{prefix + key: tensor for key, tensor in state.items()}, **others},
        dit,
        {"modelspec.title": "base", "modelspec.hash_sha256": "0x1", "config": "{}"},
    )
    name = "double_blocks.0.img_attn.qkv"
    draw = Draw(1)
    first, second = (random_adapters.lora(state[f"{name}.weight"].float(), draw, 4) for _ in "ab")
    a = write(tmp_path / "a.safetensors", {name: first}, "flux_kontext", format="kohya")
    b = write(tmp_path / "b.safetensors", {name: second}, "flux_kontext", format="diffusers")
    output = tmp_path / "out.safetensors"
    run(dit, [(a, 1.0), (b, -0.5)], output)
    found = load_file(output)
    key = f"{name}.weight"
    expected = state[key].double() + delta(first).double() - 0.5 * delta(second).double()
    assert_rounded_once(found.pop(prefix + key), expected)
    untouched = load_file(dit)
    del untouched[prefix + key]
    assert found.keys() == untouched.keys()
    for name_, tensor in untouched.items():
        assert found[name_].dtype == tensor.dtype
        assert torch.equal(found[name_].view(torch.uint8), tensor.view(torch.uint8)), name_
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert (metadata["modelspec.title"], metadata["config"]) == ("base", "{}")
    assert "modelspec.hash_sha256" not in metadata
    assert metadata["modelspec.merged_from"] == "a, b"
    assert json.loads(metadata["merged_from"]) == [
        {"file": "a.safetensors", "multiplier": 1.0},
        {"file": "b.safetensors", "multiplier": -0.5},
    ]
    again = tmp_path / "again.safetensors"
    run(output, [(a, -1.0)], again)
    with safe_open(again, "pt") as file:
        assert len(json.loads(file.metadata()["merged_from"])) == 3
        assert file.metadata()["modelspec.merged_from"] == "a, b, a"


NAME = "double_blocks.0.img_attn.qkv"
OTHER = "double_blocks.0.img_mlp.0"


def quantized_flux(layout: str) -> tuple[State, dict[str, str]]:
    """FLUX whose layers in blocks are quantized, and the header's fields."""
    state = cast(tiny_checkpoints.flux(), torch.bfloat16)
    mode, dtype, name = {
        "musubi": ("block", torch.bfloat16, "scale_weight"),
        "marker": ("tensor", torch.float32, "scale_weight"),
        "header": ("tensor", torch.float32, "weight_scale"),
        "config": ("tensor", torch.float32, "weight_scale"),
        "cast": ("", torch.float32, ""),
    }[layout]
    fields: dict[str, str] = {}
    for key in [k for k, t in state.items() if "blocks." in k and k.endswith("weight")]:
        layer = key.removesuffix(".weight")
        if layout == "cast":
            state[key] = state[key].to(torch.float8_e4m3fn)
            continue
        found = quantize(state[key], mode=mode, scale_dtype=dtype)
        state[key], state[f"{layer}.{name}"] = found.codes, found.scale
        text = json.dumps({"format": "float8_e4m3fn"})
        if layout == "header":
            fields[layer] = json.loads(text)
        elif layout == "config":
            state[f"{layer}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    if layout == "marker":
        state["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return state, {HEADER_FIELD: json.dumps({"layers": fields})} if fields else {}


@pytest.mark.parametrize("layout", ["musubi", "marker", "header", "config", "cast"])
def test_a_quantized_file_stays_what_it_is(tmp_path: Path, layout: str) -> None:
    state, metadata = quantized_flux(layout)
    dit, output = tmp_path / "dit.safetensors", tmp_path / "out.safetensors"
    save_file(state, dit, metadata)
    before = open_checkpoint(dit)
    base = layout_of(before).read(before, f"{NAME}.weight", torch.float32)
    adapter = random_adapters.lora(base, Draw(1), 4)
    lora = write(tmp_path / "a.safetensors", {NAME: adapter}, "flux_kontext")
    result = run(dit, [(lora, 1.0)], output)
    found, stored = load_file(output), load_file(dit)
    assert list(found) == list(stored)
    changed = {f"{NAME}.weight", f"{NAME}.scale_weight", f"{NAME}.weight_scale"}
    for key, tensor in stored.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        same = torch.equal(
            found[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
        assert same == (key not in changed), key
    after = open_checkpoint(output)
    assert after.metadata.items() >= metadata.items()
    values = layout_of(after).read(after, f"{NAME}.weight", torch.float32)
    exact = base.double() + delta(adapter).double()
    floor = 2**-10 if layout == "cast" else float(exact.abs().amax()) * 2**-10 / 448
    # A scale in bfloat16 may be too small for the largest value by half a unit.
    bound = (exact.abs() / 16).clamp(min=floor) * (1 + 2**-8)
    assert ((values.double() - exact).abs() <= bound).all()
    error = float((values.double() - exact).norm() / delta(adapter).double().norm())
    assert 0.02 < error < 0.1
    assert "float8_e4m3fn" in result.report


@pytest.mark.parametrize("layout", ["musubi", "marker", "header", "config", "cast"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_quantized_file_may_become_an_ordinary_one(
    tmp_path: Path, layout: str, dtype: str
) -> None:
    state, metadata = quantized_flux(layout)
    others = {"vae.decoder.conv_in.weight": torch.ones(3).to(torch.float8_e4m3fn)}
    prefix = "model.diffusion_model."
    if metadata:
        layers = json.loads(metadata[HEADER_FIELD])["layers"]
        layers = {prefix + name: value for name, value in layers.items()}
        metadata = {HEADER_FIELD: json.dumps({"layers": layers})}
    dit, output = tmp_path / "dit.safetensors", tmp_path / "out.safetensors"
    save_file({**{prefix + key: t for key, t in state.items()}, **others}, dit, metadata)
    before = open_checkpoint(dit)
    quantized = layout_of(before)
    plain = {
        key.removeprefix(prefix): quantized.read(before, key, torch.float32)
        for key in before.entries
        if key.startswith(prefix) and key not in quantized.companions
    }
    layers = {
        name: random_adapters.lora(plain[f"{name}.weight"], Draw(1), 4) for name in (NAME, OTHER)
    }
    lora = write(tmp_path / "a.safetensors", layers, "flux_kontext")
    run(dit, [(lora, 1.0)], output, dtype=dtype)
    after = open_checkpoint(output)
    found, expected = load_file(output), merged_by_hand(plain, layers, 1.0)
    assert found.keys() == {prefix + key for key in plain} | others.keys()
    assert layout_of(after).weights.keys() == others.keys()
    assert HEADER_FIELD not in after.metadata
    for key, exact in expected.items():
        assert found[prefix + key].dtype == lora_merge.DTYPES[dtype]
        assert_rounded_once(found[prefix + key], exact, key)


def test_an_ordinary_file_may_change_its_type(tmp_path: Path) -> None:
    state = cast(tiny_checkpoints.wan(), torch.bfloat16)
    state["blocks.0.modulation"] = state["blocks.0.modulation"].float()
    save_file(state, tmp_path / "dit.safetensors")
    layers = random_adapters.lora_everywhere(tiny_checkpoints.wan())
    lora = write(tmp_path / "a.safetensors", layers, "wan")
    output = tmp_path / "out.safetensors"
    run(tmp_path / "dit.safetensors", [(lora, 0.5)], output, dtype="fp16")
    expected = merged_by_hand(state, layers, 0.5)
    for key, tensor in load_file(output).items():
        assert tensor.dtype == torch.float16
        assert_rounded_once(tensor, expected[key], key)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, a LoRA for it, and the path to write."""
    state = tiny_checkpoints.flux()
    dit = tmp_path / "dit.safetensors"
    save_file(state, dit)
    adapter = random_adapters.lora(state[f"{NAME}.weight"], Draw(1), 4)
    lora = write(tmp_path / "a.safetensors", {NAME: adapter}, "flux_kontext")
    return dit, lora, tmp_path / "out.safetensors"


def test_progress_ends_at_the_whole_and_stopping_leaves_no_file(
    inputs: tuple[Path, Path, Path],
) -> None:
    dit, lora, output = inputs
    events: list[Event] = []
    lora_merge.run(dit=dit, loras=[(lora, 1.0)], output=output, report=events.append)
    progress = [event for event in events if isinstance(event, Progress)]
    assert len(progress) > 40
    assert all(a.done <= b.done for a, b in zip(progress, progress[1:], strict=False))
    output.unlink()

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= progress[-1].total // 2:
            raise KeyboardInterrupt

    before = set(output.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        lora_merge.run(dit=dit, loras=[(lora, 1.0)], output=output, report=stop)
    assert set(output.parent.iterdir()) == before


def test_an_existing_file_is_replaced_only_if_allowed_and_no_input_ever(
    inputs: tuple[Path, Path, Path],
) -> None:
    dit, lora, output = inputs
    output.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists"):
        run(dit, [(lora, 1.0)], output)
    run(dit, [(lora, 1.0)], output, overwrite=True)
    assert load_file(output)
    for path in (dit, lora):
        before = path.read_bytes()
        with pytest.raises(ConfigError, match="one of those that are read"):
            run(dit, [(lora, 1.0)], path, overwrite=True)
        assert path.read_bytes() == before


def test_a_full_disk_is_noticed_before_anything_is_written(
    inputs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dit, lora, output = inputs
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EngineError, match="the file needs .* are free"):
        run(dit, [(lora, 1.0)], output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loras": []}, "nothing to merge"),
        ({"dtype": "fp8"}, "'fp8' is unknown; choose bf16, fp16, fp32"),
        ({"architecture": "flux"}, "'flux' is unknown"),
        ({"multiplier": float("nan")}, "multiplier is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    inputs: tuple[Path, Path, Path], options: dict[str, object], words: str
) -> None:
    dit, lora, output = inputs
    multiplier = options.pop("multiplier", 1.0)
    arguments = {"loras": [(lora, multiplier)], **options}
    with pytest.raises(ConfigError, match=words):
        lora_merge.run(dit=dit, output=output, report=silent, **arguments)


def test_a_lora_of_another_size_or_model_is_refused_in_a_sentence(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    dit, _, output = inputs
    draw = Draw(2)
    large = random_adapters.lora(torch.randn(768, 256), draw, 4)
    bias = FullWeights(None, torch.ones(384))
    wan = random_adapters.lora(torch.randn(128, 128), draw, 4)
    cases = [
        (write(tmp_path / "l.safetensors", {NAME: large}, "flux_kontext"), r"768 x 256|another"),
        (write(tmp_path / "w.safetensors", {"blocks.0.self_attn.q": wan}, "wan"), r"layer|family"),
        (
            write(tmp_path / "d.safetensors", {"double_blocks.7.img_mlp.0": wan}, "flux_kontext"),
            r"double_blocks\.7\.img_mlp\.0",
        ),
    ]
    state = load_file(dit)
    del state[f"{NAME}.bias"]
    without = tmp_path / "without.safetensors"
    save_file(state, without)
    for lora, words in cases:
        with pytest.raises(CheckpointError, match=words) as caught:
            run(dit, [(lora, 1.0)], output)
        assert "\n" not in str(caught.value)
    lora = write(tmp_path / "bias.safetensors", {NAME: bias}, "flux_kontext")
    with pytest.raises(CheckpointError, match="bias"):
        run(without, [(lora, 1.0)], output)
    assert not output.exists()


@pytest.mark.parametrize(("layout", "dtype"), [("cast", None), ("fp16", None), ("bf16", "fp16")])
def test_what_becomes_infinite_is_not_written(
    inputs: tuple[Path, Path, Path], tmp_path: Path, layout: str, dtype: str | None
) -> None:
    dit, _, output = inputs
    state, value = load_file(dit), {"cast": 460.0, "fp16": 6e4, "bf16": 1e5}[layout]
    stored = {"cast": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16}[layout]
    state[f"{NAME}.weight"] = (state[f"{NAME}.weight"] * 0 + value).to(stored)
    save_file(state, dit)
    diff = FullWeights(torch.full((384, 128), 0.5 * value))
    lora = write(tmp_path / "big.safetensors", {NAME: diff}, "flux_kontext")
    with pytest.raises(CheckpointError, match=re.escape(f"{NAME}.weight")):
        run(dit, [(lora, 1.0)], output, dtype=dtype)
    assert not output.exists()


def test_much_rounding_is_told(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dit, lora, output = inputs
    state, _ = quantized_flux("musubi")
    save_file(state, dit)
    messages: list[Event] = []
    result = lora_merge.run(dit=dit, loras=[(lora, 0.02)], output=output, report=messages.append)
    assert "times as large as the change" in result.report
    assert any("rounding to float8_e4m3fn" in getattr(event, "text", "") for event in messages)
    assert "times as large" not in run(dit, [(lora, 1.0)], output, overwrite=True).report


LARGE = """
import resource, sys
from pathlib import Path
from types import ModuleType

pack = ModuleType("pack")
pack.__path__ = [sys.argv[1]]
sys.modules["pack"] = pack
import torch
torch.set_num_threads(1)
from pack.engine.events import silent
from pack.engine.jobs import lora_merge
from pack.engine import lora_file
folder = Path(sys.argv[2])
for name in ("small", "large"):
    lora_merge.run(dit=folder / f"{name}.safetensors", loras=[(folder / "lora.safetensors", 1.0)],
                   output=folder / "out.safetensors", overwrite=True, report=silent)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in other units elsewhere")
@pytest.mark.parametrize("layout", ["bf16", "musubi"])
def test_memory_does_not_grow_with_the_size_of_the_model(tmp_path: Path, layout: str) -> None:
    def model(num_blocks: int) -> State:
        generator = torch.Generator().manual_seed(0)
        state = tiny_checkpoints.flux()
        for block in range(1, num_blocks):
            weight = torch.randn(3072, 1024, generator=generator).bfloat16()
            key = f"double_blocks.{block}.img_attn.qkv"
            state[f"{key}.weight"] = weight
            if layout == "musubi":
                found = quantize(weight, scale_dtype=torch.bfloat16)
                state[f"{key}.weight"], state[f"{key}.scale_weight"] = found.codes, found.scale
        return state

    large = 68 if layout == "bf16" else 136
    save_file(model(3), tmp_path / "small.safetensors")
    save_file(model(large), tmp_path / "large.safetensors")
    assert (tmp_path / "large.safetensors").stat().st_size > 400 * 10**6
    draw, weight = Draw(0), torch.randn(3072, 1024)
    layers: dict[str, AdapterWeights] = {
        f"double_blocks.{block}.img_attn.qkv": random_adapters.lora(weight, draw, 4)
        for block in (1, 2)
    }
    write(tmp_path / "lora.safetensors", layers, "flux_kontext")
    root = Path(__file__).parents[3]
    run_ = subprocess.run(
        [sys.executable, "-c", LARGE, str(root), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    small, large_peak = (int(line) for line in run_.stdout.split()[-2:])
    # The peak of the small model already has the largest layer in it.
    assert large_peak - small < 24 * 1024
