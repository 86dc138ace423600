"""Cache Dataset with native encoders, against the engine's own encoders of the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pack.engine import media
from pack.engine.config import Config
from pack.engine.demo import draw
from pack.engine.jobs import cache
from pack.engine.text_encoders import load_clip, load_t5
from pack.tests.comfyui import graphs
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.server import PACK, PACK_NAME, ComfyServer, Run
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

DEMO = PACK / "engine" / "demo"
# The widths that the demo's transformer takes.
T5 = {"d_model": 64, "d_ff": 192, "d_kv": 32, "num_heads": 4, "num_layers": 2}
CLIP = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
}
CAPTIONS = [
    "a large red loomling in the center",
    "(parentheses:1.5) are [not] ((weights)) here",
    " ".join(["cat"] * 700),
    "Grüße, 猫 & “quotes”",
]


@dataclass(frozen=True)
class Encoders:
    """Random small encoders in the files that people have."""

    t5: Path
    clip: Path


def stored(module: nn.Module, path: Path, prefix: str = "") -> Path:
    state = {
        prefix + key.removeprefix(prefix): value.clone().contiguous()
        for key, value in module.state_dict().items()
        if "embed_tokens" not in key
    }
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5))
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **CLIP))
    return Encoders(
        stored(t5, folder / "t5.safetensors"),
        stored(clip, folder / "clip.safetensors", "text_model."),
    )


@pytest.fixture(scope="module")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    images = base / "input" / "images"
    shutil.copytree(DEMO / "dataset" / "held_out", images)
    for path, caption in zip(sorted(images.glob("*.txt")), CAPTIONS, strict=True):
        path.write_text(caption, "utf-8")
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    shutil.copy(DEMO / "model" / draw.TRANSFORMER, models / "kontext.safetensors")
    packs = {PACK_NAME: PACK, "for_tests": Path(__file__).with_name("pack_for_tests")}
    with ComfyServer(comfyui.folder, comfyui.python, base, packs=packs) as running:
        yield running


def graph(encoders: Encoders) -> graphs.Graph:
    sizes = json.dumps({"t5xxl_model_config": T5, "model_config": CLIP})
    return {
        "data": graphs.dataset("input/images"),
        "demo": graphs.node("LoraLoom_DemoModel"),
        "clip": graphs.node(
            "LoraLoomTest_TinyTextEncoders",
            t5=str(encoders.t5),
            clip=str(encoders.clip),
            sizes=sizes,
        ),
        "cached": graphs.node(
            "LoraLoom_CacheDataset", dataset=["data", 0], vae=["demo", 1], clip=["clip", 0]
        ),
    }


def encoded(server: ComfyServer, encoders: Encoders) -> str:
    """What the node says that it encoded."""
    run: Run = server.run(graph(encoders))
    assert run.status == "success", dict(run.error or {})
    return run.outputs["cached"]["text"][0]


def entries(server: ComfyServer) -> list[cache.Entry]:
    dataset = Config().dataset.model_copy(
        update={"image_directory": server.base / "input" / "images", "resolution": (64, 64)}
    )
    return cache.plan(Config(dataset=dataset), draw.ARCHITECTURE).entries


def test_native_encoders_give_what_the_engines_own_give(
    server: ComfyServer, encoders: Encoders, comfyui: ComfyUI
) -> None:
    assert encoded(server, encoders).startswith("encoded 4 of 4 images and 4 of 4 captions")
    words = comfyui.folder / "comfy" / "text_encoders" / "t5_tokenizer"
    t5 = load_t5(encoders.t5, words, dtype=torch.float32)
    clip = load_clip(encoders.clip, comfyui.folder / "comfy" / "sd1_tokenizer", dtype=torch.float32)
    autoencoder = draw.ARCHITECTURE.load_autoencoder(
        DEMO / "model" / draw.AUTOENCODER, dtype=torch.float32
    )
    for entry in entries(server):
        text, latents = load_file(entry.text), load_file(entry.latents)["latents"]
        expected = t5.encode([entry.sample.caption], 512)[0]
        assert text["text_embeds"].shape == expected.shape == (512, T5["d_model"])
        # ComfyUI holds the weights in float16 on a CPU, and so are the results stored.
        assert (text["text_embeds"] - expected).abs().max() < 5e-3 * expected.std()
        pooled = clip.encode([entry.sample.caption])[0]
        assert (text["pooled"] - pooled).abs().max() < 5e-3 * pooled.std()
        pixels = media.to_tensor(media.load_image(entry.sample.image))
        own = autoencoder.encode(pixels[None])[0]
        assert (latents - own).abs().max() < 1e-3 * own.std()


def test_only_what_changed_is_encoded_again(server: ComfyServer, encoders: Encoders) -> None:
    encoded(server, encoders)
    images = server.base / "input" / "images"
    (images / "loomling_01.txt").write_text("another caption")
    assert encoded(server, encoders).startswith("encoded 0 of 4 images and 1 of 4 captions")
    shutil.copy(images / "loomling_02.png", images / "loomling_03.png")
    assert encoded(server, encoders).startswith("encoded 1 of 4 images and 0 of 4 captions")


def test_a_deleted_cache_is_made_again(server: ComfyServer, encoders: Encoders) -> None:
    encoded(server, encoders)
    shutil.rmtree(server.base / "input" / "images" / ".loom_cache")
    assert encoded(server, encoders).startswith("encoded 4 of 4 images and 4 of 4 captions")


def test_another_text_encoder_encodes_the_captions_again(
    server: ComfyServer, encoders: Encoders, tmp_path: Path
) -> None:
    encoded(server, encoders)
    state = load_file(encoders.t5)
    state["encoder.final_layer_norm.weight"] *= 1.5
    save_file(state, tmp_path / "t5.safetensors")
    other = Encoders(tmp_path / "t5.safetensors", encoders.clip)
    assert encoded(server, other).startswith("encoded 0 of 4 images and 4 of 4 captions")


def test_a_lora_is_trained_on_what_native_encoders_made(
    server: ComfyServer, encoders: Encoders
) -> None:
    training = graph(encoders) | {
        "model": graphs.training_model("kontext.safetensors"),
        "train": graphs.demo(max_train_steps=2, preview_images=2)["train"],
    }
    training["train"]["inputs"] |= {
        "model": ["model", 0],
        "dataset": ["cached", 0],
        "vae": ["demo", 1],
    }
    training["seen"] = graphs.node("SaveImage", images=["train", 4], filename_prefix="seen")
    run = server.run(training)
    assert run.status == "success", dict(run.error or {})
    assert len(run.outputs["seen"]["images"]) == 2
    assert (server.base / "output" / "loras" / "loomling.safetensors").exists()


def test_without_a_vae_the_previews_are_small_also_of_a_recipe_that_leaves_the_family_open(
    server: ComfyServer, encoders: Encoders
) -> None:
    dit = server.base / "models" / "diffusion_models" / "kontext.safetensors"
    training = graph(encoders) | {
        "recipe": graphs.node(
            "LoraLoom_ConfigFromToml", file="none", toml=f"dit = '{dit}'\nmixed_precision = 'no'"
        ),
        "train": graphs.demo(output_name="small", max_train_steps=1, preview_images=1)["train"],
    }
    training["train"]["inputs"] |= {"model": ["recipe", 0], "dataset": ["cached", 0]}
    training["seen"] = graphs.node("SaveImage", images=["train", 4], filename_prefix="small")
    run = server.run(training)
    assert run.status == "success", dict(run.error or {})
    [seen] = run.outputs["seen"]["images"]
    with Image.open(server.base / "output" / seen["filename"]) as image:
        assert image.size == (8, 8)


def test_the_shipped_flux_workflow_runs_on_small_files(
    server: ComfyServer, encoders: Encoders
) -> None:
    """As it is, but for the text encoders' loader, the sizes and the number of steps."""
    models = server.base / "models"
    for folder, source in {
        "diffusion_models/flux1-kontext-dev.safetensors": draw.TRANSFORMER,
        "vae/ae.safetensors": draw.AUTOENCODER,
    }.items():
        (models / folder).parent.mkdir(exist_ok=True)
        shutil.copy(DEMO / "model" / source, models / folder)
    shutil.copytree(DEMO / "dataset" / "held_out", server.base / "input" / "my_dataset")
    path = PACK / "workflows" / "api" / "flux_kontext_train_and_generate.json"
    workflow = json.loads(path.read_text("utf-8"))
    smaller = {
        "LoraLoom_DatasetFromFolder": {"resolution": 64},
        "LoraLoom_TrainLora": {"max_train_steps": 2},
        "EmptySD3LatentImage": {"width": 64, "height": 64},
    }
    for node in workflow.values():
        node["inputs"] |= smaller.get(node["class_type"], {})
        if node["class_type"] == "DualCLIPLoader":
            node |= graph(encoders)["clip"]
    run = server.run(workflow)
    assert run.status == "success" and not run.node_errors, dict(run.error or {})
    assert (server.base / "output" / "loras" / "my_lora.safetensors").exists()
    assert list((server.base / "output" / "lora_loom").glob("flux_kontext_*.png"))


