"""What can be connected to Train LoRA, all at once, in a running ComfyUI."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator

import pytest
from pack.engine.config_file import load_config
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.samples import sample_files
from pack.engine.loss_history import read_history
from pack.engine.validation_history import read_validation
from pack.tests.comfyui import graphs
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.server import ComfyServer, Event, Run
from PIL import Image

STEPS = 40
PREVIEW = (4).to_bytes(4, "big")  # a binary event: a picture, and which node it is of


@pytest.fixture(scope="module")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(comfyui.folder, comfyui.python, base) as running:
        yield running


@pytest.fixture(scope="module")
def trained(server: ComfyServer) -> tuple[Run, RunFiles]:
    """The demo with every node of settings, and pictures of all that comes out."""
    sockets = ("optimizer", "lr_scheduler", "loss", "options", "validation", "samples")
    graph = graphs.demo(
        output_name="everything",
        max_train_steps=STEPS,
        save_every_n_steps=10,
        vae=["demo", 1],
        **{name: [name, 0] for name in sockets},
    )
    graph |= {
        "optimizer": graphs.node(
            "LoraLoom_Optimizer",
            optimizer_type="AdamW",
            optimizer_args="weight_decay=0.0",
            max_grad_norm=1.0,
            other_optimizer="torch.optim.NAdam",
        ),
        "lr_scheduler": graphs.node(
            "LoraLoom_LrScheduler",
            lr_scheduler="piecewise_constant",
            lr_warmup_steps=0.0,
            lr_scheduler_min_lr_ratio=0.0,
            lr_scheduler_num_cycles=1,
            lr_scheduler_power=1.0,
            max_train_steps=STEPS,
            lr_decay_steps=0.0,
            lr_scheduler_timescale=0,
            rex_alpha=0.1,
            rex_beta=0.9,
            lr_scheduler_args="step_rules='1:30,0.1'",
            lr_scheduler_type="",
        ),
        "loss": graphs.node(
            "LoraLoom_Loss",
            loss_type="huber",
            huber_c=0.5,
            noise_offset=0.05,
            unmasked_weight=0.0,
            prior_loss_weight=1.0,
            trigger_word="loomling",
            preservation_class="circle",
            preservation_weight=0.5,
            regularization_target="image",
        ),
        "options": graphs.node(
            "LoraLoom_TrainingOptions",
            max_train_epochs=0,
            gradient_accumulation_steps=1,
            save_every_n_epochs=0,
            autosave_minutes=10.0,
            infer_steps=4,
            embedded_cfg_scale=2.5,
            cpu_threads=1,
            save_last_n_steps=10,
            save_state=True,
        ),
        "validation": graphs.node(
            "LoraLoom_Validation",
            validation_folder="none",
            validation_split=0.2,
            validate_every_n_steps=10,
            early_stop_patience=0,
            keep_best=True,
            validation_times=2,
        ),
        "samples": graphs.node(
            "LoraLoom_SamplePrompts",
            sample_lines=f"{graphs.CAPTION}\n{graphs.CAPTION} --w 96 --h 48 --d 5",
            sample_every_n_steps=20,
            sample_every_n_epochs=0,
            sample_at_first=True,
        ),
    }
    for name, link in {
        "samples seen": ["train", 6],
        "levels seen": ["train", 7],
        "rate seen": ["lr_scheduler", 1],
        "loss seen": ["loss", 1],
    }.items():
        graph[name] = graphs.node("SaveImage", images=link, filename_prefix=name)
    run = server.run(graph)
    assert run.status == "success", run.error
    return run, RunFiles(server.base / "output" / "loras", "everything")


def picture(server: ComfyServer, run: Run, node: str, index: int = 0) -> Image.Image:
    found = run.outputs[node]["images"][index]
    return Image.open(server.base / found["type"] / found["subfolder"] / found["filename"])


def test_every_setting_reaches_the_training(trained: tuple[Run, RunFiles]) -> None:
    _, files = trained
    config = load_config(files.recipe, {}, {})
    assert config.optimizer.optimizer_type == "torch.optim.NAdam"
    assert config.loss.loss_type == "huber" and config.loss.preservation_class == "circle"
    assert config.output.save_last_n_steps == 10 and config.output.save_state
    assert config.validation.validation_split == 0.2 and len(config.samples.sample_lines) == 2
    rates = [step.learning_rate for step in read_history(files.history)]
    assert len(rates) == STEPS
    assert rates[:30] == [1e-3] * 30 and rates[30:] == pytest.approx([1e-4] * 10)


def test_samples_are_shown_while_it_trains_and_come_out_at_the_end(
    trained: tuple[Run, RunFiles], server: ComfyServer
) -> None:
    run, files = trained
    pictures = [file for file in sample_files(files) if file.path.suffix == ".png"]
    assert [(file.step, file.index) for file in pictures] == [
        (step, index) for step in (0, 20, 40) for index in (0, 1)
    ]
    shown = [data for data in run.data("binary") if data[:4] == PREVIEW]
    assert len(shown) == len(pictures)
    assert all(b'"node_id": "train"' in data or b'"node_id":"train"' in data for data in shown)
    sizes = [picture(server, run, "samples seen", index).size for index in (0, 1)]
    assert sizes == [(64, 64), (96, 48)]


def test_the_validation_is_measured_and_told(trained: tuple[Run, RunFiles]) -> None:
    run, files = trained
    measured = read_validation(files.validation)
    assert [each.step for each in measured] == [10, 20, 30, 40]
    best = min(measured, key=lambda each: each.loss)
    report = run.outputs["train"]["text"][0]
    assert f"lowest {best.loss:.4f} after step {best.step}" in report
    assert files.best.exists()


def test_only_the_wanted_files_are_kept(trained: tuple[Run, RunFiles]) -> None:
    _, files = trained
    assert sorted(number for _, number in files.numbered(".safetensors").values()) == [30, 40]
    assert files.numbered(".state")


@pytest.mark.parametrize("node", ["levels seen", "rate seen", "loss seen"])
def test_there_are_pictures_of_what_was_chosen_and_what_came_out(
    trained: tuple[Run, RunFiles], server: ComfyServer, node: str
) -> None:
    run, _ = trained
    with picture(server, run, node) as image:
        assert image.width > 400 and len(image.getcolors(10**6) or range(999)) > 10


class Stop:
    """Presses "stop and save" when the training goes on; again until it is accepted."""

    def __init__(self, server: ComfyServer, steps: int) -> None:
        self._server, self._steps = server, steps
        self.accepted = False

    def __call__(self, event: Event) -> None:
        data = event.data if isinstance(event.data, dict) else {}
        goes_on = event.kind == "progress" and data["max"] == self._steps
        if not goes_on or self.accepted:
            return
        try:
            self._server.post("/lora_loom/control", {"node_id": "train", "command": "stop"})
            self.accepted = True
        except urllib.error.HTTPError as error:
            assert error.code == 409, error.read()  # not yet


def test_a_stopped_training_gives_its_lora_and_goes_on_whenever_it_is_queued_again(
    server: ComfyServer,
) -> None:
    steps = 100_000
    graph = graphs.demo(output_name="stopped", max_train_steps=steps)
    graph["curve seen"] = graphs.node("SaveImage", images=["train", 3], filename_prefix="curve")
    files = RunFiles(server.base / "output" / "loras", "stopped")
    done = [0]
    for _ in range(3):
        stop = Stop(server, steps)
        run = server.run(graph, on_event=stop)
        assert stop.accepted and run.status == "success", run.error
        assert run.outputs["curve seen"]["images"]
        done.append(len(read_history(files.history)))
        said = f"Stopped after step {done[-1]} of {steps}. Everything is saved; queue again to"
        assert said in run.outputs["train"]["text"][0]
        assert run.data("lora_loom.message")[-1]["detail"].startswith(said)
    assert done == sorted(set(done))


def test_a_training_is_checked_without_training(server: ComfyServer) -> None:
    graph = graphs.demo(output_name="checked", max_train_steps=7)
    inputs = graph.pop("train")["inputs"]
    del inputs["existing_run"]
    graph["check"] = graphs.node("LoraLoom_CheckTraining", **inputs)
    run = server.run(graph)
    assert run.status == "success", run.error
    [report] = run.outputs["check"]["text"]
    assert "optimizer steps: 7" in report and "memory of cpu: about" in report
    assert "disk: " in report and "trained numbers: " in report
