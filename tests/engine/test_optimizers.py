from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.engine import optimizers
from pack.engine.config_types import OPTIMIZERS
from pack.engine.errors import ConfigError
from pack.engine.optimizer_classes import CLASSES
from pack.engine.optimizers import ParameterGroup
from pack.engine.plugins import WELL_KNOWN
from torch import Tensor, nn
from torch.optim import Optimizer

SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")


def make(
    name: str,
    *parameters: nn.Parameter,
    lr: float = 0.01,
    warmup_steps: int = 0,
    allowed: tuple[str, ...] = WELL_KNOWN,
    **arguments: Any,
) -> Optimizer:
    groups = [ParameterGroup("lora", parameters)]
    return optimizers.create(
        name, groups, lr=lr, arguments=arguments, allowed=allowed, warmup_steps=warmup_steps
    )


def matrix(rows: int = 64, columns: int = 72, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(rows, columns, generator=generator))


def refusal(name: str, arguments: dict[str, Any], *allowed: str) -> str:
    with pytest.raises(ConfigError) as caught:
        optimizers.check(name, arguments, (*WELL_KNOWN, *allowed))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_optimizer_that_settings_know_has_a_class() -> None:
    assert tuple(CLASSES) == OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_works_without_arguments(name: str) -> None:
    optimizers.check(name, {}, WELL_KNOWN)


# What they compute


def test_adamw_takes_the_steps_of_the_formula() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make("AdamW", parameter, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)

    expected = parameter.detach().double()
    first, second = torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(1, 4):
        gradient = torch.tensor([0.5 * step, -1.0])
        parameter.grad = gradient.clone()
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["AdamW", "torch.optim.AdamW"])
def test_adamw_is_one_fused_kernel_unless_another_is_asked_for(name: str) -> None:
    assert make(name, matrix()).param_groups[0]["fused"] is True
    assert make(name, matrix(), foreach=False).param_groups[0]["fused"] is True
    for other in ({"fused": False}, {"foreach": True}, {"differentiable": True}):
        assert not make(name, matrix(), **other).param_groups[0]["fused"]


class PaperScheduleFree:
    """The sequences x, y and z of arXiv:2405.15682, algorithm 1, one tensor operation a line.

    As in the authors' package, the weights of the average are made from the learning rate before
    Adam's bias correction.
    """

    def __init__(self, start: Tensor, lr: float, beta: float, decay: float) -> None:
        self.x, self.z = start.clone(), start.clone()
        self.lr, self.beta, self.decay = lr, beta, decay
        self.sum_of_weights = self.highest_rate = 0.0

    @property
    def y(self) -> Tensor:
        return (1 - self.beta) * self.z + self.beta * self.x

    def step(self, direction: Tensor, scale: float) -> None:
        rate, y = self.lr * scale, self.y
        self.highest_rate = max(self.highest_rate, rate)
        weight = self.highest_rate**2
        self.sum_of_weights += weight
        share = weight / self.sum_of_weights if weight else 0.0
        self.z = self.z - rate * (direction + self.decay * y)
        self.x = (1 - share) * self.x + share * self.z


def warmup(step: int, steps: int) -> float:
    return min(1.0, step / steps)