def test_what_else_a_training_needs_is_encoded_and_drawn_natively(
    server: ComfyServer, encoders: Encoders
) -> None:
    """Prompts, pictures to measure and captions with another word; no encoder of our own."""
    base = server.base
    shutil.copytree(DEMO / "dataset" / "held_out", base / "input" / "creatures")
    shutil.copytree(DEMO / "dataset" / "held_out", base / "input" / "held out")
    shutil.rmtree(base / "input" / "held out" / ".loom_cache", ignore_errors=True)
    loss = {"loss_type": "mse", "huber_c": 0.1, "noise_offset": 0.0, "unmasked_weight": 0.0}
    loss |= {"prior_loss_weight": 1.0, "trigger_word": "loomling", "preservation_class": "shape"}
    loss |= {"preservation_weight": 1.0, "regularization_target": "image"}
    training = graph(encoders) | {
        "data": graphs.dataset("input/creatures"),
        "loss": graphs.node("LoraLoom_Loss", **loss),
        "validation": graphs.node(
            "LoraLoom_Validation",
            validation_folder="input/held out",
            validation_split=0.0,
            validate_every_n_steps=1,
            early_stop_patience=0,
            keep_best=False,
            validation_times=1,
        ),
        "samples": graphs.node(
            "LoraLoom_SamplePrompts",
            sample_lines=f"{graphs.CAPTION} --s 2",
            sample_every_n_steps=2,
            sample_every_n_epochs=0,
            sample_at_first=False,
        ),
        "model": graphs.training_model("kontext.safetensors"),
        "train": graphs.demo(output_name="native", max_train_steps=2)["train"],
    }
    further = {name: [name, 0] for name in ("loss", "validation", "samples")}
    training["cached"]["inputs"] |= further
    training["train"]["inputs"] |= further | {
        "model": ["model", 0],
        "dataset": ["cached", 0],
        "vae": ["demo", 1],
    }
    training["seen"] = graphs.node("SaveImage", images=["train", 6], filename_prefix="native")
    run = server.run(training)
    assert run.status == "success", dict(run.error or {})
    [seen] = run.outputs["seen"]["images"]
    with Image.open(base / "output" / seen["filename"]) as image:
        assert image.size == (64, 64)
    # Decoded by ComfyUI's VAE while the training went on.
    assert (base / "output" / "loras" / "samples" / "native-step00000002-00.png").exists()
