from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pack.engine.activations import peak_bytes
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.tests.engine.jobs import tiny
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

FLUX = FluxKontext()
KIB = 2**10


class Chain(nn.Module):
    """Tanh keeps its output for the backward pass and nothing else."""

    def __init__(self, num_blocks: int, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Tanh() for _ in range(num_blocks))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


def chain_loss(chain: Chain) -> Callable[[], Tensor]:
    given = torch.empty(KIB, device="meta", requires_grad=True)
    return lambda: chain(given).sum()


@pytest.mark.parametrize("num_blocks", [1, 2, 10])
@pytest.mark.parametrize("standing_in", [False, True])
def test_the_peak_of_a_chain_is_what_it_keeps(num_blocks: int, standing_in: bool) -> None:
    chain = Chain(num_blocks)
    peak = peak_bytes(chain_loss(chain), list(chain.blocks) if standing_in else [])
    # In the backward pass of the last block: all outputs, one gradient that comes and one that
    # goes; the sum and its gradient are 4 bytes each.
    kept = (num_blocks + 1) * 4 * KIB
    assert kept <= peak <= kept + 4 * KIB + 16


@pytest.mark.parametrize("standing_in", [False, True])
def test_with_checkpointing_only_what_goes_between_blocks_is_kept(standing_in: bool) -> None:
    peaks: list[int] = []
    for num_blocks in (4, 8):
        chain = Chain(num_blocks, checkpointing=True)
        peaks.append(peak_bytes(chain_loss(chain), list(chain.blocks) if standing_in else []))
    # Four more blocks: four more inputs.
    assert peaks[1] - peaks[0] == 4 * 4 * KIB


def test_weights_and_views_of_them_are_not_counted() -> None:
    layer = nn.Linear(2 * KIB, 2 * KIB, device="meta").requires_grad_(False)
    given = torch.empty(1, 2 * KIB, device="meta", requires_grad=True)
    # The weight is 16 MiB and used transposed; input and output are 8 KiB.
    assert peak_bytes(lambda: layer(given).sum(), []) < 64 * KIB


def test_gradients_of_what_is_trained_are_counted() -> None:
    layer = nn.Linear(2 * KIB, 2 * KIB, bias=False, device="meta")
    given = torch.empty(1, 2 * KIB, device="meta")
    gradient = 4 * (2 * KIB) ** 2
    assert gradient <= peak_bytes(lambda: layer(given).sum(), []) < gradient + 64 * KIB


def test_attention_does_not_make_the_matrix_of_all_pairs() -> None:
    num_tokens, width = 4096, 8
    given = torch.empty(1, 1, num_tokens, width, device="meta", requires_grad=True)

    def loss() -> Tensor:
        return F.scaled_dot_product_attention(given, given, given).sum()

    row = 4 * num_tokens * width
    # Output, one number per token, and the gradients of all of them.
    assert peak_bytes(loss, []) < 7 * row < 4 * num_tokens**2


def flux(*, num_double: int, num_single: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            num_layers=num_double,
            num_single_layers=num_single,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=True,
        )
        transformer = transformer.requires_grad_(False).train()
        tiny.put_lora(transformer, rank=8)
    return transformer


def flux_peak(transformer: nn.Module, *, device: str, standing_in: bool) -> int:
    def loss() -> Tensor:
        velocity = FLUX.predict_velocity(
            transformer,
            torch.zeros(1, 16, 1, 32, 32, device=device),
            torch.full((1,), 0.3, device=device),
            {
                "text_embeds": torch.zeros(1, 64, 64, device=device),
                "pooled": torch.zeros(1, 32, device=device),
                "guidance": torch.ones(1, device=device),
            },
        )
        return velocity.square().mean()

    return peak_bytes(loss, FLUX.blocks(transformer) if standing_in else [])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_real_pass_allocates(checkpointing: bool) -> None:
    """On the CPU nothing stands in for anything: every block runs, with real attention."""
    transformer = flux(num_double=2, num_single=4)
    real = flux(num_double=2, num_single=4).to_empty(device="cpu")
    with torch.no_grad():
        for weight in real.parameters():
            weight.zero_()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
        real.enable_gradient_checkpointing()
    measured = flux_peak(real, device="cpu", standing_in=False)
    estimated = flux_peak(transformer, device="meta", standing_in=True)
    # Of 34 to 116 activations: a block that is stood in for holds one a moment longer, and the
    # real attention puts its three gradients down in another order.
    activation = 4 * (64 + 256) * 256
    assert measured <= estimated <= measured + 4 * activation


def test_a_block_is_itself_again_afterwards() -> None:
    chain = Chain(3)
    peak_bytes(chain_loss(chain), list(chain.blocks))
    assert all("forward" not in vars(block) for block in chain.blocks)


def test_blocks_of_other_sizes_are_followed_through_by_themselves() -> None:
    class Widening(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x.repeat(self.times))

    given = torch.empty(KIB, device="meta", requires_grad=True)
    blocks = [Widening(1), Widening(2), Widening(2)]

    def loss() -> Tensor:
        x = given
        for block in blocks:
            x = block(x)
        return x.sum()

    exact = peak_bytes(loss, [])
    # The second and third differ in the size of their input; at most one of them is left over.
    assert exact <= peak_bytes(loss, blocks) <= exact + 4 * 4 * KIB
