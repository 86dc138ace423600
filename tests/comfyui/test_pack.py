"""How the pack loads, and what it says of bad input."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from pack.tests.comfyui import graphs
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.server import PACK, PACK_NAME, ComfyServer, PromptRefused
from PIL import Image

DEMO = PACK / "engine" / "demo"
TRANSFORMER = DEMO / "model" / "transformer" / "flux1-kontext-tiny.safetensors"
VAE = DEMO / "model" / "vae" / "ae.safetensors"


@pytest.fixture(scope="module")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    shutil.copy(TRANSFORMER, models / "kontext.safetensors")
    shutil.copy(VAE, models / "a vae.safetensors")
    (models / "page.safetensors").write_text("<!DOCTYPE html><html>log in first</html>")
    for root, name in (("input", "good"), ("datasets", "other"), ("input", "no caption")):
        shutil.copytree(DEMO / "dataset" / "held_out", base / root / name)
    (base / "input" / "no caption" / "loomling_02.txt").unlink()
    (base / "input" / "empty").mkdir()
    (base / "input" / "way out").symlink_to("/etc", target_is_directory=True)
    with ComfyServer(comfyui.folder, comfyui.python, base) as running:
        yield running


def test_the_pack_loads_and_says_nothing(server: ComfyServer) -> None:
    log = server.tail(10**9)
    assert re.search(rf"[\d.]+ seconds: .*{PACK_NAME}", log)
    mentions = [line for line in log.splitlines() if PACK_NAME in line or "lora_loom" in line]
    assert len(mentions) == 1, mentions
    assert "warning" not in log.lower().replace("futurewarning", "")


def test_the_pack_loads_quickly_and_imports_nothing_heavy(comfyui: ComfyUI) -> None:
    comfyui.run("import_pack.py", PACK)


def test_every_node_is_there(server: ComfyServer) -> None:
    source = "".join(path.read_text("utf-8") for path in (PACK / "nodes").glob("*.py"))
    expected = set(re.findall(r'node_id="(LoraLoom_\w+)"', source))
    found = {name for name in server.object_info() if name.startswith("LoraLoom_")}
    assert found == expected and len(found) >= 13


def test_few_widgets_are_shown_before_the_advanced_ones(server: ComfyServer) -> None:
    widgets = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    for name, info in server.object_info().items():
        if name.startswith("LoraLoom_"):
            inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
            shown = [
                key
                for key, (kind, *options) in inputs.items()
                if kind in widgets and not (options and options[0].get("advanced"))
            ]
            assert len(shown) <= (8 if name == "LoraLoom_TrainLora" else 7), (name, shown)
            for key, (kind, *options) in inputs.items():
                assert kind not in widgets or options[0]["tooltip"], (name, key)


def train(**nodes: Any) -> graphs.Graph:
    """The good model and dataset, unless they are given, and Train LoRA."""
    graph = {
        "model": graphs.training_model("kontext.safetensors"),
        "data": graphs.dataset("input/good"),
        "train": graphs.demo(max_train_steps=2)["train"],
    } | nodes
    graph["train"]["inputs"] |= {"model": ["model", 0], "dataset": ["data", 0]}
    return graph


BAD: dict[str, tuple[graphs.Graph, str, str]] = {
    "a model that is a VAE": (
        train(model=graphs.training_model("a vae.safetensors")),
        "model",
        r"a vae\.safetensors: this is a TAESD autoencoder, not a diffusion model of a supported",
    ),
    "a web page": (
        train(model=graphs.training_model("page.safetensors")),
        "model",
        "this is a web page that was saved under a model's name",
    ),
    "a missing model": (
        train(model=graphs.training_model("gone.safetensors")),
        "model",
        r"gone\.safetensors'? not in",
    ),
    "an empty folder": (
        train(data=graphs.dataset("input/empty")),
        "data",
        "there is no image in the folder",
    ),
    "a missing folder": (
        train(data=graphs.dataset("input/nothing")),
        "data",
        r"folder 'input/nothing': .* does not exist; choose a folder of the list",
    ),
    "a folder elsewhere": (
        train(data=graphs.dataset("/etc")),
        "data",
        r"folder '/etc': datasets are read from .* only; move it there",
    ),
    "a way out": (
        train(data=graphs.dataset("input/../../..")),
        "data",
        "datasets are read from",
    ),
    "a link that leads out": (
        train(data=graphs.dataset("input/way out")),
        "data",
        "datasets are read from",
    ),
    "a missing caption": (
        train(data=graphs.dataset("input/no caption")),
        "data",
        r"no caption: loomling_02\.png: the caption loomling_02\.txt is missing; write one",
    ),
    "images that are not encoded": (
        train(),
        "train",
        "4 of 4 images and 4 captions are not in the cache; .* the node Cache Dataset",
    ),
    "a name with a folder in it": (
        train(train=graphs.demo(output_name="../up")["train"]),
        "train",
        r'Train LoRA: output_name = "\.\./up": expected a file name without folder',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_on_the_right_node_at_once(
    server: ComfyServer, case: str
) -> None:
    graph, node, message = BAD[case]
    try:
        run = server.run(graph)
    except PromptRefused as refused:
        errors = refused.answer["node_errors"]
        assert list(errors) == [node]
        [error] = errors[node]["errors"]
        text = error["details"]
    else:
        assert run.status == "error" and run.error is not None
        assert run.seconds < 2
        assert run.error["node_id"] == node
        text = run.error["exception_message"].strip()
    assert re.search(message, text), text
    assert "\n" not in text and "Traceback" not in text


def test_a_recipe_in_a_workflow_reads_nothing_from_elsewhere(server: ComfyServer) -> None:
    sockets = {"model": ["recipe", 0], "dataset": ["recipe", 1]}
    graph = graphs.demo(**sockets)
    graph["recipe"] = graphs.node(
        "LoraLoom_ConfigFromToml", file="none", toml="image_directory = '/etc'"
    )
    del graph["demo"]
    run = server.run(graph)
    assert run.error is not None and run.error["node_id"] == "recipe"
    assert "may only name files in ComfyUI's" in run.error["exception_message"]


def test_settings_nodes_show_what_they_do(server: ComfyServer) -> None:
    graph = {
        "rate": graphs.node(
            "LoraLoom_LrScheduler",
            lr_scheduler="cosine_with_restarts",
            lr_warmup_steps=0.1,
            lr_scheduler_min_lr_ratio=0.0,
            lr_scheduler_num_cycles=2,
            lr_scheduler_power=1.0,
            max_train_steps=200,
            lr_decay_steps=0.0,
            lr_scheduler_timescale=0,
            rex_alpha=0.1,
            rex_beta=0.9,
        ),
        "times": graphs.node(
            "LoraLoom_TimestepSampling",
            timestep_sampling="auto",
            discrete_flow_shift=1.0,
            sigmoid_scale=1.0,
            logit_mean=-6.0,
            logit_std=2.0,
            min_timestep=200,
            max_timestep=900,
            preserve_distribution_shape=True,
            num_timestep_buckets=0,
            weighting_scheme="cosmap",
            mode_scale=1.29,
            guidance_scale=1.0,
            shown_resolution=1024,
        ),
        "data": graphs.dataset("datasets/other"),
    }
    for name, link in {
        "curve": ["rate", 1],
        "histogram": ["times", 1],
        "sheet": ["data", 1],
    }.items():
        graph[name] = graphs.node("SaveImage", images=link, filename_prefix=name)
    run = server.run(graph)
    assert run.status == "success", run.error
    for name in ("curve", "histogram", "sheet"):
        [saved] = run.outputs[name]["images"]
        with Image.open(server.base / "output" / saved["filename"]) as image:
            assert image.width > 400 and len(image.getcolors(10**6) or range(999)) > 10


def test_help_pages_are_served(server: ComfyServer) -> None:
    for page in (PACK / "web" / "docs").glob("*.md"):
        assert server.text(f"/extensions/{PACK_NAME}/docs/{page.name}") == page.read_text("utf-8")


def test_templates_are_listed(server: ComfyServer) -> None:
    names = {path.stem for path in (PACK / "workflows").glob("*.json")}
    assert set(server.get("/workflow_templates")[PACK_NAME]) == names
