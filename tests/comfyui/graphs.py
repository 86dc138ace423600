"""Prompts in the API format, put together from small parts."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]

CAPTION = "a large red loomling in the center on a cream background"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def demo(**changes: Any) -> Graph:
    """Demo Model ("demo") and Train LoRA ("train")."""
    inputs = {
        "model": ["demo", 3],
        "dataset": ["demo", 4],
        "output_name": "loomling",
        "max_train_steps": 400,
        "learning_rate": 1e-3,
        "network_dim": 16,
        "seed": 42,
        "save_every_n_steps": 0,
        "preview_images": 0,
        "existing_run": "continue",
    }
    return {
        "demo": node("LoraLoom_DemoModel"),
        "train": node("LoraLoom_TrainLora", **inputs | changes),
    }


def sampled(model: list[Any], *, seed: int = 7, steps: int = 25) -> Graph:
    """Latents ("latents") of `CAPTION` from a MODEL of the demo with native nodes."""
    return {
        "text": node("LoraLoom_DemoTextEncode", text_encoder=["demo", 2], text=CAPTION),
        "size": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "shifted": node(
            "ModelSamplingFlux", model=model, max_shift=1.15, base_shift=0.5, width=64, height=64
        ),
        "sampled": node(
            "KSampler",
            model=["shifted", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["size", 0],
            seed=seed,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "latents": node("SaveLatent", samples=["sampled", 0], filename_prefix="latents"),
    }


def dataset(folder: str, **changes: Any) -> dict[str, Any]:
    """Dataset from Folder."""
    inputs = {
        "folder": folder,
        "resolution": 64,
        "batch_size": 2,
        "num_repeats": 1,
        "control_folder": "none",
        "enable_bucket": True,
        "bucket_no_upscale": False,
        "caption_extension": ".txt",
        "text_max_length": 512,
    }
    return node("LoraLoom_DatasetFromFolder", **inputs | changes)


def training_model(file: str, **changes: Any) -> dict[str, Any]:
    """Training Model."""
    inputs = {
        "dit": file,
        "memory": "fastest",
        "architecture": "auto",
        "mixed_precision": "no",
    }
    return node("LoraLoom_TrainingModel", **inputs | changes)