def rectification(step: int, beta2: float) -> float:
    """Liu et al. 2020, arXiv:1908.03265, algorithm 2; 0 where the variance is intractable."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= 4:
        return 0.0
    return math.sqrt(
        (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    )


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_optimizers_follow_the_sequences_of_the_paper(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    curvature = torch.linspace(0.5, 4, 6, dtype=torch.float64)
    beta1, beta2, eps, warmup_steps = 0.9, 0.99, 1e-8, 7
    adam = name != "SGDScheduleFree"
    arguments = {"betas": (beta1, beta2), "eps": eps} if adam else {"momentum": beta1}

    parameter = nn.Parameter(start.clone())
    optimizer = make(
        name, parameter, lr=0.05, warmup_steps=warmup_steps, weight_decay=0.01, **arguments
    )
    paper = PaperScheduleFree(start, lr=0.05, beta=beta1, decay=0.01)
    second = torch.zeros_like(start)
    for step in range(1, 31):
        gradient = curvature * paper.y
        parameter.grad = (curvature * parameter).detach()
        optimizer.step()

        second = beta2 * second + (1 - beta2) * gradient**2
        normalized = gradient / ((second / (1 - beta2**step)).sqrt() + eps)
        rectified = name == "RAdamScheduleFree"
        scale = rectification(step, beta2) if rectified else warmup(step, warmup_steps)
        paper.step(normalized if adam else gradient, scale)

        # A few roundings of 1e-16 in each of 30 steps.
        torch.testing.assert_close(parameter.detach(), paper.y, rtol=1e-12, atol=1e-13)
        with optimizers.evaluating(optimizer):
            torch.testing.assert_close(parameter.detach(), paper.x, rtol=1e-12, atol=1e-13)
        expected = pytest.approx(0.05 * scale, abs=1e-15)
        assert optimizers.learning_rates(optimizer) == {"lora": expected}
    assert (paper.x - paper.y).abs().max() > 1e-3  # so that the two are told apart


def test_a_warm_up_in_the_arguments_wins() -> None:
    optimizer = make("AdamWScheduleFree", matrix(), warmup_steps=5)
    assert optimizer.param_groups[0]["warmup_steps"] == 5
    groups = [ParameterGroup("lora", [matrix()])]
    given = optimizers.create(
        "AdamWScheduleFree",
        groups,
        lr=0.1,
        arguments={"warmup_steps": 9},
        allowed=WELL_KNOWN,
        warmup_steps=5,
    )
    assert given.param_groups[0]["warmup_steps"] == 9


def test_lion_moves_by_the_sign() -> None:
    parameter, before = matrix(), matrix().detach()
    optimizer = make("Lion", parameter, lr=0.25)
    parameter.grad = matrix(seed=1).detach()
    optimizer.step()
    assert torch.equal(parameter.detach(), before - 0.25 * parameter.grad.sign())


def test_adafactor_follows_the_learning_rate() -> None:
    parameter, before = matrix(), matrix().detach()
    optimizer = make("Adafactor", parameter, lr=0.25)
    rows, columns = torch.linspace(-1, 2, 64), torch.linspace(0.5, 3, 72)
    # The factored second moment of a matrix of rank 1 is exact, so each element moves by lr.
    parameter.grad = torch.outer(rows, columns)
    optimizer.step()
    expected = before - 0.25 * parameter.grad.sign()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-5)


def test_muon_moves_by_an_almost_orthogonal_matrix() -> None:
    parameter, before = matrix(64, 16), matrix(64, 16).detach()
    optimizer = make("Muon", parameter, lr=0.1, weight_decay=0.0, nesterov=False)
    parameter.grad = matrix(64, 16, seed=1).detach()
    optimizer.step()
    moved = (before - parameter.detach()) / (0.1 * math.sqrt(64 / 16))
    # Five Newton-Schulz steps bring the singular values to between 0.7 and 1.2 (Jordan 2024).
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.65 and values.max() < 1.25


def test_prodigy_finds_its_step_size() -> None:
    target, parameter = matrix(seed=1).detach(), matrix()
    optimizer = make("Prodigy", parameter, lr=1.0)
    for _ in range(200):
        parameter.grad = (parameter - target).detach()
        optimizer.step()
    # Its d is a lower bound of the distance in the norm of infinity (arXiv:2306.06101, 4.2).
    distance = (matrix().detach() - target).abs().max().item()
    rates = optimizers.learning_rates(optimizer)
    assert rates["lora"] == 1.0 and 0.01 * distance < rates["lora d*lr"] < distance
    assert (parameter - target).square().mean() < 0.05 * (matrix() - target).square().mean()


def test_adamw_of_8_bits_is_adamw_within_its_quantization() -> None:
    exact, quantized = matrix(), matrix()
    pairs = [(make("AdamW", exact), exact), (make("AdamW8bit", quantized), quantized)]
    for step in range(20):
        for optimizer, parameter in pairs:
            parameter.grad = matrix(seed=step % 3 + 1).detach()
            optimizer.step()
    assert pairs[1][0].state[quantized]["state1"].dtype is torch.uint8
    moved, expected = quantized.detach() - matrix().detach(), exact.detach() - matrix().detach()
    # A block-wise dynamic 8-bit number is off by a few percent (arXiv:2110.02861, table 5).
    assert (moved - expected).norm() < 0.05 * expected.norm()


# Learning rates


def two_groups(name: str = "AdamW", **arguments: Any) -> Optimizer:
    groups = [ParameterGroup("down", [matrix()]), ParameterGroup("up", [matrix()], lr_ratio=16)]
    return optimizers.create(name, groups, lr=0.01, arguments=arguments, allowed=WELL_KNOWN)


def test_groups_keep_the_ratio_of_their_learning_rates() -> None:
    optimizer = two_groups()
    assert optimizers.learning_rates(optimizer) == {"down": 0.01, "up": 0.16}
    optimizers.set_learning_rate(optimizer, 0.5)
    assert optimizers.learning_rates(optimizer) == {"down": 0.5, "up": 8.0}


def test_two_learning_rates_need_an_optimizer_that_can_have_them() -> None:
    with pytest.raises(ConfigError, match="one learning rate for all, but down and up are to"):
        two_groups("Prodigy")
    with pytest.raises(ConfigError, match="one learning rate for all"):
        two_groups("Adafactor", relative_step=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_averaging_optimizers_follow_no_schedule(name: str) -> None:
    assert optimizers.uses_schedule(make(name, matrix())) is (name not in SCHEDULE_FREE)


def test_adafactor_with_relative_steps_computes_its_learning_rate() -> None:
    arguments = {"relative_step": True, "scale_parameter": True, "warmup_init": True}
    optimizers.check("Adafactor", arguments, WELL_KNOWN)
    parameter, before = matrix(), matrix().detach()
    optimizer = make("Adafactor", parameter, **arguments)
    assert not optimizers.uses_schedule(optimizer)
    optimizers.set_learning_rate(optimizer, 0.1)
    assert optimizers.learning_rates(optimizer) == {}
    rows, columns = torch.linspace(-1, 2, 64), torch.linspace(0.5, 3, 72)
    parameter.grad = torch.outer(rows, columns)
    optimizer.step()
    # The first step is 1e-6 times the root mean square of what is trained (arXiv:1804.04235, 9).
    expected = before - 1e-6 * before.square().mean().sqrt() * parameter.grad.sign()
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6 * 0.3)


def test_settings_that_an_optimizer_does_not_use_are_named() -> None:
    def remarks(name: str, scheduler: str, warmup_steps: int, lr: float, **more: Any) -> list[str]:
        optimizer = make(name, matrix(), lr=lr, **more)
        return optimizers.remarks(optimizer, lr_scheduler=scheduler, warmup_steps=warmup_steps)

    assert remarks("AdamW", "cosine", 10, 1e-4) == []
    assert remarks("AdamWScheduleFree", "constant", 10, 1e-4) == []
    assert remarks("AdamWScheduleFree", "cosine", 10, 1e-4) == [
        "AdamWScheduleFree does not use lr_scheduler"
    ]
    assert remarks("RAdamScheduleFree", "rex", 10, 1e-4) == [
        "RAdamScheduleFree does not use lr_scheduler and lr_warmup_steps"
    ]
    assert remarks("Adafactor", "constant", 0, 1e-4, relative_step=True) == [
        "Adafactor does not use learning_rate"
    ]
    assert remarks("Prodigy", "cosine", 10, 1.0) == []
    (found,) = remarks("Prodigy", "cosine", 10, 1e-4)
    assert "multiplies the learning rate that it finds with learning_rate, which is 0.0001" in found


# Where it trains and what it means


def train(name: str, *, looking: bool) -> list[Tensor]:
    """The weights after each of eight steps, with or without going to the average in between."""
    parameter, found = matrix(), []
    optimizer = make(name, parameter)
    for step in range(8):
        parameter.grad = matrix(seed=step + 1).detach()
        optimizer.step()
        with optimizers.evaluating(optimizer) if looking else nullcontext():
            pass
        found.append(parameter.detach().clone())
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_at_the_average_does_not_change_a_run(name: str) -> None:
    for a, b in zip(train(name, looking=False), train(name, looking=True), strict=True):
        assert torch.equal(a, b)


def test_the_library_alone_would_change_it() -> None:
    parameter = matrix()
    optimizer: Any = make("AdamWScheduleFree", parameter)
    for step in range(3):
        parameter.grad = matrix(seed=step + 1).detach()
        optimizer.step()
    before = parameter.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert not torch.equal(parameter.detach(), before)


def test_what_fails_while_looking_changes_nothing() -> None:
    parameter = matrix()
    optimizer = make("AdamWScheduleFree", parameter)
    for step in range(3):
        parameter.grad = matrix(seed=step + 1).detach()
        optimizer.step()
    before = parameter.detach().clone()
    with pytest.raises(ZeroDivisionError), optimizers.evaluating(optimizer):
        assert not torch.equal(parameter.detach(), before)
        raise ZeroDivisionError
    assert torch.equal(parameter.detach(), before)
    optimizer.step()  # raises unless it trains again


# What is refused


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("AdamW", {"lr": 1}, "optimizer_args: lr is not set here; set learning_rate"),
        ("AdamW", {"params": 1}, "AdamW has no argument 'params'; it has betas, eps"),
        ("AdamW", {"weight_deacy": 0}, "no argument 'weight_deacy'; did you mean 'weight_decay'?"),
        ("Lion", {"eps": 0}, "Lion has no argument 'eps'; it has betas, weight_decay, use_tri"),
        ("AdamW", {"betas": 2}, "AdamW does not work with betas=2 ("),
        ("AdamW", {"betas": 2}, "; its own values are betas=(0.9, 0.999)"),
        ("AdamW", {"betas": (2.0, 0.9)}, "Invalid beta parameter at index 0: 2.0"),
        ("AdamW", {"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ("AdamW", {"eps": 0.0}, "what it trains becomes NaN or infinite in step 1"),
        ("AdamW", {"weight_decay": math.inf}, "becomes NaN or infinite in step 1"),
        ("AdamWScheduleFree", {"betas": (0.0, 0.9)}, "betas=(0.0, 0.9) ("),
        ("AdamWScheduleFree", {"betas": (0.9, 1.0)}, "becomes NaN or infinite in step 1"),
        ("AdamWScheduleFree", {"r": 10**400}, "int too large to convert to float"),
        ("SGDScheduleFree", {"r": 2**31}, "SGDScheduleFree does not work with r=2147483648 ("),
        ("Prodigy", {"d0": 0}, "Prodigy does not work with d0=0 (Invalid d0 value: 0.0)"),
        ("Prodigy", {"slice_p": 0}, "slice_p=0"),
        ("Lion", {"betas": (0.9, 3)}, "Lion does not work with betas=(0.9, 3) (AssertionError)"),
        ("Lion", {"use_triton": True}, "does not work with use_triton=True ("),
        ("Adafactor", {"warmup_init": True}, "`warmup_init=True` requires `relative_step=True`"),
        ("Muon", {"ns_steps": 1000}, "Muon does not work with ns_steps=1000"),
        ("AdamW8bit", {"betas": "x"}, "AdamW8bit does not work with betas='x'"),
        ("torch.optim.LBFGS", {}, "optimizer_type = 'torch.optim.LBFGS': it does not work on cpu"),
        ("torch.optim.Optimizer", {}, "does not work on cpu"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(
    name: str, arguments: dict[str, Any], problem: str
) -> None:
    assert problem in refusal(name, arguments)


def test_only_the_argument_that_is_wrong_is_blamed() -> None:
    message = refusal("AdamW", {"weight_decay": 0.01, "eps": "x", "amsgrad": True})
    assert "AdamW does not work with eps='x' (" in message
    assert "its own values are eps=1e-08" in message


def test_arguments_that_are_only_wrong_together_are_blamed_together() -> None:
    message = refusal("AdamW", {"fused": True, "foreach": True})
    assert "AdamW does not work with fused=True, foreach=True (" in message


def test_muon_needs_a_pytorch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    assert "has none; update it to 2.9 or later, or use AdamW" in refusal("Muon", {})


def test_muon_says_that_it_trains_matrices_only() -> None:
    with pytest.raises(ConfigError, match=r"'Muon': it cannot train this network \(Muon only"):
        make("Muon", nn.Parameter(torch.zeros(3)))


class Missing:
    """Makes Python find no package of a name."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("name", "package", "line"),
    [
        ("Prodigy", "prodigyopt", "pip install prodigyopt"),
        ("Lion", "lion_pytorch", "pip install lion-pytorch"),
        ("AdamW8bit", "bitsandbytes", "pip install bitsandbytes"),
        ("SGDScheduleFree", "schedulefree", "pip install schedulefree"),
    ],
)
def test_a_missing_package_is_named_with_its_line_for_pip(
    name: str, package: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [each for each in sys.modules if each.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    assert f"the package {package} is not installed; run: {line}" in refusal(name, {})


PACKAGE = """
import random
import torch
from torch.optim import Optimizer

class Sign(Optimizer):
    def __init__(self, params, lr=0.1, **more):
        super().__init__(params, {"lr": lr, **more})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(self.size() * parameter.grad.sign(), alpha=-group["lr"])

    def size(self):
        return 1

class Forgets(Sign):
    steps = 0
    def size(self):
        self.steps += 1
        return self.steps

class Throws(Sign):
    def size(self):
        raise KeyboardInterruptLike("no\\nway")

class KeyboardInterruptLike(Exception): ...

class KeepsObject(Sign):
    def step(self):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["generator"] = random.Random(0)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an installed package with optimizers."""
    (tmp_path / "loom_test_optimizers.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "loom_test_optimizers"
    sys.modules.pop("loom_test_optimizers", None)


def test_an_optimizer_of_an_allowed_package_is_used(package: str) -> None:
    optimizers.check(f"{package}.Sign", {}, (package,))
    parameter, before = matrix(), matrix().detach()
    optimizer = make(f"{package}.Sign", parameter, lr=0.25, allowed=(package,))
    parameter.grad = matrix(seed=1).detach()
    optimizer.step()
    assert torch.equal(parameter.detach(), before - 0.25 * parameter.grad.sign())


def test_an_optimizer_of_another_package_is_not_even_imported(package: str) -> None:
    assert "was not imported, because a shared workflow" in refusal(f"{package}.Sign", {})
    with pytest.raises(ConfigError, match="was not imported"):
        make(f"{package}.Sign", matrix())
    assert package not in sys.modules


def test_listed_optimizers_are_allowed_whatever_else_is() -> None:
    optimizers.check("AdamW", {}, ())
    with pytest.raises(ConfigError, match="was not imported"):
        optimizers.check("torch.optim.AdamW", {}, ())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Forgets", "a run that was saved and continued differs from one that was not"),
        ("Throws", "it does not work on cpu (no way); use AdamW"),
        ("KeepsObject", "optimizer.state.0.generator is a Random, which cannot be stored"),
    ],
)
def test_an_optimizer_with_which_no_run_could_be_continued_is_refused(
    package: str, name: str, problem: str
) -> None:
    assert problem in refusal(f"{package}.{name}", {}, package)


def test_an_optimizer_that_takes_anything_is_given_it(package: str) -> None:
    optimizers.check(f"{package}.Sign", {"anything": [1, {"a": None}]}, (package,))


def test_prodigy_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    make("Prodigy", matrix(), weight_decay=0.1)
    assert capfd.readouterr().out == ""


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**400, -(2**63), 2**31])
    | st.floats()
    | st.sampled_from(["", "auto", "x"])
    | st.sampled_from([b"x", 1j, {1}]),
    lambda some: (
        st.lists(some, max_size=3)
        | st.tuples(some, some)
        | st.dictionaries(st.text(max_size=2), some, max_size=2)
    ),
    max_leaves=4,
)
ARGUMENTS = {
    "AdamW": "betas eps weight_decay amsgrad maximize foreach capturable differentiable fused",
    "AdamW8bit": "betas eps weight_decay amsgrad optim_bits args min_8bit_size is_paged",
    "Adafactor": "eps clip_threshold decay_rate beta1 weight_decay scale_parameter relative_step "
    "warmup_init",
    "AdamWScheduleFree": "betas eps weight_decay warmup_steps r weight_lr_power foreach",
    "RAdamScheduleFree": "betas eps weight_decay r weight_lr_power foreach silent_sgd_phase",
    "SGDScheduleFree": "momentum weight_decay warmup_steps r weight_lr_power foreach",
    "Prodigy": "betas beta3 eps weight_decay decouple use_bias_correction safeguard_warmup d0 "
    "d_coef growth_rate fsdp_in_use slice_p",
    "Lion": "betas weight_decay use_triton decoupled_weight_decay",
    "Muon": "weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_arguments_work_or_are_refused_in_one_sentence(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = st.sampled_from([*ARGUMENTS[name].split(), "lr", "unknown"])

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(keys, LITERALS, min_size=1, max_size=3))
    def attempt(arguments: dict[str, Any]) -> None:
        check: Callable[..., None] = optimizers.check
        try:
            check(name, arguments, WELL_KNOWN)
        except ConfigError as error:
            message = str(error)
            assert message.startswith("optimizer_args: ") and "\n" not in message
            assert len(message) < 800

    attempt()
