from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pack.engine.architectures import ARCHITECTURES, find_architecture
from pack.engine.architectures.flux_kontext import TABLE, FluxKontext
from pack.engine.errors import CheckpointError
from pack.engine.key_table import fusions
from pack.tests.conftest import ROOT
from pack.tests.references import tiny_checkpoints
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KONTEXT = FluxKontext()


def conditions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    given = {name: inputs[name] for name in ("text_embeds", "pooled", "guidance")}
    if "control_latents" in inputs:
        given["control_latents_0"] = inputs["control_latents"][:, :, None]
    return given


@torch.no_grad()
def velocity(transformer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    noisy = inputs["noisy_latents"][:, :, None]
    output = KONTEXT.predict_velocity(transformer, noisy, inputs["t"], conditions(inputs))
    assert output.shape == noisy.shape
    return output[:, :, 0]


def load(state: dict[str, Tensor], folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    save_file(state, folder / "flux.safetensors")
    return KONTEXT.load_transformer(folder / "flux.safetensors", dtype=dtype)


@pytest.mark.parametrize("case", ["flux_t2i", "flux_kontext"])
def test_the_forward_equals_an_independent_implementation(tmp_path: Path, case: str) -> None:
    state, inputs = tiny_checkpoints.build(case)
    reference = load_file(ROOT / "tests/data/parity" / f"{case}.safetensors")["velocity"]
    difference = (velocity(load(state, tmp_path), inputs) - reference).abs().max()
    assert difference <= 5e-5 * reference.std()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("size", ["small", "large"])
def test_published_weights_come_back_after_loading_at_any_size(
    tmp_path: Path, prefix: str, size: str
) -> None:
    state, _ = tiny_checkpoints.build("flux_t2i", seed=5, size=size)
    transformer = load({prefix + name: value for name, value in state.items()}, tmp_path)
    published = KONTEXT.published_state_dict(transformer)
    assert published.keys() == state.keys()
    assert all(torch.equal(published[name], state[name]) for name in state)
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_all_ways_of_storing_a_model_give_the_same_output(tmp_path: Path) -> None:
    state, inputs = tiny_checkpoints.build("flux_kontext", seed=2, size="large")
    transformer = load(state, tmp_path)
    expected = velocity(transformer, inputs)

    names = sorted(state)
    for part in (1, 2, 3):
        chosen = {name: state[name] for name in names[part - 1 :: 3]}
        save_file(chosen, tmp_path / f"split-{part:05d}-of-00003.safetensors")
    whole = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    extra = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    save_file(whole | extra, tmp_path / "checkpoint.safetensors")
    folder = tmp_path / "pipeline" / "transformer"
    transformer.save_pretrained(folder)

    for path in (
        tmp_path / "split-00002-of-00003.safetensors",
        tmp_path / "checkpoint.safetensors",
        folder,
        folder.parent,
    ):
        assert find_architecture("auto", path if path != folder.parent else folder).name == (
            "flux_kontext"
        )
        again = KONTEXT.load_transformer(path, dtype=torch.float32)
        assert torch.equal(velocity(again, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_and_models_stay_close(tmp_path: Path, dtype: torch.dtype) -> None:
    state, inputs = tiny_checkpoints.build("flux_kontext", seed=3)
    expected = velocity(load(state, tmp_path), inputs)
    halves = {name: value.to(dtype) for name, value in state.items()}
    for model_dtype in (torch.float32, dtype):
        output = velocity(load(halves, tmp_path, model_dtype), inputs)
        error = (output.float() - expected).norm() / expected.norm()
        assert error < (0.02 if dtype == torch.bfloat16 else 0.004)


def test_time_is_not_rounded_in_a_bf16_model(tmp_path: Path) -> None:
    """0.5 and 0.5009 are one number in bfloat16 but not the same time."""
    state, inputs = tiny_checkpoints.build("flux_t2i", seed=4)
    transformer = load(state, tmp_path, torch.bfloat16)
    seen: list[Tensor] = []
    embedding = transformer.get_submodule("time_text_embed.time_proj")
    hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    velocity(transformer, inputs | {"t": torch.tensor([0.5, 0.5009])})
    hook.remove()
    assert seen[0].tolist() == pytest.approx([500.0, 500.9], abs=1e-3)
    assert seen[1].tolist() == [2500.0, 1000.0]


def test_a_batch_gives_what_its_entries_give_alone(tmp_path: Path) -> None:
    state, inputs = tiny_checkpoints.build("flux_kontext", seed=6)
    transformer = load(state, tmp_path)
    together = velocity(transformer, inputs)
    for index in range(2):
        alone = velocity(
            transformer, {name: value[index : index + 1] for name, value in inputs.items()}
        )
        torch.testing.assert_close(together[index : index + 1], alone, atol=2e-5, rtol=1e-4)


def test_a_second_control_image_changes_the_output_and_has_its_own_place(tmp_path: Path) -> None:
    state, inputs = tiny_checkpoints.build("flux_kontext", seed=7)
    transformer = load(state, tmp_path)
    noisy, t = inputs["noisy_latents"][:, :, None], inputs["t"]
    given = conditions(inputs)
    first = given["control_latents_0"]
    with torch.no_grad():
        one = KONTEXT.predict_velocity(transformer, noisy, t, given)
        two = KONTEXT.predict_velocity(transformer, noisy, t, given | {"control_latents_1": first})
        swapped = KONTEXT.predict_velocity(
            transformer,
            noisy,
            t,
            given | {"control_latents_0": -first, "control_latents_1": first},
        )
        reverse = KONTEXT.predict_velocity(
            transformer, noisy, t, given | {"control_latents_1": -first}
        )
    assert not torch.allclose(one, two, atol=1e-4)
    assert not torch.allclose(swapped, reverse, atol=1e-4)


def test_the_gradient_is_the_slope_of_the_output(tmp_path: Path) -> None:
    state, inputs = tiny_checkpoints.build("flux_kontext", seed=8)
    transformer = load({name: value.double() for name, value in state.items()}, tmp_path)
    transformer = transformer.double()
    noisy = inputs["noisy_latents"][:, :, None].double().requires_grad_()
    given = {name: value.double() for name, value in conditions(inputs).items()}
    direction = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0)).double()

    def total(x: Tensor) -> Tensor:
        return KONTEXT.predict_velocity(transformer, x, inputs["t"].double(), given).square().sum()

    (gradient,) = torch.autograd.grad(total(noisy), noisy)
    with torch.no_grad():
        slope = (total(noisy + 1e-3 * direction) - total(noisy - 1e-3 * direction)) / 2e-3
    # The library computes rotary embeddings in float32, which limits the precision of the slope.
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_gradient_checkpointing_does_not_change_gradients(tmp_path: Path) -> None:
    state, inputs = tiny_checkpoints.build("flux_kontext", seed=9, size="large")
    gradients = []
    for checkpointing in (False, True):
        transformer = load(state, tmp_path).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        noisy = inputs["noisy_latents"][:, :, None].clone().requires_grad_()
        output = KONTEXT.predict_velocity(transformer, noisy, inputs["t"], conditions(inputs))
        gradients.append(torch.autograd.grad(output.square().sum(), noisy)[0])
    assert torch.equal(*gradients)


def test_a_real_size_model_has_the_published_lora_targets() -> None:
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    targets = KONTEXT.lora_targets(transformer)
    assert len(targets) == 228
    assert targets["double_blocks.18.txt_mlp.2"] == ("transformer_blocks.18.ff_context.net.2",)
    assert [name.rsplit(".", 1)[1] for name in targets["single_blocks.37.linear1"]] == [
        "to_q",
        "to_k",
        "to_v",
        "proj_mlp",
    ]
    named = {inner for fusion in fusions(TABLE, transformer) for inner in fusion.inner}
    owners = {name.rsplit(".", 1)[0] for name in transformer.state_dict()}
    assert named == owners


def test_the_shift_for_a_megapixel_is_the_published_one() -> None:
    assert KONTEXT.timestep_shift(128, 128) == pytest.approx(3.15819, abs=1e-5)


WRONG_FILES = {
    "vae": ({"encoder.down.0.block.0.conv1.weight": 0, "decoder.conv_in.weight": 0}, "VAE"),
    "lora": ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": 0}, "a LoRA file"),
    "wan": ({"blocks.0.self_attn.q.weight": 0, "patch_embedding.weight": 0}, "a Wan transformer"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": 0}, "a T5 text encoder"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    keys, expected = WRONG_FILES[kind]
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in keys}, path)
    for attempt in (
        lambda: KONTEXT.load_transformer(path, dtype=torch.float32),
        lambda: find_architecture("auto", path),
    ):
        with pytest.raises(CheckpointError, match=expected) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_missing_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    state, _ = tiny_checkpoints.build("flux_t2i")
    without = {
        name: value for name, value in state.items() if name != "single_blocks.0.linear2.bias"
    }
    with pytest.raises(CheckpointError, match="single_blocks.0.linear2.bias is missing"):
        load(without, tmp_path)
    with pytest.raises(CheckpointError, match="what_is_this does not belong"):
        load(state | {"what_is_this": torch.zeros(1)}, tmp_path)


def test_a_variant_with_more_input_channels_is_refused(tmp_path: Path) -> None:
    state, _ = tiny_checkpoints.build("flux_t2i")
    state["img_in.weight"] = torch.zeros(128, 384)
    with pytest.raises(CheckpointError, match="takes 384 channels"):
        load(state, tmp_path)


def test_the_architecture_can_be_named_when_there_is_no_file() -> None:
    assert find_architecture("flux_kontext", None) is ARCHITECTURES["flux_kontext"]
    with pytest.raises(CheckpointError, match="set architecture to one of"):
        find_architecture("auto", None)


def test_a_diffusers_config_is_not_needed(tmp_path: Path) -> None:
    """Everything comes from the tensors' shapes, so a bare file in diffusers' layout is enough."""
    state, inputs = tiny_checkpoints.build("flux_t2i", seed=11)
    transformer = load(state, tmp_path)
    path = tmp_path / "diffusers.safetensors"
    save_file(dict(transformer.state_dict()), path)
    again = KONTEXT.load_transformer(path, dtype=torch.float32)
    assert torch.equal(velocity(again, inputs), velocity(transformer, inputs))
    assert json.loads(again.to_json_string())["num_layers"] == 1
