"""What is trained on: model files and images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config_types import (
    DtypeOrAuto,
    Extension,
    PathSetting,
    Size,
)
from .group import Group


class ModelConfig(Group):
    """Model files"""

    architecture: Literal["auto", "flux_kontext"] = Field(
        default="auto", description="Model family; auto finds it from the diffusion model file."
    )
    dit: PathSetting | None = Field(
        default=None,
        description="Diffusion model: a .safetensors file or part of a set, or a folder.",
    )
    vae: PathSetting | None = Field(
        default=None, description="Autoencoder: a .safetensors file or folder."
    )
    text_encoder1: PathSetting | None = Field(
        default=None, description="T5-XXL text encoder: a .safetensors file or Hugging Face folder."
    )
    text_encoder2: PathSetting | None = Field(
        default=None, description="CLIP-L text encoder: a .safetensors file or Hugging Face folder."
    )
    tokenizer1: PathSetting | None = Field(
        default=None, description="T5 tokenizer folder, needed beside a single text_encoder1 file."
    )
    tokenizer2: PathSetting | None = Field(
        default=None,
        description="CLIP tokenizer folder, needed beside a single text_encoder2 file.",
    )
    vae_dtype: DtypeOrAuto = Field(
        default="auto", description="Number type of the VAE; auto: as in its file."
    )
    text_encoder_dtype: DtypeOrAuto = Field(
        default="auto", description="Number type of the text encoders; auto: as in their files."
    )


class DatasetConfig(Group):
    """Training images"""

    image_directory: PathSetting | None = Field(
        default=None, description="Folder of images, each with a caption file of the same name."
    )
    control_directory: PathSetting | None = Field(
        default=None,
        description="Folder of control images (for editing models) with the same names.",
    )
    mask_directory: PathSetting | None = Field(
        default=None,
        description="Folder of masks with the same names: white is trained, black is not.",
    )
    alpha_mask: bool = Field(
        default=False, description="Take the opacity of the training images as their mask."
    )
    regularization_directory: PathSetting | None = Field(
        default=None,
        description="Folder of images and captions of what the model should keep, such as other "
        "things of the same class.",
    )
    caption_extension: Extension = Field(
        default=".txt", description="Extension of the caption files."
    )
    resolution: Size = Field(
        default=(1024, 1024),
        description="Area of the training images in pixels, as [width, height] or one side.",
    )
    enable_bucket: bool = Field(
        default=True,
        description="Group images by aspect ratio instead of cropping all to one size.",
    )
    bucket_no_upscale: bool = Field(
        default=False, description="Leave images smaller than the resolution at their own size."
    )
    batch_size: int = Field(default=1, ge=1, le=4096, description="Images per batch and device.")
    num_repeats: int = Field(
        default=1, ge=1, le=100_000, description="Times each image is used per epoch."
    )
    cache_directory: PathSetting | None = Field(
        default=None, description="Folder of the cache; default .loom_cache inside image_directory."
    )
    text_max_length: int = Field(
        default=512, ge=1, le=512, description="Tokens the T5 text is padded or cut to."
    )
