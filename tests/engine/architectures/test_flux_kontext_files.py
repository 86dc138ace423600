"""The files that people have of FLUX.1, whole and wrong."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.architectures import ARCHITECTURES, find_architecture
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.demo import text
from pack.engine.errors import CheckpointError
from pack.tests.references import kl_autoencoder, tiny_checkpoints
from safetensors.torch import save_file
from torch import Tensor, nn

KONTEXT = FluxKontext()


def load(state: dict[str, Tensor], folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    save_file(state, folder / "flux.safetensors")
    return KONTEXT.load_transformer(folder / "flux.safetensors", dtype=dtype)


def assert_holds(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    published = KONTEXT.published_state_dict(transformer)
    assert published.keys() == state.keys()
    assert all(torch.equal(published[name], state[name]) for name in state)


def test_all_ways_of_storing_a_model_are_read(tmp_path: Path) -> None:
    state, _ = tiny_checkpoints.build("flux_kontext", seed=2, size="large")
    names = sorted(state)
    for part in (1, 2, 3):
        chosen = {name: state[name] for name in names[part - 1 :: 3]}
        save_file(chosen, tmp_path / f"split-{part:05d}-of-00003.safetensors")
    whole = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    others = {
        "vae.encoder.conv_in.weight": torch.zeros(1),
        "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(1),
    }
    save_file(whole | others, tmp_path / "checkpoint.safetensors")
    renamed = {name.replace("_norm.scale", "_norm.weight"): state[name] for name in state}
    save_file(renamed, tmp_path / "saved_by_comfyui.safetensors")
    folder = tmp_path / "pipeline" / "transformer"
    load(state, tmp_path).save_pretrained(folder)

    for path in (
        tmp_path / "split-00002-of-00003.safetensors",
        tmp_path / "checkpoint.safetensors",
        tmp_path / "saved_by_comfyui.safetensors",
        folder,
        folder.parent,
    ):
        assert find_architecture("auto", path).name == "flux_kontext"
        assert_holds(KONTEXT.load_transformer(path, dtype=torch.float32), state)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("size", ["small", "large"])
def test_published_weights_come_back_after_loading_at_any_size(
    tmp_path: Path, prefix: str, size: str
) -> None:
    state, _ = tiny_checkpoints.build("flux_t2i", seed=5, size=size)
    transformer = load({prefix + name: value for name, value in state.items()}, tmp_path)
    assert_holds(transformer, state)
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_a_diffusers_config_is_not_needed(tmp_path: Path) -> None:
    """Everything comes from the tensors' shapes, so a bare file in diffusers' layout is enough."""
    state, _ = tiny_checkpoints.build("flux_t2i", seed=11)
    path = tmp_path / "diffusers.safetensors"
    save_file(dict(load(state, tmp_path).state_dict()), path)
    again = KONTEXT.load_transformer(path, dtype=torch.float32)
    assert_holds(again, state)
    assert again.config["axes_dims_rope"] == (16, 56, 56)


def test_heads_of_an_unknown_division_ask_for_the_config(tmp_path: Path) -> None:
    state, _ = tiny_checkpoints.build("flux_t2i")
    state["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(16)
    with pytest.raises(CheckpointError) as caught:
        load(state, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'flux.safetensors'}: heads are 16 wide, not 128 as in FLUX.1; put the "
        "config.json that says axes_dims_rope beside the file"
    )


QKV = "double_blocks.0.img_attn.qkv.weight"
WRONG_FILES = {
    "an autoencoder (VAE)": ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"],
    "a TAESD autoencoder": ["taesd_encoder.0.weight", "taesd_decoder.1.weight"],
    "a LoRA file": ["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"],
    "a LoKr file": ["lycoris_double_blocks_0_img_attn_qkv.lokr_w1"],
    "an SDXL checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.encoder.down.0.block.0.conv1.weight",
        "first_stage_model.decoder.conv_in.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "a Wan transformer": ["blocks.0.self_attn.q.weight", "patch_embedding.weight"],
    "a HunyuanVideo transformer": [
        "double_blocks.0.img_attn_qkv.weight",
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    ],
    "a Qwen-Image transformer": ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"],
    "a Chroma transformer": [QKV, "img_in.weight", "distilled_guidance_layer.in_proj.weight"],
    "a FLUX.2 transformer": [QKV, "img_in.weight", "double_stream_modulation_img.lin.weight"],
    "an SD3 transformer": [
        "transformer_blocks.0.attn.to_q.weight",
        "context_embedder.weight",
        "pos_embed.proj.weight",
    ],
    "a ControlNet": [
        "transformer_blocks.0.attn.to_q.weight",
        "context_embedder.weight",
        "controlnet_x_embedder.weight",
    ],
    "a T5 text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a CLIP text encoder": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "a file that we do not know (first tensor 'a')": ["a"],
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_wrong_file_is_named_for_what_it_is(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in WRONG_FILES[what]}, path)
    with pytest.raises(CheckpointError) as caught:
        KONTEXT.load_transformer(path, dtype=torch.float32)
    assert str(caught.value) == f"{path}: this is {what}, not a FLUX.1 transformer"
    with pytest.raises(CheckpointError) as caught:
        find_architecture("auto", path)
    assert str(caught.value) == (
        f"{path}: this is {what}, not a diffusion model of a supported family (flux_kontext)"
    )


def test_a_file_that_is_no_model_at_all_is_named_for_every_part(tmp_path: Path) -> None:
    path = tmp_path / "flux1-kontext-dev.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html>Please log in</html>")
    for attempt in (
        lambda: KONTEXT.load_transformer(path, dtype=torch.float32),
        lambda: KONTEXT.load_autoencoder(path, dtype=None),
        lambda: KONTEXT.load_text_encoders(path, path, None, None, dtype=None),
        lambda: find_architecture("auto", path),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{path}: this is a web page that was saved under a model's name, not a model; "
            "download the file itself (a log-in or licence page may have been in the way)"
        )


def test_a_missing_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    state, _ = tiny_checkpoints.build("flux_t2i")
    path = tmp_path / "flux.safetensors"
    foreign = state | {"what_is_this": torch.zeros(1)}
    small = {name: value for name, value in state.items() if name != "single_blocks.0.linear2.bias"}
    headless = {name: value for name, value in state.items() if name != "txt_in.weight"}
    for wrong, problem in (
        (
            foreign,
            "what_is_this does not belong to this kind of model; "
            "the file looks like a FLUX.1 transformer",
        ),
        (
            small,
            "single_blocks.0.linear2.bias is missing; the file looks like a FLUX.1 transformer",
        ),
        (headless, "txt_in.weight is missing; the file is not a whole FLUX.1 model"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(wrong, tmp_path)
        assert str(caught.value) == f"{path}: {problem}"


@pytest.mark.parametrize(("variant", "channels"), [("Fill", 384), ("Canny", 128)])
def test_a_variant_with_more_input_channels_is_refused(
    tmp_path: Path, variant: str, channels: int
) -> None:
    state, _ = tiny_checkpoints.build("flux_t2i")
    state["img_in.weight"] = torch.zeros(128, channels)
    with pytest.raises(CheckpointError) as caught:
        load(state, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'flux.safetensors'}: this FLUX.1 variant takes {channels} channels "
        "(Fill, Canny, Depth...); use Kontext or dev, which take 64"
    )
    assert variant in str(caught.value)


def test_a_weight_with_a_scale_is_the_weight_times_the_scale(tmp_path: Path) -> None:
    """As ComfyUI's scaled files have it, also where the codes are ordinary numbers."""
    state, _ = tiny_checkpoints.build("flux_t2i")
    layer = "single_blocks.0.linear2"
    state[f"{layer}.scale_weight"] = torch.tensor(0.5)
    loaded = KONTEXT.published_state_dict(load(state, tmp_path))
    torch.testing.assert_close(loaded[f"{layer}.weight"], 0.5 * state[f"{layer}.weight"])


