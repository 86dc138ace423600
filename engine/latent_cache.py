"""The cache: one safetensors file of latents and one of text embeddings per image.

Keys: "latents" [C, T, H, W], perhaps "mask" [1, T, H, W] in [0, 1], and "control_latents_0"...
[C, 1, h, w] in the first; in the second what the family's text encoders give ("text_embeds" [L, D],
"pooled" [D]). A second text of an image has a file of its own. The metadata holds a fingerprint of
everything the content depends on, so a file is either current or made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .errors import CheckpointError, DataError
from .weights import open_checkpoint, save_tensors

FORMAT = "1"


def cache_paths(cache: Path, image: Path, architecture: str) -> tuple[Path, Path]:
    """Files for the latents and the text of an image.

    The name holds a hash of the whole file name, so ``cat.png`` and ``cat.jpg`` never share one.
    """
    short = hashlib.sha256(image.name.encode()).hexdigest()[:8]
    stem = f"{image.stem}-{short}_{architecture}"
    return cache / f"{stem}.safetensors", cache / f"{stem}_text.safetensors"


def class_text_path(text: Path) -> Path:
    """The file for an image's second text, beside that for its first."""
    return text.with_name(f"{text.stem.removesuffix('_text')}_class_text.safetensors")


def file_digest(path: Path) -> str:
    """Identity of a file's content."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def facts_digest(facts: Mapping[str, object]) -> str:
    """One fingerprint of everything that decides a cache file's content."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_facts(path: Path) -> dict[str, object] | None:
    """What a cache file was made from; None if it is missing, damaged or of another format."""
    if not path.exists():
        return None
    try:
        facts = json.loads(open_checkpoint(path).metadata["lora_loom_cache"])
    except (CheckpointError, KeyError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.get("format") == FORMAT else None


def write_cache(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write a cache file that is either whole or absent.

    Raises:
        DataError: an encoded value is NaN or infinite.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DataError(
                f"{facts.get('image', path.name)}: the encoder gave NaN or infinite {name}; check "
                "the image, or set vae_dtype / text_encoder_dtype to fp32"
            )
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
    cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    save_tensors(path, cpu, {"lora_loom_cache": text})
