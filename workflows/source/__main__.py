"""Writes the workflow files, or makes the recording anew that they are written with."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import record
from .files import all_files

FOLDER = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflows.source", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("write", help="write the workflow files (also without a command)")
    recorder = commands.add_parser("record", help="ask a running ComfyUI for its nodes, then write")
    recorder.add_argument("address", help="such as http://127.0.0.1:8188")
    given = parser.parse_args()
    if given.command == "record":
        record.save(record.fetch(given.address))
    for name, content in all_files(record.load()).items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_bytes(content.encode())


if __name__ == "__main__":
    main()
