"""The adapter of one layer from the tensors that a LoRA file has for it, and back.

LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) may put a core [R, R, *K] between the factors
of a convolution (Tucker decomposition) and then stores the left factor as [R, O]; the core is
multiplied into the right factor here, which changes nothing.

Shapes: O out features, I in features, R rank, K kernel; L, M the factors of LoKr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from .adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
)
from .errors import CheckpointError
from .weights import Checkpoint

_LORA = ("down", "up")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_COMMON = {"alpha", "dora_scale", "bias_diff"}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

Tail = tuple[int, ...] | None
# (module as the file calls it, rank or None) -> alpha, where the keys have none
DefaultAlpha = Callable[[str, int | None], float | None]


@dataclass(frozen=True)
class PartsReader:
    """Reads the adapters of one file.

    Args:
        default_alpha: what applies where a module has no alpha of its own.
        check_finite: refuse NaN and infinity.
    """

    path: Path
    checkpoint: Checkpoint
    default_alpha: DefaultAlpha
    check_finite: bool = True

    def read(self, module: str, keys: Mapping[str, str], tail: Tail) -> AdapterWeights:
        """The adapter of one module, whose parts are under ``keys``.

        Args:
            tail: [I, *K] of the weight where it is known, to undo flattening.

        Raises:
            CheckpointError: parts are missing, are too many, do not fit each other or are damaged.
        """
        kinds = [
            ("LoRA", any(part in keys for part in (*_LORA, "mid", "up_bias"))),
            ("LoHa", any(part.startswith("hada_") for part in keys)),
            ("LoKr", any(part.startswith("lokr_") for part in keys)),
            ("full difference", "diff" in keys),
        ]
        found = [kind for kind, present in kinds if present]
        if len(found) > 1:
            self._refuse(f"{module} has parts of a {found[0]} and of a {found[1]}")
        kind = found[0] if found else "full difference"
        read = {"LoRA": self._lora, "LoHa": self._loha, "LoKr": self._lokr}.get(kind, self._full)
        adapter = read(module, keys, tail)
        if "bias_diff" in keys:
            adapter = replace(adapter, bias_diff=self._tensor(keys["bias_diff"]).flatten())
        return self._checked(module, adapter)

    def _lora(self, module: str, keys: Mapping[str, str], tail: Tail) -> LoRAWeights:
        self._expect(module, keys, _LORA, {"mid", "magnitude_vector", "up_bias"})
        down, up = self._tensor(keys["down"]), self._left(keys["up"])
        if "mid" in keys:
            down = self._with_core(self._tensor(keys["mid"]), down, keys["mid"])
        if down.dim() < 2 or up.shape[1] != down.shape[0] or not down.numel():
            self._unfit(keys["up"], up, keys["down"], down)
        alpha = self._alpha(module, keys, down.shape[0])
        adapter = LoRAWeights(_with_tail(down, tail), up, alpha)
        adapter = replace(adapter, magnitude=self._magnitude(keys, adapter.shape))
        if "up_bias" not in keys or not self._tensor(keys["up_bias"]).any():
            return adapter
        if "bias_diff" in keys or adapter.magnitude is not None:
            self._refuse(f"{keys['up_bias']} cannot be combined with what else the layer has")
        # The bias of the second factor is added to the output times alpha / R.
        bias_diff = self._tensor(keys["up_bias"]).flatten().float() * adapter.scale
        return replace(adapter, bias_diff=bias_diff)

    def _loha(self, module: str, keys: Mapping[str, str], tail: Tail) -> LoHaWeights:
        self._expect(module, keys, _LOHA, {"hada_t1", "hada_t2"})
        factors: list[Tensor] = []
        for number in ("1", "2"):
            a, b, core = (f"hada_w{number}_a", f"hada_w{number}_b", f"hada_t{number}")
            left, right = self._left(keys[a]), self._tensor(keys[b])
            if core in keys:
                left = left.T.contiguous()
                right = self._with_core(self._tensor(keys[core]), right, keys[core])
            if right.dim() < 2 or left.shape[1] != right.shape[0] or not right.numel():
                self._unfit(keys[a], left, keys[b], right)
            factors += [left, _with_tail(right, tail)]
        if factors[0].shape != factors[2].shape or factors[1].shape != factors[3].shape:
            self._unfit(keys["hada_w1_a"], factors[0], keys["hada_w2_a"], factors[2])
        alpha = self._alpha(module, keys, factors[1].shape[0])
        adapter = LoHaWeights(*factors, alpha=alpha)
        return replace(adapter, magnitude=self._magnitude(keys, adapter.shape))

    def _lokr(self, module: str, keys: Mapping[str, str], tail: Tail) -> LoKrWeights:
        parts: list[str] = []
        for name in ("lokr_w1", "lokr_w2"):
            pair = any(f"{name}_{end}" in keys for end in "ab")
            parts += [f"{name}_a", f"{name}_b"] if pair else [name]
        self._expect(module, keys, tuple(parts), {"lokr_t2"} if "lokr_w2_b" in keys else set())
        w1, w2 = self._factor("lokr_w1", keys, ""), self._factor("lokr_w2", keys, "lokr_t2")
        narrow = w1[1] if isinstance(w1, tuple) else w1
        if narrow.dim() != 2 or not narrow.numel():
            self._refuse(f"{module} has a first Kronecker factor of shape {list(narrow.shape)}")
        if tail and tail[0] % narrow.shape[1] == 0:
            tail = (tail[0] // narrow.shape[1], *tail[1:])
            w2 = (w2[0], _with_tail(w2[1], tail)) if isinstance(w2, tuple) else _with_tail(w2, tail)
        adapter = LoKrWeights(w1, w2, alpha=1.0)
        alpha = self._alpha(module, keys, adapter.rank)
        if adapter.rank is None and "alpha" not in keys and alpha != 1 and isinstance(w1, Tensor):
            # peft scales these too; LyCORIS, whose keys they are, does not.
            adapter, alpha = replace(adapter, w1=w1.float() * alpha), 1.0
        adapter = replace(adapter, alpha=alpha)
        return replace(adapter, magnitude=self._magnitude(keys, adapter.shape))

    def _full(self, module: str, keys: Mapping[str, str], tail: Tail) -> FullWeights:
        self._expect(module, keys, (), {"diff"}, common={"bias_diff"})
        if "diff" not in keys:
            return FullWeights(None)
        return FullWeights(_with_tail(self._tensor(keys["diff"]), tail))

    def _factor(
        self, name: str, keys: Mapping[str, str], core: str
    ) -> Tensor | tuple[Tensor, Tensor]:
        if name in keys:
            whole = self._tensor(keys[name])
            if whole.dim() < 2 or not whole.numel():
                self._refuse(f"{keys[name]} has the shape {list(whole.shape)}")
            return whole
        left, right = self._left(keys[f"{name}_a"]), self._tensor(keys[f"{name}_b"])
        if core in keys:
            left = left.T.contiguous()
            right = self._with_core(self._tensor(keys[core]), right, keys[core])
        if right.dim() < 2 or left.shape[1] != right.shape[0] or not right.numel():
            self._unfit(keys[f"{name}_a"], left, keys[f"{name}_b"], right)
        return left, right

    def _with_core(self, core: Tensor, right: Tensor, key: str) -> Tensor:
        """core [R, S, *K] times right [S, I] as [R, I, *K], in float32."""
        right = right.flatten(1) if right.dim() > 1 else right
        if core.dim() < 3 or right.dim() != 2 or core.shape[1] != right.shape[0]:
            self._refuse(f"{key} of shape {list(core.shape)} does not fit the other factors")
        return torch.einsum("rs...,si->ri...", core.float(), right.float())

    def _left(self, key: str) -> Tensor:
        """A factor [., R]; convolutions have it with a kernel of ones."""
        tensor = self._tensor(key)
        if tensor.dim() < 2 or any(size != 1 for size in tensor.shape[2:]):
            self._refuse(f"{key} has the shape {list(tensor.shape)}, but a matrix is needed")
        return tensor.flatten(1)

    def _magnitude(self, keys: Mapping[str, str], shape: tuple[int, ...]) -> Tensor | None:
        """DoRA's magnitudes as [O, 1] or [1, I]."""
        out, in_ = shape[:2]
        if "dora_scale" in keys and "magnitude_vector" in keys:
            self._refuse(f"{keys['dora_scale']} and {keys['magnitude_vector']} say the same twice")
        if "magnitude_vector" in keys:
            vector = self._tensor(keys["magnitude_vector"])
            if vector.numel() == out:
                return vector.reshape(out, 1)
            self._refuse(f"{keys['magnitude_vector']} has {vector.numel()} values, not {out}")
        if "dora_scale" not in keys:
            return None
        scale = self._tensor(keys["dora_scale"])
        ones = scale.numel() == max(scale.shape, default=0)
        if ones and scale.numel() == out and scale.shape[0] == out:
            return scale.reshape(out, 1)
        if not ones or scale.numel() != in_ or (scale.dim() > 1 and scale.shape[0] != 1):
            self._refuse(
                f"{keys['dora_scale']} has the shape {list(scale.shape)}, which is neither of "
                f"the {out} rows nor of the {in_} columns"
            )
        return scale.reshape(1, in_)

    def _alpha(self, module: str, keys: Mapping[str, str], rank: int | None) -> float:
        if "alpha" not in keys:
            alpha = self.default_alpha(module, rank)
            return float(rank or 1) if alpha is None else alpha
        shape = self.checkpoint.shape(keys["alpha"])
        if math.prod(shape) != 1:
            self._refuse(f"{keys['alpha']} has the shape {list(shape)}, but alpha is one number")
        alpha = float(self.checkpoint.read(keys["alpha"]).float().item())
        if not math.isfinite(alpha):
            self._refuse(f"{keys['alpha']} is {alpha}")
        return alpha

    def _tensor(self, key: str) -> Tensor:
        tensor = self.checkpoint.read(key)
        if not tensor.is_floating_point():
            self._refuse(f"{key} holds whole numbers ({tensor.dtype}); it is quantized or damaged")
        # Exact, and nothing computes with such a tensor.
        tensor = tensor.bfloat16() if tensor.dtype in _FLOAT8 else tensor
        if self.check_finite and not tensor.isfinite().all():
            self._refuse(f"{key} holds NaN or infinite values")
        return tensor

    def _expect(
        self,
        module: str,
        keys: Mapping[str, str],
        needed: tuple[str, ...],
        optional: set[str],
        common: set[str] = _COMMON,
    ) -> None:
        if missing := [part for part in needed if part not in keys]:
            there = keys[min(keys)]
            self._refuse(f"{module} has {there}, but its {missing[0]!r} factor is missing")
        if extra := keys.keys() - set(needed) - optional - common:
            self._refuse(f"{keys[min(extra)]} does not belong to the kind of adapter of its layer")

    def _checked(self, module: str, adapter: AdapterWeights) -> AdapterWeights:
        if adapter.bias_diff is not None and adapter.shape is not None:
            found, rows = adapter.bias_diff.shape[0], adapter.shape[0]
            if found != rows:
                self._refuse(f"the bias of {module} has {found} values, but the layer {rows}")
        return adapter

    def _unfit(self, a_key: str, a: Tensor, b_key: str, b: Tensor) -> NoReturn:
        self._refuse(
            f"{a_key} of shape {list(a.shape)} does not fit {b_key} of shape {list(b.shape)}"
        )

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}; get the file again")


