"""What some versions of diffusers' Qwen-Image transformer want besides its inputs."""

from __future__ import annotations

import inspect

from torch import nn


def text_lengths(transformer: nn.Module, batch: int, length: int) -> dict[str, list[int]]:
    """``txt_seq_lens``, which diffusers 0.36 needs and 0.42 does not take any more."""
    if "txt_seq_lens" in inspect.signature(transformer.forward).parameters:
        return {"txt_seq_lens": [length] * batch}
    return {}
