"""Loads models in 8 bits with the pack inside ComfyUI and does with them what its nodes do.

usage: native_quantized.py COMFYUI_DIR PACK JOB REPORT
JOB and REPORT are JSON files; see test_native_quantized.py. Runs in ComfyUI's Python. Every
number triple is: largest deviation from what is wanted, largest value of that, and largest
difference from the model in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import headless

comfyui, pack_path, job_path, report_path = sys.argv[1:]
headless.prepare(comfyui)

import comfy.hooks  # noqa: E402
import comfy.memory_management  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from quantized_models import (  # noqa: E402
    Model,
    Pack,
    codes_of,
    distances,
    messages,
    plainly,
    same,
)
from safetensors.torch import load_file  # noqa: E402

import nodes  # noqa: E402

torch.set_num_threads(1)
_LISTS = ("latents", "positive")


def ways(model: Model) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, way in model.job["ways"].items():
        patcher = model.load(way=name)
        found = model.output(patcher)
        report[name] = {
            "output": model.compared(found, way["wanted"]),
            "error": float((found - model.base).norm() / model.base.norm()),
            "layers": len(codes_of(patcher)) // 2,
            "mib": patcher.model_size() / 2**20,
        }
    return report


def sampled(model: Model) -> dict[str, Any]:
    """What KSampler does, with the rounded weights in float32 beside it.

    With hooks a LoRA is for the positive condition only, so that weights change within a step.
    """
    inputs, job = model.inputs, model.job["lora"]
    extra = {"pooled_output": inputs["y"]} if "y" in inputs else {}
    if "guidance" in inputs:
        extra["guidance"] = float(inputs["guidance"])
    condition = [[inputs["c_crossattn"], extra]]
    hooks = comfy.hooks.create_hook_lora(load_file(job["path"]), job["strength"], 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(condition, hooks)
    wanted = plainly(model.job["ways"]["e4m3 block"]["wanted"])
    patchers = {"found": model.load(), "wanted": wanted, "base": plainly(model.job["model"])}
    before = codes_of(patchers["found"])
    results: dict[str, torch.Tensor] = {}
    for name, patcher in patchers.items():
        for how, positive in (("", condition), (" hooked", hooked)):
            latent = {"samples": torch.zeros_like(inputs["x"])}
            settings = (patcher, 7, 3, 2.0, "euler", "simple", positive, condition, latent)
            results[name + how] = nodes.common_ksampler(*settings)[0]["samples"]
    return {
        "output": distances(results["found"], results["wanted"], results["base"]),
        "hooked": distances(results["found hooked"], results["wanted hooked"], results["wanted"]),
        "restored": same(before, codes_of(patchers["found"])),
    }


def with_lora(model: Model) -> dict[str, Any]:
    lora, job = load_file(model.job["lora"]["path"]), model.job["lora"]
    strength, wanted = job["strength"], job["wanted"]
    patcher = model.load()
    before = codes_of(patcher)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0.0)
    report: dict[str, Any] = {"output": model.compared(model.output(patched), wanted)}
    report["weights"] = weights_of(patched, patcher, wanted)
    again = model.output(patcher)
    report["restored"] = same(before, codes_of(patcher))
    report["after"] = model.compared(again, model.job["ways"]["e4m3 block"]["wanted"])

    patched.detach()
    patched.load(torch.device("cpu"), lowvram_model_memory=1)
    found = patched.model.apply_model(**model.inputs).clone()
    report["low vram"] = model.compared(found, wanted)
    report["low vram codes"] = same(before, codes_of(patched))
    patched.detach()

    bypass, _ = comfy.sd.load_bypass_lora_for_models(patcher, None, lora, strength, 0.0)
    report["bypass"] = model.compared(model.output(bypass), wanted)
    merged = model.load(loras=[(Path(job["path"]), strength)])
    report["merged first"] = model.compared(model.output(merged), job["merged_first"])
    return report


def weights_of(patched: Any, patcher: Any, wanted: str) -> dict[str, list[float]]:
    """Of each weight that a LoRA changed: error in steps, and how much of the change is there."""
    exact = plainly(wanted).model.diffusion_model.state_dict()
    comfy.model_management.load_models_gpu([patched])
    found: dict[str, list[float]] = {}
    for key in patched.patches:
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        module = patched.model.diffusion_model.get_submodule(name)
        base = patched.backup[key].weight.dequantize()
        weight, goal = module.weight.dequantize(), exact[f"{name}.weight"]
        blocks = goal.unflatten(1, (-1, 64))
        scale = module.weight._params.scale
        step = torch.maximum(blocks.abs() / 8, scale * 2**-9).view(goal.shape)
        change = goal - base
        kept = ((weight - base) * change).sum() / change.square().sum()
        largest = blocks.abs().amax(2, keepdim=True) / 448
        found[name] = [
            float(((weight - goal).abs() / step).max()),
            float(kept),
            float((scale / largest - 1).abs().max()),
        ]
    return found


def saved(model: Model) -> dict[str, Any]:
    """ModelSave and back, with and without a LoRA; and what ComfyUI's own loader makes of it."""
    scratch, report = Path(model.job["scratch"]), {}
    lora = load_file(model.job["lora"]["path"])
    for way in ("e4m3 block", "e4m3 tensor", "int8 tensor"):
        patcher = model.load(way=way)
        path = str(scratch / f"saved {way}.safetensors")
        comfy.sd.save_checkpoint(path, patcher)
        messages.clear()
        loaded = model.load(path, way="int8 block")
        report[way] = {"same": same(codes_of(patcher), codes_of(loaded)), "messages": [*messages]}
        try:
            found = model.output(comfy.sd.load_diffusion_model(path))
            report[way]["plain"] = model.compared(found, model.job["ways"][way]["wanted"])
        except (KeyError, RuntimeError, ValueError) as error:
            report[way]["refusal"] = f"{type(error).__name__}: {error}"
    patched, _ = comfy.sd.load_lora_for_models(model.load(), None, lora, 0.6, 0.0)
    path = str(scratch / "saved with lora.safetensors")
    comfy.sd.save_checkpoint(path, patched)
    codes = codes_of(patched)
    report["with lora"] = {"same": same(codes, codes_of(model.load(path)))}
    return report


