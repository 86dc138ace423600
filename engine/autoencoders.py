"""Image autoencoders from the files people have, behind one small class.

Layouts: Black Forest Labs' and Stability's ("LDM") KL autoencoders, diffusers folders and files,
and TAESD (https://github.com/madebyollin/taesd) in one file or in an encoder and a decoder file.
Widths and depths come from the shapes of the tensors.

Shapes: B batch, C latent channels, T = 1 frame, H W height and width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import file_kinds
from .errors import CheckpointError
from .weights import (
    Checkpoint,
    Source,
    load_into,
    open_checkpoint,
    pipeline_part,
    read_settings,
    save_tensors,
)

_PREFIXES = ("", "first_stage_model.", "vae.")
# Scalars that ComfyUI reads from a TAESD file; the latents need neither here.
_TAESD_EXTRAS = ("vae_scale", "vae_shift")
# CLIP's layers are called encoder.layers too, but are no convolutions.
_TINY_KEY = re.compile(r"taesd_(en|de)coder\.|(en|de)coder\.layers\.\d+\.(weight|conv\.)")

# diffusers' name of a module -> the LDM one; the index of an up block counts the other way.
_LDM_RENAMES: tuple[tuple[str, str], ...] = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_(q|k|v)\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


@dataclass(frozen=True)
class ImageAutoencoder:
    """Pixels <-> latents as the transformer expects them (zero mean, unit variance).

    ``is_tiny`` autoencoders give normalised latents themselves; of the others the latents are
    ``(mean - shift) * scale``, where ``mean`` is the middle of the posterior, so encoding has no
    random part.
    """

    module: Any  # an AutoencoderKL or AutoencoderTiny
    latent_channels: int
    downsampling: int
    scale: float
    shift: float
    is_tiny: bool

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents [B, C, 1, H / downsampling, W / downsampling] of pixels in [-1, 1].

        Raises:
            ValueError: a side is no multiple of ``downsampling``.
        """
        if any(side % self.downsampling for side in images_BCHW.shape[-2:]):
            raise ValueError(f"sides must be multiples of {self.downsampling}")
        images = self._like_module(images_BCHW)
        if self.is_tiny:
            return self.module.encoder(images)[:, :, None]
        mean = self.module.encode(images).latent_dist.mean
        return ((mean - self.shift) * self.scale)[:, :, None]

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1], float32, of latents with one frame."""
        latents = self._like_module(latents_BCTHW[:, :, 0])
        if self.is_tiny:
            images = self.module.decoder(latents)
        else:
            images = self.module.decode(latents / self.scale + self.shift).sample
        return images.float().clamp(-1, 1)

    def _like_module(self, tensor: Tensor) -> Tensor:
        parameter = next(self.module.parameters())
        return tensor.to(parameter.device, parameter.dtype)


def load_autoencoder(
    path: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    scale: float,
    shift: float,
) -> ImageAutoencoder:
    """Stream an autoencoder into a frozen module.

    Args:
        path: a file in any of the layouts above, or a folder with one (or its ``vae`` folder).
        dtype: type of the weights; None keeps the type of the file.
        scale, shift: normalisation of the family's KL latents.

    Raises:
        CheckpointError: the file is something else, or tensors are missing or left over.
    """
    path = pipeline_part(path, "vae")
    checkpoint = _open(path)
    keys = checkpoint.entries
    module: Any
    ignore: list[str] = []
    if any(_TINY_KEY.match(key) for key in keys):
        module, key_map = _tiny(checkpoint, path)
        ignore = [key for key in _TAESD_EXTRAS if key in keys]
        channels, downsampling = _tiny_facts(module)
    else:
        prefix = next((p for p in _PREFIXES if f"{p}decoder.conv_in.weight" in keys), None)
        if prefix is None:
            raise CheckpointError(
                f"{path}: this is {file_kinds.describe(keys)}, not an image autoencoder (VAE)"
            )
        module, key_map = _kl(checkpoint, path, prefix)
        ignore = [key for key in keys if not key.startswith(prefix)] if prefix else []
        channels = checkpoint.shape(f"{prefix}decoder.conv_in.weight")[1]
        downsampling = 2 ** (len(module.config["block_out_channels"]) - 1)
    load_into(module, checkpoint, key_map, dtype=dtype, device=device, ignore=ignore)
    module = module.requires_grad_(False).eval()
    is_tiny = type(module).__name__ == "AutoencoderTiny"
    return ImageAutoencoder(module, channels, downsampling, scale, shift, is_tiny)


def save_taesd(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    """Write a diffusers ``AutoencoderTiny`` as one TAESD file in float16.

    ComfyUI's VAE loader reads this layout, and applies and takes back the scale and shift that
    are stored with it (FLUX's).
    """
    tensors = {
        _taesd_key(name): tensor.to(torch.float16) for name, tensor in module.state_dict().items()
    }
    tensors["vae_scale"] = torch.tensor(0.3611)
    tensors["vae_shift"] = torch.tensor(0.1159)
    save_tensors(path, tensors, metadata)


def _open(path: Path) -> Checkpoint:
    """The checkpoint; an encoder and a decoder file side by side count as one."""
    checkpoint = open_checkpoint(path)
    if not any(re.fullmatch(r"\d+\.conv\.0\.weight", key) for key in checkpoint.entries):
        return checkpoint
    halves = {
        part: path.with_name(re.sub(r"(en|de)coder(?=\.safetensors$)", part, path.name))
        for part in ("encoder", "decoder")
    }
    if len(set(halves.values())) == 1 or not all(file.exists() for file in halves.values()):
        raise CheckpointError(
            f"{path}: this is half of a TAESD autoencoder; put the other file, "
            "..._encoder.safetensors or ..._decoder.safetensors, beside it"
        )
    entries = {
        f"taesd_{part}.{key}": entry
        for part, file in halves.items()
        for key, entry in open_checkpoint(file).entries.items()
    }
    return Checkpoint(tuple(halves.values()), entries, checkpoint.metadata)


def _tiny(checkpoint: Checkpoint, path: Path) -> tuple[nn.Module, dict[str, Source]]:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderTiny

    is_taesd = any(key.startswith("taesd_encoder.") for key in checkpoint.entries)
    prefixes = (
        ("taesd_encoder.", "taesd_decoder.") if is_taesd else ("encoder.layers.", "decoder.layers.")
    )
    try:
        encoder, decoder = (_block_runs(checkpoint, prefix) for prefix in prefixes)
        first = checkpoint.shape(f"{prefixes[0]}0.weight")[0]
        latent = checkpoint.shape(f"{prefixes[1]}{1 if is_taesd else 0}.weight")[1]
    except (KeyError, IndexError):
        raise CheckpointError(f"{path}: the tiny autoencoder is not whole; get it again") from None
    with init_empty_weights():
        module = AutoencoderTiny(
            encoder_block_out_channels=(first,) * len(encoder),
            decoder_block_out_channels=(first,) * len(decoder),
            num_encoder_blocks=encoder,
            num_decoder_blocks=decoder,
            latent_channels=latent,
            scaling_factor=1.0,
        )
    names = {name: _taesd_key(name) for name in module.state_dict()} if is_taesd else {}
    return module, dict(names)


def _taesd_key(name: str) -> str:
    """diffusers leaves out the decoder's first, parameterless layer, so indices differ by one."""
    part, _, index, rest = name.split(".", 3)
    return f"taesd_{part}.{int(index) + (part == 'decoder')}.{rest}"


def _block_runs(checkpoint: Checkpoint, prefix: str) -> tuple[int, ...]:
    """How many residual blocks follow each plain convolution but the last."""
    names = [key[len(prefix) :] for key in checkpoint.entries if key.startswith(prefix)]
    blocks = {int(name.split(".")[0]) for name in names if ".conv." in name}
    convolutions = sorted({int(name.split(".")[0]) for name in names} - blocks)
    return tuple(
        sum(here < block < following for block in blocks)
        for here, following in zip(convolutions[:-1], convolutions[1:], strict=True)
    )


def _tiny_facts(module: Any) -> tuple[int, int]:
    config = module.config
    return config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)


