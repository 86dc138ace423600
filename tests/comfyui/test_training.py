"""Training in a running ComfyUI: start, cancel, continue, crash, and what comes out."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import websocket
from pack.engine.config import Config, GenerateConfig
from pack.engine.demo import draw, measure
from pack.engine.demo.concept import HELD_OUT
from pack.engine.jobs.generate import SamplingSettings, initial_noise, load_with_loras, sample
from pack.engine.jobs.outputs import RunFiles
from pack.engine.loss_history import read_history
from pack.tests.comfyui import graphs
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.server import PACK, ComfyServer, Event, Run
from PIL import Image
from safetensors.torch import load_file

MODEL = PACK / "engine" / "demo" / "model"
STEPS, FEW_STEPS = 400, 120


@pytest.fixture(scope="module")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(comfyui.folder, comfyui.python, base) as running:
        yield running


@pytest.fixture(scope="module")
def trained(server: ComfyServer) -> tuple[Run, RunFiles]:
    """The demo's training, and pictures of the model with and without the LoRA."""
    graph = graphs.demo(preview_images=4, vae=["demo", 1])
    graph["loaded"] = graphs.node(
        "LoraModelLoader", model=["demo", 0], lora=["train", 0], strength_model=1.0, bypass=False
    )
    for name, model in {"before": ["demo", 0], "after": ["loaded", 0]}.items():
        part = graphs.sampled(model)
        graph |= {f"{name} {key}": renamed(value, part, name) for key, value in part.items()}
        graph[f"{name} decoded"] = graphs.node(
            "VAEDecode", samples=[f"{name} sampled", 0], vae=["demo", 1]
        )
        graph[name] = graphs.node("SaveImage", images=[f"{name} decoded", 0], filename_prefix=name)
    graph["loss"] = graphs.node("LossGraphNode", loss=["train", 2], filename_prefix="loss")
    graph["previews"] = graphs.node("SaveImage", images=["train", 4], filename_prefix="preview")
    run = server.run(graph)
    assert run.status == "success", run.error
    return run, files(server)


@pytest.fixture(scope="module")
def short(server: ComfyServer) -> RunFiles:
    """An uninterrupted training that others have to equal."""
    run = server.run(graphs.demo(output_name="short", max_train_steps=FEW_STEPS))
    assert run.status == "success", run.error
    return files(server, "short")


def renamed(node: dict[str, Any], part: graphs.Graph, prefix: str) -> dict[str, Any]:
    inputs = {
        key: [f"{prefix} {value[0]}", value[1]]
        if isinstance(value, list) and value[0] in part
        else value
        for key, value in node["inputs"].items()
    }
    return {**node, "inputs": inputs}


def files(server: ComfyServer, name: str = "loomling") -> RunFiles:
    return RunFiles(server.base / "output" / "loras", name)


def image(server: ComfyServer, run: Run, node: str, index: int = 0) -> Image.Image:
    found = run.outputs[node]["images"][index]
    return Image.open(server.base / found["type"] / found["subfolder"] / found["filename"])


