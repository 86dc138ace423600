"""FLUX.1 Kontext (and FLUX.1 dev, which has the same layout): text and control images to image.

The transformer is diffusers' ``FluxTransformer2DModel``. Published names are those of Black
Forest Labs' checkpoints, https://github.com/black-forest-labs/flux. Kontext is described in
arXiv:2506.15742.

Shapes: B batch, C latent channels, T = 1 frame, H W latent height and width, N image tokens of
2x2 latents, L text tokens, D text width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import file_kinds, flow
from ..autoencoders import ImageAutoencoder, load_autoencoder
from ..errors import CheckpointError
from ..key_table import key_map, published_state_dict
from ..layer_names import LayerNames
from ..quantization_report import summary
from ..quantized_loading import (
    Adapters,
    QuantizationSettings,
    QuantizedSource,
    quantized_source,
    remarks,
)
from ..quantized_model import load_quantized, put_empty_layers
from ..text_encoders import ClipTextEncoder, T5TextEncoder, load_clip, load_t5
from ..weights import Checkpoint, Source, open_checkpoint, pipeline_part, read_settings
from .base import Conditions
from .flux_names import NAMES, TABLE

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
_PROBE = "double_blocks.0.img_attn.qkv.weight"
_DIFFUSERS_PROBE = "transformer_blocks.0.attn.to_q.weight"
# Of ae.safetensors, as in Black Forest Labs' code.
_LATENT_SCALE, _LATENT_SHIFT = 0.3611, 0.1159
# Parts of names in transformers that are built from the same blocks.
_RELATIVES = (
    "individual_token_refiner",  # HunyuanVideo
    "distilled_guidance_layer",  # Chroma
    "double_stream_modulation",  # FLUX.2
    "pos_embed.proj",  # SD3
    "controlnet_",
)


class FluxTextEncoders(NamedTuple):
    """T5-XXL gives the text tokens, CLIP-L the pooled vector."""

    t5: T5TextEncoder
    clip: ClipTextEncoder


@dataclass(frozen=True)
class FluxKontext:
    """The adapter; see `base.Architecture` for what each member promises."""

    name: str = "flux_kontext"
    modelspec_architecture: str = "Flux.1-dev"
    layer_names: LayerNames = NAMES
    default_timestep_sampling: str = "flux_shift"
    latent_channels: int = 16
    pixel_multiple: int = 16
    pixels_per_latent: int = 8

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.entries.keys()
        published = any(prefix + _PROBE in keys for prefix in _PREFIXES)
        diffusers = _DIFFUSERS_PROBE in keys and "context_embedder.weight" in keys
        relative = any(part in key for key in keys for part in _RELATIVES)
        return (published or diffusers) and not relative

    def empty_transformer(
        self, path: Path, *, quantization: QuantizationSettings | None = None
    ) -> nn.Module:
        """See `base.Architecture`."""
        transformer, source, names, ignore = self._prepare(path, quantization, ())
        put_empty_layers(transformer, source, names, ignore=ignore)
        return transformer.requires_grad_(False).eval()

    def load_transformer(
        self,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        quantization: QuantizationSettings | None = None,
        loras: Sequence[Adapters] = (),
        told: Callable[[str], None] | None = None,
    ) -> nn.Module:
        """Load a published single file, split set or diffusers folder of any width and depth.

        Raises:
            CheckpointError: the file is something else, or tensors are missing or left over.
        """
        transformer, source, names, ignore = self._prepare(path, quantization, loras)
        layers = load_quantized(
            transformer, source, names, dtype=dtype, device=device, ignore=ignore
        )
        if told is not None:
            for remark in remarks(source):
                told(remark)
            if any(not layer.way.taken for layer in layers):
                told(summary(layers))
        return transformer.requires_grad_(False).eval()

    def _prepare(
        self, path: Path, quantization: QuantizationSettings | None, loras: Sequence[Adapters]
    ) -> tuple[nn.Module, QuantizedSource, dict[str, Source], list[str]]:
        """The model without memory, what its file holds, and where in it the weights are.

        The last are the names that belong to something else.
        """
        from accelerate import init_empty_weights
        from diffusers import FluxTransformer2DModel

        path = pipeline_part(path, "transformer")
        checkpoint = open_checkpoint(path)
        if not self.recognises(checkpoint):
            raise CheckpointError(
                f"{path}: this is {file_kinds.describe(checkpoint.keys())}, "
                "not a FLUX.1 transformer"
            )
        published = _DIFFUSERS_PROBE not in checkpoint.entries
        checkpoint = _norms_as_published(checkpoint) if published else checkpoint
        prefix = _find_prefix(checkpoint) if published else ""
        source = quantized_source(checkpoint, self.layer_names, quantization, loras)
        headers = source.headers()
        with init_empty_weights():
            transformer = FluxTransformer2DModel(**_config(headers, prefix, published, path))
        names = key_map(TABLE, transformer, prefix=prefix) if published else {}
        # A full checkpoint also holds the VAE and text encoders under prefixes of their own.
        ignore = [key for key in headers.entries if not key.startswith(prefix)]
        return transformer, source, names, ignore

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The double blocks, then the single ones."""
        lists = ("transformer_blocks", "single_transformer_blocks")
        return [block for name in lists for block in transformer.get_submodule(name).children()]

    def published_state_dict(self, transformer: nn.Module) -> dict[str, Tensor]:
        """The weights under Black Forest Labs' names."""
        return published_state_dict(TABLE, transformer)

    def predict_velocity(
        self, transformer: nn.Module, noisy_BCTHW: Tensor, t_B: Tensor, conditions: Conditions
    ) -> Tensor:
        """See `base.Architecture`; conditions: "text_embeds" [B, L, D], "pooled" [B, P],
        "guidance" [B] (if the model has a guidance embedding) and any number of control images
        "control_latents_0", "control_latents_1"... [B, C, 1, h, w].
        """
        height, width = noisy_BCTHW.shape[-2:]
        tokens, ids = _image_tokens(noisy_BCTHW, index=0, top=0, left=0)
        num_tokens = tokens.shape[1]
        for control, control_ids in _control_tokens(conditions):
            tokens = torch.cat([tokens, control], dim=1)
            ids = torch.cat([ids, control_ids])
        text_BLD = conditions["text_embeds"]
        dtype = next(transformer.parameters()).dtype
        guidance_B = conditions["guidance"] if _has_guidance(transformer) else None
        with _exact_time(transformer, dtype, t_B, guidance_B):
            output_BND = transformer(
                hidden_states=tokens.to(dtype),
                timestep=t_B,
                guidance=guidance_B,
                pooled_projections=conditions["pooled"].to(dtype),
                encoder_hidden_states=text_BLD.to(dtype),
                txt_ids=torch.zeros(text_BLD.shape[1], 3, device=tokens.device),
                img_ids=ids,
                return_dict=False,
            )[0]
        return rearrange(
            output_BND[:, :num_tokens],
            "b (h w) (c p q) -> b c 1 (h p) (w q)",
            h=height // 2,
            w=width // 2,
            p=2,
            q=2,
        )

    def timestep_shift(self, latent_height: int, latent_width: int) -> float:
        """``exp(mu)``, mu linear through (256 tokens, 0.5) and (4096 tokens, 1.15)."""
        num_tokens = (latent_height // 2) * (latent_width // 2)
        return flow.flux_shift(num_tokens)

    def condition_shapes(
        self, transformer: nn.Module, text_length: int
    ) -> dict[str, tuple[int, ...]]:
        """T5's tokens and CLIP's vector."""
        layers = ("context_embedder", "time_text_embed.text_embedder.linear_1")
        text, pooled = (transformer.get_parameter(f"{name}.weight").shape[1] for name in layers)
        return {"text_embeds": (text_length, text), "pooled": (pooled,)}

    def load_autoencoder(
        self, path: Path, *, dtype: torch.dtype | None, device: torch.device | str = "cpu"
    ) -> ImageAutoencoder:
        """FLUX's autoencoder; its latents are given as by `normalize_latents`."""
        autoencoder = load_autoencoder(
            path, dtype=dtype, device=device, scale=_LATENT_SCALE, shift=_LATENT_SHIFT
        )
        if autoencoder.latent_channels != self.latent_channels:
            raise CheckpointError(
                f"{path}: the latents of this autoencoder have {autoencoder.latent_channels} "
                f"channels, those of FLUX.1 {self.latent_channels}; use ae.safetensors or TAEF1"
            )
        return autoencoder

    def normalize_latents(self, raw_BCTHW: Tensor) -> Tensor:
        return (raw_BCTHW - _LATENT_SHIFT) * _LATENT_SCALE

    def raw_latents(self, latents_BCTHW: Tensor) -> Tensor:
        return latents_BCTHW / _LATENT_SCALE + _LATENT_SHIFT

    def load_text_encoders(
        self,
        text_encoder1: Path,
        text_encoder2: Path,
        tokenizer1: Path | None,
        tokenizer2: Path | None,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str = "cpu",
    ) -> FluxTextEncoders:
        return FluxTextEncoders(
            load_t5(text_encoder1, tokenizer1, dtype=dtype, device=device),
            load_clip(text_encoder2, tokenizer2, dtype=dtype, device=device),
        )

    def encode_text(
        self, encoders: FluxTextEncoders, captions: list[str], max_length: int
    ) -> list[dict[str, Tensor]]:
        embeds_BLD = encoders.t5.encode(captions, max_length)
        pooled_BD = encoders.clip.encode(captions)
        return [
            {"text_embeds": text, "pooled": pooled}
            for text, pooled in zip(embeds_BLD, pooled_BD, strict=True)
        ]


def _find_prefix(checkpoint: Checkpoint) -> str:
    return next(prefix for prefix in _PREFIXES if prefix + _PROBE in checkpoint.entries)


def _norms_as_published(checkpoint: Checkpoint) -> Checkpoint:
    """ComfyUI's nodes that save models call the scale of a norm "weight" (seen in 0.33)."""
    entries = {
        re.sub(r"\.(query|key)_norm\.weight$", r".\1_norm.scale", key): entry
        for key, entry in checkpoint.entries.items()
    }
    return replace(checkpoint, entries=entries)


def _config(checkpoint: Checkpoint, prefix: str, published: bool, path: Path) -> dict:
    """Constructor arguments of the transformer, from the shapes of its tensors."""

    def shape(published_name: str, inner_name: str) -> tuple[int, ...]:
        name = prefix + published_name if published else inner_name
        if name not in checkpoint.entries:
            raise CheckpointError(
                f"{path}: {name} is missing; the file is not a whole FLUX.1 model"
            )
        return checkpoint.shape(name)

    double, single, guidance = (
        ("double_blocks", "single_blocks", "guidance_in.in_layer.weight")
        if published
        else (
            "transformer_blocks",
            "single_transformer_blocks",
            "time_text_embed.guidance_embedder.linear_1.weight",
        )
    )
    hidden, in_channels = shape("img_in.weight", "x_embedder.weight")
    out_channels = shape("final_layer.linear.weight", "proj_out.weight")[0]
    if in_channels != out_channels:
        raise CheckpointError(
            f"{path}: this FLUX.1 variant takes {in_channels} channels (Fill, Canny, Depth...); "
            f"use Kontext or dev, which take {out_channels}"
        )
    head_dim = shape(
        "double_blocks.0.img_attn.norm.query_norm.scale", "transformer_blocks.0.attn.norm_q.weight"
    )[0]
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "num_layers": _count_blocks(checkpoint, prefix + double),
        "num_single_layers": _count_blocks(checkpoint, prefix + single),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": shape("txt_in.weight", "context_embedder.weight")[1],
        "pooled_projection_dim": shape(
            "vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight"
        )[1],
        "guidance_embeds": prefix + guidance in checkpoint.entries,
        "axes_dims_rope": _axes(path, head_dim, published),
    }


