"""Loads models and LoRAs with ComfyUI's own loaders; compares with checkpoints that hold the sum.

usage: native_lora.py COMFYUI_DIR JOB REPORT
Both are JSON files; see test_native_lora.py. Runs in ComfyUI's Python, so it imports nothing of
ours. All cases of all families share one process, because starting ComfyUI is what takes longest.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import headless

comfyui, job_path, report_path = sys.argv[1:]
headless.prepare(comfyui)

import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

torch.set_num_threads(1)
messages: list[str] = []


class Collect(logging.Handler):
    """Keeps what ComfyUI warns of: keys not loaded, shapes that do not fit, failed patches."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.append(record.getMessage())


logging.getLogger().addHandler(Collect(level=logging.WARNING))
detect = comfy.model_detection.detect_unet_config


def detect_any_size(state: dict[str, Any], prefix: str, metadata: Any = None) -> Any:
    """ComfyUI assumes the size of Qwen-Image's heads and text; tiny ones are told here."""
    config = detect(state, prefix, metadata=metadata)
    if config and config["image_model"] == "qwen_image":
        config["num_attention_heads"] = state[f"{prefix}img_in.weight"].shape[0] // 128
        config["joint_attention_dim"] = state[f"{prefix}txt_norm.weight"].shape[0]
    return config


comfy.model_detection.detect_unet_config = detect_any_size


def load_model(path: str) -> Any:
    model = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})
    if type(model.model).__name__ == "BaseModel":
        raise RuntimeError(f"{path}: ComfyUI does not know this model")
    return model


def loaded(patcher: Any, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    """The weights as they are when it samples, patches included, and what one call predicts.

    The weights are those of the model that all its clones share: valid until the next call.
    """
    comfy.model_management.load_models_gpu([patcher])
    return patcher.model_state_dict(), patcher.model.apply_model(**inputs).clone()


def compared(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> list[float]:
    """Largest deviation, largest value, and largest change from the model without LoRA."""
    return [
        float((found - wanted).abs().max()),
        float(wanted.abs().max()),
        float((wanted - base).abs().max()),
    ]


class Family:
    """One base model, and the checkpoints that its LoRAs were merged into."""

    def __init__(self, model_path: str, inputs_path: str) -> None:
        self.model = load_model(model_path)
        self.inputs = load_file(inputs_path)
        weights, self.output = loaded(self.model, self.inputs)
        self.weights = {key: value.clone() for key, value in weights.items()}
        self.merged: dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]] = {}

    def of_checkpoint(self, path: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if path not in self.merged:
            self.merged[path] = loaded(load_model(path), self.inputs)
        return self.merged[path]

    def of_lora(self, path: str, checkpoints: dict[str, str]) -> dict[str, Any]:
        """``checkpoints`` are by the strength of the LoRA in them."""
        messages.clear()
        lora = comfy.utils.load_torch_file(path, safe_load=True)
        patched: Any = None
        results: dict[str, Any] = {}
        for strength, checkpoint in checkpoints.items():
            wanted, wanted_output = self.of_checkpoint(checkpoint)
            patched, _ = comfy.sd.load_lora_for_models(self.model, None, lora, float(strength), 0.0)
            found, found_output = loaded(patched, self.inputs)
            weights = {
                key: compared(found[key], wanted[key], base) for key, base in self.weights.items()
            }
            results[strength] = {
                "weights": weights,
                "output": compared(found_output, wanted_output, self.output),
            }
        return {
            "messages": list(dict.fromkeys(messages)),
            "patched": sorted(patched.patches),
            "strengths": results,
        }

    def in_bypass(self, path: str, checkpoints: dict[str, str]) -> dict[str, Any]:
        """As the node that adds what a LoRA computes to each layer's output, for any weights."""
        messages.clear()
        lora = comfy.utils.load_torch_file(path, safe_load=True)
        outputs: dict[str, list[float]] = {}
        for strength, checkpoint in checkpoints.items():
            wanted = self.of_checkpoint(checkpoint)[1]
            patched, _ = comfy.sd.load_bypass_lora_for_models(
                self.model, None, lora, float(strength), 0.0
            )
            outputs[strength] = compared(loaded(patched, self.inputs)[1], wanted, self.output)
        return {"messages": list(dict.fromkeys(messages)), "outputs": outputs}

    def alike(self, found: str, wanted: str) -> dict[str, Any]:
        """Whether two checkpoints are the same model."""
        messages.clear()
        output = loaded(load_model(found), self.inputs)[1]
        outputs = compared(output, self.of_checkpoint(wanted)[1], self.output)
        return {"messages": messages.copy(), "output": outputs}

    def extract(self, checkpoint: str, lora: str) -> None:
        """Save what a checkpoint changes, as the nodes ModelMergeSubtract and LoraSave do."""
        from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model

        difference = load_model(checkpoint).clone()
        for key, patch in self.model.get_key_patches("diffusion_model.").items():
            difference.add_patches({key: patch}, -1.0, 1.0)
        prefix = "diffusion_model."
        tensors = calc_lora_model(
            difference, 8, prefix, prefix, {}, LORAType.FULL_DIFF, bias_diff=True
        )
        comfy.utils.save_torch_file(tensors, lora)

    def only_keys(self, path: str) -> dict[str, Any]:
        """For a LoRA that ComfyUI need not understand: what it takes and what it says."""
        messages.clear()
        lora = comfy.utils.load_torch_file(path, safe_load=True)
        patched, _ = comfy.sd.load_lora_for_models(self.model, None, lora, 1.0, 0.0)
        return {"messages": messages.copy(), "patched": sorted(patched.patches)}

    def of_case(self, lora: str, merged: dict[str, str], bypass: dict[str, str]) -> dict[str, Any]:
        report = self.of_lora(lora, merged) if merged else self.only_keys(lora)
        return report | {"bypass": self.in_bypass(lora, bypass)}


report: dict[str, Any] = {}
with torch.inference_mode():
    for name, job in json.loads(Path(job_path).read_text()).items():
        messages.clear()
        family = Family(job["model"], job["inputs"])
        report[name] = {
            "class": type(family.model.model).__name__,
            "messages": messages.copy(),
            "cases": {case: family.of_case(**files) for case, files in job["cases"].items()},
            "pairs": {pair: family.alike(**files) for pair, files in job["pairs"].items()},
        }
        family.extract(**job["extract"])
Path(report_path).write_text(json.dumps(report))