def copied(model: Model) -> dict[str, Any]:
    """Clones, and the second model that ComfyUI reads where it needs one of its own."""
    patcher = model.load()
    clone, other = patcher.clone(), patcher.clone(force_deepcopy=True)
    return {
        "clone shares": clone.model is patcher.model,
        "copy shares": other.model is patcher.model,
        "same": same(codes_of(patcher), codes_of(other)),
        "output": model.compared(model.output(other), model.job["ways"]["e4m3 block"]["wanted"]),
    }


def merged(model: Model) -> dict[str, Any]:
    """ComfyUI's nodes that merge models: half of ours in 8 bits and half of one with a LoRA."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    patcher, plain = model.load(), plainly(model.job["model"])
    exact = plainly(model.job["lora"]["wanted"])
    other = model.load(model.job["lora"]["wanted"])
    merge = ModelMergeSimple().merge
    pairs = {
        "plain into ours": merge(patcher, exact, 0.5)[0],
        "ours into plain": merge(plain, other, 0.5)[0],
        "ours into ours": merge(patcher, other, 0.5)[0],
    }
    goal = (model.output(merge(plain, exact, 0.5)[0]) - model.base).clone()
    return {
        name: float((model.output(pair) - model.base - goal).norm() / model.base.norm())
        for name, pair in pairs.items()
    }


def computed_in_bf16(model: Model) -> list[float]:
    """Relative distance to the rounded weights in float32, of those in bf16 and of ours in bf16."""
    wanted = model.job["ways"]["e4m3 block"]["wanted"]
    exact, found = model.wanted(wanted), []
    for patcher in (plainly(wanted), model.load()):
        patcher.set_model_compute_dtype(torch.bfloat16)
        found.append(float((model.output(patcher).float() - exact).norm() / exact.norm()))
    return found


def trained(model: Model) -> dict[str, Any]:
    """ComfyUI's own Train LoRA on a model in 8 bits, with weights patched and with a bypass."""
    from comfy_extras.nodes_train import TrainLoraNode

    condition = [[model.inputs["c_crossattn"], {}]]
    values: dict[str, Any] = {
        "latents": [{"samples": model.inputs["x"]}],
        "positive": [condition],
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "steps": 2,
        "learning_rate": 1e-3,
        "rank": 2,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "none",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
    }
    report: dict[str, Any] = {}
    for bypass in (False, True):
        inputs = values | {"model": model.load(), "bypass_mode": bypass}
        listed = {name: value if name in _LISTS else [value] for name, value in inputs.items()}
        lora, losses, _ = TrainLoraNode.execute(**listed).result
        moved = [value for key, value in lora.items() if ".lora_up" in key and value.any()]
        report["bypass" if bypass else "patched"] = {
            "losses": losses["loss"],
            "moved": len(moved),
        }
    return report


