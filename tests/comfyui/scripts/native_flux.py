"""Loads a model, an autoencoder and a LoRA with ComfyUI's own loaders and samples with them.

usage: native_flux.py COMFYUI_DIR INPUTS OUTPUTS
INPUTS is a safetensors file of tensors with the paths in its metadata; see test_native_flux.py.
Runs in ComfyUI's Python, so it imports nothing of ours.
"""

from __future__ import annotations

import json
import logging
import sys

import headless

comfyui, inputs_path, outputs_path = sys.argv[1:]
headless.prepare(comfyui)

import comfy.lora  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

warnings: list[str] = []


class Collect(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warnings.append(record.getMessage())


logging.getLogger().addHandler(Collect(level=logging.WARNING))

tensors = load_file(inputs_path)
with safe_open(inputs_path, "pt") as file:
    paths = json.loads(file.metadata()["paths"])

with torch.inference_mode():
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(paths["vae"]), dtype=torch.float32)
    vae.throw_exception_if_invalid()
    results = {"encoded": vae.encode(tensors["pixels"]), "decoded": vae.decode(tensors["latents"])}

    model = comfy.sd.load_diffusion_model(paths["dit"], model_options={"dtype": torch.float32})
    warnings.clear()
    lora = comfy.utils.load_torch_file(paths["lora"])
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(lora, key_map)
    tuned, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    unmatched = list(warnings)

    extra = {"pooled_output": tensors["pooled"], "guidance": 2.5}
    if "control" in tensors:
        extra["reference_latents"] = [vae.encode(tensors["control"])]
    positive = [[tensors["text_embeds"], extra]]
    noise = tensors["noise"]
    for name, patcher in (("base", model), ("tuned", tuned)):
        results[name] = comfy.sample.sample_custom(
            patcher,
            noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            tensors["sigmas"],
            positive,
            positive,
            torch.zeros_like(noise),
            disable_pbar=True,
        )

facts = {"patched": len(patches), "unmatched": json.dumps(unmatched)}
save_file(
    {name: tensor.float().contiguous().clone() for name, tensor in results.items()},
    outputs_path,
    metadata={name: str(value) for name, value in facts.items()},
)