def test_the_architecture_can_be_named_when_there_is_no_file() -> None:
    assert find_architecture("flux_kontext", None) is ARCHITECTURES["flux_kontext"]
    with pytest.raises(CheckpointError, match="set architecture to one of"):
        find_architecture("auto", None)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was tried to reach while nothing can be reached; libraries may swallow the error."""
    tried: list[str] = []

    def refuse(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            tried.append(f"{name}{args}")
            raise OSError("the network is unreachable")

        return call

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse(name))
    with pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("huggingface.co", 443))
    tried.clear()
    yield tried


def save_everything(folder: Path) -> None:
    """A whole pipeline as diffusers keeps it, and the single files that ComfyUI's users have."""
    state, _ = tiny_checkpoints.build("flux_kontext")
    load(state, folder).save_pretrained(folder / "pipeline" / "transformer")
    autoencoder = kl_autoencoder.random_state((32,) * 4, blocks=1, latent_channels=16)
    save_file(autoencoder, folder / "ae.safetensors")
    vae = KONTEXT.load_autoencoder(folder / "ae.safetensors", dtype=None)
    vae.module.save_pretrained(folder / "pipeline" / "vae")
    models = {"_2": text.t5_model(480), "": text.clip_model(480)}
    tokenizers = {"_2": text.t5_tokenizer(["a red star"]), "": text.clip_tokenizer(["a red star"])}
    for name, module in models.items():
        module.save_pretrained(folder / "pipeline" / f"text_encoder{name}")
        tokenizers[name].save_pretrained(folder / "pipeline" / f"tokenizer{name}")
        files = (folder / "pipeline" / f"text_encoder{name}").glob("*.safetensors")
        (folder / f"encoder{name}.safetensors").write_bytes(next(files).read_bytes())


