"""What is read from a command line, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["is_null", "replacing"]


def is_null(value) -> bool:
    """Whether an entry of a config means "none": None, or the words that a command line has for it."""
    return value is None or str(value).strip().lower() in ("", "none", "null", "false")


@contextlib.contextmanager
def replacing(path: str | os.PathLike, shared: bool = False) -> Iterator[Path]:
    """A path beside the file to write to, which then takes the file's place: a kill leaves the old file or the new one,
    never half of one. The folder is made.

    Args:
        path: of the file.
        shared: several processes may write it at the same time. Else what a killed one left is written over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
