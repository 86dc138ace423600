"""The tools for LoRA files as nodes of a running ComfyUI, one's file going into the next."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.adapter_weights import LoRAWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.demo import draw
from pack.engine.lora_file import LoRAFile, read_lora, write_lora
from pack.engine.weights import open_checkpoint
from pack.tests.comfyui import graphs
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.server import PACK, ComfyServer, Event, PromptRefused, Run
from PIL import Image
from safetensors.torch import load_file

MODEL = PACK / "engine" / "demo" / "model" / draw.TRANSFORMER
NAMES = LAYER_NAMES["flux_kontext"]
LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.3.linear2",
)
STEPS = (10, 20, 30)
RANK = 4
OUTPUT = {"existing_file": "keep", "architecture": "auto"}
RANKS = {"rank": 0, "amount": 0.0, "method": "energy", "max_rank": 0}
NO_LORAS = {
    key: value
    for number in range(1, 5)
    for key, value in ((f"lora_{number}", "none"), (f"strength_{number}", 1.0))
}
AS_IN_FILE = "as in the file"


def write(path: Path, step: int, **metadata: str) -> None:
    """A LoRA of the tiny model that changes what it draws."""
    generator = torch.Generator().manual_seed(step)
    model = open_checkpoint(MODEL)
    layers: dict[str, Any] = {}
    for name in LAYERS:
        out, in_ = model.entries[f"{name}.weight"].shape
        down = torch.randn(RANK, in_, generator=generator) / in_**0.5
        up = torch.randn(out, RANK, generator=generator) / 8
        layers[name] = LoRAWeights(down, up, float(RANK))
    known = {"ss_steps": str(step), "ss_base_model_version": "flux_kontext"} | metadata
    write_lora(path, layers, NAMES, dtype=torch.float32, metadata=known)


@pytest.fixture(scope="module")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models" / "diffusion_models").mkdir(parents=True)
    (base / "models" / "loras").mkdir()
    shutil.copy(MODEL, base / "models" / "diffusion_models" / "kontext.safetensors")
    for step in STEPS:
        write(base / "models" / "loras" / f"run-step{step:08d}.safetensors", step)
    write(base / "models" / "loras" / "run.safetensors", STEPS[-1])
    with ComfyServer(comfyui.folder, comfyui.python, base) as running:
        yield running


def drawn(name: str, model: list[Any]) -> graphs.Graph:
    """Latents of a model, whose nodes have names of their own."""
    part = graphs.sampled(model, steps=2)
    part["latents"]["inputs"]["filename_prefix"] = name
    found: graphs.Graph = {}
    for key, node in part.items():
        inputs = {
            each: [f"{name} {value[0]}", value[1]]
            if isinstance(value, list) and value[0] in part
            else value
            for each, value in node["inputs"].items()
        }
        found[f"{name} {key}"] = {**node, "inputs": inputs}
    return found


def first_graph() -> graphs.Graph:
    """Everything that needs no file of another tool; the rest is linked."""
    last = "run-step00000030.safetensors"
    tools = {
        "demo": graphs.node("LoraLoom_DemoModel"),
        "settings": graphs.node(
            "LoraLoom_LoraSettings",
            network_alpha=0.0,
            save_precision="bf16",
            include_patterns=r"single_blocks\.\d+\.linear2",
            rank_patterns=r".*\.0\..* = 2",
        ),
        "targets": graphs.node(
            "LoraLoom_LoraTargets", model=["demo", 3], network_dim=8, lora=["settings", 0]
        ),
        "inspect": graphs.node(
            "LoraLoom_InspectLora",
            lora=last,
            dit="kontext.safetensors",
            verbose=True,
            architecture="auto",
        ),
        "convert": graphs.node(
            "LoraLoom_ConvertLora",
            lora=last,
            format="kohya",
            dtype=AS_IN_FILE,
            output_name="as kohya",
            **OUTPUT,
        ),
        "merge": graphs.node(
            "LoraLoom_MergeLora",
            dit="kontext.safetensors",
            dtype=AS_IN_FILE,
            output_name="with the lora",
            **NO_LORAS | {"lora_1": "none"},
            **OUTPUT,
            lora_path=["convert", 1],
        ),
        "combine": graphs.node(
            "LoraLoom_CombineLoras",
            **NO_LORAS
            | {"lora_1": last, "lora_2": "run-step00000010.safetensors", "strength_2": -0.5},
            **RANKS,
            format=AS_IN_FILE,
            dtype=AS_IN_FILE,
            output_name="both",
            **OUTPUT,
        ),
        "resize": graphs.node(
            "LoraLoom_ResizeLora",
            lora="none",
            **RANKS | {"rank": 2},
            format=AS_IN_FILE,
            dtype=AS_IN_FILE,
            output_name="small",
            **OUTPUT,
            lora_path=["combine", 1],
        ),
        "ema": graphs.node(
            "LoraLoom_PostHocEma",
            lora=last,
            sigma_rel=0.0,
            beta=0.5,
            beta2=0.0,
            keep_first=False,
            by_steps=False,
            sort="steps",
            files="",
            dtype=AS_IN_FILE,
            output_name="mean",
            **OUTPUT,
        ),
        "native": graphs.node(
            "LoraLoaderModelOnly", model=["demo", 0], lora_name=last, strength_model=1.0
        ),
        "loaded": graphs.node(
            "LoraModelLoader",
            model=["demo", 0],
            lora=["convert", 0],
            strength_model=1.0,
            bypass=False,
        ),
    }
    for name, link in {"inspected": ["inspect", 0], "weights": ["ema", 3]}.items():
        tools[name] = graphs.node("SaveImage", images=link, filename_prefix=name)
    return tools | drawn("native", ["native", 0]) | drawn("loaded", ["loaded", 0])


def extract_graph(**changes: Any) -> graphs.Graph:
    inputs = {
        "tuned": "with the lora.safetensors",
        "base": "kontext.safetensors",
        **RANKS,
        "rank": RANK,
        "output_name": "extracted",
        **OUTPUT,
        "format": "comfyui",
        "dtype": "fp32",
        "min_difference": 0.0,
        "clamp_quantile": 0.0,
        "full_rest": False,
        "include_patterns": "",
        "exclude_patterns": "",
    }
    return {"extract": graphs.node("LoraLoom_ExtractLora", **inputs | changes)}


@pytest.fixture(scope="module")
def first(server: ComfyServer) -> Run:
    run = server.run(first_graph())
    assert run.status == "success", run.error
    return run


@pytest.fixture(scope="module")
def extracted(server: ComfyServer, first: Run) -> Run:
    """The LoRA once more, from the model that it was merged into; and what that model draws."""
    graph = extract_graph()
    graph["model"] = graphs.node(
        "UNETLoader", unet_name="with the lora.safetensors", weight_dtype="default"
    )
    graph["demo"] = graphs.node("LoraLoom_DemoModel")
    graph["seen"] = graphs.node("SaveImage", images=["extract", 3], filename_prefix="seen")
    run = server.run(graph | drawn("merged", ["model", 0]))
    assert run.status == "success", run.error
    return run


def report(run: Run, node: str) -> str:
    [text] = run.outputs[node]["text"]
    return text


def lora(server: ComfyServer, name: str) -> LoRAFile:
    folder = "models" if name.startswith("run") else "output"
    return read_lora(server.base / folder / "loras" / f"{name}.safetensors", [NAMES])


def latents(server: ComfyServer, name: str) -> torch.Tensor:
    [path] = (server.base / "output").glob(f"{name}_*.latent")
    return load_file(path)["latent_tensor"]


def deviation(found: LoRAFile, wanted: dict[str, torch.Tensor]) -> float:
    """The largest of all layers, in parts of the largest number."""
    assert found.layers.keys() == wanted.keys()
    return max(
        float((delta(layer) - wanted[name]).abs().max() / wanted[name].abs().max())
        for name, layer in found.layers.items()
    )


def deltas(server: ComfyServer, step: int) -> dict[str, torch.Tensor]:
    layers = lora(server, f"run-step{step:08d}").layers
    return {name: delta(layer) for name, layer in layers.items()}


def picture(server: ComfyServer, run: Run, node: str) -> Image.Image:
    [found] = run.outputs[node]["images"]
    return Image.open(server.base / found["type"] / found["subfolder"] / found["filename"])


def test_targets_are_those_of_the_settings(first: Run) -> None:
    text = report(first, "targets")
    assert re.search(r"single_blocks\.0\.linear2 +128 x 640 +2 +2 ", text)
    assert re.search(r"single_blocks\.1-3\.linear2 +x3 +128 x 640 +8 +8 ", text)


def test_a_lora_is_inspected_with_its_model(first: Run, server: ComfyServer) -> None:
    text = report(first, "inspect")
    assert "comfyui format for flux_kontext" in text and "rank 4" in text
    assert "of weight" in text and all(name in text for name in LAYERS)
    with picture(server, first, "inspected") as image:
        assert image.width > 400 and len(image.getcolors(10**6) or range(999)) > 10


def test_a_converted_lora_draws_the_same_in_comfyui(first: Run, server: ComfyServer) -> None:
    path = server.base / "output" / "loras" / "as kohya.safetensors"
    assert all(key.startswith("lora_unet_") for key in load_file(path))
    without = "lora key not loaded"
    assert without not in server.tail(10**9)
    assert torch.equal(latents(server, "loaded"), latents(server, "native"))


def test_a_merged_model_draws_what_the_model_with_its_lora_draws(
    first: Run, extracted: Run, server: ComfyServer
) -> None:
    assert "tensors changed, in 4 layers" in report(first, "merge")
    wanted = latents(server, "native")
    found = latents(server, "merged")
    # The weights are rounded once more, to the float16 of the model's file; measured is 2e-4.
    assert (found - wanted).abs().max() < 2**-9 * wanted.abs().max()


def test_combined_loras_add_up(first: Run, server: ComfyServer) -> None:
    both = lora(server, "both")
    first_, second = deltas(server, 30), deltas(server, 10)
    wanted = {name: first_[name] - 0.5 * second[name] for name in first_}
    assert {layer.rank for layer in both.layers.values()} == {2 * RANK}
    assert deviation(both, wanted) < 1e-5


def test_a_linked_lora_is_resized(first: Run, server: ComfyServer) -> None:
    small = lora(server, "small")
    assert {layer.rank for layer in small.layers.values()} == {2}
    wanted = {name: delta(layer) for name, layer in lora(server, "both").layers.items()}
    for name, layer in small.layers.items():
        left, values, right = torch.linalg.svd(wanted[name].double())
        best = left[:, :2] * values[:2] @ right[:2]
        assert (delta(layer) - best).abs().max() < 1e-5 * wanted[name].abs().max()


def test_the_mean_is_that_of_the_run_and_counts_each_step_once(
    first: Run, server: ComfyServer
) -> None:
    """run.safetensors is of step 30, too."""
    text = report(first, "ema")
    assert text.startswith("mean of 3 files (4 layers of flux_kontext) by beta 0.5")
    mean = lora(server, "mean")
    for name, layer in mean.layers.items():
        found = factors_of(layer)
        parts = [factors_of(lora(server, f"run-step{step:08d}").layers[name]) for step in STEPS]
        for place in range(2):
            a, b, c = (part[place] for part in parts)
            assert torch.allclose(found[place], 0.25 * a + 0.25 * b + 0.5 * c, atol=1e-6)


def factors_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(layer, LoRAWeights)
    return layer.up, layer.down


def test_what_was_merged_is_extracted_again(extracted: Run, server: ComfyServer) -> None:
    assert "4 extracted" in report(extracted, "extract")
    wanted = deltas(server, 30)
    found = lora(server, "extracted")
    # The error of the merged model, which is rounded to float16; measured is 4e-4.
    assert deviation(found, wanted) < 2**-9
    with picture(server, extracted, "seen") as image:
        assert image.width > 400


def test_queued_again_the_file_is_the_one_that_was_made(first: Run, server: ComfyServer) -> None:
    path = server.base / "output" / "loras" / "as kohya.safetensors"
    before = path.stat().st_mtime_ns
    graph = {name: node for name, node in first_graph().items() if name == "convert"}
    run = server.run(graph)
    assert report(run, "convert").startswith("made before from the same inputs: ")
    assert path.stat().st_mtime_ns == before
    path.unlink()
    run = server.run(graph)
    assert run.status == "success" and path.stat().st_mtime_ns > before


def test_another_file_of_the_name_is_only_replaced_if_that_is_wanted(
    first: Run, server: ComfyServer
) -> None:
    graph = {name: node for name, node in first_graph().items() if name == "convert"}
    graph["convert"]["inputs"] |= {"output_name": "small", "format": "diffusers"}
    run = server.run(graph)
    assert run.error is not None
    assert (
        "small.safetensors: the file exists; choose another name"
        in (run.error["exception_message"])
    )
    graph["convert"]["inputs"]["existing_file"] = "replace"
    assert server.run(graph).status == "success"
    assert lora(server, "small").format == "diffusers"


BAD: dict[str, tuple[graphs.Graph, str]] = {
    "no LoRA": (
        {"node": first_graph()["resize"] | {}},
        "lora: none is chosen; choose one of the list, or connect lora_path",
    ),
    "a name with a folder in it": (
        {"node": first_graph()["convert"]},
        r'Convert LoRA: output_name = "\.\./up": expected a file name without folder',
    ),
    "a rank and an amount": (
        {"node": first_graph()["combine"]},
        "give either rank or amount: both are given",
    ),
    "a model that does not differ": (
        {"node": extract_graph(tuned="kontext.safetensors")["extract"]},
        "nothing that would be in the LoRA differs from",
    ),
    "one file": (
        {"node": first_graph()["ema"]},
        "a mean needs at least two files, and there is 1; train with",
    ),
}
CHANGES: dict[str, dict[str, Any]] = {
    "no LoRA": {"lora_path": ""},
    "a name with a folder in it": {"output_name": "../up"},
    "a model that does not differ": {"output_name": "x"},
    "a rank and an amount": {"rank": 4, "amount": 0.5, "output_name": "x"},
    "one file": {"files": "run", "output_name": "x"},
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_one_sentence(first: Run, server: ComfyServer, case: str) -> None:
    graph, message = BAD[case]
    graph["node"]["inputs"] |= CHANGES.get(case, {})
    try:
        run = server.run(graph)
    except PromptRefused as refused:
        pytest.fail(str(refused))
    assert run.error is not None
    text = run.error["exception_message"].strip()
    assert re.search(message, text) and "\n" not in text, text


@pytest.mark.slow
def test_a_pattern_that_takes_for_ever_can_be_cancelled(server: ComfyServer) -> None:
    graph = {
        "demo": graphs.node("LoraLoom_DemoModel"),
        "settings": graphs.node(
            "LoraLoom_LoraSettings",
            network_alpha=0.0,
            save_precision="bf16",
            include_patterns=r"((\w|\.)+)+!",
        ),
        "targets": graphs.node(
            "LoraLoom_LoraTargets", model=["demo", 3], network_dim=8, lora=["settings", 0]
        ),
    }
    begun: list[float] = []

    def cancel(event: Event) -> None:
        executing = event.kind == "executing" and event.data["node"] == "targets"
        if executing and not begun:
            begun.append(time.monotonic())
            # By then the child is at the pattern, and ComfyUI still answers.
            threading.Timer(6, server.interrupt).start()

    run = server.run(graph, on_event=cancel)
    assert run.status == "interrupted"
    assert time.monotonic() - begun[0] < 20


def test_a_path_from_elsewhere_is_refused(first: Run, server: ComfyServer) -> None:
    graph = {
        "elsewhere": graphs.node("PrimitiveString", value="/etc/passwd"),
        "node": first_graph()["resize"],
    }
    graph["node"]["inputs"]["lora_path"] = ["elsewhere", 0]
    run = server.run(graph)
    assert run.error is not None
    assert "LoRA '/etc/passwd': there is no such file in " in run.error["exception_message"]
