"""A complete but untrained tiny model, a few images, and settings to run the jobs on them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pack.engine import seeds
from pack.engine.autoencoders import save_taesd
from pack.engine.config import FIELDS, GROUP_OF, GROUPS, Config
from pack.engine.demo import draw, make, train_base
from pack.engine.demo.pictures import all_pictures
from pack.engine.events import silent
from pack.engine.jobs import cache
from pack.engine.jobs.network_plan import plan_network
from pack.engine.layer_names import published_layers
from pack.engine.networks.network import Network
from pack.engine.weights import open_checkpoint
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

# What tells two files of equal runs apart.
# What differs between files of the same training.
VARYING = {
    "lora_loom.recipe",
    "modelspec.date",
    "ss_session_id",
    "ss_training_started_at",
    "ss_training_finished_at",
}
CAPTIONS = ("a red star", "a blue ring on a cream background", "a small green heart")


def write_model(folder: Path) -> None:
    """All files of a model that answers to text, time, control images and adapters."""
    from diffusers import AutoencoderTiny

    base = train_base.build_model(list(all_pictures())[::16], seed=0)
    autoencoder = AutoencoderTiny(latent_channels=16)
    with torch.no_grad():
        # Untrained, all of them give almost the same for everything.
        base.transformer.get_parameter("proj_out.weight").normal_(std=0.1)
        for weight in autoencoder.parameters():
            weight.mul_(1.7 if weight.ndim == 4 else 1)
        autoencoder.get_parameter("encoder.layers.14.weight").mul_(8)
    make.save_base(folder, base)
    save_taesd(folder / draw.AUTOENCODER, autoencoder, {})


def write_image(path: Path, size: tuple[int, int], caption: str | None = None) -> Path:
    """A picture of random blocks, the same for the same name, and its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = Image.new("RGB", (4, 4))
    chance = random.Random(path.name)
    blocks.putdata([tuple(chance.randbytes(3)) for _ in range(16)])
    blocks.resize(size, Image.Resampling.BICUBIC).save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


def write_images(folder: Path, *sizes: tuple[int, int]) -> Path:
    """One captioned image of each size; gives the folder."""
    for index, size in enumerate(sizes):
        write_image(folder / f"{index}.png", size, CAPTIONS[index % len(CAPTIONS)])
    return folder


def model_settings(model: Path) -> dict[str, Any]:
    """The files of a model written by `write_model`."""
    return {
        "dit": model / draw.TRANSFORMER,
        "vae": model / draw.AUTOENCODER,
        "text_encoder1": model / draw.T5,
        "text_encoder2": model / draw.CLIP,
        "vae_dtype": "fp32",  # a CPU is ten times slower in the float16 of the file
        "device": "cpu",
        "mixed_precision": "no",
    }


def config(*parts: Mapping[str, Any], **changes: Any) -> Config:
    """Settings by their flat names; later ones win."""
    flat: dict[str, Any] = {}
    for part in (*parts, changes):
        flat |= part
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in flat.items():
        assert name in FIELDS
        groups[GROUP_OF[name]][name] = value
    return Config(**{group: GROUPS[group](**values) for group, values in groups.items()})


def training_settings(model: Path, folder: Path) -> dict[str, Any]:
    """A data set of five images in two sizes in ``folder``, encoded, and settings for it.

    With two images a batch an epoch has three batches, one of them short.
    """
    images = write_images(folder, (48, 48), (64, 32), (48, 48), (64, 32), (48, 48))
    settings = {
        **model_settings(model),
        "image_directory": images,
        "resolution": (48, 48),
        "batch_size": 2,
        "network_dim": 4,
        "learning_rate": 1e-2,
        "output_name": "tiny",
    }
    cache.run(config(settings), silent)
    return settings


def put_lora(transformer: nn.Module, *, rank: int, alpha: float | None = None) -> Network:
    """A LoRA on the layers of a FLUX that are trained by default; its values never change."""
    settings = config(network_dim=rank, network_alpha=alpha)
    planned = plan_network(settings, draw.ARCHITECTURE, transformer)
    return planned.put_on(transformer, seeds.generator(0, "lora"))


def layer_shapes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every layer of a FLUX that a LoRA may name."""
    layers = published_layers(draw.ARCHITECTURE.layer_names, transformer)
    return {name: layer.shape for name, layer in layers.items()}


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    return load_file(path), open_checkpoint(path).metadata


def assert_same_file(first: Path, second: Path, *, but: Collection[str] = ()) -> None:
    """Every tensor is the same bit for bit, and so is all metadata but the times and ``but``."""
    tensors, metadata = contents(first)
    others, other_metadata = contents(second)
    keys = (metadata.keys() | other_metadata.keys()) - VARYING - set(but)
    assert {key: metadata.get(key) for key in keys} == {
        key: other_metadata.get(key) for key in keys
    }
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def folder(path: Path) -> Path:
    """``path``, made."""
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The system refuses to write more into a file, as a full disk does."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
