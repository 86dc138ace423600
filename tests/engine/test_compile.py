from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.compile import (
    CompileSettings,
    check,
    compile_blocks,
    compiled_graphs,
    explained,
    uncompiled,
)
from pack.engine.config_types import DYNAMO_BACKENDS
from pack.engine.errors import ConfigError, EngineError
from pack.engine.networks.network import Network
from pack.tests.engine.jobs import tiny
from torch import Tensor, nn

CPU = torch.device("cpu")
FLUX = FluxKontext()
EAGER = CompileSettings("EAGER", fullgraph=True)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Each test has a compiler that has seen nothing and has the limits it begins with."""
    config = torch._dynamo.config
    limits = config.recompile_limit, config.accumulated_recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    config.recompile_limit, config.accumulated_recompile_limit = limits


class Block(nn.Module):
    """What every real block has: a linear layer that gets an adapter, and something after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def flux(*, num_double: int = 1, num_single: int = 2) -> tuple[nn.Module, Network]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=num_double,
        num_single_layers=num_single,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
    )
    transformer = transformer.requires_grad_(False).train()
    network = tiny.put_lora(transformer, rank=4)
    for [parameter] in (adapter.up_side() for adapter in network.adapters.values()):
        nn.init.normal_(parameter, std=0.02)
    return transformer, network


def loss_and_gradient(
    transformer: nn.Module, network: Network, *, side: int = 4
) -> tuple[Tensor, Tensor]:
    """Of one batch of ``side`` x ``side`` latents, always the same."""
    generator = torch.Generator().manual_seed(side)
    for parameter in network.parameters():
        parameter.grad = None
    velocity = FLUX.predict_velocity(
        transformer,
        torch.randn(1, 16, 1, side, side, generator=generator),
        torch.full((1,), 0.3),
        {
            "text_embeds": torch.randn(1, 8, 16, generator=generator),
            "pooled": torch.randn(1, 16, generator=generator),
            "guidance": torch.ones(1),
        },
    )
    loss = velocity.square().mean()
    loss.backward()
    grads = [parameter.grad for parameter in network.parameters()]
    return loss.detach(), torch.cat([grad.flatten() for grad in grads if grad is not None])


def test_blocks_with_adapters_are_one_graph_each_and_give_the_same_bits() -> None:
    expected = loss_and_gradient(*flux())
    transformer, network = flux()
    before = compiled_graphs()
    # With fullgraph a break in the graph is an error.
    compile_blocks(FLUX.blocks(transformer), EAGER, num_shapes=1)
    assert all(map(torch.equal, loss_and_gradient(transformer, network), expected))
    # The first block of the double ones gets inputs without a gradient; the others share theirs.
    first = compiled_graphs() - before
    assert 1 <= first <= 3
    loss_and_gradient(transformer, network)
    assert compiled_graphs() - before == first


def test_names_and_identities_stay() -> None:
    transformer, network = flux()
    names = list(transformer.state_dict())
    modules = [id(module) for module in transformer.modules()]
    compile_blocks(FLUX.blocks(transformer), EAGER, num_shapes=1)
    loss_and_gradient(transformer, network)
    assert list(transformer.state_dict()) == names
    assert [id(module) for module in transformer.modules()] == modules


def test_checkpointing_uses_the_compiled_blocks_and_changes_no_bit() -> None:
    transformer, network = flux()
    compile_blocks(FLUX.blocks(transformer), EAGER, num_shapes=1)
    expected = loss_and_gradient(transformer, network)
    before = compiled_graphs()
    transformer.enable_gradient_checkpointing()
    assert all(map(torch.equal, loss_and_gradient(transformer, network), expected))
    assert compiled_graphs() == before


def test_no_number_of_shapes_is_too_many() -> None:
    blocks = [Block() for _ in range(2)]
    for block in blocks:
        block.requires_grad_(False)
    num_shapes = 20  # PyTorch's own limit is 8
    compile_blocks(blocks, EAGER, num_shapes=num_shapes)
    before = compiled_graphs()
    for length in range(2, num_shapes + 2):
        blocks[1](blocks[0](torch.ones(length, 8)))
    assert compiled_graphs() - before == num_shapes


def test_dynamic_compiles_once_for_all_shapes() -> None:
    block = Block().requires_grad_(False)
    settings = CompileSettings("EAGER", fullgraph=True, dynamic=True)
    compile_blocks([block], settings, num_shapes=20)
    before = compiled_graphs()
    for length in range(2, 22):
        block(torch.ones(length, 8))
    assert compiled_graphs() - before == 1


def test_adapters_can_be_turned_off_and_on_again() -> None:
    transformer, network = flux(num_single=1)
    expected = loss_and_gradient(transformer, network)
    compile_blocks(FLUX.blocks(transformer), EAGER, num_shapes=1)
    assert torch.equal(loss_and_gradient(transformer, network)[0], expected[0])
    block, given = FLUX.blocks(transformer)[1], torch.ones(1, 2, 128)
    embedding, rotary = torch.ones(1, 128), (torch.ones(4, 128), torch.zeros(4, 128))

    def output() -> Tensor:
        with torch.no_grad():
            return block(given, given, embedding, rotary)[1]

    adapted = output()
    with network.disabled():
        assert not torch.equal(output(), adapted)
    assert torch.equal(output(), adapted)


