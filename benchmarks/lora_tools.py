"""Time and memory of combining, resizing and extracting LoRAs of a model's size.

The layers are the 228 of FLUX.1 that a training takes, at a part of their width. Extraction is
from two checkpoints that hold only those. Each tool runs in a process of its own, so that the
largest resident size is its own. Run from the repository root: ``python -m benchmarks.lora_tools``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from engine import hardware
from engine.adapter_weights import AdapterWeights, LoRAWeights
from engine.architectures.names import LAYER_NAMES
from engine.jobs import lora_combine, lora_extract, lora_resize
from engine.jobs.tool_result import ToolResult
from engine.lora_file import write_lora
from engine.low_rank import RankChoice
from engine.weights import save_tensors

_HIDDEN = 3072
_NAMES = LAYER_NAMES["flux_kontext"]
_METADATA = {"ss_base_model_version": "flux_kontext"}
# Out and in features of a layer, in hidden sizes.
_DOUBLE = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4)}
_SINGLE = {"linear1": (7, 1), "linear2": (1, 5)}
TOOLS = ("combine", "combine to rank", "resize", "extract", "extract by energy")


def shapes(width: float) -> dict[str, tuple[int, int]]:
    """Every layer at a part of the width."""
    hidden = int(_HIDDEN * width)
    found = {
        f"double_blocks.{block}.{stream}_{layer}": (out * hidden, into * hidden)
        for block in range(19)
        for stream in ("img", "txt")
        for layer, (out, into) in _DOUBLE.items()
    }
    return found | {
        f"single_blocks.{block}.{layer}": (out * hidden, into * hidden)
        for block in range(38)
        for layer, (out, into) in _SINGLE.items()
    }


def make_files(folder: Path, *, width: float, rank: int) -> None:
    """Two LoRAs and two checkpoints in bf16; the tuned one differs by a change of low rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    for name in ("a", "b"):
        layers: dict[str, AdapterWeights] = {}
        for layer, (out, into) in shapes(width).items():
            # Singular values of trained LoRAs fall off.
            up = draw(out, rank) * torch.logspace(0, -2, rank) * out**-0.5
            layers[layer] = LoRAWeights(draw(rank, into) * into**-0.5, up, alpha=rank / 2)
        path = folder / f"{name}.safetensors"
        write_lora(path, layers, _NAMES, dtype=torch.bfloat16, metadata=_METADATA)
    base, tuned = {}, {}
    for layer, (out, into) in shapes(width).items():
        weight = (draw(out, into) * into**-0.5).bfloat16()
        change = (draw(out, 32) * torch.logspace(0, -1, 32)) @ draw(32, into)
        change *= 0.05 * weight.float().norm() / change.norm()
        base[f"{layer}.weight"] = weight
        tuned[f"{layer}.weight"] = (weight.float() + change).bfloat16()
    save_tensors(folder / "base.safetensors", base, {})
    save_tensors(folder / "tuned.safetensors", tuned, {})


def call(tool: str, folder: Path, output: Path) -> ToolResult:
    """Run one tool on what `make_files` made."""
    both = [(folder / "a.safetensors", 1.0), (folder / "b.safetensors", -0.5)]
    if tool == "resize":
        return lora_resize.run(source=both[0][0], output=output, ranks=RankChoice(amount=0.99))
    if tool.startswith("combine"):
        ranks = RankChoice(rank=32) if tool == "combine to rank" else None
        return lora_combine.run(sources=both, output=output, ranks=ranks)
    by_energy = tool == "extract by energy"
    return lora_extract.run(
        tuned=folder / "tuned.safetensors",
        base=folder / "base.safetensors",
        output=output,
        ranks=RankChoice(amount=0.9, max_rank=64) if by_energy else RankChoice(rank=32),
        settings=lora_extract.ExtractSettings(device="cpu"),
        # Half of a model could be of another family.
        architecture="flux_kontext",
    )


def run_tool(tool: str, folder: Path) -> str:
    """Run one tool here and describe what it took."""
    output = folder / f"{tool}.safetensors"
    before = hardware.resident_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    result = call(tool, folder, output)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = hardware.peak_memory_mib(torch.device("cpu")) - before / 2**20
    size_mib = output.stat().st_size / 2**20
    error = next(line for line in result.report.splitlines() if line.startswith("error in all"))
    return (
        f"{tool:18s} {seconds:6.1f} s, {cpu:5.1f} s of CPU, {peak:5.0f} MiB, "
        f"file {size_mib:6.1f} MiB, {error}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=0.25, help="part of FLUX.1's width")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRAs")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--tool", choices=TOOLS, help="only this one, on the files in --folder")
    parser.add_argument("--folder", type=Path, help="that holds the files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.tool:
        hardware.give_freed_memory_back()
        sys.stdout.write(run_tool(arguments.tool, arguments.folder) + "\n")
        return
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name), width=arguments.width, rank=arguments.rank)
        for tool in TOOLS:
            command = [sys.executable, "-m", "benchmarks.lora_tools", "--tool", tool]
            command += ["--folder", name, "--threads", str(arguments.threads)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
