"""MagCache on models of all families in a real ComfyUI: what is computed, and what comes of it.

The reference is ComfyUI itself: without MagCache where nothing is skipped, and with forward hooks
that replace what enters the layer after the blocks where something is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.lora_file import write_lora
from pack.engine.magcache import Rule, greedy_plan
from pack.engine.magcache_curves import parse_ratios
from pack.tests.comfyui import graphs
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.server import PACK, ComfyServer, Run
from pack.tests.references import random_adapters, tiny_native
from pack.tests.references.tiny_checkpoints import wan
from safetensors.torch import load_file, save_file
from torch import Tensor

MODELS = ("FLUX.1 Kontext", "HunyuanVideo", "Qwen-Image", "Wan 2.1 t2v", "Wan 2.1 VACE")
# Image tokens and width, for what a ControlNet adds.
TOKENS = {"FLUX.1 Kontext": (16, 128), "HunyuanVideo": (32, 128), "Qwen-Image": (16, 128)}
CLOSELY = ("FLUX.1 Kontext", "Wan 2.1 t2v")
# How many calls of the model a step takes, the last one excepted.
SAMPLERS = {
    "euler": 1,
    "euler_ancestral": 1,
    "dpmpp_2m": 1,
    "uni_pc": 1,
    "res_multistep": 1,
    "heun": 2,
    "dpm_2": 2,
    "dpmpp_2s_ancestral": 2,
}
RATIOS = [1.0, 1.15, 1.08, 1.04, 1.03, 1.02, 1.02, 1.01, 1.01, 1.0]
RATIOS += [1.0, 0.99, 0.98, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85]
RULE = Rule(retention_ratio=0.2, threshold=0.24, k=6)
PLAN = greedy_plan(RATIOS, 20, RULE)

Report = dict[str, dict[str, Any]]
# All models and one process of ComfyUI for everything: about a minute of a CPU.
pytestmark = pytest.mark.slow


def vace(depth: int, beside: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A Wan VACE transformer with ``beside`` side blocks, and its inputs."""
    state = wan(depth=depth, seed=6)
    generator = torch.Generator().manual_seed(8)
    for block in range(beside):
        for key in [key for key in state if key.startswith("blocks.0.")]:
            name = key.removeprefix("blocks.0.")
            noise = torch.randn(state[key].shape, generator=generator) * 0.01
            state[f"vace_blocks.{block}.{name}"] = state[key] + noise
        for layer in ("after_proj", *(("before_proj",) if block == 0 else ())):
            weight = torch.randn(128, 128, generator=generator) / 128**0.5
            state[f"vace_blocks.{block}.{layer}.weight"] = weight
            state[f"vace_blocks.{block}.{layer}.bias"] = torch.zeros(128)
    weight = torch.randn(128, 96, 1, 2, 2, generator=generator) * 0.05
    state["vace_patch_embedding.weight"] = weight
    state["vace_patch_embedding.bias"] = torch.zeros(128)
    _, inputs = tiny_native.build("Wan 2.1 t2v")
    inputs["vace_frames"] = torch.randn(1, 32, 2, 8, 8, generator=generator)
    inputs["vace_mask"] = torch.ones(1, 64, 2, 8, 8)
    return state, inputs


def job_of(folder: Path, name: str) -> dict[str, Any]:
    folder.mkdir()
    state, inputs = vace(4, 2) if "VACE" in name else tiny_native.build(name)
    for kind, tensors in (("model", state), ("inputs", inputs)):
        owned = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(owned, folder / f"{kind}.safetensors")
    lora = folder / "lora.safetensors"
    family = tiny_native.MODELS.get(name, "wan")
    if name in tiny_native.MODELS:
        adapters = random_adapters.KINDS["lora"](state)
        write_lora(lora, adapters, LAYER_NAMES[family], dtype=torch.float32, metadata={})
    return {
        "model": str(folder / "model.safetensors"),
        "inputs": str(folder / "inputs.safetensors"),
        "lora": str(lora),
        "ratios": RATIOS,
        "computed": list(PLAN.computed),
        "tokens": TOKENS.get(name),
        "samplers": list(SAMPLERS),
    }


