"""The tool that writes models in 8 bits; the files themselves have tests of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError, ConfigError, EngineError
from pack.engine.events import Event, Message, Progress, silent
from pack.engine.jobs import quantize
from pack.engine.jobs.tool_result import ToolResult
from pack.engine.lora_file import write_lora
from pack.engine.quantized_cache import MADE_FROM
from pack.engine.quantized_loading import QuantizationSettings
from pack.engine.weights import open_checkpoint
from pack.tests.engine.test_quantized_loading import STATES, adapters, cast, flux
from pack.tests.references.checkpoint_layouts import save_split
from safetensors.torch import load_file, save_file

FP8 = QuantizationSettings()


def run(
    dit: Path, output: Path, settings: QuantizationSettings = FP8, **options: object
) -> ToolResult:
    return quantize.run(dit=dit, output=output, settings=settings, **({"report": silent} | options))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "flux1.safetensors"
    save_file(flux(), path, {"modelspec.title": "Flux", "modelspec.hash_sha256": "0x12"})
    return path


@pytest.mark.parametrize("family", STATES)
@pytest.mark.parametrize("layout", ["blockwise", "comfyui"])
def test_the_family_is_found_by_itself(tmp_path: Path, family: str, layout: str) -> None:
    state = cast(STATES[family]())
    save_file(state, tmp_path / "model.safetensors")
    result = run(tmp_path / "model.safetensors", tmp_path / "out.safetensors", layout=layout)
    assert f"model.safetensors: {family}" in result.report
    found = load_file(tmp_path / "out.safetensors")
    ending = ".scale_weight" if layout == "blockwise" else ".weight_scale"
    scales = [key for key in found if key.endswith(ending)]
    assert scales and set(state) <= set(found)
    assert result.picture is not None and result.path == tmp_path / "out.safetensors"


def test_the_report_says_what_it_costs_and_saves(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    events: list[Event] = []
    result = run(model, output, report=events.append)
    lines = result.report.splitlines()
    assert lines[1].startswith("10 layers were rounded to 8 bits: ")
    assert lines[1].endswith("% less, relative error 2.507%") or "relative error 2.5" in lines[1]
    assert lines[2].startswith(f"Wrote {output}: ") and " instead of " in lines[2]
    assert lines[3] == "Largest errors:" and len(lines) == 4 + 1 + 8
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].done == pytest.approx(progress[-1].total, abs=1)
    assert output.stat().st_size < 0.8 * model.stat().st_size


def test_the_difference_of_the_errors_is_said_for_comfyui(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out.safetensors", layout="comfyui")
    [line] = [each for each in result.report.splitlines() if "ComfyUI's own loader" in each]
    errors = [float(word.strip("%;")) for word in line.split() if "%" in word]
    # Normal weights: 2.64 % with a scale for all, 2.50 % in blocks.
    assert errors[0] == pytest.approx(2.64, abs=0.04) and errors[1] == pytest.approx(2.5, abs=0.02)


def test_metadata_is_kept_but_for_the_old_hash(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out.safetensors", QuantizationSettings(format="int8"))
    metadata = open_checkpoint(tmp_path / "out.safetensors").metadata
    assert metadata["modelspec.title"] == "Flux" and "modelspec.hash_sha256" not in metadata
    facts = json.loads(metadata[MADE_FROM])
    assert facts["file"] == "flux1.safetensors" and facts["settings"]["format"] == "int8"


def test_loras_are_merged_first(model: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    names = LAYER_NAMES["flux_kontext"]
    write_lora(lora, adapters(flux(), "lora"), names, dtype=torch.float32, metadata={})
    plain, merged = tmp_path / "plain.safetensors", tmp_path / "merged.safetensors"
    run(model, plain)
    events: list[Event] = []
    result = run(model, merged, loras=[(lora, 0.5)], report=events.append)
    told = [event.text for event in events if isinstance(event, Message)]
    assert told[0] == "lora.safetensors is merged at 0.5, layers: 4" and told[0] in result.report
    before, after = load_file(plain), load_file(merged)
    changed = [
        key
        for key, tensor in after.items()
        if not torch.equal(
            tensor.view(-1).view(torch.uint8), before[key].view(-1).view(torch.uint8)
        )
    ]
    assert set(changed) == {
        "double_blocks.0.img_attn.qkv.scale_weight",
        "double_blocks.0.img_attn.qkv.weight",
        "single_blocks.0.linear2.scale_weight",
        "single_blocks.0.linear2.weight",
        "double_blocks.0.txt_mod.lin.weight",
        "double_blocks.0.txt_attn.qkv.bias",
    }
    facts = json.loads(open_checkpoint(merged).metadata[MADE_FROM])
    assert facts["loras"] == [{"file": "lora.safetensors", "multiplier": 0.5}]


def test_a_split_set_becomes_one_file(model: Path, tmp_path: Path) -> None:
    part = save_split(tmp_path / "set", flux())
    run(model, tmp_path / "one.safetensors")
    run(part, tmp_path / "two.safetensors")
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), two[key].view(-1).view(torch.uint8))


def test_an_existing_file_is_only_replaced_if_allowed(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_text("precious")
    with pytest.raises(ConfigError, match="exists"):
        run(model, output)
    assert output.read_text() == "precious"
    run(model, output, overwrite=True)
    with pytest.raises(ConfigError, match="one of those that are read"):
        run(output, output, overwrite=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "gguf"}, "choose blockwise or comfyui"),
        ({"architecture": "sdxl"}, "unknown"),
        ({"settings": QuantizationSettings(exclude=("x",))}, "quantize_exclude_patterns"),
        ({"settings": QuantizationSettings(compat=True, search=True)}, "quantize_search"),
        ({"loras": [(Path("a.safetensors"), float("nan"))]}, "give a number"),
    ],
)
def test_wrong_options_are_refused(model: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(model, tmp_path / "out.safetensors", **options)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_of_something_else_is_called_what_it_is(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a diffusion model"):
        run(tmp_path / "x.safetensors", tmp_path / "out.safetensors")


def test_a_full_disk_is_noticed_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EngineError, match="make room or choose another folder"):
        run(model, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