def test_inside_uncompiled_nothing_is_compiled() -> None:
    block = Block()
    compile_blocks([block], EAGER, num_shapes=1)
    before = compiled_graphs()
    with uncompiled():
        block(torch.ones(3, 8))
    assert compiled_graphs() == before
    block(torch.ones(3, 8))
    assert compiled_graphs() == before + 1


def test_without_a_backend_nothing_is_changed() -> None:
    block = Block()
    compile_blocks([block], CompileSettings(), num_shapes=1)
    before = compiled_graphs()
    with explained(CompileSettings()):
        block(torch.ones(3, 8))
    assert compiled_graphs() == before
    check(CompileSettings(mode="max-autotune"), CPU)


def test_every_backend_works_or_says_what_does() -> None:
    """All that accelerate names; on a machine without accelerators three of them work."""
    works: list[str] = []
    for backend in DYNAMO_BACKENDS:
        try:
            check(CompileSettings(backend), CPU)
        except ConfigError as error:
            assert str(error).startswith(f"dynamo_backend = '{backend}': ")
            assert "; use INDUCTOR" in str(error) and "\n" not in str(error)
            continue
        works.append(backend)
    assert works == ["NO", "EAGER", "AOT_EAGER", "INDUCTOR"]


def test_a_backend_that_is_there_but_lacks_its_package_says_which() -> None:
    with pytest.raises(ConfigError, match=r"'TVM': it does not work here \(.*apache-tvm"):
        check(CompileSettings("TVM"), CPU)


def test_a_mode_is_for_inductor_only() -> None:
    with pytest.raises(ConfigError, match="dynamo_mode = 'max-autotune': only .* INDUCTOR has"):
        check(CompileSettings("AOT_EAGER", mode="max-autotune"), CPU)


@pytest.mark.skipif(os.name == "nt", reason="the compiler is found in another way there")
def test_inductor_without_a_compiler_is_refused_at_once() -> None:
    from torch._inductor import config
    from torch._inductor.cpp_builder import cpp_compiler_search

    cpp_compiler_search.cache_clear()
    try:
        with (
            config.patch({"cpp.cxx": (None, "no-such-compiler")}),
            pytest.raises(ConfigError, match="'INDUCTOR': it needs a C.. compiler; install g"),
        ):
            check(CompileSettings("INDUCTOR"), CPU)
    finally:
        cpp_compiler_search.cache_clear()
    check(CompileSettings("INDUCTOR"), CPU)


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_a_break_in_the_graph_is_explained_when_it_is_not_wanted() -> None:
    block = Breaking()
    compile_blocks([block], EAGER, num_shapes=1)
    with (
        pytest.raises(
            EngineError, match="'EAGER': the model could not be compiled .*dynamo_fullgraph off"
        ),
        explained(EAGER),
    ):
        block(torch.ones(2))


def test_a_break_in_the_graph_is_no_error_otherwise() -> None:
    block = Breaking()
    compile_blocks([block], CompileSettings("EAGER"), num_shapes=1)
    assert torch.equal(block(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["AOT_EAGER", "INDUCTOR"])
def test_compiled_blocks_compute_what_they_did(backend: str) -> None:
    """Loss and gradient to the rounding of float32 sums in another order."""
    expected = loss_and_gradient(*flux())
    transformer, network = flux()
    settings = CompileSettings(backend, fullgraph=True)
    compile_blocks(FLUX.blocks(transformer), settings, num_shapes=1)
    loss, gradient = loss_and_gradient(transformer, network)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    largest = expected[1].abs().max().item()
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.slow
def test_inductor_computes_the_same_for_shapes_it_has_not_seen() -> None:
    block = Block().requires_grad_(False)
    given = [torch.randn(length, 8) for length in (3, 5, 9)]
    expected = [block(x) for x in given]
    settings = CompileSettings("INDUCTOR", fullgraph=True, dynamic=True)
    compile_blocks([block], settings, num_shapes=3)
    for x, output in zip(given, expected, strict=True):
        torch.testing.assert_close(block(x), output)


@pytest.mark.slow
def test_compiling_again_gives_the_same_bits_whatever_came_before() -> None:
    """What a run that is continued does: another process compiles, and sees other shapes first."""
    settings = CompileSettings("INDUCTOR", fullgraph=True)
    runs: list[list[Tensor]] = []
    for sides in ((4, 6), (6, 4)):
        torch._dynamo.reset()
        transformer, network = flux()
        compile_blocks(FLUX.blocks(transformer), settings, num_shapes=2)
        results = {side: loss_and_gradient(transformer, network, side=side) for side in sides}
        runs.append([*results[4], *results[6]])
    assert all(map(torch.equal, *runs))


@pytest.mark.gpu
def test_inductor_on_a_gpu_computes_the_same() -> None:
    settings = CompileSettings("INDUCTOR", fullgraph=True)
    check(settings, torch.device("cuda"))
    torch.manual_seed(0)
    block = Block().cuda()
    x = torch.randn(64, 8, device="cuda")
    expected = block(x)
    compile_blocks([block], settings, num_shapes=1)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)
