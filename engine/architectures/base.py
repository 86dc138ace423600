"""What the jobs need to know of a model family, and nothing more.

Shapes: B batch, C latent channels, T frames, H W latent height and width. Image families use
T = 1, so that nothing above this line has to ask which kind it is talking to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..autoencoders import ImageAutoencoder
from ..layer_names import LayerNames
from ..quantized_loading import Adapters, QuantizationSettings
from ..weights import Checkpoint

# Everything but the noisy latents and the time that the transformer is given for one batch.
Conditions = Mapping[str, Tensor]


class Architecture(Protocol):
    """One model family."""

    @property
    def name(self) -> str:
        """Short identity, as in the setting ``architecture`` and in cache file names."""
        ...

    @property
    def modelspec_architecture(self) -> str:
        """The family's name in ``modelspec.architecture`` of a LoRA file, before "/lora"."""
        ...

    @property
    def layer_names(self) -> LayerNames:
        """What its layers are called, and which of them are trained by default."""
        ...

    @property
    def default_timestep_sampling(self) -> str:
        """What ``timestep_sampling = "auto"`` means."""
        ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels."""
        ...

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of a side one latent stands for."""
        ...

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether the tensor names are those of this family's transformer."""
        ...

    def empty_transformer(
        self, path: Path, *, quantization: QuantizationSettings | None = None
    ) -> nn.Module:
        """The model of a user's file or folder without its weights, on the meta device.

        Only headers are read.

        Raises:
            EngineError: `load_transformer` could not load it.
        """
        ...

    def load_transformer(
        self,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: QuantizationSettings | None = None,
        loras: Sequence[Adapters] = (),
        told: Callable[[str], None] | None = None,
    ) -> nn.Module:
        """Stream a user's file or folder into a frozen model in evaluation mode.

        What a file has in 8 bits already stays so, whatever ``quantization`` says.

        Args:
            dtype: of all that is not in 8 bits, and of what is computed.
            quantization: keep the linear layers of the blocks in 8 bits.
            loras: merged before anything is rounded.
            told: is given sentences on what was done.

        Raises:
            ConfigError: the settings do not go together, or a pattern matches nothing.
            CheckpointError: the file is of another kind, damaged or has values that are not
                finite.
        """
        ...

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The layers that repeat, in the order in which they are run."""
        ...

    def predict_velocity(
        self, transformer: nn.Module, noisy_BCTHW: Tensor, t_B: Tensor, conditions: Conditions
    ) -> Tensor:
        """The model's velocity at flow times ``t`` in [0, 1], same shape as the latents."""
        ...

    def timestep_shift(self, latent_height: int, latent_width: int) -> float:
        """The family's own shift towards noise for this latent size."""
        ...

    def condition_shapes(
        self, transformer: nn.Module, text_length: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what `encode_text` gives for a caption of at most ``text_length`` tokens."""
        ...

    def load_autoencoder(
        self, path: Path, *, dtype: torch.dtype | None, device: torch.device | str
    ) -> ImageAutoencoder:
        """The family's VAE; its latents are normalised as the transformer expects them."""
        ...

    def normalize_latents(self, raw_BCTHW: Tensor) -> Tensor:
        """What a VAE gives, as the transformer expects it."""
        ...

    def raw_latents(self, latents_BCTHW: Tensor) -> Tensor:
        """The inverse of `normalize_latents`."""
        ...

    def load_text_encoders(
        self,
        text_encoder1: Path,
        text_encoder2: Path,
        tokenizer1: Path | None,
        tokenizer2: Path | None,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> Any:
        """What `encode_text` takes as its first argument."""
        ...

    def encode_text(
        self, encoders: Any, captions: list[str], max_length: int
    ) -> list[dict[str, Tensor]]:
        """The conditions that each caption gives, without a batch dimension."""
        ...
