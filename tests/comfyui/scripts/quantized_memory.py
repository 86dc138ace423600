"""Loads a model in 8 bits inside ComfyUI and measures what that takes at most.

usage: quantized_memory.py COMFYUI_DIR PACK MODEL REPORT
REPORT is a JSON file: bytes of the process before and at most, and of the model that came of it.
Linux only.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from pathlib import Path

import headless

comfyui, pack, model, report_path = sys.argv[1:]
headless.prepare(comfyui)

import comfy.sd  # noqa: E402, F401
import server  # noqa: E402, F401
import torch  # noqa: E402

import nodes  # noqa: E402

assert asyncio.run(nodes.load_custom_node(pack, module_parent="custom_nodes"))
ours = nodes.NODE_CLASS_MAPPINGS["LoraLoom_LoadQuantizedModel"].__module__.rpartition(".")[0]
eight_bit = importlib.import_module(f"{ours}.eight_bit_model")
loading = importlib.import_module(f"{ours.rpartition('.')[0]}.engine.quantized_loading")
torch.set_num_threads(1)


def status(field: str) -> int:
    """VmRSS is memory now, VmHWM the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load(path: Path) -> object:
    request = eight_bit.ModelRequest(path, loading.QuantizationSettings())
    return eight_bit.load_model(request, report=lambda event: None).patcher


with torch.inference_mode():
    # What libraries take at first is no part of a model.
    load(Path(pack) / "engine/demo/model/transformer/flux1-kontext-tiny.safetensors")
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    patcher = load(Path(model))
    seconds = time.perf_counter() - start
    numbers = {
        "before": before,
        "peak": status("VmHWM"),
        "after": status("VmRSS"),
        "model": patcher.model_size(),
        "seconds": seconds,
    }
Path(report_path).write_text(json.dumps(numbers))