def test_everything_loads_and_runs_without_a_network(tmp_path: Path, attempts: list[str]) -> None:
    save_everything(tmp_path)
    attempts.clear()
    pipeline = tmp_path / "pipeline"
    sources = (
        (
            pipeline,
            pipeline,
            (pipeline / "text_encoder_2", pipeline / "text_encoder", None, None),
        ),
        (
            tmp_path / "flux.safetensors",
            tmp_path / "ae.safetensors",
            (
                tmp_path / "encoder_2.safetensors",
                tmp_path / "encoder.safetensors",
                pipeline / "tokenizer_2",
                pipeline / "tokenizer",
            ),
        ),
    )
    results = []
    for dit, vae, encoders in sources:
        assert find_architecture("auto", dit).name == "flux_kontext"
        KONTEXT.load_transformer(dit, dtype=torch.float32)
        autoencoder = KONTEXT.load_autoencoder(vae, dtype=None)
        latents = autoencoder.encode(torch.zeros(1, 3, 16, 16))
        loaded = KONTEXT.load_text_encoders(*encoders, dtype=None)
        [encoded] = KONTEXT.encode_text(loaded, ["a red star"], 512)
        results.append([latents, encoded["text_embeds"], encoded["pooled"]])

    assert attempts == []
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", ["small", "large"])
def test_an_empty_model_is_the_loaded_one_without_memory(tmp_path: Path, size: str) -> None:
    state, _ = tiny_checkpoints.build("flux_kontext", size=size)
    loaded = load(state, tmp_path)
    empty = KONTEXT.empty_transformer(tmp_path / "flux.safetensors")
    shapes = {name: weight.shape for name, weight in loaded.named_parameters()}
    assert {name: weight.shape for name, weight in empty.named_parameters()} == shapes
    assert all(weight.is_meta and not weight.requires_grad for weight in empty.parameters())
    assert not empty.training


def test_an_empty_model_reads_headers_only(tmp_path: Path) -> None:
    """What the file holds besides is a hole."""
    path = tmp_path / "flux.safetensors"
    state = tiny_checkpoints.flux(depth=2, single=3)
    save_file(state, path)
    length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    start, size = path.read_bytes()[:length], path.stat().st_size
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(size)
    empty = KONTEXT.empty_transformer(path)
    assert len(KONTEXT.blocks(empty)) == 5


def test_an_empty_model_is_refused_for_what_loading_would_refuse(tmp_path: Path) -> None:
    state = tiny_checkpoints.flux()
    key = "single_blocks.0.linear2.weight"
    path = tmp_path / "flux.safetensors"
    for changed, sentence in (
        ({name: value for name, value in state.items() if name != key}, f"{key} is missing"),
        (state | {"single_blocks.0.more": torch.zeros(1)}, "single_blocks.0.more does not belong"),
        (state | {key: state[key][:, :-1].contiguous()}, f"{key} gives a tensor of shape"),
    ):
        save_file(changed, path)
        for read in (
            KONTEXT.empty_transformer,
            lambda path: KONTEXT.load_transformer(path, dtype=torch.float32),
        ):
            with pytest.raises(CheckpointError, match=sentence):
                read(path)


def test_blocks_come_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    transformer = load(tiny_checkpoints.flux(depth=2, single=3), tmp_path)
    names = {id(module): name for name, module in transformer.named_modules()}
    assert [names[id(block)] for block in KONTEXT.blocks(transformer)] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
        *(f"single_transformer_blocks.{index}" for index in range(3)),
    ]


def test_the_conditions_that_a_model_takes_are_known_from_its_shapes(tmp_path: Path) -> None:
    state = tiny_checkpoints.flux(text_width=96, pooled_width=40)
    transformer = load(state, tmp_path)
    shapes = KONTEXT.condition_shapes(transformer, 77)
    assert shapes == {"text_embeds": (77, 96), "pooled": (40,)}
