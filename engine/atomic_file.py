"""Files that are either whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path`` that takes its place when the block succeeds.

    The content is on disk before the rename, so a power cut leaves the old file or the new one.
    When the block raises, the temporary file is removed and ``path`` is untouched. The folder is
    created when it is missing. The file may be read by whom the user's umask allows, even if a
    library writes it for its owner alone, as safetensors does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two processes that write the same file from sharing a temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` line ends."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
