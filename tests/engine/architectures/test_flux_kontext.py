"""The adapter's forward pass, gradients and LoRA targets; its files have tests of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pack.engine.architectures.flux_kontext import TABLE, FluxKontext
from pack.engine.key_table import fusions
from pack.engine.layer_names import published_layers
from pack.engine.lora_targets import select
from pack.tests.conftest import ROOT
from pack.tests.references import flux_reference, tiny_checkpoints
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KONTEXT = FluxKontext()
# What the reference may differ by, in standard deviations of its output.
PARITY = 5e-5


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
    assert difference <= PARITY * reference.std()


@pytest.mark.parametrize("case", ["flux_t2i", "flux_kontext"])
def test_our_slow_reference_agrees_with_that_implementation(case: str) -> None:
    state, inputs = tiny_checkpoints.build(case)
    published = load_file(ROOT / "tests/data/parity" / f"{case}.safetensors")["velocity"]
    controls = [inputs["control_latents"]] if "control_latents" in inputs else []
    output = flux_reference.velocity(
        state,
        flux_reference.Inputs(
            inputs["noisy_latents"],
            inputs["t"],
            inputs["text_embeds"],
            inputs["pooled"],
            inputs["guidance"],
            [flux_reference.Placed(latents, top=0, left=0) for latents in controls],
        ),
    )
    assert (output - published).abs().max() <= PARITY * published.std()


class Case(NamedTuple):
    """Sizes of a random model and its inputs; latent sizes are (height, width).

    ``controls`` are (height, width, top, left): the position of the first token was worked out by
    hand from the rule "to the right of those before it if that keeps the whole less wide than it
    would be high below them, else below", counted in tokens of 2x2 latents.
    """

    hidden: int = 128
    depth: int = 1
    single: int = 1
    text_width: int = 64
    pooled_width: int = 32
    text_tokens: int = 12
    size: tuple[int, int] = (8, 8)
    t: tuple[float, ...] = (0.25, 0.9)
    guidance: tuple[float, ...] | None = (3.5, 1.0)
    controls: tuple[tuple[int, int, int, int], ...] = ()


CASES = {
    "one block of each": Case(),
    "wide and deep": Case(hidden=384, depth=3, single=4, text_width=80, pooled_width=48),
    "no single blocks": Case(depth=2, single=0),
    "a flat picture": Case(size=(6, 10), text_tokens=7),
    "a tall picture": Case(size=(22, 2), text_tokens=1),
    "both ends of time": Case(t=(0.0, 1.0)),
    "one picture of the batch": Case(t=(0.5,), guidance=(30.0,)),
    "without guidance": Case(guidance=None, depth=2, single=2),
    "a control image of another size": Case(controls=((10, 6, 0, 0),)),
    "the second below": Case(controls=((6, 10, 0, 0), (8, 8, 3, 0))),
    "the second to the right": Case(size=(6, 10), controls=((12, 4, 0, 0), (4, 8, 0, 2))),
    "three of them": Case(controls=((6, 10, 0, 0), (8, 8, 3, 0), (4, 4, 0, 5)), guidance=None),
}


def random_case(case: Case, seed: int) -> tuple[dict[str, Tensor], flux_reference.Inputs]:
    state = tiny_checkpoints.flux(
        hidden=case.hidden,
        depth=case.depth,
        single=case.single,
        text_width=case.text_width,
        pooled_width=case.pooled_width,
        guidance=case.guidance is not None,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for name in state:
        if name.endswith(".scale"):  # all ones would hide one in another's place
            state[name] = 1 + 0.3 * draw(128)
    batch = len(case.t)
    return state, flux_reference.Inputs(
        draw(batch, 16, *case.size),
        torch.tensor(case.t),
        draw(batch, case.text_tokens, case.text_width),
        draw(batch, case.pooled_width),
        torch.tensor(case.guidance) if case.guidance else None,
        [
            flux_reference.Placed(draw(batch, 16, height, width), top, left)
            for height, width, top, left in case.controls
        ],
    )


def reference_velocity(
    state: dict[str, Tensor], inputs: flux_reference.Inputs, **axes: Any
) -> Tensor:
    """In float64, so that all rounding that is seen is ours."""
    exact = flux_reference.Inputs(
        *(value.double() if isinstance(value, Tensor) else value for value in inputs[:5]),
        [control._replace(latents=control.latents.double()) for control in inputs.controls],
    )
    return flux_reference.velocity(
        {name: value.double() for name, value in state.items()}, exact, **axes
    )


@torch.no_grad()
def our_velocity(transformer: nn.Module, inputs: flux_reference.Inputs) -> Tensor:
    given = {"text_embeds": inputs.text_BL, "pooled": inputs.pooled_B}
    if inputs.guidance_B is not None:
        given["guidance"] = inputs.guidance_B
    for index, control in enumerate(inputs.controls):
        given[f"control_latents_{index}"] = control.latents[:, :, None]
    noisy = inputs.noisy_BChw[:, :, None]
    return KONTEXT.predict_velocity(transformer, noisy, inputs.t_B, given)[:, :, 0]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_forward_equals_the_published_formulas_at_any_size(
    tmp_path: Path, name: str, seed: int
) -> None:
    state, inputs = random_case(CASES[name], seed)
    expected = reference_velocity(state, inputs)
    difference = (our_velocity(load(state, tmp_path), inputs) - expected).abs().max()
    assert difference <= PARITY * expected.std()


def test_a_diffusers_folder_keeps_its_own_axes(tmp_path: Path) -> None:
    """How a head is divided among the axes stands in config.json alone."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 14, 10),
    )
    for name, parameter in transformer.named_parameters():
        if ".norm_" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape)
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    shards = sorted((tmp_path / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    _, inputs = random_case(CASES["the second below"], seed=3)
    expected = reference_velocity(
        KONTEXT.published_state_dict(transformer), inputs, axes=(8, 14, 10)
    )

    for path in (tmp_path, tmp_path / "transformer", shards[1]):
        output = our_velocity(KONTEXT.load_transformer(path, dtype=torch.float32), inputs)
        assert (output - expected).abs().max() <= PARITY * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_and_models_stay_close(tmp_path: Path, dtype: torch.dtype) -> None:
    state, inputs = tiny_checkpoints.build("flux_kontext", seed=3)
    expected = velocity(load(state, tmp_path), inputs)
    halves = {name: value.to(dtype) for name, value in state.items()}
    for model_dtype in (torch.float32, dtype):
        transformer = load(halves, tmp_path, model_dtype)
        published = KONTEXT.published_state_dict(transformer)
        assert all(torch.equal(published[name], halves[name].to(model_dtype)) for name in state)
        output = velocity(transformer, inputs)
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
    layers = published_layers(KONTEXT.layer_names, transformer)
    shapes = {name: layer.shape for name, layer in layers.items()}
    targets = {name: layers[name].inner for name in select(shapes, KONTEXT.layer_names)}
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
