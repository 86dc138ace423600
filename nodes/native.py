"""ComfyUI's own VAE, text encoders and latents, as the engine needs them."""

from __future__ import annotations

import hashlib
from typing import Any

import comfy.latent_formats
import comfy.model_management
import torch
from torch import Tensor

from ..engine.architectures import ARCHITECTURES
from ..engine.architectures.base import Architecture
from ..engine.config import Config
from ..engine.errors import DataError
from ..engine.jobs.cache import Encoders, Facts
from .images import as_comfy

_SAMPLED_VALUES = 64  # of each tensor of an encoder
# ComfyUI's class of the text encoders -> our family, and the family's latents in ComfyUI.
_FAMILIES = {"FluxClipModel": "flux_kontext"}
_LATENT_FORMATS = {"flux_kontext": comfy.latent_formats.Flux}


def architecture_of(vae: Any, clip: Any) -> Architecture:
    """The family that these encoders belong to.

    Raises:
        DataError: they are of a family that we cannot train, or do not belong together.
    """
    if clip is None or vae is None:
        raise DataError(
            "the VAE or CLIP is empty; the loader that it comes from found none in its file"
        )
    classes = [kind.__name__ for kind in type(clip.cond_stage_model).__mro__]
    family = next((_FAMILIES[name] for name in classes if name in _FAMILIES), None)
    if family is None:
        raise DataError(
            f"clip: these text encoders ({classes[0].rstrip('_')}) are not of a family that can be "
            "trained; for FLUX use DualCLIPLoader with t5xxl, clip_l and type flux"
        )
    architecture = ARCHITECTURES[family]
    check_vae(vae, architecture)
    return architecture


def check_vae(vae: Any, architecture: Architecture) -> None:
    """Check that a VAE has the latents of a family.

    Raises:
        DataError: it has others.
    """
    if vae.latent_channels != architecture.latent_channels:
        raise DataError(
            f"vae: its latents have {vae.latent_channels} channels, those of {architecture.name} "
            f"{architecture.latent_channels}; use the VAE of that family"
        )


def encoders(vae: Any, clip: Any, architecture: Architecture) -> Encoders:
    """ComfyUI's encoders for the cache job."""
    # Half the size, and finer than the bfloat16 that most models read them in.
    exact = torch.float32 in clip.cond_stage_model.dtypes
    dtype = torch.float32 if exact else torch.float16

    def encode_image(pixels_1CHW: Tensor) -> Tensor:
        raw = vae.encode(as_comfy(pixels_1CHW))
        return architecture.normalize_latents(raw.float())[0][:, None]

    def encode_text(captions: list[str], max_length: int) -> list[dict[str, Tensor]]:
        return [_encode_caption(clip, caption, max_length, dtype) for caption in captions]

    latent_facts: Facts = {"vae": f"comfyui {_identity(vae.patcher)}", "vae_dtype": None}
    text_facts: Facts = {
        "text_encoder1": f"comfyui {_identity(clip.patcher)}, layer {clip.layer_idx}",
        "text_encoder2": None,
        "tokenizer1": None,
        "tokenizer2": None,
        "text_encoder_dtype": None,
    }
    return Encoders(latent_facts, text_facts, encode_image, encode_text)


def on_comfyuis_device(config: Config) -> Config:
    """The CPU if ComfyUI was started with --cpu and nothing else is asked for."""
    if config.runtime.device != "auto" or not comfy.model_management.cpu_mode():
        return config
    runtime = config.runtime.model_copy(update={"device": "cpu"})
    return config.model_copy(update={"runtime": runtime})


def decode(vae: Any, raw_latents_NCHW: Tensor) -> Tensor:
    """IMAGE [N, H, W, 3] of a VAE's latents."""
    images = vae.decode(raw_latents_NCHW)
    return images.reshape(-1, *images.shape[-3:])


def approximate(family: str, raw_latents_NCHW: Tensor) -> Tensor:
    """IMAGE in an eighth of the size, from ComfyUI's linear map of latents to colours."""
    latent_format = _LATENT_FORMATS[family]()
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0] * 3)
    latents = latent_format.process_in(raw_latents_NCHW.float()).movedim(1, -1)
    return ((latents @ factors + bias + 1) / 2).clamp(0, 1)


def _encode_caption(
    clip: Any, caption: str, max_length: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """FLUX: T5's embedding of every token and CLIP's pooled one."""
    options = {"t5xxl_min_length": max_length, "t5xxl_min_padding": 0}
    # Parentheses in a caption are parentheses, not weights.
    tokens = clip.tokenize(caption, disable_weights=True, tokenizer_options=options)
    tokens["t5xxl"] = [
        batch if len(batch) <= max_length else batch[: max_length - 1] + batch[-1:]
        for batch in tokens["t5xxl"][:1]
    ]
    embeds, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return {"text_embeds": embeds[0].to(dtype), "pooled": pooled[0].to(dtype)}


def _identity(patcher: Any) -> str:
    """Tells weights from others by a sample of each tensor; LoRAs on them count, too."""
    digest = hashlib.sha256()
    for name, tensor in sorted(patcher.model.state_dict().items()):
        row = tensor.detach().reshape(-1, tensor.shape[-1])[0] if tensor.ndim else tensor
        sample = row.reshape(-1)[:_SAMPLED_VALUES].float().cpu().numpy()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + sample.tobytes())
    if patcher.patches:
        digest.update(str(patcher.patches_uuid).encode())
    return digest.hexdigest()[:16]
