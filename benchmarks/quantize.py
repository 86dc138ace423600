"""8-bit weights: time to quantize, to restore and to use them, and their errors.

One linear layer of Wan 1.3B's size, [8960, 1536] in bfloat16. "plain" is how a widely used trainer
computes the same, each step with a result of its own: its scales in the weight's type, and a
forward pass that leaves the restored weight to autograd. Run from the repository root:
``python -m benchmarks.quantize``. Times are CPU seconds of the process, all ways in turn; ratios
are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.hardware import give_freed_memory_back
from engine.quantize import dequantize, quantize, relative_error
from engine.quantized_linear import QuantizedLinear
from engine.workspace import Workspace

OUT_FEATURES, IN_FEATURES = 8960, 1536
BLOCK = 64
Way = Callable[[], object]


def plain_quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes and scales in the type of the weight."""
    blocks_ONK = weight_OI.view(weight_OI.shape[0], -1, BLOCK)
    scale_ON1 = (blocks_ONK.abs().amax(dim=2, keepdim=True) / 448.0).clamp(min=1e-8).float()
    quotient_ONK = torch.nan_to_num(blocks_ONK.float() / scale_ON1, nan=0.0)
    codes_ONK = quotient_ONK.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes_ONK.view(weight_OI.shape), scale_ON1.to(weight_OI.dtype)


def plain_dequantize(codes_OI: Tensor, scale_ON1: Tensor) -> Tensor:
    """The weight in the type of the scale."""
    blocks_ONK = codes_OI.to(scale_ON1.dtype).view(codes_OI.shape[0], -1, BLOCK)
    return (blocks_ONK * scale_ON1).view(codes_OI.shape)


