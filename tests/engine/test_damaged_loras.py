"""Files that were cut, edited or overwritten: read as the same thing, or refused in a sentence."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import AdapterWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import EngineError
from pack.engine.lora_file import LoRAFile, read_lora, write_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from .lora_examples import adapter

FLUX = LAYER_NAMES["flux_kontext"]
LAYERS = ("double_blocks.3.img_attn.qkv", "single_blocks.2.linear1", "double_blocks.3.img_mlp.0")
SHAPES = {LAYERS[0]: (24, 12), LAYERS[1]: (56, 12), LAYERS[2]: (16, 12)}
METADATA = {"ss_base_model_version": "flux_kontext", "modelspec.title": "a"}
NUM_FILES = 900

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors, random.Random], None]


def good(kind: str, format: str, path: Path) -> dict[str, AdapterWeights]:
    generator = torch.Generator().manual_seed(0)
    given = {name: adapter(kind, SHAPES[name], generator) for name in LAYERS}
    write_lora(path, given, FLUX, format=format, dtype=torch.float32, metadata=METADATA)
    return given


def original(
    kind: str, format: str, path: Path
) -> tuple[dict[str, AdapterWeights], Tensors, bytes]:
    given = good(kind, format, path)
    return given, load_file(path), path.read_bytes()


def edited(tensors: Tensors, edits: list[Edit], draw: random.Random) -> Tensors:
    changed = dict(tensors)
    for edit in edits:
        if changed:
            edit(changed, draw)
    return changed


def any_key(tensors: Tensors, draw: random.Random) -> str:
    return draw.choice(sorted(tensors))


def renamed(tensors: Tensors, draw: random.Random) -> None:
    key = any_key(tensors, draw) or "x"
    tensors.setdefault(key, torch.ones(1))
    place = draw.randrange(len(key))
    letter = draw.choice("abX_.0/é\n ")
    tensors[key[:place] + letter + key[place + 1 :]] = tensors.pop(key)


def cut_name(tensors: Tensors, draw: random.Random) -> None:
    key = any_key(tensors, draw)
    tensors[key[: draw.randrange(len(key) + 1)]] = tensors.pop(key)


def half_missing(tensors: Tensors, draw: random.Random) -> None:
    tensors.pop(any_key(tensors, draw))


def other_shape(tensors: Tensors, draw: random.Random) -> None:
    key = any_key(tensors, draw)
    sizes = [draw.randrange(4) for _ in range(draw.randrange(5))]
    tensors[key] = torch.ones(sizes)


def transposed(tensors: Tensors, draw: random.Random) -> None:
    key = any_key(tensors, draw)
    if tensors[key].dim() > 1:
        tensors[key] = tensors[key].transpose(0, 1).contiguous()


def other_dtype(tensors: Tensors, draw: random.Random) -> None:
    key = any_key(tensors, draw)
    dtypes = (torch.int8, torch.int64, torch.bool, torch.float64, torch.float16, torch.uint8)
    tensors[key] = tensors[key].to(draw.choice((*dtypes, torch.float8_e4m3fn)))


def not_finite(tensors: Tensors, draw: random.Random) -> None:
    key = any_key(tensors, draw)
    values = tensors[key].float().flatten().clone()
    if not len(values):
        return
    values[draw.randrange(len(values))] = draw.choice((torch.nan, torch.inf, -torch.inf))
    tensors[key] = values.reshape(tensors[key].shape)


def alpha(tensors: Tensors, draw: random.Random) -> None:
    stem = any_key(tensors, draw).partition(".lora_")[0].partition(".lokr_")[0]
    values = (0.0, -1.0, 1e38, float("nan"), [1.0, 2.0], [[3.0]], [])
    tensors[f"{stem}.alpha"] = torch.tensor(draw.choice(values))


def copied(tensors: Tensors, draw: random.Random) -> None:
    key = any_key(tensors, draw)
    prefix = draw.choice(("transformer.", "model.", "lora_unet_", "base_model.model.", "x."))
    tensors[prefix + key] = tensors[key].clone()


def added(tensors: Tensors, draw: random.Random) -> None:
    stem = any_key(tensors, draw).rpartition(".")[0].rpartition(".lora")[0]
    ends = (
        "diff",
        "dora_scale",
        "lora_mid.weight",
        "hada_t1",
        "lokr_t2",
        "oft_blocks",
        "lora_B.bias",
    )
    tensors[f"{stem}.{draw.choice(ends)}"] = torch.ones([draw.randrange(1, 4)] * draw.randrange(4))


EDITS: tuple[Edit, ...] = (
    *(renamed, cut_name, half_missing, other_shape, transposed, other_dtype),
    *(not_finite, alpha, copied, added),
)


def overwritten(content: bytearray, draw: random.Random) -> None:
    """Bytes of the header or anywhere become others."""
    header = int.from_bytes(content[:8], "little")
    end = len(content) if draw.random() < 0.3 else 8 + header
    for _ in range(draw.choice((1, 1, 3, 40))):
        content[draw.randrange(end)] = draw.randrange(256)


def cut(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def header_value(content: bytearray, draw: random.Random) -> None:
    """Something in the header has another type."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    odd = draw.choice((None, 1, -1, "x", [], {}, [[]], True, 1e308, {"a": []}, [2**70, 1]))
    key = draw.choice(sorted(header))
    if draw.random() < 0.3 or not isinstance(header[key], dict):
        header[key] = odd
    else:
        header[key][draw.choice(sorted(header[key]))] = odd
    if draw.random() < 0.2 and header["__metadata__"] is not odd:
        header["__metadata__"] = {"lora_adapter_metadata": odd}
    new = json.dumps(header).encode()
    content[: 8 + length] = len(new).to_bytes(8, "little") + new


SAME_VALUES = (renamed, cut_name, copied)
SOURCES = (
    *((kind, format) for kind in ("lora", "lokr", "dora_rows") for format in ("comfyui", "kohya")),
    ("lora", "diffusers"),
)
DAMAGES = (overwritten, cut, header_value)


def check_same(read: LoRAFile, given: dict[str, AdapterWeights]) -> None:
    for name, found in read.layers.items():
        assert torch.equal(delta(found), delta(given[name]))


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_refused_in_one_sentence_or_read(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    originals = [original(kind, format, tmp_path / "good.safetensors") for kind, format in SOURCES]
    counts: Counter[str] = Counter()
    for _ in range(NUM_FILES // 6):
        given, tensors, content = draw.choice(originals)
        made = tmp_path / "a.safetensors"
        edits = [draw.choice(EDITS) for _ in range(draw.choice((1, 1, 2)))]
        if draw.random() < 0.6:
            save_file(edited(tensors, edits, draw), made, METADATA)
        else:
            edits = []
            damaged = bytearray(content)
            draw.choice(DAMAGES)(damaged, draw)
            made.write_bytes(damaged)
        shapes = SHAPES if draw.random() < 0.5 else None
        families = LAYER_NAMES.values() if draw.random() < 0.5 else [FLUX]
        try:
            read = read_lora(made, families, shapes=shapes)
        except EngineError as error:
            sentence = str(error).replace(str(tmp_path), "")
            assert "\n" not in sentence and len(sentence) < 400
            counts["refused"] += 1
            continue
        counts["read"] += 1
        assert read.layers
        if shapes and edits and all(edit in SAME_VALUES for edit in edits):
            check_same(read, given)
    assert counts["refused"] > 60 and counts["read"] > 5
