"""Values as a command line gives them."""

from __future__ import annotations

from monai.utils import str2bool

__all__ = ["flag", "is_null"]


def flag(value) -> bool:
    """Whether an option is on: a bool, or one of the words that MONAI takes for it (true, yes, 1, ...).

    Raises:
        ValueError: for any other word.
    """
    return str2bool(str(value).strip())


def is_null(value) -> bool:
    """Whether an option is off: None, or one of the words that a command line has for it."""
    return value is None or str(value).strip().lower() in ("", "none", "null", "false")
