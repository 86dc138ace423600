"""Load Quantized Model and Quantize Model in a running ComfyUI, with the demo's model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.adapter_weights import LoRAWeights
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.demo import draw
from pack.engine.lora_file import write_lora
from pack.engine.weights import open_checkpoint
from pack.tests.comfyui import graphs
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.server import PACK, ComfyServer, Run
from PIL import Image
from safetensors.torch import load_file

MODEL = PACK / "engine" / "demo" / "model" / draw.TRANSFORMER
LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")
WIDGETS = {
    "quantize_format": "e4m3",
    "quantize_mode": "block",
    "quantize_block_size": 64,
    "quantize_search": False,
    "quantize_scale_dtype": "fp32",
    "quantize_compat": False,
    "quantize_exclude_patterns": "",
    "architecture": "auto",
    **{f"lora_{number}": "none" for number in range(1, 5)},
    **{f"strength_{number}": 1.0 for number in range(1, 5)},
}
# A server, and a model that is sampled about ten times.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models" / "diffusion_models").mkdir(parents=True)
    (base / "models" / "loras").mkdir()
    shutil.copy(MODEL, base / "models" / "diffusion_models" / "kontext.safetensors")
    write(base / "models" / "loras" / "style.safetensors")
    with ComfyServer(comfyui.folder, comfyui.python, base) as running:
        yield running


def write(path: Path) -> None:
    """A LoRA that changes what the model draws."""
    generator = torch.Generator().manual_seed(0)
    entries = open_checkpoint(MODEL).entries
    layers: dict[str, Any] = {}
    for name in LAYERS:
        rows, columns = entries[f"{name}.weight"].shape
        down = torch.randn(4, columns, generator=generator) / columns**0.5
        layers[name] = LoRAWeights(down, torch.randn(rows, 4, generator=generator) / 4, 4.0)
    write_lora(path, layers, LAYER_NAMES["flux_kontext"], dtype=torch.float32, metadata={})


def loaded(**changes: Any) -> dict[str, Any]:
    inputs = {"dit": "kontext.safetensors", "measure_errors": False} | WIDGETS
    return graphs.node("LoraLoom_LoadQuantizedModel", **inputs | changes)


def plain(file: str) -> dict[str, Any]:
    return graphs.node("UNETLoader", unet_name=file, weight_dtype="default")


def with_lora(model: str) -> dict[str, Any]:
    return graphs.node(
        "LoraLoaderModelOnly", model=[model, 0], lora_name="style.safetensors", strength_model=1.0
    )


def quantized(name: str, **changes: Any) -> dict[str, Any]:
    inputs = {
        "dit": "kontext.safetensors",
        "layout": "blockwise",
        "output_name": name,
        "existing_file": "keep",
    }
    return graphs.node("LoraLoom_QuantizeModel", **inputs | WIDGETS | changes)


def drawn(models: dict[str, list[Any]]) -> graphs.Graph:
    """Latents of each model."""
    graph: graphs.Graph = {"demo": graphs.node("LoraLoom_DemoModel")}
    for name, model in models.items():
        part = graphs.sampled(model, steps=4)
        part["latents"]["inputs"]["filename_prefix"] = name
        for key, each in part.items():
            inputs = {
                field: [f"{name} {value[0]}", value[1]]
                if isinstance(value, list) and value[0] in part
                else value
                for field, value in each["inputs"].items()
            }
            graph[f"{name} {key}"] = each | {"inputs": inputs}
    return graph


def latents(server: ComfyServer, name: str) -> torch.Tensor:
    [path] = (server.base / "output").glob(f"{name}_*.latent")
    return load_file(path)["latent_tensor"]


@pytest.fixture(scope="module")
def first(server: ComfyServer) -> Run:
    """The model and its LoRA in both types, two files of it, and what ComfyUI saves of it."""
    models = {
        "exact": "exact",
        "fp8": "fp8",
        "int8": "int8",
        "exact styled": "exact with lora",
        "styled": "fp8 with lora",
        "merged": "merged",
    }
    graph = drawn({name: [node, 0] for name, node in models.items()}) | {
        "exact": plain("kontext.safetensors"),
        "fp8": loaded(measure_errors=True),
        "int8": loaded(quantize_format="int8"),
        "exact with lora": with_lora("exact"),
        "fp8 with lora": with_lora("fp8"),
        "merged": loaded(lora_1="style.safetensors"),
        "errors": graphs.node("SaveImage", images=["fp8", 2], filename_prefix="errors"),
        "report": graphs.node("PreviewAny", source=["fp8", 1]),
        "no errors": graphs.node("SaveImage", images=["int8", 2], filename_prefix="no errors"),
        "blocks": quantized("blocks", quantize_format="int8"),
        "tensors": quantized("tensors", layout="comfyui"),
        "saved": graphs.node("ModelSave", model=["fp8", 0], filename_prefix="saved"),
    }
    run = server.run(graph)
    assert run.status == "success", run.error
    [path] = (server.base / "output").glob("saved_*.safetensors")
    shutil.move(path, server.base / "models" / "diffusion_models" / "saved.safetensors")
    return run


@pytest.fixture(scope="module")
def second(server: ComfyServer, first: Run) -> Run:
    """The files of the first run."""
    models = ("of blocks", "of tensors", "of saved")
    graph = drawn({name: [name, 0] for name in models}) | {
        "of blocks": loaded(dit="blocks.safetensors"),
        "of tensors": plain("tensors.safetensors"),
        "of saved": loaded(dit="saved.safetensors", quantize_format="int8"),
        "report": graphs.node("PreviewAny", source=["of blocks", 1]),
        "again": quantized("blocks", quantize_format="int8"),
    }
    run = server.run(graph)
    assert run.status == "success", run.error
    return run


def distance(server: ComfyServer, found: str, wanted: str = "exact") -> float:
    exact = latents(server, wanted)
    return float((latents(server, found) - exact).norm() / exact.norm())


def test_the_model_draws_nearly_what_it_draws_in_full(server: ComfyServer, first: Run) -> None:
    assert 0 < distance(server, "fp8") < 0.05
    assert 0 < distance(server, "int8") < 0.4 * distance(server, "fp8")


def test_loras_work_on_it_and_in_it(server: ComfyServer, first: Run) -> None:
    effect = distance(server, "exact styled")

    assert distance(server, "styled", "exact styled") < effect / 2
    assert distance(server, "merged", "exact styled") < effect / 2


def test_the_report_tells_what_was_rounded_and_the_picture_by_how_much(
    server: ComfyServer, first: Run
) -> None:
    [report] = first.outputs["report"]["text"]
    [picture] = (server.base / "output").glob("errors_*.png")

    assert re.search(r"flux_kontext\n\d+ layers were rounded to 8 bits: .* relative error", report)
    with Image.open(picture) as image:
        assert image.width > 500
    # Nothing was measured of the other.
    assert "no errors" not in first.outputs


def test_files_in_8_bits_are_read_as_they_are(server: ComfyServer, first: Run, second: Run) -> None:
    [report] = second.outputs["report"]["text"]

    assert "are in 8 bits in the file and are used as they are" in report
    assert torch.equal(latents(server, "of blocks"), latents(server, "int8"))
    assert torch.equal(latents(server, "of saved"), latents(server, "fp8"))
    assert 0 < distance(server, "of tensors") < 0.05


def test_a_file_is_not_made_twice(second: Run) -> None:
    [report] = second.outputs["again"]["text"]

    assert report.startswith("made before from the same inputs")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (loaded(quantize_exclude_patterns="nothing"), "matches none of the"),
        (loaded(quantize_compat=True, quantize_format="int8"), "musubi-tuner has no int8"),
    ],
)
def test_what_cannot_be_is_said(server: ComfyServer, node: dict[str, Any], message: str) -> None:
    run = server.run({"load": node, "show": graphs.node("PreviewAny", source=["load", 1])})

    assert run.status == "error" and run.error is not None
    assert message in run.error["exception_message"]
