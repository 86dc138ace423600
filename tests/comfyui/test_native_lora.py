"""LoRA files of every kind, family and format in ComfyUI: what it loads, and what comes of it.

ComfyUI itself is the reference. Its loader loads each LoRA; then the weights and the output of
the model must be those of a checkpoint that has the LoRA in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.adapter_weights import FullWeights
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.lora_file import read_lora
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.native_cases import (
    BYPASS,
    FOREIGN,
    KINDS,
    LAYOUTS,
    QUANTIZED,
    WRITTEN,
    Cases,
    checkpoint_with,
)
from pack.tests.references import tiny_native
from safetensors.torch import load_file

# The same float32 numbers added in another order, and for DoRA the norms of up to 768 of them.
# Measured are at most 2**-20 of the largest number (DoRA), else 2**-22; a wrong layer makes 2**-3.
WEIGHTS = 2**-18
# Two blocks of each kind amplify that; measured are 7e-7.
OUTPUT = 1e-5
# Far beyond that, so that a LoRA without effect would be noticed.
EFFECT = 0.02

Report = dict[str, dict[str, Any]]
# All files and one process of ComfyUI for everything: about 40 seconds of a CPU.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("native lora")
    jobs = {}
    for model in tiny_native.MODELS:
        cases = Cases(folder / model, model)
        for kind in KINDS:
            cases.add_written(kind)
        for tool, foreign in FOREIGN.get(model, {}).items():
            cases.add_foreign(tool, foreign)
        cases.add_half_precision()
        if model in QUANTIZED:
            for layout in LAYOUTS:
                cases.add_quantized(layout)
        if model == "FLUX.1 Kontext":
            cases.add_row_norms()
        if model == "Wan 2.1 t2v":
            cases.add_convolution()
        jobs[model] = cases.job()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    comfyui.run("native_lora.py", folder / "jobs.json", folder / "report.json")
    report = json.loads((folder / "report.json").read_text())
    for model, job in jobs.items():
        report[model]["job"] = job
    return report


def deviation(numbers: list[float]) -> float:
    """The largest, in parts of the largest number that was added."""
    found, wanted, changed = numbers
    return found / max(wanted, changed) if found else 0.0


def is_the_checkpoint(case: dict[str, Any]) -> bool:
    """Every key was loaded, and at each strength all weights and the output are the same."""
    assert case["messages"] == []
    for strength, result in case["strengths"].items():
        worst = {key: deviation(numbers) for key, numbers in result["weights"].items()}
        assert max(worst.values()) < WEIGHTS, (strength, max(worst, key=worst.__getitem__))
        changed = [key for key, (_, _, change) in result["weights"].items() if change > 0]
        assert sorted(changed) == case["patched"]
        found, wanted, change = result["output"]
        assert found < OUTPUT * wanted
        assert change > EFFECT * wanted
    return bool(case["strengths"])


@pytest.mark.parametrize("model", tiny_native.MODELS)
def test_comfyui_knows_the_tiny_models(report: Report, model: str) -> None:
    classes = {"flux_kontext": "Flux", "wan": "WAN21", "qwen_image": "QwenImage"}
    wanted = classes.get(tiny_native.MODELS[model], "HunyuanVideo")

    assert report[model]["class"] == wanted
    assert report[model]["messages"] == []


@pytest.mark.parametrize(("model", "kind", "format"), WRITTEN)
def test_what_we_write_is_what_comfyui_computes(
    report: Report, model: str, kind: str, format: str
) -> None:
    assert is_the_checkpoint(report[model]["cases"][f"{kind} as {format}"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", tiny_native.MODELS)
def test_the_checkpoints_that_comfyui_is_compared_with_hold_the_adapters(
    report: Report, model: str, kind: str
) -> None:
    state, _ = tiny_native.build(model)
    files = report[model]["job"]["cases"][f"{kind} as comfyui"]["merged"]
    wanted = checkpoint_with(state, KINDS[kind](state), 0.6)
    found = load_file(files["0.6"])

    assert found.keys() == state.keys()
    for key, tensor in wanted.items():
        assert (found[key] - tensor).abs().max() <= WEIGHTS * tensor.abs().max()


@pytest.mark.parametrize("model", tiny_native.MODELS)
def test_every_layer_of_the_model_can_have_an_adapter(report: Report, model: str) -> None:
    state, _ = tiny_native.build(model)
    layers = [key for key, tensor in state.items() if key.endswith("weight") and tensor.dim() > 1]
    # All but Wan's modulation, which is a parameter without a module.
    tensors = [key for key in state if key.endswith(("weight", "scale", "bias"))]

    assert len(report[model]["cases"]["lora as comfyui"]["patched"]) == len(layers)
    assert len(report[model]["cases"]["full as comfyui"]["patched"]) == len(tensors)


@pytest.mark.parametrize(
    ("model", "kind"),
    [(model, kind) for model, kinds in BYPASS.items() for kind in kinds if kind != "dora"],
)
def test_comfyuis_bypass_mode_comes_to_the_same(report: Report, model: str, kind: str) -> None:
    bypass = report[model]["cases"][f"{kind} as comfyui"]["bypass"]
    [(found, wanted, change)] = bypass["outputs"].values()

    assert [text for text in bypass["messages"] if "inefficient" not in text] == []
    assert found < OUTPUT * wanted
    assert change > EFFECT * wanted


def test_comfyuis_bypass_mode_has_no_magnitudes_and_no_parts_of_a_layer(report: Report) -> None:
    cases = report["FLUX.1 Kontext"]["cases"]
    dora = cases["dora as comfyui"]["bypass"]
    parts = cases["lora as diffusers"]["bypass"]

    # Nothing is said of the magnitudes.
    assert dora["messages"] == []
    assert any("Adapter key not in model" in message for message in parts["messages"])
    for bypass in (dora, parts):
        [(found, wanted, _)] = bypass["outputs"].values()
        assert found > EFFECT * wanted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", QUANTIZED)
def test_an_fp8_model_with_a_lora_merged_in_is_loaded_as_what_it_says(
    report: Report, model: str, layout: str
) -> None:
    pair = report[model]["pairs"][layout]
    found, wanted, change = pair["output"]

    assert pair["messages"] == []
    # The codes times the scale are the same float32 numbers on both sides.
    assert found < OUTPUT * wanted
    assert change > EFFECT * wanted


@pytest.mark.parametrize("model", tiny_native.MODELS)
def test_what_comfyui_extracts_from_a_checkpoint_is_read_without_loss(
    report: Report, model: str
) -> None:
    state, _ = tiny_native.build(model)
    file = read_lora(Path(report[model]["job"]["extract"]["lora"]), LAYER_NAMES.values())
    wanted = KINDS["full"](state)

    assert file.names.family == tiny_native.MODELS[model]
    assert file.layers.keys() == wanted.keys()
    for name, adapter in wanted.items():
        found = file.layers[name]
        assert isinstance(found, FullWeights) and isinstance(adapter, FullWeights)
        for theirs, ours in ((found.diff, adapter.diff), (found.bias_diff, adapter.bias_diff)):
            if ours is not None and theirs is not None:
                # A difference of two float32 numbers of at most 8, as float16.
                assert torch.allclose(theirs.float(), ours, rtol=2**-11, atol=2**-20)
            assert (ours is None) == (theirs is None)


@pytest.mark.parametrize("model", tiny_native.MODELS)
def test_a_lora_in_half_precision_does_what_its_rounded_numbers_say(
    report: Report, model: str
) -> None:
    assert is_the_checkpoint(report[model]["cases"]["bf16"])


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize(
    ("model", "tool"), [(model, tool) for model, tools in FOREIGN.items() for tool in tools]
)
def test_files_of_other_tools_load_once_we_have_converted_them(
    report: Report, model: str, tool: str, format: str
) -> None:
    assert is_the_checkpoint(report[model]["cases"][f"{tool} as {format}"])


@pytest.mark.parametrize(
    ("model", "tool"), [(model, tool) for model, tools in FOREIGN.items() for tool in tools]
)
def test_what_comfyui_makes_of_the_files_of_other_tools(
    report: Report, model: str, tool: str
) -> None:
    case, taken = report[model]["cases"][f"{tool} itself"], FOREIGN[model][tool].taken

    if taken:
        assert is_the_checkpoint(case)
    elif taken is False:
        assert case["patched"] == []
        assert all(message.startswith("lora key not loaded") for message in case["messages"])


def test_comfyui_drops_7_of_13_layers_of_hunyuan_video_under_the_makers_names(
    report: Report,
) -> None:
    case = report["HunyuanVideo"]["cases"]["musubi-tuner itself"]
    patched = {key for key in case["patched"] if ".0." in key and "blocks." in key}
    dropped = {message.split(": ")[1].split(".")[0] for message in case["messages"]}

    assert len({key for key in patched if "_blocks.0." in key}) == 6
    assert {name for name in dropped if "_0_" in name} == {
        *(f"lora_unet_double_blocks_0_{each}_mod_linear" for each in ("img", "txt")),
        *(f"lora_unet_double_blocks_0_{each}_mlp_fc1" for each in ("img", "txt")),
        *(f"lora_unet_double_blocks_0_{each}_mlp_fc2" for each in ("img", "txt")),
        "lora_unet_single_blocks_0_modulation_linear",
    }


def test_comfyui_divides_norms_of_rows_by_those_before_the_change(report: Report) -> None:
    cases = report["FLUX.1 Kontext"]["cases"]
    ours = cases["row norms"]["strengths"]["1.0"]["weights"]

    assert is_the_checkpoint(cases["row norms as ComfyUI"])
    # A change of half the weight makes the norms of rows larger by an eighth and more.
    assert max(deviation(numbers) for numbers in ours.values()) > 0.05


def test_comfyui_knows_no_magnitudes_in_the_format_of_diffusers(report: Report) -> None:
    case = report["FLUX.1 Kontext"]["cases"]["row norms as diffusers"]

    assert len(case["patched"]) == len(report["FLUX.1 Kontext"]["cases"]["row norms"]["patched"])
    assert case["messages"]
    assert all(message.endswith(".lora_magnitude_vector") for message in case["messages"])


def test_comfyui_multiplies_kernels_of_three_dimensions_only_as_matrices(report: Report) -> None:
    cases = report["Wan 2.1 t2v"]["cases"]
    [stored] = [
        numbers
        for numbers in cases["convolution as LyCORIS"]["strengths"]["1.0"]["weights"].values()
        if numbers[2] > 0
    ]

    assert deviation(stored) > 0.1
    assert is_the_checkpoint(cases["convolution as comfyui"])