def _with_tail(right: Tensor, tail: Tail) -> Tensor:
    """[R, I * K] as [R, I, *K] and [R, I, 1, 1] as [R, I], where the layer is like that."""
    if tail is None or not right.numel() or right.shape[1:] == tail:
        return right
    if right.numel() != right.shape[0] * math.prod(tail):
        return right
    return right.reshape(right.shape[0], *tail)


def lycoris_tensors(adapter: AdapterWeights) -> dict[str, Tensor]:
    """The tensors of all kinds but LoRA under the names that LyCORIS and ComfyUI give them."""
    found: dict[str, Tensor] = {}
    if isinstance(adapter, LoHaWeights):
        # As a matrix, because readers multiply them as such.
        found["hada_w1_a"], found["hada_w1_b"] = adapter.w1_a, adapter.w1_b.flatten(1)
        found["hada_w2_a"], found["hada_w2_b"] = adapter.w2_a, adapter.w2_b.flatten(1)
    elif isinstance(adapter, LoKrWeights):
        for name, part in (("lokr_w1", adapter.w1), ("lokr_w2", adapter.w2)):
            if isinstance(part, tuple):
                found |= {f"{name}_a": part[0], f"{name}_b": part[1].flatten(1)}
            else:
                # ComfyUI multiplies kernels of two dimensions only, and matrices.
                found[name] = part.flatten(1) if part.dim() > 4 else part
    elif isinstance(adapter, FullWeights) and adapter.diff is not None:
        found["diff"] = adapter.diff
    if adapter.bias_diff is not None:
        found["diff_b"] = adapter.bias_diff
    magnitude = None if isinstance(adapter, FullWeights) else adapter.magnitude
    if magnitude is not None and adapter.shape is not None:
        ones = (1,) * (len(adapter.shape) - 2)
        found["dora_scale"] = magnitude.reshape(*magnitude.shape, *ones)
    return found
