from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.engine.config import Config, RuntimeConfig
from pack.engine.errors import DataError
from torch import Tensor, nn

END = (1, 1.0)
PAD = (0, 1.0)


@pytest.fixture
def native(load: Callable[[str], Any]) -> Any:
    return load("native")


class Patcher:
    """A model that ComfyUI has loaded, and what is put on it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.patches: dict[str, Any] = {}
        self.patches_uuid = "first"


class FluxClipModel(nn.Module):
    """ComfyUI's name for FLUX's pair of text encoders."""

    dtypes = frozenset({torch.bfloat16, torch.float16})


class FluxClipModel_(FluxClipModel):  # noqa: N801  as ComfyUI calls the one it makes
    pass


class SD1ClipModel(nn.Module):
    pass


class Clip:
    """One token for each letter: its number in Unicode."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.cond_stage_model = model or FluxClipModel_()
        self.patcher = Patcher(nn.Linear(2, 2))
        self.layer_idx: int | None = None
        self.tokenizer_options: dict[str, int] = {}
        self.encoded: list[tuple[int, float]] = []

    def tokenize(
        self, text: str, *, disable_weights: bool, tokenizer_options: dict[str, int]
    ) -> dict[str, list[list[tuple[int, float]]]]:
        assert disable_weights
        options = self.tokenizer_options | tokenizer_options
        tokens = [*((ord(letter), 1.0) for letter in text), END]
        padded = tokens + [PAD] * options.get("t5xxl_min_padding", 0)
        padded += [PAD] * (options["t5xxl_min_length"] - len(padded))
        return {"l": [tokens[:77], tokens[77:]], "t5xxl": [padded]}

    def encode_from_tokens(self, tokens: Any, *, return_pooled: bool) -> tuple[Tensor, Tensor]:
        assert return_pooled
        (self.encoded,) = tokens["t5xxl"]
        ids = torch.tensor([[[float(number)] for number, _ in self.encoded]])
        return ids, torch.tensor([[float(len(tokens["l"]))]])


class Vae:
    """Latents are the pixels' mean, 16 times."""

    latent_channels = 16

    def __init__(self) -> None:
        self.patcher = Patcher(nn.Conv2d(1, 1, 1))

    def encode(self, image_NHWC: Tensor) -> Tensor:
        assert image_NHWC.shape[-1] == 3 and image_NHWC.min() >= 0 and image_NHWC.max() <= 1
        return image_NHWC.mean(-1)[:, None].expand(-1, 16, -1, -1)


def encode(native: Any, clip: Clip, caption: str, max_length: int) -> dict[str, Tensor]:
    encoders = native.encoders(Vae(), clip, native.architecture_of(Vae(), clip))
    (encoded,) = encoders.encode_text([caption], max_length)
    return encoded


# The family


def test_the_family_is_known_from_the_text_encoders(native: Any) -> None:
    for model in (FluxClipModel(), FluxClipModel_()):
        assert native.architecture_of(Vae(), Clip(model)).name == "flux_kontext"


def test_other_text_encoders_are_refused_with_what_to_use(native: Any) -> None:
    with pytest.raises(DataError, match=r"^clip: .* \(SD1ClipModel\) .*use DualCLIPLoader with"):
        native.architecture_of(Vae(), Clip(SD1ClipModel()))


def test_a_vae_with_other_latents_is_refused(native: Any) -> None:
    vae = SimpleNamespace(latent_channels=4)
    with pytest.raises(DataError, match="^vae: its latents have 4 channels, those of flux_kon.*16"):
        native.architecture_of(vae, Clip())


def test_a_loader_that_found_nothing_is_named(native: Any) -> None:
    for vae, clip in ((None, Clip()), (Vae(), None)):
        with pytest.raises(DataError, match="^the VAE or CLIP is empty; "):
            native.architecture_of(vae, clip)


# Captions


@pytest.mark.parametrize("caption", ["", "a", "(a:1.5)", "abcdefg"])
def test_a_caption_that_fits_is_padded(native: Any, caption: str) -> None:
    clip = Clip()
    encoded = encode(native, clip, caption, 8)
    tokens = [*((ord(letter), 1.0) for letter in caption), END]
    assert clip.encoded == [*tokens, *[PAD] * (8 - len(tokens))]
    assert encoded["text_embeds"].shape == (8, 1)


@pytest.mark.parametrize("length", [1, 2, 8])
def test_a_caption_that_does_not_fit_is_cut_and_keeps_its_end(native: Any, length: int) -> None:
    clip = Clip()
    caption = "abcdefghijk"
    encoded = encode(native, clip, caption, length)
    assert clip.encoded == [*((ord(letter), 1.0) for letter in caption[: length - 1]), END]
    assert encoded["text_embeds"].shape == (length, 1)


def test_padding_that_a_node_has_set_on_the_clip_changes_nothing(native: Any) -> None:
    clip = Clip()
    clip.tokenizer_options = {"t5xxl_min_padding": 4, "t5xxl_min_length": 20}
    encode(native, clip, "abcdefghijk", 8)
    assert clip.encoded[-2:] == [(ord("g"), 1.0), END]


def test_only_the_text_of_t5_is_cut(native: Any) -> None:
    assert encode(native, Clip(), "a" * 100, 8)["pooled"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        ({torch.float32}, torch.float32),
        ({torch.float32, torch.float16}, torch.float32),
        ({torch.bfloat16}, torch.float16),
        ({torch.float16, torch.float8_e4m3fn}, torch.float16),
    ],
)
def test_exact_text_encoders_give_exact_text(
    native: Any, dtypes: set[torch.dtype], stored: torch.dtype
) -> None:
    clip = Clip()
    clip.cond_stage_model.dtypes = dtypes
    encoded = encode(native, clip, "a", 4)
    assert encoded["text_embeds"].dtype == encoded["pooled"].dtype == stored


