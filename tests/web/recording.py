"""What ComfyUI sent to the browser while it ran a workflow: one message a line.

Text that a node shows while it runs travels as bytes; it is written down in words here, other
bytes (previews) in base64. ``LORA_LOOM_RECORD=1 python -m pytest tests/web/test_recording.py``
makes the recordings anew with a real ComfyUI.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Message = dict[str, Any]

FOLDER = Path(__file__).parent / "recordings"
PROMPT_ID = "00000000-0000-4000-8000-000000000000"  # in every recording
_GREETINGS = ("status", "feature_flags")
_PROGRESS_TEXT = 3  # BinaryEventTypes.TEXT in ComfyUI's protocol.py


def read(name: str, folder: Path = FOLDER) -> list[Message]:
    """The messages of a recording, in the order in which they came."""
    lines = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write(name: str, messages: Iterable[Message], folder: Path = FOLDER) -> None:
    """Replace a recording."""
    lines = [json.dumps(message) + "\n" for message in messages]
    (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def neutral(messages: Iterable[Message], base: Path) -> list[Message]:
    """Messages without what is only true of one prompt and of one machine.

    ``base`` is ComfyUI's base directory. What every page gets that opens is left out, too.
    """
    own = [message for message in messages if message["type"] not in _GREETINGS]
    prompt_id = own[0]["data"]["prompt_id"]
    text = json.dumps(own).replace(prompt_id, PROMPT_ID).replace(str(base), "/ComfyUI")
    kept = json.loads(text)
    for message in kept:
        if "traceback" in message["data"]:
            message["data"]["traceback"] = ["  somewhere\n"]
    return kept


def from_wire(payload: str | bytes) -> Message:
    """A message of the websocket."""
    if isinstance(payload, str):
        return json.loads(payload)
    (kind,) = struct.unpack_from(">I", payload)
    if kind != _PROGRESS_TEXT:
        return {"type": "bytes", "data": base64.b64encode(payload).decode()}
    (length,) = struct.unpack_from(">I", payload, 4)
    node, text = payload[8 : 8 + length], payload[8 + length :]
    return {"type": "progress_text", "data": {"node": node.decode(), "text": text.decode()}}


def to_wire(message: Message) -> str | bytes:
    """The opposite of ``from_wire``."""
    data = message["data"]
    if message["type"] == "bytes":
        return base64.b64decode(data)
    if message["type"] == "progress_text":
        node, text = data["node"].encode(), data["text"].encode()
        return struct.pack(">II", _PROGRESS_TEXT, len(node)) + node + text
    return json.dumps(message)


def shapes(messages: Iterable[Message]) -> dict[str, set[str]]:
    """Names and types of what messages carry, by type of message; neither values nor how many."""
    found: dict[str, set[str]] = {}
    for message in messages:
        found.setdefault(message["type"], set()).update(_leaves(message["data"]))
    return found


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{'NODE' if key.isdigit() else key}")
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, f"{path}[]")
    else:
        yield f"{path} {type(value).__name__}"
