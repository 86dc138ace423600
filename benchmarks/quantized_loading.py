"""Loading a model in 8 bits: time, CPU time and memory, each way in a process of its own.

A FLUX of random bfloat16 weights, by default 620 MB in a file that the system has in memory.
"plain" is how a widely used trainer does it: one tensor after the other, each step of the rounding
with a result of its own. "bfloat16" is our loader without rounding, "cached" our second start.
Run from the repository root: ``python -m benchmarks.quantized_loading``. GB are those of the
bfloat16 file; memory is what the process grew by at its peak, beyond what was kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quantize import plain_quantize
from engine import hardware
from engine.architectures.flux_kontext import FluxKontext
from engine.events import silent
from engine.quantized_cache import cached_model
from engine.quantized_loading import QuantizationSettings, quantized_source
from engine.quantized_stream import stored_tensors
from engine.tensor_stream import TensorPlan, tensor_stream
from engine.weights import open_checkpoint

ARCHITECTURE = FluxKontext()
BF16 = torch.bfloat16
SETTINGS = {
    "compat": QuantizationSettings(compat=True),
    "e4m3": QuantizationSettings(),
    "e4m3 tensor": QuantizationSettings(mode="tensor"),
    "e4m3 search": QuantizationSettings(search=True),
    "int8": QuantizationSettings(format="int8"),
}
Loaded = nn.Module | dict[str, Tensor]


def write_model(path: Path, hidden: int, depth: int, single: int) -> None:
    """Normal weights under the published names, not all of the same size."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            num_layers=depth, num_single_layers=single, num_attention_heads=hidden // 128
        )
        state = ARCHITECTURE.published_state_dict(transformer)
    plan = {name: TensorPlan(BF16, tuple(tensor.shape)) for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(0)
    with tensor_stream(path, plan, {}) as write:
        for name, (_, shape) in plan.items():
            weight = torch.randn(shape, generator=generator) * 0.02
            write(name, weight.to(BF16))


def plain(path: Path) -> dict[str, Tensor]:
    """All tensors in turn."""
    checkpoint = open_checkpoint(path)
    chosen = set(quantized_source(checkpoint, ARCHITECTURE.layer_names, SETTINGS["e4m3"]).eight_bit)
    result: dict[str, Tensor] = {}
    for key in checkpoint.entries:
        tensor = checkpoint.read(key)
        if key in chosen:
            codes, scale = plain_quantize(tensor)
            result |= {key: codes, f"{key.removesuffix('.weight')}.scale_weight": scale}
        else:
            result[key] = tensor
    return result


def stream(path: Path, settings: QuantizationSettings) -> dict[str, Tensor]:
    """What our loader puts into the model, under the names of the file."""
    source = quantized_source(open_checkpoint(path), ARCHITECTURE.layer_names, settings)
    result: dict[str, Tensor] = {}
    for key, value, _ in stored_tensors(source, source.tensors(), dtype=BF16):
        if isinstance(value, Tensor):
            result[key] = value
        else:
            name = f"{key.removesuffix('.weight')}.scale_weight"
            result |= {key: value.codes, name: value.scale}
    return result


def model(path: Path, settings: QuantizationSettings | None) -> nn.Module:
    """The transformer itself."""
    return ARCHITECTURE.load_transformer(path, dtype=BF16, quantization=settings)


def ways(path: Path, cache: Path) -> dict[str, Callable[[], Loaded]]:
    """Everything that is compared."""
    found: dict[str, Callable[[], Loaded]] = {
        "plain": lambda: plain(path),
        "bfloat16": lambda: model(path, None),
        "compat, tensors only": lambda: stream(path, SETTINGS["compat"]),
    }
    for name, settings in SETTINGS.items():
        found[name] = lambda settings=settings: model(path, settings)
    names = ARCHITECTURE.layer_names
    found["cached"] = lambda: model(
        cached_model(path, cache, names, SETTINGS["e4m3"], report=silent), None
    )
    return found


def measure(way: str, path: Path, tiny: Path, cache: Path, threads: int) -> None:
    """Run one way in this process and print what it took."""
    torch.set_num_threads(threads)
    if way != "plain":  # as all our jobs do; for the other, new memory would be dearer
        hardware.give_freed_memory_back()
    ways(tiny, cache)[way]()  # loads the libraries
    before = resource.getrusage(resource.RUSAGE_SELF)
    resident = hardware.resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    loaded = ways(path, cache)[way]()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    state = loaded.state_dict() if isinstance(loaded, nn.Module) else loaded
    digest = hashlib.sha256()
    if not isinstance(loaded, nn.Module):
        for name in sorted(state):
            digest.update(state[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    facts = {
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "user": after.ru_utime - before.ru_utime,
        "peak_mib": hardware.peak_memory_mib(torch.device("cpu")) - resident / 2**20,
        "result_mib": sum(tensor.nbytes for tensor in state.values()) / 2**20,
        "digest": digest.hexdigest()[:12],
    }
    sys.stdout.write(json.dumps(facts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--size", type=int, nargs=3, default=(1536, 2, 4))
    parser.add_argument("--measure", nargs=4, metavar=("WAY", "MODEL", "TINY", "CACHE"))
    arguments = parser.parse_args()
    if arguments.measure:
        way, *paths = arguments.measure
        measure(way, *(Path(path) for path in paths), arguments.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, tiny, cache = folder / "model.safetensors", folder / "tiny.safetensors", folder / "c"
        write_model(path, *arguments.size)
        write_model(tiny, 128, 1, 1)
        cached_model(path, cache, ARCHITECTURE.layer_names, SETTINGS["e4m3"], report=silent)
        size = path.stat().st_size / 1e9
        sys.stdout.write(f"{size:.3f} GB, {arguments.threads} threads\n")
        found: dict[str, list[dict]] = {way: [] for way in ways(path, cache)}
        for _ in range(arguments.rounds):
            for way, results in found.items():
                command = [sys.executable, "-m", "benchmarks.quantized_loading"]
                command += ["--threads", str(arguments.threads)]
                command += ["--measure", way, str(path), str(tiny), str(cache)]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append(json.loads(run.stdout.splitlines()[-1]))
        show(found, size)


def show(found: dict[str, list[dict]], size: float) -> None:
    """One line per way: medians, and ratios of the same round."""
    for way, results in found.items():

        def median(field: str, results: list[dict] = results) -> float:
            return statistics.median(result[field] for result in results)

        def ratio(base: str, field: str, results: list[dict] = results) -> float:
            pairs = zip(found[base], results, strict=True)
            return statistics.median(other[field] / own[field] for other, own in pairs)

        sys.stdout.write(
            f"{way:22s} {size / median('seconds'):5.2f} GB/s  CPU {median('cpu') / size:5.2f} s/GB "
            f"(user {median('user') / size:5.2f})  plain / this: {ratio('plain', 'seconds'):5.2f}, "
            f"CPU {ratio('plain', 'cpu'):5.2f}, user {ratio('plain', 'user'):5.2f}  "
            f"this / bfloat16: {1 / ratio('bfloat16', 'seconds'):5.2f}  "
            f"memory: {median('result_mib'):5.0f} MiB kept, "
            f"{median('peak_mib') - median('result_mib'):4.0f} more  {results[0]['digest']}\n"
        )


if __name__ == "__main__":
    main()