def same_tensors(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def text_events(run: Run) -> list[str]:
    """The lines that a node showed while it ran; they are binary events of kind 3."""
    shown = [data for data in run.data("binary") if data[:4] == (3).to_bytes(4, "big")]
    return [data[4:].split(b"train", 1)[-1].decode(errors="replace") for data in shown]


def test_the_demo_is_trained_and_drawn_in_under_four_minutes(
    trained: tuple[Run, RunFiles], server: ComfyServer
) -> None:
    run, result = trained
    assert run.seconds < 240
    creature = next(one for one in HELD_OUT if one.caption == graphs.CAPTION)
    before, after = (image(server, run, name).convert("RGB") for name in ("before", "after"))
    assert not measure.has_eye(before, creature) and measure.has_eye(after, creature)
    gain = measure.similarity(after, creature.draw()) - measure.similarity(before, creature.draw())
    assert gain > 0.1
    assert len(run.outputs["previews"]["images"]) == 4
    assert image(server, run, "loss").width > 100  # by a native node, from the loss map
    assert image(server, run, "previews", 3).size == (64, 64)
    assert [step.step for step in read_history(result.history)] == list(range(1, STEPS + 1))


def test_progress_and_time_left_are_shown_while_it_runs(trained: tuple[Run, RunFiles]) -> None:
    run, _ = trained
    steps = [data for data in run.data("progress") if data["node"] == "train"]
    assert any(data["max"] == STEPS and 0 < data["value"] < STEPS for data in steps)
    lines = text_events(run)
    assert any("loss" in line and "ms/step" in line and "left" in line for line in lines)


def test_queueing_a_finished_training_again_returns_at_once(
    trained: tuple[Run, RunFiles], server: ComfyServer
) -> None:
    _, result = trained
    before = result.lora.stat().st_mtime_ns
    again = server.run(graphs.demo(preview_images=4, vae=["demo", 1]))
    assert again.status == "success" and again.seconds < 3
    assert result.lora.stat().st_mtime_ns == before


def test_the_native_loader_lists_the_file_and_matches_every_key(
    trained: tuple[Run, RunFiles], server: ComfyServer
) -> None:
    info = server.get("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]
    names = info["input"]["required"]["lora_name"]
    options = names[1]["options"] if names[0] == "COMBO" else names[0]
    assert options == ["loomling.safetensors"]  # and no state or previews
    start = len(server.tail(10**9))
    graph = {"demo": graphs.node("LoraLoom_DemoModel")}
    graph["loaded"] = graphs.node(
        "LoraLoaderModelOnly", model=["demo", 0], lora_name=options[0], strength_model=1.0
    )
    run = server.run(graph | graphs.sampled(["loaded", 0]))
    assert run.status == "success", run.error
    assert "lora key not loaded" not in server.tail(10**9)[start:]


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_engine_draws_the_latents_that_the_native_sampler_draws(
    trained: tuple[Run, RunFiles], server: ComfyServer, with_lora: bool
) -> None:
    _, result = trained
    graph = {"demo": graphs.node("LoraLoom_DemoModel")}
    graph["loaded"] = graphs.node(
        "LoraLoaderModelOnly",
        model=["demo", 0],
        lora_name="loomling.safetensors",
        strength_model=float(with_lora),
    )
    run = server.run(graph | graphs.sampled(["loaded", 0]))
    [saved] = run.outputs["latents"]["latents"]
    path = server.base / saved["type"] / saved["subfolder"] / saved["filename"]
    native = draw.ARCHITECTURE.normalize_latents(load_file(path)["latent_tensor"])[:, :, None]

    loras = [result.lora] if with_lora else []
    config = Config(generate=GenerateConfig(lora_weight=loras))
    model = config.model.model_copy(update={"dit": MODEL / draw.TRANSFORMER})
    training = config.training.model_copy(update={"mixed_precision": "no"})
    config = config.model_copy(update={"model": model, "training": training})
    transformer = load_with_loras(config, draw.ARCHITECTURE, torch.device("cpu"))
    encoders = draw.load_model(MODEL).text_encoders
    [conditions] = draw.ARCHITECTURE.encode_text(encoders, [graphs.CAPTION], 512)
    ours = sample(
        draw.ARCHITECTURE,
        transformer,
        initial_noise(draw.ARCHITECTURE, width=64, height=64, seed=7),
        {name: tensor[None].float() for name, tensor in conditions.items()},
        SamplingSettings(25, draw.ARCHITECTURE.timestep_shift(8, 8), 3.5),
    )
    relative = ((ours - native).norm() / native.norm()).item()
    assert relative < 1e-3, relative


class Cancel:
    """Cancels when the training reaches a step; remembers when."""

    def __init__(self, server: ComfyServer, step: int) -> None:
        self._server, self._step = server, step
        self.at: float | None = None

    def __call__(self, event: Event) -> None:
        data = event.data if isinstance(event.data, dict) else {}
        reached = (
            event.kind == "progress" and data["max"] == FEW_STEPS and data["value"] >= self._step
        )
        if reached and self.at is None:
            self.at = time.monotonic()
            self._server.interrupt()


def test_cancelled_and_queued_again_the_result_is_that_of_an_uninterrupted_run(
    short: RunFiles, server: ComfyServer
) -> None:
    graph = graphs.demo(output_name="cancelled", max_train_steps=FEW_STEPS)
    cancel = Cancel(server, 50)
    run = server.run(graph, on_event=cancel)
    assert run.status == "interrupted" and cancel.at is not None
    assert time.monotonic() - cancel.at < 2
    stopped = files(server, "cancelled")
    steps = len(read_history(stopped.history))
    assert 50 <= steps < FEW_STEPS and stopped.lora.exists() and stopped.state.exists()
    [message] = run.data("lora_loom.message")
    assert message["level"] == "info" and message["node_id"] == "train"
    assert message["detail"] == (
        f"Stopped after step {steps} of {FEW_STEPS}. Everything is saved; queue again to continue."
    )

    assert server.run(graph).status == "success"
    assert same_tensors(short.lora, stopped.lora)


def children(server: ComfyServer) -> list[psutil.Process]:
    return [
        one
        for one in psutil.Process(server.pid).children(recursive=True)
        if "--stop_with_input" in one.cmdline()
    ]


def test_the_server_survives_a_killed_training_which_then_continues(
    short: RunFiles, server: ComfyServer
) -> None:
    killed: list[int] = []

    def kill(event: Event) -> None:
        data = event.data if isinstance(event.data, dict) else {}
        reached = event.kind == "progress" and data["max"] == FEW_STEPS and data["value"] >= 60
        if reached and not killed:
            [child] = children(server)
            killed.append(child.pid)
            child.kill()

    graph = graphs.demo(output_name="killed", save_every_n_steps=50, max_train_steps=FEW_STEPS)
    run = server.run(graph, on_event=kill)
    assert run.status == "error" and run.error is not None
    assert run.error["node_id"] == "train"
    assert "was killed by signal 9" in run.error["exception_message"]

    again = server.run(graph)
    assert again.status == "success"
    assert "continuing after step 50 of 120" in again.outputs["train"]["text"][0]
    assert same_tensors(short.lora, files(server, "killed").lora)


def test_a_training_does_not_outlive_its_server(comfyui: ComfyUI, tmp_path: Path) -> None:
    """The server is killed; its child notices, saves and ends."""
    found: list[psutil.Process] = []

    def kill(event: Event) -> None:
        if not found and len(read_history(files(server).history)) >= 5:
            found.extend(children(server))
            os.kill(server.pid, signal.SIGKILL)

    with ComfyServer(comfyui.folder, comfyui.python, tmp_path) as server:
        with pytest.raises((RuntimeError, OSError, websocket.WebSocketException)):
            server.run(graphs.demo(max_train_steps=10**6), on_event=kill)
        [child] = found
        gone, alive = psutil.wait_procs([child], timeout=20)
        assert gone and not alive
        result = files(server)
        assert result.lora.exists() and result.state.exists()
        assert not list(result.folder.glob(".*.tmp"))


def test_the_written_recipe_gives_the_same_lora_in_the_shell(
    short: RunFiles, server: ComfyServer, comfyui: ComfyUI, tmp_path: Path
) -> None:
    graph = graphs.demo(output_name="shell", max_train_steps=FEW_STEPS)
    inputs = {k: v for k, v in graph["train"]["inputs"].items() if k != "existing_run"}
    graph["train"] = graphs.node("LoraLoom_ConfigToToml", **inputs)
    run = server.run(graph)
    assert run.status == "success", run.error
    recipe = server.base / "output" / "lora_loom" / "shell.toml"
    assert str(recipe) in run.outputs["train"]["text"][0]
    command = [comfyui.python, "-m", "engine", "train", "--config_file", recipe]
    command += ["--output_dir", tmp_path]
    done = subprocess.run(
        [str(word) for word in command], cwd=PACK, env=server.environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert same_tensors(short.lora, RunFiles(tmp_path, "shell").lora)


def test_a_recipe_read_back_trains_the_same_lora(short: RunFiles, server: ComfyServer) -> None:
    sockets = ("model", "dataset", "lora", "optimizer", "lr_scheduler", "timesteps", "options")
    widgets = ("max_train_steps", "learning_rate", "network_dim", "seed")
    links: dict[str, Any] = {name: ["recipe", index] for index, name in enumerate(sockets)}
    links |= {name: ["recipe", 8 + index] for index, name in enumerate(widgets)}
    graph = graphs.demo(output_name="read back", **links)
    graph["recipe"] = graphs.node("LoraLoom_ConfigFromToml", file="loras/short.toml", toml="")
    del graph["demo"]
    run = server.run(graph)
    assert run.status == "success", run.error
    assert same_tensors(short.lora, files(server, "read back").lora)