def in_turn(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def show(title: str, ways: dict[str, Way], rounds: int, *, num_weights: int, base: str) -> None:
    """One line per way: milliseconds, weights per second, and how often it fits into ``base``."""
    sys.stdout.write(f"{title}\n")
    seconds = in_turn(ways, rounds)
    for name, taken in seconds.items():
        median = statistics.median(taken)
        ratio = statistics.median(b / t for b, t in zip(seconds[base], taken, strict=True))
        sys.stdout.write(
            f"  {name:32s} {median * 1e3:8.2f} ms  {num_weights / median / 1e9:6.3f} G weights/s  "
            f"{base} / this {ratio:6.2f}\n"
        )
    sys.stdout.flush()


def errors() -> None:
    """Relative errors of normal weights."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(1024, 2048, generator=generator) * 0.02
    sys.stdout.write("relative error, normal weights in float32\n")
    for format in ("e4m3", "e5m2", "int8"):
        for mode in ("block", "channel", "tensor"):
            for search in (False, True):
                stored = quantize(weight_OI, format=format, mode=mode, search=search)
                error = relative_error(weight_OI, stored)
                searched = " search" if search else ""
                sys.stdout.write(f"  {format} {mode}{searched}: {error:.3%}\n")


def conversions(weight_OI: Tensor, rounds: int) -> None:
    """To 8 bits and back."""
    size = weight_OI.numel()
    to_8_bits: dict[str, Way] = {
        "plain": lambda: plain_quantize(weight_OI),
        "compat (the same result)": lambda: quantize(weight_OI, compat=True),
        "e4m3 block": lambda: quantize(weight_OI),
        "e4m3 channel": lambda: quantize(weight_OI, mode="channel"),
        "e4m3 tensor": lambda: quantize(weight_OI, mode="tensor"),
        "e5m2 block": lambda: quantize(weight_OI, format="e5m2"),
        "int8 block": lambda: quantize(weight_OI, format="int8"),
        "e4m3 block, search": lambda: quantize(weight_OI, search=True),
    }
    show("quantize", to_8_bits, rounds, num_weights=size, base="plain")
    codes_OI, scale_ON1 = plain_quantize(weight_OI)
    stored = {name: quantize(weight_OI, format=name) for name in ("e4m3", "e5m2", "int8")}
    halves = quantize(weight_OI, scale_dtype=torch.bfloat16)
    out_OI, workspace = torch.empty_like(weight_OI), Workspace()
    back: dict[str, Way] = {
        "plain": lambda: plain_dequantize(codes_OI, scale_ON1),
        "e4m3": lambda: dequantize(stored["e4m3"], torch.bfloat16),
        "e4m3, memory that was used": lambda: dequantize(
            stored["e4m3"], torch.bfloat16, out=out_OI, workspace=workspace
        ),
        "the same, bfloat16 scales": lambda: dequantize(
            halves, torch.bfloat16, out=out_OI, workspace=workspace
        ),
        "e5m2": lambda: dequantize(stored["e5m2"], torch.bfloat16),
        "int8": lambda: dequantize(stored["int8"], torch.bfloat16),
    }
    show("dequantize to bfloat16", back, rounds, num_weights=size, base="plain")


def saved_bytes(product: Callable[[Tensor], Tensor], x_TI: Tensor, resident: list[Tensor]) -> int:
    """What autograd keeps that is not there anyway."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x_TI, *resident)}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = product(x_TI)
    del output
    return sum(found.values())


def products(weight_OI: Tensor, rounds: int) -> None:
    """The layer alone, frozen, with and without a backward pass to its input."""
    bias_O = torch.zeros(OUT_FEATURES, dtype=weight_OI.dtype)
    codes_OI, scale_ON1 = plain_quantize(weight_OI)
    workspace = Workspace()
    e4m3 = QuantizedLinear(quantize(weight_OI), bias_O, workspace=workspace)
    int8 = QuantizedLinear(quantize(weight_OI, format="int8"), bias_O, workspace=workspace)
    halves = quantize(weight_OI, scale_dtype=torch.bfloat16)
    e4m3_halves = QuantizedLinear(halves, bias_O, workspace=workspace)
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "bfloat16": lambda x: F.linear(x, weight_OI, bias_O),
        "plain": lambda x: F.linear(x, plain_dequantize(codes_OI, scale_ON1), bias_O),
        "ours, e4m3": e4m3,
        "ours, e4m3, bfloat16 scales": e4m3_halves,
        "ours, int8": int8,
    }
    resident = [weight_OI, bias_O, codes_OI, scale_ON1, e4m3.codes, e4m3.scale]
    resident += [int8.codes, int8.scale, halves.codes, halves.scale]
    for tokens in (256, 1024):
        x_TI = torch.randn(tokens, IN_FEATURES).to(weight_OI.dtype).requires_grad_()
        grad_TO = torch.randn(tokens, OUT_FEATURES).to(weight_OI.dtype)
        for name, layer in layers.items():
            mebibytes = saved_bytes(layer, x_TI, resident) / 2**20
            sys.stdout.write(f"kept for the backward pass, {name}: {mebibytes:.1f} MiB\n")
        both = {name: _both_ways(layer, x_TI, grad_TO) for name, layer in layers.items()}
        title = f"forward and backward, {tokens} tokens"
        show(title, both, rounds, num_weights=weight_OI.numel(), base="bfloat16")
        alone = {name: _forward(layer, x_TI.detach()) for name, layer in layers.items()}
        title = f"forward, {tokens} tokens"
        show(title, alone, rounds, num_weights=weight_OI.numel(), base="bfloat16")


def _both_ways(layer: Callable[[Tensor], Tensor], x_TI: Tensor, grad_TO: Tensor) -> Way:
    return lambda: torch.autograd.grad(layer(x_TI), x_TI, grad_TO)


def _forward(layer: Callable[[Tensor], Tensor], x_TI: Tensor) -> Way:
    return lambda: layer(x_TI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--as-in-training", action="store_true", help="give freed memory back")
    given = parser.parse_args()
    if given.as_in_training:
        give_freed_memory_back()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    weight_OI = (torch.randn(OUT_FEATURES, IN_FEATURES) * 0.02).bfloat16()
    codes_OI, scale_ON1 = plain_quantize(weight_OI)
    ours = quantize(weight_OI, compat=True)
    assert torch.equal(ours.codes.view(torch.uint8), codes_OI.view(torch.uint8))
    assert torch.equal(ours.scale, scale_ON1)
    errors()
    conversions(weight_OI, given.rounds)
    products(weight_OI, given.rounds)


if __name__ == "__main__":
    main()
