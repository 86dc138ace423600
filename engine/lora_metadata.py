"""What LoRA files say about themselves in their header.

``ss_*`` are the keys of kohya's trainers, ``modelspec.*`` those of Stability AI's standard
(https://github.com/Stability-AI/ModelSpec), ``lora_adapter_metadata`` is that of diffusers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime

from torch import Tensor

DIFFUSERS_KEY = "lora_adapter_metadata"
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with the hashes by which programs recognise a file whose header was edited.

    The model hash is the SHA-256 of all that follows the header; the legacy hash, of 8 digits, is
    of 64 KiB at 1 MiB of a file with only the ``ss_*`` metadata. Both are those of kohya's
    trainers, which took them from AUTOMATIC1111's extension for additional networks.
    """
    from safetensors.torch import save

    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    owned = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    content = memoryview(save(owned, training))
    payload = content[8 + int.from_bytes(content[:8], "little") :]
    model_hash = hashlib.sha256(payload).hexdigest()
    legacy = hashlib.sha256(content[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]).hexdigest()
    hashes = {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy[:8]}
    if any(key.startswith("modelspec.") for key in metadata):
        hashes["modelspec.hash_sha256"] = f"0x{model_hash}"
    return {**without_hashes(metadata), **hashes}


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` without what only holds for the file that it was read from."""
    return {key: value for key, value in metadata.items() if key not in _HASHES}


def derived(sources: Sequence[Mapping[str, str]], *, title: str, operation: str) -> dict[str, str]:
    """The metadata of a file that was made from others.

    Of one source everything is kept that is still true. Of several only what all agree on is.

    Args:
        sources: metadata of the files, in order.
        title: of the new file.
        operation: what was done, in words.
    """
    first = sources[0] if sources else {}
    kept = {
        key: value
        for key, value in first.items()
        if key not in (*_HASHES, DIFFUSERS_KEY) and all(each.get(key) == value for each in sources)
    }
    kept["modelspec.sai_model_spec"] = first.get("modelspec.sai_model_spec", "1.0.0")
    kept["modelspec.title"] = title
    kept["modelspec.date"] = datetime.now().astimezone().isoformat(timespec="seconds")
    kept["lora_loom.operation"] = operation
    titles = [
        each.get("modelspec.title") or each.get("ss_output_name") or "unnamed" for each in sources
    ]
    if len(sources) > 1:
        kept["modelspec.merged_from"] = ", ".join(titles)
    return kept