def linear_layer(model: Model) -> dict[str, Any]:
    """One layer: its gradient, what is kept for it, and how ComfyUI moves a weight on a GPU."""
    with torch.inference_mode(False):
        patcher = model.load()
        layer = patcher.model.diffusion_model.get_submodule(next(iter(codes_of(patcher))))
        weight = layer.weight.dequantize()
        x = torch.randn(5, weight.shape[1], requires_grad=True)
        kept: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = layer(x)
        (gradient,) = torch.autograd.grad(result.square().sum(), x)
        plain = torch.nn.functional.linear(x, weight, layer.bias)
        (wanted,) = torch.autograd.grad(plain.square().sum(), x)
    return {
        "gradient": float((gradient - wanted).abs().max() / wanted.abs().max()),
        "kept": sum(kept),
        "codes": layer.weight._qdata.nbytes + layer.weight._params.scale.nbytes,
        **moved(layer),
    }


def moved(layer: Any) -> dict[str, Any]:
    """ComfyUI gathers the weights of a layer in one buffer; a LoRA is added when it gets there."""
    management = comfy.memory_management
    source = [layer.weight, layer.bias]
    buffer = torch.empty(management.vram_aligned_size(source), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered(source, buffer)
    arrived = management.interpret_gathered_like(source, buffer)[0]
    bits = [each._qdata.view(torch.uint8) for each in (arrived, layer.weight)]
    arrives = torch.equal(*bits) and torch.equal(arrived.dequantize(), layer.weight.dequantize())
    change = torch.full(tuple(layer.weight.shape), 1e-3)
    dtype = layer.weight.dtype
    layer.weight_lowvram_function = lambda weight: weight + change
    layer.seed_key = "layer"
    layer._prefetch = {
        "resident": False,
        "signature": 1,
        "xfer_dest": buffer,
        "cast_dest": None,
        "cast_geometry": management.tensors_to_geometries(source),
        "needs_cast": False,
    }
    weight, _ = comfy.ops.resolve_cast_module_with_vbar(layer, dtype, None, dtype, dtype, False)
    goal = layer.weight.dequantize() + change
    kept = layer._v_weight.dequantize()
    return {
        "arrives": arrives,
        "patched": float((weight - goal).abs().max()),
        "resident": float((kept - goal).norm() / goal.norm()),
        "resident mean": float((kept - goal).mean() / 1e-3),
    }


def files(model: Model) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, pair in model.job["files"].items():
        messages.clear()
        patcher = model.load(pair["found"])
        report[name] = {
            "output": model.compared(model.output(patcher), pair["wanted"]),
            "layers": len(codes_of(patcher)) // 2,
            "messages": [*messages],
        }
        if name == "comfyui":
            plain = comfy.sd.load_diffusion_model(pair["found"])
            ours, theirs = codes_of(patcher), codes_of(plain)
            report[name]["same codes"] = same(
                {key: value.view(-1) for key, value in ours.items()},
                {key: value.view(-1) for key, value in theirs.items()},
            )
            found = model.output(plain)
            report[name]["plain"] = model.compared(found, pair["wanted"])
            report[name]["error"] = float((found - model.base).norm() / model.base.norm())
    return report


pack = Pack(pack_path)
report: dict[str, Any] = {}
with torch.inference_mode():
    for name, job in json.loads(Path(job_path).read_text()).items():
        model = Model(job, pack)
        report[name] = {
            "ways": ways(model),
            "lora": with_lora(model),
            "saved": saved(model),
            "copied": copied(model),
            "merged": merged(model),
            "bf16": computed_in_bf16(model),
            "layer": linear_layer(model),
            "files": files(model),
        }
        if not {"c_concat", "clip_fea"} & model.inputs.keys():
            report[name]["sampled"] = sampled(model)
            # Those of FLUX and HunyuanVideo change activations that autograd needs.
            if not {"guidance"} & model.inputs.keys():
                report[name]["trained"] = trained(model)
Path(report_path).write_text(json.dumps(report))