@pytest.fixture(scope="module")
def report(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("native magcache")
    (folder / "user").mkdir()
    job = {
        "models": {name: job_of(folder / name, name) for name in MODELS},
        "closely": CLOSELY,
        "user": str(folder / "user"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    comfyui.run("native_magcache.py", PACK, folder / "job.json", folder / "report.json")
    return json.loads((folder / "report.json").read_text())


def calls_of_steps(steps: list[int], computed: tuple[bool, ...]) -> int:
    """How many of the calls, each of a step, are computed."""
    return sum(computed[step] for step in steps)


def nearest(sigmas: list[float], calls: list[float]) -> list[int]:
    """The step of each call."""
    return [
        min(range(len(sigmas) - 1), key=lambda step: abs(sigmas[step] - call)) for call in calls
    ]


def test_the_plan_of_these_tests_skips_several_steps_in_a_row() -> None:
    text = "".join("c" if now else "." for now in PLAN.computed)
    assert text.startswith("cccc.") and text.endswith("c") and "..." in text


@pytest.mark.parametrize("cfg", ["1.0", "3.0"])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_changes_where_nothing_is_skipped(report: Report, model: str, cfg: str) -> None:
    found = report[model]["exact"][cfg]

    assert found["never"] and found["off"] and found["calibrating"] and found["unpatched after"]
    branches = ["conditional", "unconditional"]
    assert found["branches"] == branches[: 1 if cfg == "1.0" else 2]


@pytest.mark.parametrize("cfg", ["1.0", "3.0"])
@pytest.mark.parametrize("model", MODELS)
def test_every_block_runs_in_the_steps_of_the_plan_and_in_no_other(
    report: Report, model: str, cfg: str
) -> None:
    found = report[model]["exact"][cfg]["skipping"]

    assert len(found["calls"]) == 20
    assert set(found["counts"].values()) == {PLAN.num_computed}


@pytest.mark.parametrize("cfg", ["1.0", "3.0"])
@pytest.mark.parametrize("model", MODELS)
def test_a_skipped_step_adds_what_the_blocks_added_before(
    report: Report, model: str, cfg: str
) -> None:
    found = report[model]["exact"][cfg]

    assert found["wanted"] and found["again"]
    assert found["skipping"]["finite"] and 0 < found["skipping"]["distance"] < 0.5


def test_side_blocks_of_vace_run_in_skipped_steps_too(report: Report) -> None:
    found = report["Wan 2.1 VACE"]["exact"]

    assert found["hindrance"] == ""
    assert found["side cost"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", CLOSELY)
def test_each_call_is_computed_if_the_step_of_the_nearest_noise_level_is(
    report: Report, model: str, sampler: str
) -> None:
    found = report[model]["samplers"][sampler]
    steps = nearest(found["sigmas"], found["calls"])

    assert len(steps) == SAMPLERS[sampler] * 19 + 1
    assert set(found["counts"].values()) == {calls_of_steps(steps, PLAN.computed)}
    assert found["finite"] and found["again"] and found["distance"] < 0.6


@pytest.mark.parametrize("model", CLOSELY)
def test_parts_of_a_run_follow_the_plan_of_the_whole(report: Report, model: str) -> None:
    found = report[model]["parts"]
    halves = greedy_plan(RATIOS, 20, RULE, handovers=[9])
    denoised = greedy_plan(RATIOS, 20, RULE, handovers=[10]).part(10, 20)

    assert set(found["first"]["counts"].values()) == {halves.part(0, 9).num_computed}
    assert set(found["second"]["counts"].values()) == {halves.part(9, 20).num_computed}
    assert set(found["denoised"]["counts"].values()) == {denoised.num_computed}
    for each in found.values():
        assert each["finite"] and each.get("distance", 0.1) < 0.5


@pytest.mark.parametrize("model", CLOSELY)
def test_the_part_is_read_from_the_noise_levels(report: Report, model: str) -> None:
    wrong = []
    for scheduler, wanted, found, name in report[model]["parts found"]:
        is_whole = wanted[1] - wanted[0] == wanted[2]
        # Parts of similar grids are the same but for a step.
        near = max(abs(a - b) for a, b in zip(wanted, found, strict=True)) <= (0 if is_whole else 1)
        named = name == f"euler {scheduler}"
        if not near or (is_whole and not named):
            wrong.append((scheduler, wanted, found, name))
    assert wrong == []


@pytest.mark.parametrize(
    "other",
    [
        "skip layer guidance",
        "skip layer guidance of a part",
        "replaced block",
        "lora",
        "late prompt",
        "one by one",
        "two pictures",
    ],
)
@pytest.mark.parametrize("model", CLOSELY)
def test_it_goes_with_what_else_changes_a_model(report: Report, model: str, other: str) -> None:
    found = report[model]["together"][other]

    assert found["never"]
    assert found["effect"] > 1e-3 or other == "one by one"
    assert found["finite"] and found["distance"] < 0.5
    # Fewer than all calls were computed.
    assert max(found["counts"].values()) < 0.8 * len(found["calls"])


def test_tokens_of_a_picture_to_edit_are_kept_with_the_others(report: Report) -> None:
    found = report["FLUX.1 Kontext"]["together"]["picture to edit"]

    assert found["never"] and found["effect"] > 1e-3 and found["distance"] < 0.5
    # The negative prompt has no picture, so ComfyUI makes a call of its own for it.
    assert set(found["counts"].values()) == {2 * PLAN.num_computed}


@pytest.mark.parametrize("model", CLOSELY)
def test_applied_twice_the_last_one_counts(report: Report, model: str) -> None:
    assert report[model]["together"]["twice"] == {"wrappers": [1, 1], "same": True}


@pytest.mark.parametrize("model", [*TOKENS, "Wan 2.1 t2v"])
def test_what_others_add_after_blocks_is_there_once(report: Report, model: str) -> None:
    found = report[model]["additions"]

    assert found
    for each in found.values():
        assert each["never"] and each["effect"] > 1e-3
        assert set(each["counts"].values()) == {PLAN.num_computed}
        # What follows the last block is of this step or kept with the rest, here the same
        # constant in another order of additions.
        assert each["wanted"] < 1e-5


@pytest.mark.parametrize("model", CLOSELY)
def test_an_interrupted_run_leaves_nothing_behind(report: Report, model: str) -> None:
    found = report[model]["interrupted"]

    # Two residuals are held during a skip, and none afterwards.
    assert max(found["held"]) == 2 and found["held"][-1] == 0
    assert found["options"] and found["then"] and found["module"] == []


def test_windows_of_frames_have_residuals_of_their_own(report: Report) -> None:
    found = report["Wan 2.1 t2v"]["windows"]
    per_step, rest = divmod(len(found["calls"]), 20)

    assert found["never"] and rest == 0 and per_step > 1
    assert set(found["counts"].values()) == {PLAN.num_computed * per_step}
    assert found["distance"] < 0.5


@pytest.mark.parametrize("model", CLOSELY)
def test_calibration_is_found_afterwards(report: Report, model: str) -> None:
    found = report[model]["stored"]
    ratios = parse_ratios(found["saved"]["ratios"])

    assert "MagCache Calibrate" in found["before"]
    assert len(ratios) == 20 and ratios[0] == 1.0
    assert (
        "mean of one run" in found["saved"]["text"] and "unconditional:" in found["saved"]["text"]
    )
    assert "mean of one run" in found["saved again"]
    assert "mean of 2 runs" in found["other seed"]
    assert "mean of one run" in found["replaced"]
    plan = greedy_plan(ratios, 20, RULE)
    assert "measured on model.safetensors with 20 steps (one run)" in found["found"]["plan"]
    assert f"computes {plan.num_computed} of 20 steps" in found["found"]["plan"]
    assert set(found["run"]["counts"].values()) == {plan.num_computed}
    assert found["saved"]["picture"][-1] == found["found"]["picture"][-1] == 3


@pytest.mark.parametrize("model", CLOSELY)
def test_another_number_of_steps_takes_the_nearest_ratios(report: Report, model: str) -> None:
    found = report[model]["stored"]
    plan = greedy_plan(parse_ratios(found["saved"]["ratios"]), 31, RULE)

    assert len(found["longer"]["calls"]) == 31
    assert set(found["longer"]["counts"].values()) == {plan.num_computed}


@pytest.mark.parametrize("model", CLOSELY)
def test_a_part_of_a_run_has_a_curve_of_its_own(report: Report, model: str) -> None:
    family = tiny_native.MODELS[model]
    files = report[model]["stored"]["files"].values()
    [part] = [each for each in files if each["family"] == family and "to 9" in each["scheduler"]]
    ratios = part["branches"]["conditional"]["ratios"]
    plan = greedy_plan(ratios, 20, RULE, handovers=[9]).part(0, 9)

    assert part["scheduler"] == "euler simple, steps 1 to 9 of 20" and part["steps"] == 20
    assert ratios[9:] == [2.0] * 11
    assert set(report[model]["stored"]["part"]["counts"].values()) == {plan.num_computed}


@pytest.mark.parametrize("model", CLOSELY)
def test_what_cannot_be_stored_is_said(report: Report, model: str) -> None:
    found = report[model]["stored"]

    assert "no prompt was used in every step" in found["incomplete"]
    assert "connect the model that MagCache Calibrate gives" in found["nothing"]


def magcache(server: ComfyServer, prefix: str, **changes: Any) -> Run:
    """The demo's picture with MagCache, and what that says."""
    inputs: dict[str, Any] = {"model": ["demo", 0], "preset": "default", "steps": 25}
    inputs |= {"retention_ratio": 0.2, "threshold": 0.24, "k": 6, "ratios": "auto"}
    graph = graphs.sampled(["cache", 0]) | {
        "demo": graphs.node("LoraLoom_DemoModel"),
        "cache": graphs.node("LoraLoom_MagCache", **inputs | {"steps_to_compute": 0} | changes),
        "plan": graphs.node("PreviewAny", source=["cache", 1]),
        "picture": graphs.node("SaveImage", images=["cache", 2], filename_prefix=f"{prefix} plan"),
    }
    graph["latents"]["inputs"]["filename_prefix"] = prefix
    return server.run(graph)


def test_in_a_workflow_a_model_is_calibrated_and_then_sampled_faster(server: ComfyServer) -> None:
    missing = magcache(server, "too early")
    calibration = graphs.sampled(["calibrate", 0]) | {
        "demo": graphs.node("LoraLoom_DemoModel"),
        "calibrate": graphs.node("LoraLoom_MagCacheCalibrate", model=["demo", 0]),
        "save": graphs.node(
            "LoraLoom_SaveMagCacheRatios",
            calibration=["calibrate", 1],
            latent=["sampled", 0],
            measured_before="average",
        ),
        "ratios": graphs.node("PreviewAny", source=["save", 0]),
    }
    calibration["latents"]["inputs"]["filename_prefix"] = "calibrated"
    calibrated = server.run(calibration)
    found = magcache(server, "faster")
    off = magcache(server, "off", preset="off")

    assert missing.error is not None
    assert "put MagCache Calibrate before a sampler" in missing.error["exception_message"]
    assert (calibrated.status, found.status, off.status) == ("success",) * 3
    ratios = parse_ratios(calibrated.outputs["ratios"]["text"][0])
    plan = greedy_plan(ratios, 25)
    assert f"computes {plan.num_computed} of 25 steps" in found.outputs["plan"]["text"][0]
    assert "MagCache is off" in off.outputs["plan"]["text"][0]
    assert "picture" in found.outputs and "picture" not in off.outputs
    latents = {}
    for name in ("calibrated", "faster", "off"):
        [path] = (server.base / "output").glob(f"{name}_*.latent")
        latents[name] = load_file(path)["latent_tensor"]
    assert torch.equal(latents["calibrated"], latents["off"])
    distance = (latents["faster"] - latents["off"]).norm() / latents["off"].norm()
    assert plan.num_computed < 25 and 0 < distance < 0.5
