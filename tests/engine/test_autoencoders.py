"""Autoencoders in all layouts that people have, against slow references in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.autoencoders import ImageAutoencoder, load_autoencoder, save_taesd
from pack.engine.errors import CheckpointError
from pack.tests.references import kl_autoencoder, taesd
from safetensors.torch import load_file, save_file
from torch import Tensor

SCALE, SHIFT = 0.3611, 0.1159  # FLUX's
# Float32 rounds to 6e-8 and these networks are some twenty convolutions deep; 1e-5 is measured.
TOLERANCE = 5e-5


def load(path: Path, dtype: torch.dtype | None = torch.float32) -> ImageAutoencoder:
    return load_autoencoder(path, dtype=dtype, scale=SCALE, shift=SHIFT)


def stored(state: dict[str, Tensor], folder: Path, name: str = "ae.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    return folder / name


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() for key, value in state.items()}


def random_pixels(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_latents(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(output: Tensor, expected: Tensor) -> None:
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= TOLERANCE * expected.std()


def small_kl(seed: int = 0) -> dict[str, Tensor]:
    return kl_autoencoder.random_state((32, 64), blocks=1, latent_channels=16, seed=seed)


def expected_latents(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    mean = kl_autoencoder.encode(doubled(state), pixels.double())
    return ((mean - 0.1159) * 0.3611)[:, :, None]


def expected_pixels(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    plain = latents[:, :, 0].double() / 0.3611 + 0.1159
    return kl_autoencoder.decode(doubled(state), plain).clamp(-1, 1)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize(
    ("widths", "blocks", "channels", "quant"),
    [((32, 64), 1, 16, False), ((32, 32, 64), 2, 8, True)],
)
def test_the_published_layout_encodes_and_decodes_as_published(
    tmp_path: Path, prefix: str, widths: tuple[int, ...], blocks: int, channels: int, quant: bool
) -> None:
    state = kl_autoencoder.random_state(
        widths, blocks=blocks, latent_channels=channels, quant=quant, seed=3
    )
    autoencoder = load(stored({prefix + key: value for key, value in state.items()}, tmp_path))
    pixels = random_pixels(1, 2, 3, 24, 40)

    latents = autoencoder.encode(pixels)

    assert autoencoder.downsampling == 2 ** (len(widths) - 1)
    assert autoencoder.latent_channels == channels
    assert_close(latents, expected_latents(state, pixels))
    assert_close(autoencoder.decode(latents), expected_pixels(state, latents))


def test_a_checkpoint_with_other_models_in_it_gives_its_autoencoder(tmp_path: Path) -> None:
    state = small_kl()
    others = {
        "model.diffusion_model.img_in.weight": torch.zeros(2, 2),
        "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(2, 2),
    }
    path = stored({f"vae.{key}": value for key, value in state.items()} | others, tmp_path)
    pixels = random_pixels(2, 1, 3, 8, 8)

    assert_close(load(path).encode(pixels), expected_latents(state, pixels))


def test_a_diffusers_folder_its_pipeline_and_its_bare_file_are_one_model(tmp_path: Path) -> None:
    state = small_kl(seed=5)
    load(stored(state, tmp_path)).module.save_pretrained(tmp_path / "pipeline" / "vae")
    bare = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    assert "encoder.mid_block.attentions.0.to_q.weight" in load_file(bare)
    pixels = random_pixels(3, 1, 3, 16, 24)

    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", bare):
        autoencoder = load(path)
        assert_close(autoencoder.encode(pixels), expected_latents(state, pixels))
        latents = autoencoder.encode(pixels)
        assert_close(autoencoder.decode(latents), expected_pixels(state, latents))


def test_a_diffusers_folder_may_have_groups_of_another_size(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    module = AutoencoderKL(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    module.save_pretrained(tmp_path)
    pixels = random_pixels(4, 1, 3, 8, 8)

    with torch.no_grad():
        mean = module.encode(pixels).latent_dist.mean

    assert_close(load(tmp_path).encode(pixels), ((mean - SHIFT) * SCALE)[:, :, None])


def joined(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {"taesd_encoder": encoder, "taesd_decoder": decoder}
    return {f"{part}.{key}": value for part, half in parts.items() for key, value in half.items()}


def assert_is_taesd(
    autoencoder: ImageAutoencoder, encoder: dict[str, Tensor], decoder: dict[str, Tensor]
) -> None:
    pixels = random_pixels(6, 2, 3, 16, 24)
    # Far larger than any latents, so that a clamp that is left out shows.
    latents = random_latents(7, 2, 16, 1, 3, 2) * 5

    expected = taesd.encode(doubled(encoder), (pixels.double() + 1) / 2)
    assert_close(autoencoder.encode(pixels), expected[:, :, None])
    expected = taesd.decode(doubled(decoder), latents[:, :, 0].double()) * 2 - 1
    assert (expected.abs() < 1).float().mean() > 0.5
    assert_close(autoencoder.decode(latents), expected.clamp(-1, 1))


def test_one_taesd_file_works_on_pixels_from_minus_one_to_one(tmp_path: Path) -> None:
    encoder, decoder = taesd.random_halves(latent_channels=16)
    extras = {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}
    autoencoder = load(stored(joined(encoder, decoder) | extras, tmp_path))

    assert autoencoder.latent_channels == 16 and autoencoder.downsampling == 8
    assert_is_taesd(autoencoder, encoder, decoder)


def test_taesd_halves_are_found_from_either_file(tmp_path: Path) -> None:
    encoder, decoder = taesd.random_halves(latent_channels=16, seed=1)
    paths = [
        stored(encoder, tmp_path, "taef1_encoder.safetensors"),
        stored(decoder, tmp_path, "taef1_decoder.safetensors"),
    ]

    for path in paths:
        assert_is_taesd(load(path), encoder, decoder)


@pytest.mark.parametrize("name", ["taef1_decoder.safetensors", "decoder of taef1.safetensors"])
def test_half_a_taesd_without_the_other_is_named(tmp_path: Path, name: str) -> None:
    _, decoder = taesd.random_halves(latent_channels=16)
    path = stored(decoder, tmp_path, name)

    with pytest.raises(CheckpointError) as caught:
        load(path)

    assert str(caught.value) == (
        f"{path}: this is half of a TAESD autoencoder; put the other file, "
        "..._encoder.safetensors or ..._decoder.safetensors, beside it"
    )


def test_a_diffusers_folder_with_taesd_is_read(tmp_path: Path) -> None:
    encoder, decoder = taesd.random_halves(latent_channels=16, seed=2)
    module = load(stored(joined(encoder, decoder), tmp_path)).module
    module.save_pretrained(tmp_path / "vae")
    names = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert "encoder.layers.0.weight" in names and "decoder.layers.0.weight" in names

    for path in (tmp_path / "vae", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
        assert_is_taesd(load(path), encoder, decoder)


def test_other_depths_and_widths_of_taesd_come_from_the_shapes(tmp_path: Path) -> None:
    encoder, decoder = taesd.random_halves(
        latent_channels=16, width=24, encoder_blocks=(2, 1, 0), seed=3
    )
    autoencoder = load(stored(joined(encoder, decoder), tmp_path))

    assert autoencoder.downsampling == 4
    assert_is_taesd(autoencoder, encoder, decoder)


def test_a_taesd_that_we_write_has_the_published_names_and_comes_back(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    module = AutoencoderTiny(latent_channels=16)
    save_taesd(tmp_path / "taesd.safetensors", module, {"made": "here"})
    written = load_file(tmp_path / "taesd.safetensors")

    halves = taesd.random_halves(latent_channels=16)
    published = joined(*halves)
    scales = {"vae_scale", "vae_shift"}
    assert written.keys() == published.keys() | scales
    assert all(written[key].shape == published[key].shape for key in published)
    assert all(written[key].dtype == torch.float16 for key in published)
    assert [written[key].item() for key in sorted(scales)] == pytest.approx([SCALE, SHIFT])
    again = load(tmp_path / "taesd.safetensors")
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor.half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_type_of_the_file_is_kept_unless_another_is_asked_for(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {key: value.to(dtype) for key, value in small_kl().items()}
    # What else is in the file has no say, however large it is.
    others = {"model.diffusion_model.x.weight": torch.zeros(2000, 2000)}
    path = stored({f"vae.{key}": value for key, value in state.items()} | others, tmp_path)
    pixels = random_pixels(8, 1, 3, 8, 8)

    kept = load(path, dtype=None)
    assert {parameter.dtype for parameter in kept.module.parameters()} == {dtype}
    assert kept.encode(pixels).dtype == dtype
    assert kept.decode(kept.encode(pixels)).dtype == torch.float32
    exact = load(path, dtype=torch.float32)
    assert_close(exact.encode(pixels), expected_latents(state, pixels))


def test_the_module_is_frozen_and_wholly_on_its_device(tmp_path: Path) -> None:
    path = stored(small_kl(), tmp_path)
    assert not any(parameter.requires_grad for parameter in load(path).module.parameters())
    assert not load(path).module.training
    module = load_autoencoder(path, dtype=None, device="meta", scale=1, shift=0).module
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


def test_sides_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    autoencoder = load(stored(small_kl(), tmp_path))
    with pytest.raises(ValueError, match="sides must be multiples of 2"):
        autoencoder.encode(torch.zeros(1, 3, 8, 9))


CLIP = "encoder.layers.0.self_attn.q_proj.weight"
WRONG_FILES = {
    "transformer": (
        ["img_in.weight", "double_blocks.0.img_attn.qkv.weight"],
        "a FLUX.1 transformer",
    ),
    "lora": (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA file"),
    "t5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
    "clip": ([f"text_model.{CLIP}"], "a CLIP text encoder"),
    "clip as transformers 5 writes it": ([CLIP], "a CLIP text encoder"),
    "wan": (
        ["encoder.downsamples.0.residual.0.gamma", "decoder.upsamples.0.residual.0.gamma"],
        "a Wan VAE",
    ),
    "hunyuan": (
        ["encoder.down.0.block.0.conv1.conv.weight", "decoder.conv_in.conv.weight"],
        "a HunyuanVideo VAE",
    ),
    "mlp": (["0.weight", "1.weight"], "a file that we do not know (first tensor '0.weight')"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    names, what = WRONG_FILES[kind]
    path = stored({name: torch.zeros(2, 2) for name in names}, tmp_path)

    with pytest.raises(CheckpointError) as caught:
        load(path)

    assert str(caught.value) == f"{path}: this is {what}, not an image autoencoder (VAE)"


@pytest.mark.parametrize("layout", ["KL", "TAESD"])
def test_flux_refuses_the_autoencoder_of_another_family(tmp_path: Path, layout: str) -> None:
    if layout == "KL":
        state = kl_autoencoder.random_state((32, 32), blocks=1, latent_channels=4, quant=True)
    else:
        state = joined(*taesd.random_halves(latent_channels=4))
    path = stored(state, tmp_path)

    with pytest.raises(CheckpointError) as caught:
        FluxKontext().load_autoencoder(path, dtype=torch.float32)

    assert str(caught.value) == (
        f"{path}: the latents of this autoencoder have 4 channels, those of FLUX.1 16; "
        "use ae.safetensors or TAEF1"
    )


def test_flux_normalises_with_its_published_numbers(tmp_path: Path) -> None:
    state = small_kl(seed=9)
    autoencoder = FluxKontext().load_autoencoder(stored(state, tmp_path), dtype=torch.float32)
    pixels = random_pixels(9, 1, 3, 8, 8)
    assert_close(autoencoder.encode(pixels), expected_latents(state, pixels))


def test_a_missing_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    state = small_kl()
    bias = state.pop("decoder.up.0.block.1.conv2.bias")
    path = stored(state, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: decoder.up.0.block.1.conv2.bias is missing; "
        "the file looks like an autoencoder (VAE)"
    )
    state |= {"decoder.up.0.block.1.conv2.bias": bias, "what.is.this": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"what\.is\.this does not belong"):
        load(stored(state, tmp_path))


def test_a_taesd_that_lacks_its_decoder_is_named(tmp_path: Path) -> None:
    encoder, _ = taesd.random_halves(latent_channels=16)
    path = stored(joined(encoder, {}), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: the tiny autoencoder is not whole; get it again"


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    load(stored(small_kl(), tmp_path)).module.save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    assert json.loads(config.read_text())["norm_num_groups"] == 32
    config.write_text("<!doctype html>")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "vae")
    assert str(caught.value) == f"{config}: this is not readable JSON; download it again"
