"""``python -m engine lora <tool>``: the tools for LoRA files on the command line.

A tool is only imported when it runs, because it brings torch and heavier libraries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, EngineError
from .events import Reporter

if TYPE_CHECKING:
    from .jobs.tool_result import ToolResult
    from .low_rank import RankChoice

DTYPES = ("bf16", "fp16", "fp32")
FORMATS = ("comfyui", "kohya", "diffusers")
METHODS = ("energy", "frobenius", "ratio", "cumulative")
SORTINGS = ("time", "name", "steps", "given")
TOOLS = {
    "targets": "show which layers of a model a training would train",
    "inspect": "show what is in a LoRA file",
    "convert": "write a LoRA in another format or number type",
    "merge": "merge LoRAs into a model file",
    "combine": "make one LoRA of several",
    "resize": "give a LoRA a lower rank",
    "extract": "make a LoRA of the difference of two models",
    "ema": "average the LoRAs of several steps of a training (post-hoc EMA)",
}


def add_tool(tools: Any, name: str) -> argparse.ArgumentParser:
    """The command of a tool without its arguments; ``tools`` is what `add_subparsers` gives."""
    description = f"{TOOLS[name][0].upper()}{TOOLS[name][1:]}."
    return tools.add_parser(name, help=TOOLS[name], description=description, allow_abbrev=False)


def add_tools(tools: Any) -> None:
    """Every tool with its arguments, but ``targets``, whose arguments are settings."""
    for name, (add_arguments, _) in _COMMANDS.items():
        command = add_tool(tools, name)
        add_arguments(command)
        command.add_argument(
            "--architecture", default="auto", help="model family, where the file does not tell"
        )
        if name not in ("convert", "merge"):
            command.add_argument("--picture", type=Path, help="PNG file for the picture")


def run(parsed: argparse.Namespace, report: Reporter) -> ToolResult:
    """Do what the command line says; gives what is to be told.

    Raises:
        EngineError: a file or an argument cannot be used.
    """
    _, tool = _COMMANDS[parsed.tool]
    result = tool(parsed, report)
    save_picture(result, vars(parsed).get("picture"))
    return result


def save_picture(result: ToolResult, path: Path | None) -> None:
    """Write the picture of a tool, if it is asked for and there is one.

    Raises:
        EngineError: the file cannot be written.
    """
    if path is None or result.picture is None:
        return
    try:
        result.picture.save(path, "PNG")
    except OSError as error:
        raise EngineError(
            f"{path}: the picture cannot be written ({error.strerror or error}); choose another "
            "folder"
        ) from None


def _add_output(command: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    command.add_argument("output", type=Path, help="file to write, ending in .safetensors")
    command.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    if dtype:
        command.add_argument("--dtype", choices=DTYPES, help="number type; default as in the file")


def _add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--format", choices=FORMATS, help="how layers are called; default as in the file"
    )


def _add_ranks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", type=int, help="the same rank for every layer")
    command.add_argument(
        "--amount", type=float, help="how much of each layer is kept, instead of a rank"
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        default="energy",
        help="what the amount is of: the squared norm, the norm (sv_fro), the largest singular "
        "value divided by the smallest that is kept (sv_ratio), or their sum (sv_cumulative)",
    )
    command.add_argument("--max_rank", type=int, help="most that a layer gets with an amount")


def _ranks(parsed: argparse.Namespace) -> RankChoice:
    from .low_rank import RankChoice

    return RankChoice(parsed.rank, parsed.method, parsed.amount, parsed.max_rank)


def _add_loras(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lora_weight", type=Path, nargs="+", required=True, metavar="FILE", help="LoRA files"
    )
    command.add_argument(
        "--lora_multiplier",
        type=float,
        nargs="+",
        default=[],
        metavar="NUMBER",
        help="how strongly each counts; 1 where missing",
    )


def _loras(parsed: argparse.Namespace) -> list[tuple[Path, float]]:
    files: Sequence[Path] = parsed.lora_weight
    given: Sequence[float] = parsed.lora_multiplier
    if len(given) > len(files):
        raise ConfigError(
            f"lora_multiplier: {len(given)} numbers for {len(files)} files; give at most one each"
        )
    return list(zip(files, [*given, *[1.0] * (len(files) - len(given))], strict=True))


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, help="LoRA file")
    command.add_argument("--dit", type=Path, help="model that it is for, to compare with")
    command.add_argument("--verbose", action="store_true", help="every layer, all metadata")
    command.add_argument("--json", action="store_true", help="all of it as JSON")


def _inspect(parsed: argparse.Namespace, report: Reporter) -> ToolResult:
    from .jobs import lora_inspect

    return lora_inspect.run(
        source=parsed.source,
        architecture=parsed.architecture,
        dit=parsed.dit,
        verbose=parsed.verbose,
        as_json=parsed.json,
        report=report,
    )


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, help="LoRA file")
    _add_output(command)
    command.add_argument("--format", choices=FORMATS, default="comfyui", help="default comfyui")


def _convert(parsed: argparse.Namespace, report: Reporter) -> ToolResult:
    from .jobs import lora_convert

    return lora_convert.run(
        source=parsed.source,
        output=parsed.output,
        format=parsed.format,
        dtype=parsed.dtype,
        architecture=parsed.architecture,
        overwrite=parsed.overwrite,
    )


def _add_merge(command: argparse.ArgumentParser) -> None:
    command.add_argument("dit", type=Path, help="model: a file, a part of a set, or a folder")
    _add_output(command)
    _add_loras(command)


def _merge(parsed: argparse.Namespace, report: Reporter) -> ToolResult:
    from .jobs import lora_merge

    return lora_merge.run(
        dit=parsed.dit,
        loras=_loras(parsed),
        output=parsed.output,
        dtype=parsed.dtype,
        architecture=parsed.architecture,
        overwrite=parsed.overwrite,
        report=report,
    )


def _add_combine(command: argparse.ArgumentParser) -> None:
    _add_output(command)
    _add_format(command)
    _add_loras(command)
    _add_ranks(command)


def _combine(parsed: argparse.Namespace, report: Reporter) -> ToolResult:
    from .jobs import lora_combine

    exact = parsed.rank is None and parsed.amount is None
    ranks = None if exact else _ranks(parsed)
    return lora_combine.run(
        sources=_loras(parsed),
        output=parsed.output,
        ranks=ranks,
        dtype=parsed.dtype,
        format=parsed.format,
        overwrite=parsed.overwrite,
        architecture=parsed.architecture,
        report=report,
    )


def _add_resize(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, help="LoRA file")
    _add_output(command)
    _add_format(command)
    _add_ranks(command)


def _resize(parsed: argparse.Namespace, report: Reporter) -> ToolResult:
    from .jobs import lora_resize

    return lora_resize.run(
        source=parsed.source,
        output=parsed.output,
        ranks=_ranks(parsed),
        dtype=parsed.dtype,
        format=parsed.format,
        overwrite=parsed.overwrite,
        architecture=parsed.architecture,
        report=report,
    )


def _add_extract(command: argparse.ArgumentParser) -> None:
    command.add_argument("tuned", type=Path, help="model that was tuned")
    command.add_argument("base", type=Path, help="model that it was made from")
    _add_output(command, dtype=False)
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    command.add_argument("--format", choices=FORMATS, default="comfyui", help="default comfyui")
    _add_ranks(command)
    patterns = {"nargs": "*", "default": [], "metavar": "PATTERN"}
    command.add_argument(
        "--exclude_patterns", **patterns, help="layers to leave out: patterns of whole names"
    )
    command.add_argument("--include_patterns", **patterns, help="only these layers")
    command.add_argument(
        "--min_difference",
        type=float,
        default=0.0,
        help="leave out layers that nowhere differ by more",
    )
    command.add_argument(
        "--clamp_quantile",
        type=float,
        help="limit outliers to this quantile, which other tools set to 0.99",
    )
    command.add_argument(
        "--full_rest", action="store_true", help="take biases and norms that differ, too"
    )
    command.add_argument("--device", default="auto", help="where to compute; default auto")


def _extract(parsed: argparse.Namespace, report: Reporter) -> ToolResult:
    from .jobs import lora_extract

    return lora_extract.run(
        tuned=parsed.tuned,
        base=parsed.base,
        output=parsed.output,
        ranks=_ranks(parsed),
        settings=lora_extract.ExtractSettings(
            dtype=parsed.dtype,
            format=parsed.format,
            exclude=parsed.exclude_patterns,
            include=parsed.include_patterns,
            min_difference=parsed.min_difference,
            clamp_quantile=parsed.clamp_quantile,
            full_rest=parsed.full_rest,
            device=parsed.device,
        ),
        overwrite=parsed.overwrite,
        architecture=parsed.architecture,
        report=report,
    )


def _add_ema(command: argparse.ArgumentParser) -> None:
    command.add_argument("sources", type=Path, nargs="+", help="LoRA files of one training")
    command.add_argument("--output", type=Path, required=True, help="file to write")
    command.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    command.add_argument("--dtype", choices=DTYPES, help="number type; default as in the files")
    command.add_argument(
        "--beta", type=float, help="part of the mean that each file leaves of it; default 0.95"
    )
    command.add_argument("--beta2", type=float, help="that of the last file; default as beta")
    command.add_argument(
        "--sigma_rel",
        type=float,
        help="width of the power function, from 0.05 to 0.25, instead of beta",
    )
    command.add_argument(
        "--keep_first", action="store_true", help="with sigma_rel, let the oldest file count too"
    )
    command.add_argument(
        "--by_steps",
        action="store_true",
        help="with sigma_rel, let each file count for the steps since the one before",
    )
    command.add_argument(
        "--sort", choices=SORTINGS, default="time", help="which file is older; default by time"
    )
    command.add_argument(
        "--no_sort", action="store_const", const="given", dest="sort", help="as --sort given"
    )


def _ema(parsed: argparse.Namespace, report: Reporter) -> ToolResult:
    from .jobs import lora_ema

    return lora_ema.run(
        sources=parsed.sources,
        output=parsed.output,
        averaging=lora_ema.Averaging(
            beta=parsed.beta,
            beta2=parsed.beta2,
            sigma_rel=parsed.sigma_rel,
            keep_first=parsed.keep_first,
            by_steps=parsed.by_steps,
        ),
        sort=parsed.sort,
        dtype=parsed.dtype,
        overwrite=parsed.overwrite,
        architecture=parsed.architecture,
        report=report,
    )


_Adder = Callable[[argparse.ArgumentParser], None]
_Tool = Callable[[argparse.Namespace, Reporter], "ToolResult"]
_COMMANDS: dict[str, tuple[_Adder, _Tool]] = {
    "inspect": (_add_inspect, _inspect),
    "convert": (_add_convert, _convert),
    "merge": (_add_merge, _merge),
    "combine": (_add_combine, _combine),
    "resize": (_add_resize, _resize),
    "extract": (_add_extract, _extract),
    "ema": (_add_ema, _ema),
}