def _kl(checkpoint: Checkpoint, path: Path, prefix: str) -> tuple[nn.Module, dict[str, Source]]:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL

    keys = checkpoint.entries
    is_ldm = f"{prefix}encoder.down.0.block.0.conv1.weight" in keys
    level, block = ("down", "block") if is_ldm else ("down_blocks", "resnets")
    widths: list[int] = []
    while (key := f"{prefix}encoder.{level}.{len(widths)}.{block}.0.conv1.weight") in keys:
        widths.append(checkpoint.shape(key)[0])
    layers = 0
    while f"{prefix}encoder.{level}.0.{block}.{layers}.conv1.weight" in keys:
        layers += 1
    if not widths:
        raise CheckpointError(
            f"{path}: this is {file_kinds.describe(keys)}, not an image autoencoder (VAE)"
        )
    config = {
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": layers,
        "latent_channels": checkpoint.shape(f"{prefix}decoder.conv_in.weight")[1],
        "norm_num_groups": _norm_groups(path),
        "use_quant_conv": f"{prefix}quant_conv.weight" in keys,
        "use_post_quant_conv": f"{prefix}post_quant_conv.weight" in keys,
    }
    with init_empty_weights():
        module = AutoencoderKL(**config)
    key_map: dict[str, Source] = {}
    for name, tensor in module.state_dict().items():
        source = prefix + (_ldm_key(name, widths) if is_ldm else name)
        is_linear = ".attentions." in name and tensor.ndim == 2
        key_map[name] = (source, _as_linear) if is_linear else source
    return module, key_map


def _norm_groups(path: Path) -> int:
    """32 in every published model; a diffusers folder may say otherwise."""
    config = path / "config.json"
    return read_settings(config).get("norm_num_groups", 32) if config.exists() else 32


def _ldm_key(name: str, widths: Sequence[int]) -> str:
    key = re.sub(
        r"\.up_blocks\.(\d+)\.",
        lambda match: f".up_blocks.{len(widths) - 1 - int(match[1])}.",
        name,
    )
    for pattern, replacement in _LDM_RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _as_linear(weight: Tensor) -> Tensor:
    """Attention projections are stored as 1x1 convolutions in LDM files."""
    return weight.flatten(1)
