"""What is written into LoRA files for people and programs that browse them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from .group import Group


def _check_resolution(value: str) -> str:
    if not re.fullmatch(r"\d{1,5}(\s*[,x]\s*\d{1,5})?", value):
        raise ValueError('one number, or "width,height"')
    return value


class MetadataConfig(Group):
    """Metadata of LoRA files"""

    no_metadata: bool = Field(
        default=False,
        description="Write only what is needed to use the LoRA, nothing about its training.",
    )
    training_comment: str | None = Field(default=None, description="A text of your own.")
    metadata_title: str | None = Field(
        default=None, description="Title of the LoRA; unset: output_name."
    )
    metadata_author: str | None = Field(default=None, description="Who made it.")
    metadata_description: str | None = Field(default=None, description="What it is for.")
    metadata_license: str | None = Field(default=None, description="Its license.")
    metadata_tags: str | None = Field(default=None, description="Tags, separated by commas.")
    metadata_reso: Annotated[str, AfterValidator(_check_resolution)] | None = Field(
        default=None, description='Resolution it is for, as "width,height"; unset: as trained.'
    )
    metadata_arch: str | None = Field(
        default=None, description="Name of the model family to write instead of its usual one."
    )