def _axes(path: Path, head_dim: int, published: bool) -> tuple[int, ...]:
    """How much of a head encodes image index, row and column; no tensor's shape tells."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not published and file.exists():
        axes = read_settings(file).get("axes_dims_rope", ())
        if sum(axes) == head_dim:
            return tuple(axes)
    if head_dim % 32:
        raise CheckpointError(
            f"{path}: heads are {head_dim} wide, not 128 as in FLUX.1; put the config.json that "
            "says axes_dims_rope beside the file"
        )
    # Published as (16, 56, 56) for heads of 128, the only width there is.
    return head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16


def _count_blocks(checkpoint: Checkpoint, prefix: str) -> int:
    start = len(prefix) + 1
    return len(
        {key[start:].split(".")[0] for key in checkpoint.entries if key.startswith(f"{prefix}.")}
    )


def _image_tokens(
    latents_BCTHW: Tensor, *, index: int, top: int, left: int
) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, 4C] of 2x2 latents and their positions [N, 3] (image index, row, column)."""
    tokens = rearrange(latents_BCTHW, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    rows, columns = latents_BCTHW.shape[-2] // 2, latents_BCTHW.shape[-1] // 2
    ids = torch.zeros(rows, columns, 3, device=tokens.device)
    ids[..., 0] = index
    ids[..., 1] = torch.arange(top, top + rows, device=tokens.device)[:, None]
    ids[..., 2] = torch.arange(left, left + columns, device=tokens.device)[None, :]
    return tokens, ids.flatten(0, 1)


def _control_tokens(conditions: Conditions) -> Iterator[tuple[Tensor, Tensor]]:
    """Each control image with positions of its own, laid out as ComfyUI does by default.

    All have image index 1; the next one is placed to the right of or below those before it,
    whichever keeps the whole smaller.
    """
    height = width = index = 0
    while (latents := conditions.get(f"control_latents_{index}")) is not None:
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        top, left = (0, width) if rows + height > columns + width else (height, 0)
        yield _image_tokens(latents, index=1, top=top, left=left)
        height, width = max(height, top + rows), max(width, left + columns)
        index += 1


def _has_guidance(transformer: nn.Module) -> bool:
    return hasattr(transformer.get_submodule("time_text_embed"), "guidance_embedder")


@contextmanager
def _exact_time(
    transformer: nn.Module, dtype: torch.dtype, t_B: Tensor, guidance_B: Tensor | None
) -> Iterator[None]:
    """Give the time embedding ``t`` and guidance in float32.

    diffusers 0.42 rounds both to the model's type first; in bfloat16 that moves ``t`` by up to
    0.002, which ComfyUI and the published code do not do.
    """
    if dtype == torch.float32:
        yield
        return
    exact = [1000 * value.float() for value in (t_B, guidance_B) if value is not None]
    embedding = transformer.get_submodule("time_text_embed")
    hook = embedding.register_forward_pre_hook(lambda module, args: (*exact, args[-1]))
    try:
        yield
    finally:
        hook.remove()
