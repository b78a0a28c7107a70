"""What is read from a command line."""

from __future__ import annotations

__all__ = ["is_null"]


def is_null(value) -> bool:
    """Whether an entry of a config means "none": None, or the words that a command line has for it."""
    return value is None or str(value).strip().lower() in ("", "none", "null", "false")