# Pictures


def test_a_picture_is_encoded_as_the_transformer_expects_it(native: Any) -> None:
    vae, clip = Vae(), Clip()
    architecture = native.architecture_of(vae, clip)
    pixels = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = native.encoders(vae, clip, architecture).encode_image(pixels)
    assert latents.shape == (16, 1, 4, 6)
    means = (architecture.raw_latents(latents) * 2 - 1)[5, 0]
    assert torch.allclose(means, pixels[0].mean(0), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 1, 4, 6, 3)])
def test_decoded_pictures_have_no_time(native: Any, shape: tuple[int, ...]) -> None:
    vae = SimpleNamespace(decode=lambda latents: torch.zeros(shape))
    assert native.decode(vae, torch.zeros(2, 16, 1, 1)).shape == (2, 4, 6, 3)


@pytest.mark.parametrize("bias", [[0.1, 0.0, -0.1], None])
def test_without_a_vae_colours_are_a_linear_map(
    native: Any, monkeypatch: pytest.MonkeyPatch, bias: list[float] | None
) -> None:
    class Format:
        latent_rgb_factors = [[0.5, 0.0, 0.0], [0.0, 0.25, 9.0]]
        latent_rgb_factors_bias = bias

        def process_in(self, latents: Tensor) -> Tensor:
            return latents - 1

    monkeypatch.setitem(native._LATENT_FORMATS, "flux_kontext", Format)
    raw = torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1).expand(2, 2, 4, 6)
    image = native.approximate("flux_kontext", raw.half())
    assert image.shape == (2, 4, 6, 3)
    red, green, _ = bias or [0.0, 0.0, 0.0]
    expected = torch.tensor([(0.5 + red + 1) / 2, (0.5 + green + 1) / 2, 1.0])
    assert torch.allclose(image, expected.expand_as(image))


# What the cache is made with


def facts(native: Any, vae: Vae, clip: Clip) -> tuple[object, object]:
    encoders = native.encoders(vae, clip, native.architecture_of(vae, clip))
    return encoders.latent_facts["vae"], encoders.text_facts["text_encoder1"]


def linear(**changes: Any) -> Patcher:
    """The same model each time, but for what a test changes in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    model.register_buffer("scale", torch.tensor(2.0))
    model.load_state_dict({**model.state_dict(), **changes})
    return Patcher(model)


def identity_of(native: Any, patcher: Patcher) -> object:
    vae = Vae()
    vae.patcher = patcher
    return facts(native, vae, Clip())[0]


def test_the_same_weights_are_the_same_encoder(native: Any) -> None:
    assert identity_of(native, linear()) == identity_of(native, linear())
    patcher = linear()
    patcher.patches_uuid = "another, as every clone of a model has"
    assert identity_of(native, patcher) == identity_of(native, linear())


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": torch.tensor(2.5)},
        {"0.bias": torch.ones(3)},
        {"0.weight": torch.ones(3, 4)},
    ],
)
def test_other_weights_are_another_encoder(native: Any, changes: dict[str, Tensor]) -> None:
    assert identity_of(native, linear(**changes)) != identity_of(native, linear())


def test_equal_values_of_other_names_types_or_shapes_are_another_encoder(native: Any) -> None:
    seen = set()
    for name, ones in (
        ("a", torch.ones(2, 2)),
        ("b", torch.ones(2, 2)),
        ("a", torch.ones(2, 2).half()),
        ("a", torch.ones(3, 2)),
    ):
        model = nn.Module()
        model.register_buffer(name, ones)
        seen.add(identity_of(native, Patcher(model)))
    assert len(seen) == 4


def test_a_lora_on_an_encoder_makes_it_another(native: Any) -> None:
    seen = {identity_of(native, linear())}
    for name in ("a", "b"):
        patcher = linear()
        patcher.patches, patcher.patches_uuid = {"0.weight": []}, name
        seen.add(identity_of(native, patcher))
    assert len(seen) == 3


def test_another_layer_of_an_encoder_makes_it_another(native: Any) -> None:
    seen: set[Any] = set()
    for layer in (None, -1, -2):
        clip = Clip()
        clip.layer_idx = layer
        clip.patcher = linear()
        vae = SimpleNamespace(patcher=linear())
        seen.add(native.encoders(vae, clip, None).text_facts["text_encoder1"])
    assert len(seen) == 3


def test_an_encoder_in_8_bits_has_an_identity(native: Any) -> None:
    model = linear().model.to(torch.float8_e4m3fn)
    assert identity_of(native, Patcher(model)) == identity_of(native, Patcher(model))


def test_vae_and_text_encoders_have_identities_of_their_own(native: Any) -> None:
    vae, clip = Vae(), Clip()
    before = facts(native, vae, clip)
    clip.patcher = linear()
    after = facts(native, vae, clip)
    assert after[0] == before[0] and after[1] != before[1]
    # A cache that was made from files is made anew.
    assert all(str(identity).startswith("comfyui ") for identity in after)


@pytest.mark.parametrize(
    ("asked", "cpu_only", "used"),
    [("auto", True, "cpu"), ("auto", False, "auto"), ("cuda:1", True, "cuda:1")],
)
def test_a_comfyui_that_keeps_to_the_cpu_trains_on_it(
    native: Any, monkeypatch: pytest.MonkeyPatch, asked: str, cpu_only: bool, used: str
) -> None:
    management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "cpu_mode", lambda: cpu_only, raising=False)
    config = Config(runtime=RuntimeConfig(device=asked))
    assert native.on_comfyuis_device(config).runtime.device == used
