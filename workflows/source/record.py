"""The recording of ``/object_info`` that the workflows are made and checked with.

``python -m workflows.source record http://127.0.0.1:8188`` makes it anew from a running ComfyUI
that has loaded this pack.
"""

from __future__ import annotations

import copy
import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("object_info.json")
OUR_PREFIX = "LoraLoom_"
NATIVE = (
    "CLIPTextEncode",
    "ConditioningZeroOut",
    "DualCLIPLoader",
    "EmptySD3LatentImage",
    "FluxGuidance",
    "ImageScaleBy",
    "ImageStitch",
    "KSampler",
    "LoraModelLoader",
    "ModelSamplingFlux",
    "PreviewAny",
    "PreviewImage",
    "SaveImage",
    "UNETLoader",
    "VAEDecode",
    "VAELoader",
)
# What these offer differs from machine to machine; only the entries named here are recorded.
_FILES: dict[tuple[str, str], tuple[str, ...]] = {
    ("DualCLIPLoader", "clip_name1"): (),
    ("DualCLIPLoader", "clip_name2"): (),
    ("LoraLoom_ConfigFromToml", "file"): ("none",),
    ("LoraLoom_DatasetFromFolder", "control_folder"): ("none",),
    ("LoraLoom_DatasetFromFolder", "folder"): (),
    ("LoraLoom_DatasetFromFolder", "mask_folder"): ("none",),
    ("LoraLoom_DatasetFromFolder", "regularization_folder"): ("none",),
    ("LoraLoom_Logging", "tracker_config"): ("none",),
    ("LoraLoom_TrainingModel", "dit"): (),
    ("LoraLoom_Validation", "validation_folder"): ("none",),
    ("UNETLoader", "unet_name"): (),
    ("VAELoader", "vae_name"): (),
}


def load() -> dict[str, Any]:
    """The recording, in the form of ``/object_info``."""
    return json.loads(FILE.read_text("utf-8"))


def fetch(address: str) -> dict[str, Any]:
    """All that the ComfyUI at ``address`` says of its nodes."""
    with urllib.request.urlopen(f"{address.rstrip('/')}/object_info", timeout=60) as answer:
        return json.load(answer)


def reduced(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Only our nodes and those that the workflows use, without the files of this machine.

    Raises:
        ValueError: nodes are missing.
    """
    names = sorted([*NATIVE, *(name for name in object_info if name.startswith(OUR_PREFIX))])
    if missing := [name for name in names if name not in object_info]:
        raise ValueError(f"this ComfyUI has no {', '.join(missing)}")
    if names == sorted(NATIVE):
        raise ValueError("this ComfyUI has not loaded LoRA Loom")
    kept = {name: copy.deepcopy(object_info[name]) for name in names}
    for (node, name), entries in _FILES.items():
        if node in kept:
            _replace_choices(kept[node], name, list(entries))
    return kept


def save(object_info: Mapping[str, Any]) -> None:
    """Replace the recording."""
    FILE.write_text(json.dumps(reduced(object_info), indent=1, sort_keys=False) + "\n", "utf-8")


def _replace_choices(info: dict[str, Any], name: str, choices: list[str]) -> None:
    for inputs in info["input"].values():
        if name in inputs:
            spec = inputs[name]
            if isinstance(spec[0], list):
                spec[0] = choices
            else:
                spec[1]["options"] = choices
                spec[1].pop("default", None)
