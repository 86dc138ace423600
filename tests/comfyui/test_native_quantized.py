"""Models in 8 bits in ComfyUI: what it computes with them, and all that it does with a model.

The reference is ComfyUI itself with a float32 checkpoint of the weights that codes and scales
mean. Where weights are restored exactly, its numbers must be the same.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.quantized_cases import WAYS, QuantizedCases
from pack.tests.comfyui.server import PACK
from pack.tests.references import tiny_checkpoints, tiny_native
from safetensors.torch import save_file

# The same float32 numbers, added in the same order: mostly it is 0. A bypass adds in another one;
# measured are at most 4e-7.
SAME = 4e-6
# Layers that are kept in 8 bits in two blocks of each kind, as many as a LoRA is for: of FLUX and
# HunyuanVideo but for the modulation, which Qwen-Image has in its blocks' lists.
LAYERS = {
    "FLUX.1 Kontext": 2 * 8 + 2 * 2,
    "HunyuanVideo": 2 * 8 + 2 * 2,
    "Qwen-Image": 2 * 14,
    "Wan 2.1 t2v": 2 * 10,
    "Wan 2.1 i2v": 2 * 12,
    "Wan 2.2 i2v": 2 * 10,
}
SAMPLED = ("FLUX.1 Kontext", "HunyuanVideo", "Qwen-Image", "Wan 2.1 t2v")
TRAINED = ("Qwen-Image", "Wan 2.1 t2v")
MODELS = list(tiny_native.MODELS)

Report = dict[str, dict[str, Any]]
# All files and one process of ComfyUI for everything: about 45 seconds of a CPU.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("native quantized")
    jobs = {model: QuantizedCases(folder / model, model).job() for model in MODELS}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    comfyui.run("native_quantized.py", PACK, folder / "jobs.json", folder / "report.json")
    return json.loads((folder / "report.json").read_text())


def is_the_same(numbers: list[float]) -> bool:
    """Nothing but rounding of float32, where the model in float32 is clearly another one."""
    found, wanted, change = numbers
    assert change > 100 * SAME * wanted
    return found < SAME * wanted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_computes_what_its_codes_and_scales_mean(
    report: Report, model: str, way: str
) -> None:
    found = report[model]["ways"][way]

    assert is_the_same(found["output"])
    assert found["layers"] == LAYERS[model]


@pytest.mark.parametrize("model", MODELS)
def test_int8_in_blocks_has_a_quarter_of_the_error_of_fp8(report: Report, model: str) -> None:
    ways = report[model]["ways"]

    assert ways["int8 block"]["error"] < 0.3 * ways["e4m3 block"]["error"]
    assert ways["e4m3 block"]["error"] < 0.7 * ways["e5m2 channel"]["error"]


@pytest.mark.parametrize("model", SAMPLED)
def test_ksampler_draws_the_same(report: Report, model: str) -> None:
    assert is_the_same(report[model]["sampled"]["output"])


@pytest.mark.parametrize("model", SAMPLED)
def test_hooks_change_its_weights_within_a_step_and_restore_every_bit(
    report: Report, model: str
) -> None:
    sampled = report[model]["sampled"]
    rounding, found = sampled["output"][2], sampled["hooked"][0]

    # What rounding the sum by chance costs, 2^0.5 of rounding to nearest, is in one of the two
    # conditions only, so that guidance of 2 doubles it.
    assert 0 < found < 1.5 * 2 * 2**0.5 * rounding
    assert sampled["restored"]


@pytest.mark.parametrize("model", MODELS)
def test_a_lora_on_a_model_in_8_bits_goes_to_the_next_codes_and_keeps_its_strength(
    report: Report, model: str
) -> None:
    weights = report[model]["lora"]["weights"]

    assert len(weights) == LAYERS[model]
    for name, (steps, kept, scale) in weights.items():
        # As scales are those of merging first, no weight is further away than one step ...
        assert steps < 1.001, name
        assert scale < 1e-6, name
        # ... and on average it is where it should be: the noise of 16,384 weights and more.
        assert abs(kept - 1) < 0.1, name


@pytest.mark.parametrize("model", MODELS)
def test_removing_a_lora_restores_every_bit(report: Report, model: str) -> None:
    lora = report[model]["lora"]

    assert lora["restored"]
    assert is_the_same(lora["after"])


@pytest.mark.parametrize("model", MODELS)
def test_with_low_memory_and_with_a_bypass_a_lora_is_added_exactly(
    report: Report, model: str
) -> None:
    lora = report[model]["lora"]

    assert is_the_same(lora["low vram"])
    assert lora["low vram codes"]
    assert is_the_same(lora["bypass"])
    found, _, change = lora["output"]
    assert 0 < found < change  # what rounding the sum again costs


@pytest.mark.parametrize("model", MODELS)
def test_a_lora_merged_on_loading_is_rounded_once(report: Report, model: str) -> None:
    found, _, change = report[model]["lora"]["merged first"]

    # Sums that differ in their last bit may be rounded to another code, one in thousands.
    assert found < 0.02 * change


@pytest.mark.parametrize("way", ["e4m3 block", "e4m3 tensor", "int8 tensor"])
@pytest.mark.parametrize("model", MODELS)
def test_what_comfyui_saves_is_loaded_bit_for_bit(report: Report, model: str, way: str) -> None:
    saved = report[model]["saved"]

    assert saved[way]["same"]
    assert saved[way]["messages"] == []
    assert saved["with lora"]["same"]


@pytest.mark.parametrize("model", MODELS)
def test_comfyuis_own_loader_takes_what_it_can_read_and_refuses_the_rest(
    report: Report, model: str
) -> None:
    saved = report[model]["saved"]

    assert is_the_same(saved["e4m3 tensor"]["plain"])
    # Of INT8 models it rounds the activations, too.
    found, _, change = saved["int8 tensor"]["plain"]
    assert SAME < found < 2 * change
    assert "Unknown quantization format" in saved["e4m3 block"]["refusal"]


@pytest.mark.parametrize("model", MODELS)
def test_clones_share_the_model_and_copies_read_it_again(report: Report, model: str) -> None:
    copied = report[model]["copied"]

    assert copied["clone shares"] and not copied["copy shares"]
    assert copied["same"]
    assert is_the_same(copied["output"])


@pytest.mark.parametrize("model", MODELS)
def test_models_in_8_bits_can_be_merged(report: Report, model: str) -> None:
    error = report[model]["ways"]["e4m3 block"]["error"]

    for name, found in report[model]["merged"].items():
        assert 0 < found < 2 * error, name


@pytest.mark.parametrize("model", MODELS)
def test_another_type_to_compute_in_does_to_it_what_it_does_to_others(
    report: Report, model: str
) -> None:
    plain, ours = report[model]["bf16"]

    # Two blocks of some models make much of a time that is rounded to bf16.
    assert ours == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_exact_and_only_codes_are_kept_for_them(report: Report, model: str) -> None:
    layer = report[model]["layer"]

    assert layer["gradient"] < 1e-6
    assert layer["kept"] == layer["codes"]


@pytest.mark.parametrize("model", MODELS)
def test_a_weight_survives_the_way_to_a_gpu_and_gets_its_lora_there(
    report: Report, model: str
) -> None:
    layer = report[model]["layer"]

    assert layer["arrives"]
    assert layer["patched"] < 1e-7
    # Where the sum stays on the GPU it is rounded by chance: by e4m3's error times 2^0.5 at most.
    assert layer["resident"] < 0.05
    assert abs(layer["resident mean"]) < 0.1


@pytest.mark.parametrize("model", TRAINED)
@pytest.mark.parametrize("how", ["patched", "bypass"])
def test_comfyuis_own_training_runs_on_it(report: Report, model: str, how: str) -> None:
    trained = report[model]["trained"]

    assert all(math.isfinite(loss) for loss in trained[how]["losses"])
    assert trained[how]["moved"] >= LAYERS[model]
    first = trained["patched"]["losses"][0]
    # The two ways only differ in what autocast rounds to bf16.
    assert trained["bypass"]["losses"][0] == pytest.approx(first, rel=2**-7)


@pytest.mark.parametrize(
    ("model", "file"),
    [
        (model, file)
        for model in MODELS
        for file in ("blockwise", "comfyui", "marker", "cast", "diffusers", "checkpoint")
        if (model, file) != ("Qwen-Image", "diffusers")
    ],
)
def test_files_of_all_kinds_are_loaded_as_what_they_say(
    report: Report, model: str, file: str
) -> None:
    found = report[model]["files"][file]

    assert is_the_same(found["output"])
    assert found["layers"] == LAYERS[model]
    assert found["messages"] == []


@pytest.mark.parametrize("model", MODELS)
def test_comfyuis_own_loader_reads_the_file_that_is_written_for_it(
    report: Report, model: str
) -> None:
    found = report[model]["files"]["comfyui"]

    assert found["same codes"]
    assert is_the_same(found["plain"])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by Linux")
def test_loading_needs_the_result_and_two_layers(comfyui: ComfyUI, tmp_path: Path) -> None:
    state = tiny_checkpoints.flux(hidden=1024, depth=3, single=6)
    model, report = tmp_path / "model.safetensors", tmp_path / "report.json"
    save_file({key: tensor.bfloat16().contiguous() for key, tensor in state.items()}, model)
    largest = max(tensor.numel() for tensor in state.values()) * torch.bfloat16.itemsize
    comfyui.run("quantized_memory.py", PACK, model, report)
    numbers = json.loads(report.read_text())
    above = numbers["peak"] - numbers["before"] - numbers["model"]

    # And what the allocator keeps; the file has 408 MiB.
    assert above < 2 * largest + 24 * 2**20
