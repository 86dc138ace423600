"""Types of settings: what a value may look like, and what it becomes.

Every problem is a ``ValueError`` whose text completes the sentence "expected ...".
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

_FORBIDDEN_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
# What neither a file system nor a TOML file can hold, or only by mistake: "C:\new" has a line end.
_FORBIDDEN_IN_PATHS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
# Known optimizers; what each is and takes is for `optimizers` to say.
OPTIMIZERS = (
    "AdamW",
    "AdamW8bit",
    "Adafactor",
    "AdamWScheduleFree",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "Prodigy",
    "Lion",
    "Muon",
)
_CLASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# The names of accelerate's DynamoBackend.
DYNAMO_BACKENDS = (
    "NO",
    "EAGER",
    "AOT_EAGER",
    "INDUCTOR",
    "AOT_TS_NVFUSER",
    "NVPRIMS_NVFUSER",
    "CUDAGRAPHS",
    "OFI",
    "FX2TRT",
    "ONNXRT",
    "TENSORRT",
    "AOT_TORCHXLA_TRACE_ONCE",
    "TORCHXLA_TRACE_ONCE",
    "IPEX",
    "TVM",
    "HPU_BACKEND",
    "NEURON",
)
# Other names of number types in the files of musubi-tuner.
_DTYPE_NAMES = {"float": "fp32", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _path(value: Any) -> Any:
    # pathlib's own expansion fails for "~name" unless there is such a user.
    return Path(os.path.expanduser(value)) if isinstance(value, str | Path) and value else value


def _check_path(value: Path) -> Path:
    if _FORBIDDEN_IN_PATHS.search(str(value)):
        raise ValueError(
            "a path without line ends and the like; backslashes in a TOML file need 'single quotes'"
        )
    return value


def _dtype_name(value: Any) -> Any:
    return _DTYPE_NAMES.get(value, value) if isinstance(value, str) else value


def _optimizer_name(value: Any) -> Any:
    """The known spelling; ``schedulefree.AdamWScheduleFree`` is one of ours, too."""
    if not isinstance(value, str):
        return value
    known = {name.lower(): name for name in OPTIMIZERS}
    return known.get(value.lower().removeprefix("schedulefree."), value)


def _check_optimizer_name(value: str) -> str:
    if value not in OPTIMIZERS and ("." not in value or not _CLASS_NAME.fullmatch(value)):
        near = get_close_matches(value, OPTIMIZERS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"one of {', '.join(OPTIMIZERS)}, or package.Class{hint}")
    return value


def _check_class_name(value: str) -> str:
    if not _CLASS_NAME.fullmatch(value):
        raise ValueError("a class of torch.optim.lr_scheduler, or package.Class")
    return value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _check_dynamo_backend(value: str) -> str:
    if value not in DYNAMO_BACKENDS:
        near = get_close_matches(value, DYNAMO_BACKENDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"one of {', '.join(DYNAMO_BACKENDS)}{hint}")
    return value


def _check_prefix(value: str) -> str:
    if _FORBIDDEN_IN_NAMES.search(value):
        raise ValueError('the beginning of a file name without any of < > : " / \\ | ? *')
    return value


def _size(value: Any) -> Any:
    """One number means a square."""
    return (value, value) if type(value) is int else tuple(value) if type(value) is list else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _share_or_steps(value: Any) -> Any:
    """ "10%" is the share 0.1."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return float(match[1]) / 100 if match else value


def _check_share_or_steps(value: int | float) -> int | float:
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError("whole steps without a dot, or a share of all steps below 1")
    return value


def _check_name(value: str) -> str:
    if not value.strip() or _FORBIDDEN_IN_NAMES.search(value) or value.strip(". ") != value:
        raise ValueError('a file name without folder, extension or any of < > : " / \\ | ? *')
    return value


def _check_device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise ValueError("one of auto, cpu, cuda, cuda:0 ..., xpu, mps")
    return value


def _check_extension(value: str) -> str:
    if not re.fullmatch(r"\.\w+", value):
        raise ValueError('an extension with its dot, such as ".txt"')
    return value


def _check_sdpa(value: bool) -> bool:
    if not value:
        raise ValueError("true; PyTorch's own attention is the only one there is")
    return value


def _check_arguments(values: list[str]) -> list[str]:
    parse_arguments(values)
    return values


def parse_arguments(values: list[str]) -> dict[str, Any]:
    """``["weight_decay=0.01"]`` -> ``{"weight_decay": 0.01}``; values are Python literals.

    Only the first "=" separates, so a value may hold more of them.

    Raises:
        ValueError: an entry is not ``key=value``, comes twice, or its value is no literal.
    """
    parsed: dict[str, Any] = {}
    for entry in values:
        key, equals, text = (part.strip() for part in entry.partition("="))
        if not equals or not key.isidentifier():
            raise ValueError(f"entries key=value (not {entry!r})")
        if key in parsed:
            raise ValueError(f"each key once ({key} comes twice)")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of escapes that mean nothing
                parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if "\\" in text:
                raise ValueError(
                    f"an r before quotes with a backslash, as in r'a\\.b', for {key} (not {text})"
                ) from None
            raise ValueError(
                f"a number, True, False, None, 'text' or a list of them for {key} (not {text!r})"
            ) from None
    return parsed


def _check_multipliers(values: list[float], info: ValidationInfo) -> list[float]:
    num_loras = len(info.data.get("lora_weight", values))
    if len(values) > num_loras:
        raise ValueError(f"at most one value for each of the {num_loras} LoRA files")
    return values


def _check_timestep_end(value: int, info: ValidationInfo) -> int:
    start = info.data.get("min_timestep", 0)
    if value <= start:
        raise ValueError(f"a whole number above min_timestep, which is {start}")
    return value


PathSetting = Annotated[Path, BeforeValidator(_path), AfterValidator(_check_path)]
Side = Annotated[int, Field(ge=16, le=8192)]
Size = Annotated[tuple[Side, Side], BeforeValidator(_size)]
DtypeOrAuto = Annotated[Literal["auto", "fp32", "bf16", "fp16"], BeforeValidator(_dtype_name)]
Dtype = Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(_dtype_name)]
Extension = Annotated[str, AfterValidator(_check_extension)]
FileName = Annotated[str, AfterValidator(_check_name)]
DeviceName = Annotated[str, AfterValidator(_check_device)]
OptimizerName = Annotated[
    str, BeforeValidator(_optimizer_name), AfterValidator(_check_optimizer_name)
]
LrSchedulerName = Annotated[str, AfterValidator(_check_class_name)]
Arguments = Annotated[list[str], AfterValidator(_check_arguments)]
DynamoBackend = Annotated[str, BeforeValidator(_upper), AfterValidator(_check_dynamo_backend)]
LogPrefix = Annotated[str, AfterValidator(_check_prefix)]
ShareOrSteps = Annotated[
    int | float, BeforeValidator(_share_or_steps), AfterValidator(_check_share_or_steps)
]
TimestepEnd = Annotated[int, AfterValidator(_check_timestep_end)]
Sdpa = Annotated[bool, AfterValidator(_check_sdpa)]
Prompts = Annotated[list[str], BeforeValidator(_one_or_many)]
Paths = Annotated[list[PathSetting], BeforeValidator(_one_or_many)]
Multipliers = Annotated[list[float], AfterValidator(_check_multipliers)]
