"""``python -m engine <job>``: the only place that turns errors into exit codes.

0 done, 1 something cannot be used (one sentence on standard error), 2 wrong settings, 3 stopped
by a signal after saving, 130 stopped by a signal where there was nothing to save.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from . import lora_command, quantize_command
from .config import Config
from .config_file import load_config, to_toml
from .console import ConsoleReporter, json_lines
from .errors import ConfigError, EngineError
from .events import Message, Reporter
from .options import add_options, given_words, reference
from .signals import Stopped, stop_with_input

_JOBS = {
    "cache": "encode the training images and captions",
    "train": "train a LoRA",
    "check": "look at everything that a training needs, without training",
    "generate": "draw pictures from prompts",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; gives the exit code."""
    parsed, unknown = _parser().parse_known_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if getattr(parsed, "stop_with_input", False):
        stop_with_input()
    try:
        return _run(parsed, unknown)
    except EngineError as error:
        if getattr(parsed, "events", "") == "json":
            json_lines(sys.stdout)(Message(str(error), "error"))
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 3
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130


def _run(parsed: argparse.Namespace, unknown: Sequence[str]) -> int:
    takes_settings = parsed.job in (*_JOBS, "quantize") or vars(parsed).get("tool") == "targets"
    if unknown and not takes_settings:
        raise ConfigError(f"{parsed.job} does not take {' '.join(unknown)}")
    if parsed.job == "options":
        _print(reference())
        return 0
    if parsed.job == "control":
        from .jobs import control

        wait, as_json = parsed.wait, parsed.json
        control.run(parsed.run, parsed.command, wait=wait, as_json=as_json, write=_print)
        return 0
    if parsed.job in ("lora", "quantize"):
        _run_tool(parsed, unknown)
        return 0
    # The progress bar is closed before an error is written, which so has a line of its own.
    with closing(ConsoleReporter()) as console:
        report = json_lines(sys.stdout) if parsed.events == "json" else console
        if parsed.job == "demo":
            from .demo import job

            job.run(parsed.output, report, steps=parsed.steps)
            return 0
        config = load_config(parsed.config_file, given_words(parsed, unknown), os.environ)
        if parsed.print_config:
            _print(to_toml(config))
            return 0
        _run_job(parsed.job, config, report)
    return 0


def _run_tool(parsed: argparse.Namespace, unknown: Sequence[str]) -> None:
    with closing(ConsoleReporter()) as console:
        report = json_lines(sys.stdout) if parsed.events == "json" else console
        if parsed.job == "quantize":
            config = load_config(parsed.config_file, given_words(parsed, unknown), os.environ)
            result = quantize_command.run(parsed, config, report)
        elif parsed.tool == "targets":
            from .jobs import lora_targets

            config = load_config(parsed.config_file, given_words(parsed, unknown), os.environ)
            result = lora_targets.run(config)
        else:
            result = lora_command.run(parsed, report)
    if parsed.events == "json":
        report(Message(result.report))
    else:
        _print(f"{result.report}\n")


def _run_job(job: str, config: Config, report: Reporter) -> None:
    # Only the job that runs is imported, because each brings heavy libraries.
    if job == "cache":
        from .jobs import encode

        encode.run(config, report)
    elif job == "train":
        from .jobs import train

        train.run(config, report)
    elif job == "check":
        from .jobs import checks

        checks.run(config, report)
    else:
        from .jobs import generate

        generate.run(config, report)


def _print(text: str) -> None:
    # Redirected into a file it has to be UTF-8, whatever the console's encoding is.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine", allow_abbrev=False)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="job")
    for job, help_text in _JOBS.items():
        command = jobs.add_parser(
            job,
            help=help_text,
            description=help_text.capitalize() + ".",
            usage=f"{parser.prog} {job} [--config_file FILE] [--setting value ...]",
            allow_abbrev=False,
        )
        command.add_argument(
            "--config_file", type=Path, help="TOML file with settings; .toml may be left out"
        )
        command.add_argument(
            "--print_config", action="store_true", help="print the settings as TOML and exit"
        )
        _add_events(command)
        add_options(command)
    demo = jobs.add_parser(
        "demo",
        help="train on the embedded tiny model and draw before and after",
        allow_abbrev=False,
    )
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for results")
    demo.add_argument("--steps", type=int, default=None, help="optimizer steps of the training")
    _add_events(demo)
    _add_control(jobs.add_parser("control", help="tell a running training what to do"))
    quantize = jobs.add_parser("quantize", help="write a model in 8 bits", allow_abbrev=False)
    quantize_command.add_arguments(quantize)
    _add_events(quantize)
    add_options(quantize)
    lora = jobs.add_parser("lora", help="tools for LoRA files", allow_abbrev=False)
    tools = lora.add_subparsers(dest="tool", required=True, metavar="tool")
    targets = lora_command.add_tool(tools, "targets")
    targets.add_argument("--config_file", type=Path, help="TOML file with settings of a training")
    add_options(targets)
    lora_command.add_tools(tools)
    for tool in tools.choices.values():
        _add_events(tool)
    jobs.add_parser("options", help="print the reference of all settings (docs/options.md)")
    return parser


def _add_control(command: argparse.ArgumentParser) -> None:
    from .jobs.control import WORDS

    words = "; ".join(f"{word}: {meaning}" for word, meaning in WORDS.items())
    command.add_argument(
        "run", type=Path, help="output_dir/output_name, one of the run's files, or its config file"
    )
    command.add_argument("command", choices=WORDS, help=words)
    command.add_argument("--wait", action="store_true", help="return when it is done")
    command.add_argument("--json", action="store_true", help="for status: all of it as JSON")


def _add_events(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--events",
        choices=("console", "json"),
        default="console",
        help="json: one JSON line per event on standard output instead of a progress bar",
    )
    command.add_argument(
        "--stop_with_input",
        action="store_true",
        help="save and stop when standard input ends; for programs that start this one",
    )


def _end(code: int) -> NoReturn:
    """End at once: to take torch down takes up to a second, and a parent waits for our end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
